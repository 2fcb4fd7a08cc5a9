"""Tensor parallelism: the weights of some sites lie in parts on several processes, and their adapters beside them.

A site is split by its outputs ("colwise": W, B and bias along out, A whole) or by its inputs ("rowwise": W and A along
in, B and bias whole). Between a colwise site and the rowwise one behind it values are DTensors, which every op of torch
reads as the whole; everywhere else they are plain tensors, the same in every process. Which is which is written into a
copy of the graph that is only compiled, so all that reads the graph still reads the one that was traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .applications import bodies_of, is_step
from .attributes import check_holds_values, get_attribute, get_parameter, set_attribute
from .copying import copy_graph
from .equivalence import default_tolerance, relative_error
from .errors import ConfigError, GraphError, LoraFxError, TargetError, closest
from .graph import write_conversions
from .graph_module import (
    LoraGraphModule,
    Lowering,
    check_editable,
    checked_graph_module,
    copy_sharing_tensors,
    record_of,
)
from .layouts import Matrix
from .matching import matches_suffix
from .sharding import is_spread
from .sites import Site, find_sites

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Side = Literal["colwise", "rowwise"]

# What attention and MLP blocks call the sites that read the block's input, and those that give its output.
_COLWISE = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"),
    *("self.query", "self.key", "self.value", "intermediate.dense"),  # BERT's
    *("q_lin", "k_lin", "v_lin", "lin1"),
)
_ROWWISE = ("o_proj", "out_proj", "down_proj", "fc2", "output.dense", "out_lin", "lin2")
_SIDES: dict[str, Side] = {**dict.fromkeys(_COLWISE, "colwise"), **dict.fromkeys(_ROWWISE, "rowwise")}


def tensor_parallel_plan(gm: fx.GraphModule, size: int = 1) -> dict[str, Side]:
    """{site: how to split it} for the attention and MLP blocks whose sites have the names that most models give them.

    Args:
        gm: a graph module.
        size: processes to split over; sites that do not divide by it are left whole.

    The plan decides how much is split and what is sent, not what is computed; add to it, or write another.
    """
    return {
        site.path: side
        for site in find_sites(checked_graph_module(gm))
        if (side := _side_of(site.path)) is not None and _why_not(site, side, size) is None
    }


def distribute(
    gm: fx.GraphModule, mesh: DeviceMesh, plan: Mapping[str, Side] | None = None, *, check: bool = True
) -> LoraGraphModule:
    """A graph module that computes what `gm` does, together with the other processes of a mesh.

    Weights of the plan's sites, and their adapters, become DTensors, each process holding a part; other parameters that
    train are DTensors that every process has whole, so that one optimizer takes them all. Inputs are to be the same in
    all processes, and so are outputs; and so has the seed to be, where there is dropout: each process draws the masks
    of the whole, and takes its part. save_adapter and fold gather.

    Args:
        gm: a graph module, injected or not, or a tree of `unflatten`, whose blocks `fully_shard` can then wrap along
            another dimension of the mesh. It is untouched. Parameters are those of the first process.
        mesh: one-dimensional; a two-dimensional one is sliced, as in mesh["tp"].
        plan: {site: "colwise" or "rowwise"}; by default that of `tensor_parallel_plan`.
        check: run the inputs that `trace` remembers through both, in eval mode, and compare.

    Raises:
        ConfigError: if the mesh has several dimensions or no process group, or the plan says something else.
        TargetError: if the plan names no site, or one that cannot be split so, or nothing at all.
        GraphError: if an op of the graph cannot be run on parts, or `gm` is optimised, folded, batched or sharded, or
            holds no weights yet.
    """
    gm = checked_graph_module(gm)
    check_editable(gm)
    if not all(hasattr(mesh, name) for name in ("ndim", "mesh_dim_names", "size")):
        raise ConfigError(
            f"mesh={mesh!r} must be a DeviceMesh, such as torch.distributed.init_device_mesh('cuda', (processes,))"
        )
    if mesh.ndim != 1:
        raise ConfigError(
            f"the mesh has {mesh.ndim} dimensions ({mesh.mesh_dim_names}), and weights are split along one; give a "
            'slice of it, such as mesh["tp"]'
        )
    lowering = record_of(gm).lowering
    if lowering is not None and lowering.trains_only:
        raise GraphError(
            "this graph comes from optimize, whose fused calls take whole weights; distribute the graph that it was "
            "made from"
        )
    plan = tensor_parallel_plan(gm, mesh.size()) if plan is None else _checked_plan(gm, plan, mesh.size())
    if not plan:
        raise TargetError(
            f"there is nothing to split over {mesh.size()} processes: no site has a name that says how, or none "
            "divides by that. Write a plan: {site: 'colwise' or 'rowwise'}; find_sites(gm) lists the sites"
        )
    check_holds_values(gm, "there is nothing to give to other processes")
    result = copy_sharing_tensors(gm)
    _check_group(mesh)
    splits = _splits(result, plan)
    _spread(result, mesh, splits)
    spreading = Spreading(
        mesh,
        frozenset(name for name, split in splits.items() if split.side == "colwise"),
        frozenset(name for name, split in splits.items() if split.side == "rowwise"),
        frozenset(name for name, split in splits.items() if split.side is None),
    )
    record_of(result).lowering = spreading if lowering is None else lowering.behind(spreading)
    result.recompile()
    if check:
        _compare(gm, result)
    return result


def _check_group(mesh: DeviceMesh) -> None:
    """Raise ConfigError if the processes of a mesh cannot talk to each other any more."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise ConfigError(
            f"mesh={mesh!r} has no process group (any more); call torch.distributed.init_process_group() and make the "
            "mesh after that"
        )


