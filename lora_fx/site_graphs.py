"""The graph around one site, before injection, injected and folded: rows of text, lined up by the names of nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .applications import Application, read_applications
from .attributes import get_attribute
from .errors import TargetError, closest
from .graph_module import ROLE, checked_graph_module
from .ops.use import operands_of
from .tables import Shown, Table

# Characters of one node, and how much of what a weight is made of.
_LONGEST, _MOST_OPERANDS = 240, 12


@dataclass(frozen=True)
class GraphRow:
    """One node in each of the graphs; empty where it is not there.

    Attributes:
        before, injected, folded: the node as text.
        change: "", "added" (by injection, or by folding where it unties a weight), "changed" (it reads something else),
            or "new values" (a folded weight).
    """

    before: str
    injected: str
    folded: str
    change: str


@dataclass(frozen=True)
class SiteGraphs(Shown):
    """The graph around one site; prints as a table.

    Attributes:
        path: the site's.
        rows: the op, what it reads and what reads it, in the order of the injected graph.
        calls: how many ops apply the weight; the first is shown.
    """

    path: str
    rows: tuple[GraphRow, ...]
    calls: int = 1

    def blocks(self) -> list[str | Table]:
        """A row for each node."""
        rows = [(row.change, row.before, row.injected, row.folded) for row in self.rows]
        shown = f"{self.path or '(root)'}" + (f", the first of {self.calls} calls" if self.calls > 1 else "")
        return [shown, Table(("", "before", "injected", "folded"), rows)]


def site_graphs(
    before: fx.GraphModule, injected: fx.GraphModule, folded: fx.GraphModule | None, paths: Iterable[str]
) -> list[SiteGraphs]:
    """The graphs around some sites, as evaluation runs them.

    Args:
        before: as it was traced.
        injected: with adapters.
        folded: with them folded; None leaves that column empty.
        paths: of the sites; of a part of a packed weight, the whole's is meant too.

    Raises:
        TargetError: if there is no such site.
    """
    graphs = [None if gm is None else checked_graph_module(gm) for gm in (before, injected, folded)]
    found: list[dict[str, list[Application]]] = [{} if gm is None else _applications(gm) for gm in graphs]
    result = []
    for path in paths:
        whole = path if path in found[0] else path.partition("[")[0]
        if whole not in found[0]:
            raise TargetError(f"there is no site {path!r}.{closest(path, found[0])} find_sites(gm) lists them all")
        views = [
            _View.of(gm, each[whole][0] if whole in each else None) for gm, each in zip(graphs, found, strict=True)
        ]
        result.append(SiteGraphs(path, _rows(*views), len(found[0][whole])))
    return result


def _applications(gm: fx.GraphModule) -> dict[str, list[Application]]:
    """{path: its applications in evaluation}."""
    found: dict[str, list[Application]] = {}
    for application in read_applications(gm).applications:
        if application.mode is not True:
            found.setdefault(application.path, []).append(application)
    return found


@dataclass(frozen=True)
class _View:
    """One of the graphs: its nodes in order, those to show, and the tensor that the site applies."""

    nodes: dict[str, fx.Node]
    shown: set[str]
    readers: set[str]
    weight: torch.Tensor | None

    @classmethod
    def of(cls, gm: fx.GraphModule | None, application: Application | None) -> _View:
        if gm is None or application is None:
            return cls({}, set(), set(), None)
        op = application.use.node
        sums = _sums_behind(op)
        shown = {op, *sums, *_inserted(op, sums), *_operands(op, application.use.x)}
        shown |= set((sums[-1] if sums else op).users)
        nodes = {node.name: node for node in application.scope.graph.nodes}
        readers = {n.name for n in shown if n.op == "get_attr" and str(n.target) == application.attribute}
        readers = readers or {op.name}  # which holds it, or gets it as an operand of the sub-graph that it is in
        weight = get_attribute(gm, application.attribute)
        return cls(nodes, {node.name for node in shown}, readers, weight)

    def text(self, name: str) -> str:
        return _spelled(self.nodes[name]) if name in self.nodes else ""


def _operands(op: fx.Node, x: fx.Node) -> set[fx.Node]:
    """What the op reads, and what its weight is made of."""
    found, waiting = {x}, [node for node in operands_of(op) if node is not x]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += operands_of(node) if len(found) < _MOST_OPERANDS else []
    return found


def _sums_behind(op: fx.Node) -> list[fx.Node]:
    """The nodes that add low-rank paths to its result, one after the other."""
    sums: list[fx.Node] = []
    last: fx.Node | None = op
    while last is not None:
        last = next((user for user in last.users if _is_sum(user) and user.args[0] is last), None)
        sums += [] if last is None else [last]
    return sums


def _is_sum(node: fx.Node) -> bool:
    return ROLE in node.meta and bool(node.meta[ROLE].is_sum)


def _inserted(op: fx.Node, sums: Sequence[fx.Node]) -> set[fx.Node]:
    """All that was inserted for these sums, or for the op's weight."""
    found: set[fx.Node] = set()
    waiting = [*sums, *operands_of(op)]
    while waiting:
        node = waiting.pop()
        if ROLE in node.meta and node not in found:
            found.add(node)
            waiting += [each for each in operands_of(node) if not (_is_sum(each) and not each.meta[ROLE].is_on_weight)]
    return found


def _rows(before: _View, injected: _View, folded: _View) -> tuple[GraphRow, ...]:
    shown = before.shown | injected.shown | folded.shown
    names = [name for name in injected.nodes if name in shown]
    for name in (name for name in folded.nodes if name in shown and name not in injected.nodes):
        order = [each for each in folded.nodes if each in names or each == name]
        place = order.index(name)
        names.insert(names.index(order[place - 1]) + 1 if place else 0, name)
    rows = []
    for name in names:
        texts = before.text(name), injected.text(name), folded.text(name)
        rows.append(GraphRow(*texts, _change(name, texts, before, folded)))
    return tuple(rows)


def _change(name: str, texts: tuple[str, str, str], before: _View, folded: _View) -> str:
    if name in folded.readers and not _has_same_values(before.weight, folded.weight):
        return "new values"
    if not texts[0]:
        return "added"
    return "changed" if any(text and text != texts[0] for text in texts) else ""


def _has_same_values(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _spelled(node: fx.Node) -> str:
    """A node as a line of code."""
    given = [*map(repr, node.args), *(f"{name}={value!r}" for name, value in node.kwargs.items())]
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    if node.op == "output":
        return _cut(f"return {', '.join(given)}")
    if node.op == "call_method":
        return _cut(f"{node.name} = {given[0]}.{node.target}({', '.join(given[1:])})")
    name = f"self.{node.target}" if node.op == "call_module" else _named(node.target)
    return _cut(f"{node.name} = {name}({', '.join(given)})")


def _named(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
