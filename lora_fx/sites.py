"""Sites: the places of a graph where a parameter can be adapted, as plain values that print as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from .applications import Application, Reading, read_applications
from .attributes import get_attribute, get_parameter
from .graph_module import checked_graph_module
from .heads import is_output_head
from .layouts import Layout, Matrix
from .matching import shortest_suffix
from .packed import packed_parts, part_names
from .tables import Shown, Table


@dataclass(frozen=True)
class Site:
    """One weight at one place of the model, whatever the spelling and the number of its nodes.

    Attributes:
        path: the name that target_modules is matched with: the module's, or the parameter's own full
            name where it is no module's `weight`.
        op: "linear", "matmul", "addmm", "mm", "mv", "einsum", "embedding", "conv2d", "grouped_mm", or the name of
            any other op that takes the parameter, such as "lstm".
        weight: full name of the parameter.
        layout: how A and B make its delta.
        bias: full name of the module's bias, or None.
        dtype: the weight's.
        layer_index: the first number in the path, or None.
        calls: how many nodes apply it.
        is_linear: whether "all-linear" may mean it.
        is_on_weight: the op is none that lora_fx reads: the delta is built, and added to the weight it takes.
        tied_with: other names of the same tensor, and names of tensors that overlap it.
        aliases: other paths at which the same module stands.
        attention: the nn.MultiheadAttention that the weight is a projection of, whose name means all its projections.
        parts: (start, stop) of the projections that are packed in it, as the graph takes its outputs apart.
        part: what of the site this is, such as "[q]"; the end of the path then. Empty for all of it.
        is_output_head: its result is an output of the model, at most reshaped, scaled or normalised.
        gets_gradient: False if it runs under torch.no_grad only.
    """

    path: str
    op: str
    weight: str
    layout: Layout
    bias: str | None
    dtype: torch.dtype
    layer_index: int | None
    calls: int
    is_linear: bool = True
    is_on_weight: bool = False
    tied_with: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    attention: str | None = None
    parts: tuple[tuple[int, int], ...] = ()
    part: str = ""
    is_output_head: bool = False
    gets_gradient: bool = True

    @property
    def in_features(self) -> int:
        """Size of what the op takes: features, channels, or the size of a vocabulary."""
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        """Size of what the op gives."""
        return self.layout.out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """The weight is stored (in, out) rather than (out, in)."""
        return self.layout.stored_in_out

    @property
    def is_lookup(self) -> bool:
        """It is an embedding's table: A and B have names and first values of their own."""
        return self.op == "embedding"

    @property
    def takes_dropout(self) -> bool:
        """There is an input whose elements can be dropped: neither an index nor a weight."""
        return not (self.is_lookup or self.is_on_weight)

    @property
    def size(self) -> str:
        """`in → out`, with the number of experts before it."""
        experts = f"{self.layout.count} × " if self.layout.count > 1 else ""
        return f"{experts}{self.in_features} → {self.out_features}"

    @property
    def whole_path(self) -> str:
        """The path of the site that this one is, or is a part of."""
        return self.path.removesuffix(self.part)

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which target_modules may mean this site."""
        return (self.path, *self.aliases, *(() if self.attention is None else (self.attention,)))


class Sites(Shown, tuple[Site, ...]):
    """A tuple of sites that prints as a table."""

    def blocks(self) -> tuple[Table]:
        """A row for each site."""
        rows = [
            (
                site.path or "(root)",
                site.op,
                site.size,
                str(site.dtype).removeprefix("torch."),
                "" if site.layer_index is None else str(site.layer_index),
                _remarks(site),
            )
            for site in self
        ]
        return (Table(("site", "op", "in → out", "dtype", "layer", "remarks"), rows),)

    __repr__ = Shown.__str__


def find_sites(gm: fx.GraphModule) -> tuple[Site, ...]:
    """Every place of `gm` where a parameter can be adapted, in the order of the graph.

    Args:
        gm: from `lora_fx.trace`, `torch.fx.symbolic_trace`, or `torch.export.export(...).module()`.

    Raises:
        GraphError: if `gm` is no graph module, or was decomposed.
    """
    return sites_of(checked_graph_module(gm), read_applications(checked_graph_module(gm)))


def find_all_linear_names(gm: fx.GraphModule) -> list[str]:
    """The names to put into `target_modules` to adapt every linear except the output head.

    Each is the shortest dotted suffix that does not also mean the head.
    """
    sites = [site for site in find_sites(gm) if site.is_linear]
    heads = [name for site in sites if site.is_output_head for name in site.names]
    return sorted({shortest_suffix(site.path, heads) for site in sites if not site.is_output_head})


def sites_of(gm: fx.GraphModule, reading: Reading) -> Sites:
    """`find_sites` on a graph that was read already."""
    by_path: dict[str, list[Application]] = {}
    weights: dict[str, dict[str, None]] = {}  # parameter → the names of weights that are applied from it
    for application in reading.applications:
        by_path.setdefault(application.path, []).append(application)
        weights.setdefault(application.attribute, {})[application.weight] = None
    paths: dict[str, list[str]] = {}
    for alias, path in reading.aliases.items():
        paths.setdefault(path, []).append(alias)
    sites = []
    for path, found in by_path.items():
        overlapping = reading.names[found[0].attribute]
        tied = {*overlapping, *(weight for name in overlapping for weight in weights.get(name, ()))}
        tied -= {found[0].weight}
        # The other names of one shared module are aliases of the site, not further tensors.
        aliases = paths.get(path, [])
        tied -= {f"{alias}.weight" for alias in aliases}
        bias = f"{path}.bias".lstrip(".")
        sites.append(_site(gm, found, bias if bias in reading.names else None, tied, aliases))
    return Sites(sites)


def _site(
    gm: fx.GraphModule,
    found: list[Application],
    bias: str | None,
    tied: Iterable[str],
    aliases: Iterable[str],
) -> Site:
    main = next((a for a in found if not a.use.family.is_on_weight), found[0])
    parameter = get_parameter(gm, main.attribute)
    attention = _attention_of(gm, main.weight)
    return Site(
        path=main.path,
        op=main.use.kind,
        weight=main.weight,
        layout=main.layout,
        bias=bias,
        dtype=main.use.family.dtype(main.use, parameter),
        layer_index=next((int(part) for part in main.path.split(".") if part.isdigit()), None),
        calls=max(Counter((application.mode, application.rows) for application in found).values()),
        tied_with=tuple(sorted(tied)),
        aliases=tuple(sorted(aliases)),
        attention=attention,
        parts=_parts(main, [a.rows for a in found if a.rows is not None], attention),
        is_linear=main.use.family.is_linear,
        is_on_weight=main.use.family.is_on_weight,
        is_output_head=any(
            is_output_head(a.use.node) for a in found if a.scope.parent is None and a.use.family.is_linear
        ),
        gets_gradient=any(a.scope.grad for a in found),
    )


def _attention_of(gm: fx.GraphModule, weight: str) -> str | None:
    """The path of the nn.MultiheadAttention with that input or output projection, known by its parameters."""
    own = next((n for n in (*_INPUTS, "in_proj_weight", "out_proj.weight") if f".{weight}".endswith(f".{n}")), None)
    if own is None:
        return None
    path = weight.removesuffix(own)

    def has(*names: str) -> bool:
        return all(isinstance(get_attribute(gm, f"{path}{name}"), nn.Parameter) for name in names)

    return path.removesuffix(".") if has("out_proj.weight") and (has("in_proj_weight") or has(*_INPUTS)) else None


# What nn.MultiheadAttention has in place of in_proj_weight where keys or values are of another width.
_INPUTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _parts(main: Application, rows: list[tuple[int, int]], attention: str | None) -> tuple[tuple[int, int], ...]:
    layout = main.layout
    if not isinstance(layout, Matrix) or main.use.family.is_on_weight:
        return ()
    if attention is not None and main.weight.endswith("in_proj_weight"):
        size = layout.out_features // 3
        return (0, size), (size, 2 * size), (2 * size, 3 * size)
    return packed_parts(main.use, layout.out_features, rows)


def _remarks(site: Site) -> str:
    remarks = []
    if site.fan_in_fan_out and site.is_linear:
        remarks.append("stored (in, out)")
    if site.is_on_weight:
        remarks.append("adapted on the weight")
    if site.calls > 1:
        remarks.append(f"called {site.calls} times")
    if site.tied_with:
        remarks.append(f"tied with {', '.join(site.tied_with)}")
    if site.parts:
        named = part_names(len(site.parts))
        remarks.append(f"packs {', '.join(named)}" if named else f"packs {len(site.parts)} parts")
    if site.aliases:
        remarks.append(f"also named {', '.join(site.aliases)}")
    if site.is_output_head:
        remarks.append("output head")
    if not site.gets_gradient:
        remarks.append("under no_grad")
    return "; ".join(remarks)