@dataclass(frozen=True)
class Split:
    """How one parameter lies: along which dimension, and by its site's outputs or inputs; whole without either."""

    side: Side | None = None
    dimension: int | None = None


@dataclass(frozen=True)
class Spreading:
    """Lets values become DTensors before ops that take one, and whole again behind those that lead out of a site.

    Attributes:
        mesh: whose processes have the parts.
        by_outputs, by_inputs, whole: names of the parameters that are DTensors.
    """

    mesh: Any
    by_outputs: frozenset[str]
    by_inputs: frozenset[str]
    whole: frozenset[str]
    trains_only: ClassVar[bool] = False

    def __call__(self, gm: LoraGraphModule, graph: fx.Graph) -> fx.Graph:
        """A graph that converts; `graph` stays as it is."""
        lowered = copy_graph(graph, {})
        lowered.owning_module = gm
        run, flow = self._nodes(gm, lowered)
        write_conversions(lowered, run, flow, _entering(self.mesh), _leave, _IN_PARTS)
        lowered.lint()
        return lowered

    def behind(self, first: Lowering) -> Lowering:
        """There is one way only of spreading a graph."""
        raise GraphError("this graph is distributed already; distribute the graph that it was made from")

    def on_whole_tensors(self) -> None:
        """Nothing is to be done."""

    def _nodes(self, gm: LoraGraphModule, graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
        """(nodes that run on DTensors, nodes that are DTensors for those behind them).

        What is split by outputs stays so, through all that is computed of it, up to an op whose weight is split by its
        inputs: that gives parts of a sum. Weights themselves stay as they are, turned or not.
        """
        weights: dict[fx.Node, str] = {}
        run: set[fx.Node] = set()
        flow: set[fx.Node] = set()
        for node in graph.nodes:
            operands = node.all_input_nodes
            if node.op == "get_attr" and str(node.target) in self.by_outputs | self.by_inputs | self.whole:
                weights[node] = str(node.target)
            elif len(operands) == 1 and operands[0] in weights and is_step(node):
                weights[node] = weights[operands[0]]
            elif node.op == "call_module" or (node.op == "call_function" and not bodies_of(node)[0]):
                taken = {weights[operand] for operand in operands if operand in weights} | self._of_module(gm, node)
                is_behind = any(operand in flow for operand in operands)
                takes_whole = _draws(gm, node) or any(_is_whole_weight(gm, operand) for operand in operands)
                if is_behind and not taken and takes_whole:
                    continue  # nothing splits what it gives, or each process would draw for its part what all draw
                if taken or is_behind:
                    run.add(node)
                if (is_behind or taken & self.by_outputs) and not taken & self.by_inputs:
                    flow.add(node)
        return run | weights.keys(), flow | weights.keys()

    def _of_module(self, gm: LoraGraphModule, node: fx.Node) -> set[str]:
        """Those that a module brings along."""
        if node.op != "call_module":
            return set()
        names = {f"{node.target}.{name}" for name, _ in get_attribute(gm, str(node.target)).named_parameters()}
        return names & (self.by_outputs | self.by_inputs | self.whole)


def _draws(gm: LoraGraphModule, node: fx.Node) -> bool:
    """Whether a node draws random numbers, other than those that `_IN_PARTS` draws for the whole."""
    if node.op == "call_module":
        return isinstance(get_attribute(gm, str(node.target)), nn.modules.dropout._DropoutNd)
    is_tagged = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target not in _IN_PARTS and (is_tagged or node.target in _RANDOM)


def _is_whole_weight(gm: LoraGraphModule, node: fx.Node) -> bool:
    value = get_attribute(gm, str(node.target)) if node.op == "get_attr" else None
    return isinstance(value, nn.Parameter) and value.ndim > 1


@functools.cache
def _entering(mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    def entered(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or is_spread(value):
            return value
        # Every process computes a part of the gradient.
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False, grad_placements=[Replicate()])

    def enter(value: Any) -> Any:
        return pytree.tree_map(entered, value)

    enter.__qualname__ = enter.__name__
    return enter


def _leave(value: Any) -> Any:
    """What DTensors stand for, as plain tensors that every process has."""
    from torch.distributed.tensor import Replicate

    def left(leaf: Any) -> Any:
        return (
            leaf.redistribute(placements=[Replicate()] * leaf.device_mesh.ndim).to_local() if is_spread(leaf) else leaf
        )

    return pytree.tree_map(left, value)


def _attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *options: Any, **named: Any) -> Any:
    """Attention, each process over the heads that it has; torch has no rule for it on CPUs.

    Where heads do not divide, every process has them all.
    """
    from torch.distributed.tensor import DTensor, Replicate

    attention: Any = F.scaled_dot_product_attention
    given = (query, key, value)
    placements = {each.placements for each in given if is_spread(each)}
    placement = placements.pop() if len(placements) == 1 and all(is_spread(each) for each in given) else ()
    mesh = next(each.device_mesh for each in given if is_spread(each))
    heads = query.ndim - 3
    mask = _leave(attn_mask)
    rate = options[0] if options else named.get("dropout_p", 0.0)  # what is dropped is drawn for all heads at once
    in_parts = (
        placement
        and placement[0].is_shard(heads)
        and all(each.shape[heads] % mesh.size() == 0 for each in given)
        and not rate
    )
    if not in_parts or (mask is not None and mask.ndim > 2 and mask.shape[-3] != 1):
        result = attention(*(_leave(each) for each in given), mask, *options, **named)
        return DTensor.from_local(result, mesh, [Replicate()], run_check=False, grad_placements=[Replicate()])
    local = [each.to_local() for each in given]
    return DTensor.from_local(attention(*local, mask, *options, **named), mesh, placement, run_check=False)


def _drop(value: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Dropout, by the mask that one process would draw: each draws all of it, and takes its part."""
    from torch.distributed.tensor import DTensor, Replicate

    if not training or not p:
        return value
    drawn = F.dropout(torch.ones(value.shape, dtype=value.dtype, device=value.to_local().device), p)
    mask = DTensor.from_local(drawn, value.device_mesh, [Replicate()] * value.device_mesh.ndim, run_check=False)
    mask = mask.redistribute(placements=[Replicate() if each.is_partial() else each for each in value.placements])
    return value.mul_(mask) if inplace else value * mask


_IN_PARTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _attend,
    F.scaled_dot_product_attention: _attend,
    **dict.fromkeys((torch.ops.aten.dropout.default, F.dropout, torch.dropout), _drop),
}
_RANDOM = (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu)


def _side_of(path: str) -> Side | None:
    return next((side for name, side in _SIDES.items() if matches_suffix(path, name)), None)


def _why_not(site: Site, side: Side, size: int) -> str | None:
    """Why a site cannot be split so, or None."""
    if not site.is_linear or not isinstance(site.layout, Matrix):
        return f"it is {site.op}, and linears are split"
    if site.tied_with or site.aliases or site.attention or site.is_on_weight:
        return "its weight is read elsewhere, too"
    features = site.out_features if side == "colwise" else site.in_features
    if features % size:
        return f"its {features} {'outputs' if side == 'colwise' else 'inputs'} do not divide by {size} processes"
    return None


def _checked_plan(gm: fx.GraphModule, plan: object, size: int) -> dict[str, Side]:
    if not isinstance(plan, Mapping) or not all(
        isinstance(path, str) and side in ("colwise", "rowwise") for path, side in plan.items()
    ):
        raise ConfigError(f"plan={plan!r} must be a mapping of site paths to 'colwise' or 'rowwise'")
    sites = {site.path: site for site in find_sites(gm)}
    for path, side in plan.items():
        if path not in sites:
            raise TargetError(
                f"the plan names {path!r}, which is no site.{closest(path, sites)} find_sites(gm) lists all"
            )
        reason = _why_not(sites[path], side, size)
        if reason is not None:
            raise TargetError(f"{path!r} cannot be split {side}: {reason}. Leave it out of the plan")
    return dict(plan)


def _splits(gm: LoraGraphModule, plan: Mapping[str, Side]) -> dict[str, Split]:
    """{parameter: how it is to lie}, of the sites of the plan and of all that trains."""
    found = {name: Split() for name, p in gm.named_parameters(remove_duplicate=False) if p.requires_grad}
    for site in find_sites(gm):
        if (side := plan.get(site.path)) is not None:
            by_outputs = side == "colwise"
            found[site.weight] = Split(side, int(by_outputs == site.fan_in_fan_out))
            if site.bias is not None:  # a module that is called brings its bias along, so it has to be of one kind
                found[site.bias] = Split(side, 0) if by_outputs else Split()
    for adapter in record_of(gm).adapters.values():
        for own in adapter.sites.values():
            if plan.get(own.applied) == "colwise":
                ends = (own.lora_b, own.lora_bias, own.magnitude)
                found |= {name: Split("colwise", 0) for name in ends if name is not None}
            elif plan.get(own.applied) == "rowwise":
                found[own.lora_a] = Split("rowwise", 1)
    return found


def _spread(gm: LoraGraphModule, mesh: DeviceMesh, splits: Mapping[str, Split]) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made: dict[int, nn.Parameter] = {}
    for name, split in splits.items():
        old = get_parameter(gm, name)
        if id(old) not in made:
            placement = Replicate() if split.dimension is None else Shard(split.dimension)
            own = old.detach()
            if split.dimension is None or mesh.size() == 1:
                own = own.clone()  # torch would send into the tensor of `gm`, and train it
            value = distribute_tensor(own, mesh, [placement])
            made[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
        set_attribute(gm, name, made[id(old)])


def _compare(gm: fx.GraphModule, result: LoraGraphModule) -> None:
    """Raise GraphError if the two do not give the same for the remembered inputs."""
    record = record_of(gm)
    if record.trace is None:
        return
    other, shown = copy_sharing_tensors(gm), result.training
    other.recompile()
    flags = {module: module.training for module in result.modules()}
    device = next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))

    def here(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    args, kwargs = pytree.tree_map(here, (record.trace.args, record.trace.kwargs))
    mode = False if False not in record.untraceable else gm.training
    outputs = []
    for each in (other, result):
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            try:
                outputs.append(pytree.tree_leaves(each.train(mode)(*args, **kwargs)))
            except LoraFxError:
                raise
            except Exception as error:
                raise GraphError(
                    f"the graph cannot be run on parts of these weights: {_first_line(error)}. Leave the sites around "
                    "that op out of the plan, or choose a number of processes that the attention heads divide by"
                ) from error
    result.train(shown)
    for module, training in flags.items():
        module.training = training
    for one, two in zip(*outputs, strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            bound = default_tolerance(one.dtype) * (1 + len(find_sites(gm)))
            if not (apart := relative_error(one, two)) <= bound:
                raise GraphError(
                    f"split over processes, the graph gives outputs that differ by {apart:.3g} of their largest value; "
                    f"{bound:.3g} is what rounding may do. Leave sites out of the plan until it is right, and report it"
                )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
