"""Which tensors folding writes: one task for each, and the name that each result gets where the weight was tied."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .aliasing import is_same_view, storage_of, view_of
from .applications import Application, Reading, bias_of, read_applications, readers_in
from .attributes import get_attribute, get_parameter, set_attribute
from .errors import FoldError
from .fold_terms import BiasTerm, LowRankTerm, RowsTerm, Term
from .graph import rebind_weight, rename_reads
from .graph_module import LoraGraphModule, record_of
from .injection import Adapter


@dataclass(frozen=True)
class FoldTask:
    """One tensor of the base to fold into: all that the adapters add to it.

    Attributes:
        paths: the sites, all of which read the result.
        terms: the summands; each of them for the same tensor.
        attribute: the name under which the graph reads the tensor.
        aliases: all names of it.
        other_readers: those under which something reads it that is not adapted.
    """

    paths: tuple[str, ...]
    terms: tuple[Term, ...]
    attribute: str
    aliases: tuple[str, ...]
    other_readers: tuple[str, ...]

    @property
    def tensor(self) -> str:
        """The tensor's own name at the first site."""
        return self.terms[0].tensor

    @property
    def twins(self) -> tuple[str, ...]:
        """Other names of a tied weight that keep the base's value; empty where nothing else reads it."""
        if not self.other_readers:
            return ()
        adapted = {self.tensor, *self.paths, *(f"{path}.weight".lstrip(".") for path in self.paths)}
        names = [name for name in self.aliases if name not in adapted]
        return tuple(names or [name for name in self.other_readers if name not in adapted] or [self.tensor])


def fold_tasks(
    gm: LoraGraphModule, reading: Reading, chosen: list[Adapter], weights: dict[str, float]
) -> list[FoldTask]:
    """One task per resulting tensor: sites that share weight and adapters fold together."""
    by_path: dict[str, list[Term]] = {}
    for adapter in chosen:
        for site in adapter.sites.values():
            by_path.setdefault(site.applied, []).append(LowRankTerm(site, weights[adapter.name]))
        for rows in adapter.tokens.values():
            for path in rows.readers:
                by_path.setdefault(path, []).append(RowsTerm(rows, weights[adapter.name]))
    groups: dict[object, list[str]] = {}
    applications: dict[str, list[Application]] = {}
    for application in reading.applications:
        applications.setdefault(application.path, []).append(application)
    for path, terms in by_path.items():
        if path not in applications:
            raise FoldError(
                f"the weight of {path!r} is no parameter any more (pruned or parametrized), so it cannot be folded "
                "into; take that back, as torch.nn.utils.prune.remove does"
            )
        weight = get_parameter(gm, applications[path][-1].attribute)
        # Sites that share A and B hold the same Parameter objects.
        values = tuple((id(get_parameter(gm, term.parts[0])), term.scalings) for term in terms)
        groups.setdefault((view_of(weight), values), []).append(path)
    tasks = [
        _task(gm, reading, paths, by_path[paths[0]], applications[paths[0]][-1].attribute, applications)
        for paths in groups.values()
    ]
    return [*tasks, *_bias_tasks(gm, reading, by_path, applications)]


def _task(
    gm: LoraGraphModule,
    reading: Reading,
    paths: list[str],
    terms: Sequence[Term],
    attribute: str,
    applications: dict[str, list[Application]],
) -> FoldTask:
    weight = get_parameter(gm, attribute)
    names = reading.names[attribute]
    adapted = {node for path in paths for application in applications[path] for node in readers_in(application)}
    readers = [name for name in names if any(node not in adapted for node in reading.users.get(name, ()))]
    aliases = [name for name in names if is_same_view(get_parameter(gm, name), weight)]
    return FoldTask(tuple(paths), tuple(terms), attribute, tuple(aliases), tuple(readers))


def _bias_tasks(
    gm: LoraGraphModule,
    reading: Reading,
    by_path: dict[str, list[Term]],
    applications: dict[str, list[Application]],
) -> Iterator[FoldTask]:
    """With lora_bias, the bias of the base takes that of B."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    for path, terms in by_path.items():
        low_rank = [term for term in terms if isinstance(term, LowRankTerm)]
        with_bias = [term for term in low_rank if term.site.lora_bias is not None]
        if not with_bias:
            continue
        biases = {bias_of(application, parameters) for application in applications[path]}
        bias = biases.pop()
        if bias is None or biases:
            raise FoldError(
                f"{path!r} has a lora_bias, and no bias of its own in the base to fold it into; give the base module "
                "one (of zeros) before tracing, or train without lora_bias"
            )
        found = [BiasTerm(term.site, term.strength, bias) for term in with_bias]
        task = _task(gm, reading, [path], found, bias, applications)
        if task.other_readers:
            raise FoldError(
                f"the bias {bias!r}, into which the lora_bias of {path!r} goes, is also read by something that is not "
                "adapted; leave lora_bias out, or give both a bias of their own before tracing"
            )
        yield task


def check_not_tied(gm: LoraGraphModule, tasks: list[FoldTask]) -> None:
    """Raise FoldError if writing a weight where it lies would change what something else reads."""
    reads = (node for graph in record_of(gm).views.values() for node in graph.nodes if node.op == "get_attr")
    read = {str(node.target): get_attribute(gm, str(node.target)) for node in reads}
    others = [(n, t) for n, t in read.items() if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]
    for task in tasks:
        if task.other_readers:
            raise FoldError(
                f"fold(inplace=True) cannot write {task.tensor!r}: its tensor is also read as "
                f"{', '.join(task.twins)}, which does not get the same delta. fold(gm) unties it in a new graph"
            )
        weight = get_parameter(gm, task.attribute)
        views = [name for name, tensor in others if storage_of(tensor) == storage_of(weight)]
        if views:
            raise FoldError(
                f"fold(inplace=True) cannot write {task.attribute!r}: {', '.join(map(repr, views))} views its memory "
                "and would change too; fold(gm) writes a new tensor"
            )
        if any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
            raise FoldError(f"fold(inplace=True) cannot write {task.attribute!r}: its elements overlap in memory")


def replace_weights(gm: LoraGraphModule, tasks: list[FoldTask], values: list[torch.Tensor]) -> None:
    """Put the folded weights in place of the base's, for the adapted applications only."""
    parameters = [
        nn.Parameter(value, requires_grad=get_parameter(gm, task.attribute).requires_grad)
        for task, value in zip(tasks, values, strict=True)
    ]
    tied: dict[Hashable, list[tuple[FoldTask, nn.Parameter]]] = {}
    for task, parameter in zip(tasks, parameters, strict=True):
        if task.other_readers:
            tied.setdefault(view_of(get_parameter(gm, task.attribute)), []).append((task, parameter))
    if tied:
        reading = read_applications(gm)  # before any name changes
        for group in tied.values():
            _untie(gm, reading, group)
    for task, parameter in zip(tasks, parameters, strict=True):
        if not task.other_readers:
            for name in task.aliases:
                set_attribute(gm, name, parameter)


def _untie(gm: LoraGraphModule, reading: Reading, group: list[tuple[FoldTask, nn.Parameter]]) -> None:
    """Give each task on one tied weight a name of its own, and let whoever else reads the weight keep the base."""
    aliases = group[0][0].aliases
    sites = {path: [a for a in reading.applications if a.path == path] for task, _ in group for path in task.paths}
    adapted = {node for applications in sites.values() for each in applications for node in readers_in(each)}
    others = {name for name in aliases if any(node not in adapted for node in reading.users.get(name, ()))}
    fixed = {  # a module that is not adapted reads its own parameter, whatever we call others
        name for name in others if any(node.op == "call_module" and node not in adapted for node in reading.users[name])
    }
    owns = [list(dict.fromkeys(a.weight for path in task.paths for a in sites[path])) for task, _ in group]
    spare = [name for name in aliases if not any(name in own for own in owns)]
    bound = {each.weight for found in sites.values() for each in found if isinstance(each.use.weight, str)}
    keeper = None
    if others:  # a name that nobody adapted, or else one whose own value then gets another
        keeper = min(aliases, key=lambda name: (name in bound, name not in spare))
    taken = {keeper, *fixed}
    for name in sorted(bound.intersection(taken)):
        raise FoldError(
            f"folding would untie {name!r} from what else reads it in this graph, and its module reads it by that "
            "name; fold a graph of lora_fx.trace(model, args), where ops read weights and modules do not"
        )
    names = [
        {name: _untied_name(gm, task, name, is_taken=name in taken) for name in own}
        for (task, _), own in zip(group, owns, strict=True)
    ]
    for name in (name for each in names for name in each.values()):
        if keeper is not None:
            rename_reads(gm, name, keeper)
    flags = record_of(gm).requires_grad
    for (task, parameter), each in zip(group, names, strict=True):
        for application in (application for path in task.paths for application in sites[path]):
            name = each[application.weight]
            flags[name] = flags.get(application.attribute, parameter.requires_grad)  # for when no adapter is left
            set_attribute(gm, name, parameter)
            rebind_weight(application, name)


def _untied_name(gm: LoraGraphModule, task: FoldTask, own: str, *, is_taken: bool) -> str:
    """The name of an untied weight: its own, unless the base's value has to keep that."""
    if not is_taken:
        return own
    name = f"{own}_folded"
    if get_attribute(gm, name) is not None:
        raise FoldError(f"untying {own!r} needs the name {name!r}, which is taken; rename it in the model")
    still_there = [a.name for a in record_of(gm).adapters.values() if not _places(a).isdisjoint(task.paths)]
    if still_there:  # their site is named after the weight
        raise FoldError(
            f"folding would untie {own!r} under the name {name!r}, where {', '.join(map(repr, still_there))} would "
            "not find it; fold all adapters at once"
        )
    return name


def _places(adapter: Adapter) -> set[str]:
    """The sites whose weights it adds to."""
    readers = (path for rows in adapter.tokens.values() for path in rows.readers)
    return {site.applied for site in adapter.sites.values()}.union(readers)
