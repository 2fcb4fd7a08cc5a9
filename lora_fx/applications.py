"""Where in a graph parameters are applied: the one reading of graphs that sites and injection share.

Dialects of fx graph end here. Scopes see through higher-order ops (torch.no_grad, autocast, cond and
checkpoint regions are sub-graphs that take the weight as an operand), chains of transposes are undone,
and parameters are known by storage, so that every name of a tied weight means the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from .aliasing import is_same_view, overlapping_names
from .attributes import get_attribute
from .errors import GraphError
from .graph_module import ROLE, record_of
from .layouts import Layout
from .ops import ON_WEIGHT, Use, uses_of
from .ops.use import argument, operands_of, writer_of
from .quantized import unpack
from .slices import is_pieces, is_slice, slice_dimension, slice_of

_aten = torch.ops.aten

# Ops that give the same weight, transposed or as it is.
_TRANSPOSES = {_aten.t.default, _aten.numpy_T.default, _aten.mT.default, torch.t, "t"}
_SWAPS = {_aten.transpose.int, torch.transpose, "transpose", torch.swapaxes, "swapaxes"}
_PERMUTES = {_aten.permute.default, torch.permute, "permute"}
_COPIES = {
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.alias.default,
    _aten.contiguous.default,
    _aten.clone.default,
    "contiguous",
    "clone",
}

# Higher-order ops whose operands follow their body one by one; cond and checkpoint are handled beside.
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint"}

# run_decompositions leaves these behind; torch.export and symbolic_trace never write them.
_DECOMPOSED = {
    _aten._softmax.default,
    _aten._log_softmax.default,
    _aten.native_layer_norm.default,
    _aten.native_group_norm.default,
    _aten.native_dropout.default,
    _aten._to_copy.default,
    _aten.convolution.default,
    _aten._native_batch_norm_legit.default,
    _aten._native_batch_norm_legit_no_training.default,
}
_PRODUCTS = {_aten.addmm.default, _aten.mm.default}  # and linears go into these
_LINEAR_CLASS = "torch.nn.modules.linear.Linear"
_EMBEDDING_CLASS = "torch.nn.modules.sparse.Embedding"


@dataclass(frozen=True, eq=False)
class Scope:
    """A graph, and for the body of a higher-order op the call that it belongs to.

    Attributes:
        graph: the nodes.
        module: the graph module that owns the graph's attributes.
        call: the higher-order node in the parent's graph; None at the root.
        parent: the scope of that node.
        operands: what the call passes to each placeholder of this graph, in order.
        grad: False under torch.no_grad.
        reason: why nothing can be inserted here, for ops whose operands we cannot extend.
    """

    graph: fx.Graph
    module: fx.GraphModule
    call: fx.Node | None = None
    parent: Scope | None = None
    operands: tuple[fx.Node, ...] = ()
    grad: bool = True
    reason: str | None = None

    @property
    def root(self) -> Scope:
        """The scope of the module's own graph."""
        return self if self.parent is None else self.parent.root


@dataclass(frozen=True)
class Application:
    """One node that applies a parameter.

    Attributes:
        scope, use: where, and how the op reads it.
        path: the dotted name that target_modules is matched with.
        weight: the parameter's own name at that path.
        attribute: the name under which the graph reads it; differs from `weight` for tied weights.
        mode: the view it is in.
        layout: how A and B make the parameter's delta as this op reads it.
        rows: which of its outputs this op applies, where the weight is sliced on the way; None for all.
    """

    scope: Scope
    use: Use
    path: str
    weight: str
    attribute: str
    mode: bool | None
    layout: Layout
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Refusal:
    """A node that applies something that cannot be adapted, and why; `is_linear`, whether "all-linear" means it."""

    path: str
    reason: str
    is_linear: bool = True


@dataclass
class Reading:
    """All applications in all views of a graph module, and what else uses the same storages.

    Attributes:
        applications: in graph order, the views one after the other.
        refusals: linear nodes that cannot be adapted.
        names: parameter name → all names whose memory overlaps it, its own among them.
        users: parameter name → nodes that read it, dead reads left out.
        aliases: other module paths of a shared module → the path that stands for all.
    """

    applications: list[Application] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    users: dict[str, list[fx.Node]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def by_path(self) -> dict[str, list[Application]]:
        """The applications of each site, in all views."""
        found: dict[str, list[Application]] = {}
        for application in self.applications:
            found.setdefault(application.path, []).append(application)
        return found


def read_applications(gm: fx.GraphModule) -> Reading:
    """Every place of `gm` where a parameter of two dimensions or more is applied, in every view.

    Raises:
        GraphError: if the graph was decomposed, so that its linears are no longer there.
    """
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    reading = Reading(names=overlapping_names(parameters), aliases=_module_aliases(gm, parameters))
    for mode, graph in record_of(gm).views.items():
        _check_not_decomposed(graph)
        start = len(reading.applications)
        found = [
            (node, scope, _read_node(node, scope, mode, parameters, reading))
            for node, scope in _nodes(Scope(graph, gm))
        ]
        claimed = {step for _, scope, uses in found if uses for use in uses for step in _steps_of(use, scope)}
        for node, scope, uses in found:
            if uses == [] and node not in claimed:
                _read_weights(node, scope, mode, parameters, reading)
        order = {node: position for position, (node, _, _) in enumerate(found)}
        reading.applications[start:] = sorted(reading.applications[start:], key=lambda a: order[a.use.node])
    return reading


def _module_aliases(gm: fx.GraphModule, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """{path: first path} of modules that stand in the model under several names.

    `trace` knows them from the model. In a graph that the user exported, two modules are taken for one
    if weight and bias are both the same; sharing a weight alone is tying, not sharing the module.
    """
    record = record_of(gm).trace
    if record is not None:
        return dict(record.module_aliases)
    first: dict[tuple[int, int], str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in parameters.items():
        path, _, last = name.rpartition(".")
        bias = parameters.get(f"{path}.bias")
        if last == "weight" and bias is not None:
            found = first.setdefault((id(parameter), id(bias)), path)
            if found != path:
                aliases[path] = found
    return aliases


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """[(module path, class name)] of the calls that the node was traced in, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [
        # strict export calls the model itself `_export_root` inside the bodies of higher-order ops
        (f"{path}.".removeprefix("_export_root.").removesuffix("."), cls if isinstance(cls, str) else _class_name(cls))
        for path, cls in stack
    ]


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def bodies_of(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node], str | None]:
    """(body get_attr nodes, operands, why operands cannot be added) of a higher-order node; empty for others."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return [], [], None
    name = _name_of(node.target)
    bodies = [arg for arg in node.args if isinstance(arg, fx.Node) and _is_body(arg)]
    if name == "cond":
        return bodies, list(argument(node, 3, "operands") or ()), None
    if name in _REGIONS:
        start = node.args.index(bodies[-1]) + 1 if bodies else 0
        return bodies, [arg for arg in node.args[start:] if isinstance(arg, fx.Node)], None
    return bodies, [], f"it runs inside the higher-order op {name!r}, to which no operand can be added"


def body_module(body: fx.Node) -> fx.GraphModule:
    """The sub-graph that a body's get_attr node reads."""
    owner = body.graph.owning_module
    module = None if owner is None else get_attribute(owner, str(body.target))
    if not isinstance(module, fx.GraphModule):
        raise GraphError(f"the sub-graph {body.target!r} of a higher-order op is not in the graph module")
    return module


def _name_of(op: torch._ops.HigherOrderOperator) -> str:
    return str(op.name())  # type: ignore[no-untyped-call]


def _is_body(arg: fx.Node) -> bool:
    if arg.op != "get_attr":
        return False
    owner = arg.graph.owning_module
    return owner is not None and isinstance(get_attribute(owner, str(arg.target)), fx.GraphModule)


def _nodes(scope: Scope) -> Iterator[tuple[fx.Node, Scope]]:
    """All nodes in the order in which they run, those of sub-graphs at the place of their call."""
    for node in scope.graph.nodes:
        yield node, scope
        bodies, operands, reason = bodies_of(node)
        for body in bodies:
            module = body_module(body)
            in_no_grad = node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and node.args[0] is False
            shared = "its sub-graph is called from two places" if len(body.users) > 1 else None
            yield from _nodes(
                Scope(
                    graph=module.graph,
                    module=module,
                    call=node,
                    parent=scope,
                    operands=tuple(operands),
                    grad=scope.grad and not in_no_grad,
                    reason=reason or scope.reason or shared,
                )
            )


def _read_node(
    node: fx.Node, scope: Scope, mode: bool | None, parameters: dict[str, nn.Parameter], reading: Reading
) -> list[Use] | None:
    """The uses that say what the node is, applied or refused; none for other ops; None for an adapter's nodes."""
    if ROLE in node.meta:
        return None  # an adapter's own nodes are no sites
    _note_users(node, scope, parameters, reading)
    if node.op not in ("call_function", "call_method", "call_module"):
        return []
    refusal: tuple[Refusal, Use] | None = None
    for use in uses_of(node, scope.module):
        found = _application(use, scope, mode, parameters, reading)
        if isinstance(found, Application):
            reading.applications.append(found)
            return [use]
        refusal = refusal or (None if found is None else (found, use))
    if refusal is None:
        return []
    reading.refusals.append(refusal[0])
    return [refusal[1]]


def _steps_of(use: Use, scope: Scope) -> list[fx.Node]:
    """The nodes that stand between a weight's read and its use: no uses of their own."""
    return [] if isinstance(use.weight, str) else steps_from_read(use.weight, scope)


def steps_from_read(node: fx.Node, scope: Scope) -> list[fx.Node]:
    """The transposes, copies and slices between a parameter's read at the root and `node`, first to last."""
    steps = steps_to(node)
    first = steps[0].args[0] if steps else node
    assert isinstance(first, fx.Node)
    if first.op != "placeholder" or scope.parent is None:
        return steps
    placeholders = [n for n in scope.graph.nodes if n.op == "placeholder"]
    index = placeholders.index(first)
    if index >= len(scope.operands):
        return steps
    return [*steps_from_read(scope.operands[index], scope.parent), *steps]


# This says what a cast was traced with.
_ONLY_CHECKS = {_aten._assert_tensor_metadata.default}

# These look at a weight's shape or type, and apply nothing; what becomes of a detached weight is a matter of its own.
_ONLY_LOOKS = {
    *_ONLY_CHECKS,
    _aten.sym_size.int,
    _aten.sym_numel.default,
    _aten.sym_stride.int,
    _aten.detach.default,
}


def _read_weights(
    node: fx.Node, scope: Scope, mode: bool | None, parameters: dict[str, nn.Parameter], reading: Reading
) -> None:
    """The parameters that an op of no family takes: each can be adapted by what the op is fed."""
    if node.op not in ("call_function", "call_method") or node.target in _ONLY_LOOKS or not node.users:
        return
    weights = dict.fromkeys(unsummed(operand) for operand in node.all_input_nodes)
    reads = [weight for weight in weights if _is_read(weight, scope, parameters)]
    if not reads or bodies_of(node)[0]:
        return
    for weight in reads:
        found = _application(ON_WEIGHT.use(node, weight), scope, mode, parameters, reading)
        if isinstance(found, Application):
            reading.applications.append(found)
        elif found is not None:
            reading.refusals.append(found)


def _is_read(operand: fx.Node, scope: Scope, parameters: dict[str, nn.Parameter]) -> bool:
    """Whether an operand may be a parameter as it is. (What reorders one is itself the op that takes it.)"""
    if operand.op == "placeholder":
        return scope.parent is not None
    return operand.op == "get_attr" and str(operand.target) in parameters


def unsummed(operand: fx.Node) -> fx.Node:
    """The weight that an operand is, without the deltas that adapters add to it for this op."""
    while ROLE in operand.meta and operand.meta[ROLE].is_on_weight:
        source = operand.args[0]
        assert isinstance(source, fx.Node)
        operand = source
    return operand


def _note_users(node: fx.Node, scope: Scope, parameters: dict[str, nn.Parameter], reading: Reading) -> None:
    if node.op == "get_attr" and str(node.target) in parameters and scope.parent is None:
        reading.users.setdefault(str(node.target), []).extend(_final_users(node))
    elif node.op == "call_module":
        for name, _ in scope.module.get_submodule(str(node.target)).named_parameters(remove_duplicate=False):
            reading.users.setdefault(f"{node.target}.{name}", []).append(node)


def readers_in(application: Application) -> set[fx.Node]:
    """The nodes that an application stands for among the users of its parameter, as a `Reading` lists them."""
    node = application.use.node
    return {node, *_final_users(node)} if is_step(node) else {node}


def _final_users(node: fx.Node) -> Iterator[fx.Node]:
    """The users of a weight, looking through transposes and into the bodies that it is an operand of."""
    for user in node.users:
        bodies, operands, reason = bodies_of(user)
        if reason is None and bodies:
            if node not in operands:
                yield user
            for body in bodies:
                placeholders = [n for n in body_module(body).graph.nodes if n.op == "placeholder"]
                for index, operand in enumerate(operands):
                    if operand is node:
                        yield from _final_users(placeholders[index])
        elif is_step(user) or unsummed(user) is not user:
            yield from _final_users(user)
        elif ROLE not in user.meta and user.target not in _ONLY_CHECKS:
            yield user


def _application(
    use: Use, scope: Scope, mode: bool | None, parameters: dict[str, nn.Parameter], reading: Reading
) -> Application | Refusal | None:
    """The application that a use is; a refusal if it is one that cannot be adapted; None if it is neither."""
    refused = partial(Refusal, is_linear=use.family.is_linear)
    origin = _origin(use.weight, scope, parameters)
    stack = module_stack(use.node)
    path = stack[-1][0] if stack else ""
    if use.node.op == "call_module":
        path = str(use.node.target)
        if reason := _module_reason(scope.module.get_submodule(path)):
            return refused(path, reason)
    if isinstance(origin, str):
        return refused(path, origin) if use.is_certain else None
    attribute, stored_in_out = origin.name, use.takes_in_out != origin.flipped
    parameter = parameters[attribute]
    weight = _own_name(attribute, stack, use, parameters, reading)
    layout = use.family.layout(use, tuple(parameter.shape), stored_in_out)
    if isinstance(layout, str):
        return refused(_path_of(weight), layout) if use.is_certain else None
    rows = origin.sliced(1 if stored_in_out else 0)
    if isinstance(rows, str):
        return refused(_path_of(weight), rows) if use.is_certain else None
    if not (parameter.is_floating_point() or use.family.is_quantized):
        return refused(_path_of(weight), f"{attribute} is {parameter.dtype}, which LoRA cannot be added to")
    if reason := scope.reason or _reason_not_plain(use, scope, parameters, reading.names[attribute]):
        return refused(_path_of(weight), reason)
    return Application(scope, use, _path_of(weight), weight, attribute, mode, layout, rows)


def bias_of(application: Application, parameters: dict[str, nn.Parameter]) -> str | None:
    """The parameter that the op adds to its product, if it is one."""
    use = application.use
    bias = None if use.family.is_on_weight else use.family.bias(use)
    origin = None if bias is None else _origin(bias, application.scope, parameters)
    return origin.name if isinstance(origin, _Origin) and origin.sliced(0) == application.rows else None


def _reason_not_plain(use: Use, scope: Scope, parameters: dict[str, nn.Parameter], names: list[str]) -> str | None:
    """Why W + ΔW in this one operand would not be W + ΔW in the model, or None."""
    if use.node.op == "call_module":
        return None
    origins = [_origin(unsummed(arg), scope, parameters) for arg in operands_of(use.node)]
    if sum(isinstance(o, _Origin) and o.name in names for o in origins) > 1:
        return f"{use.node.name} reads its weight in two of its operands"
    if isinstance(use.weight, fx.Node) and (writer := _writer(use.weight, scope)) is not None:
        return f"its weight is written into in the graph (by {writer.name})"
    return None


def _writer(weight: fx.Node, scope: Scope) -> fx.Node | None:
    """The node that changes a weight, a copy of it on the way to its use, or a view of these, in place."""
    for node in [*steps_to(weight), _read_of(weight)]:
        if (writer := writer_of(node)) is not None:
            return writer
    read = _read_of(weight)
    if read.op != "placeholder" or scope.parent is None:
        return None
    placeholders = [n for n in scope.graph.nodes if n.op == "placeholder"]
    return _writer(scope.operands[placeholders.index(read)], scope.parent)


def _read_of(weight: fx.Node) -> fx.Node:
    """The read of a parameter behind its transposes and copies."""
    while (source := _source_of(weight)) is not None:
        weight = source
    return weight


def _module_reason(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which symbolic_trace hides; lora_fx.trace sees through it"
    if "weight" not in module._parameters:
        return "its weight is computed (parametrised, weight-normed or pruned), not a parameter"
    if module._forward_hooks or any(hook is not unpack for hook in module._forward_pre_hooks.values()):
        return "it has forward hooks, which symbolic_trace hides in the module; lora_fx.trace puts them into the graph"
    return None


@dataclass(frozen=True)
class _Origin:
    """A parameter, and what was done to it on the way.

    Attributes:
        name: the parameter's.
        flipped: whether it is transposed.
        slices: by dimension of the parameter, the part that is left of it.
        shape: of the parameter.
    """

    name: str
    flipped: bool
    slices: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]

    def sliced(self, outputs: int) -> tuple[int, int] | str | None:
        """The part of dimension `outputs`; None for all of it, or why that is not all that is sliced."""
        parts = [part for dim, part in enumerate(self.slices) if part != (0, self.shape[dim])]
        if not parts:
            return None
        if len(parts) > 1 or self.slices[outputs] != parts[0]:
            return "its weight is sliced along its inputs in the graph, and A is not"
        return parts[0]


def _origin(weight: fx.Node | str, scope: Scope, parameters: dict[str, nn.Parameter]) -> _Origin | str:
    """The parameter that a weight operand is, through transposes, slices and out of sub-graphs; or why it is none."""
    steps = list[fx.Node]()
    while isinstance(weight, fx.Node):
        if weight.op == "placeholder" and scope.parent is not None:
            placeholders = [n for n in scope.graph.nodes if n.op == "placeholder"]
            if placeholders.index(weight) >= len(scope.operands):
                return "its weight is an operand of a sub-graph that cannot be followed"
            weight, scope = scope.operands[placeholders.index(weight)], scope.parent
        elif weight.op == "get_attr":
            weight = str(weight.target)
        elif (source := _source_of(weight)) is not None:
            steps.insert(0, weight)
            weight = source
        else:
            return f"its weight is computed in the graph (by {weight.name}), not a parameter"
    if weight not in parameters:
        return f"its weight {weight!r} is a buffer or constant, not a parameter"
    return _traced_steps(weight, tuple(parameters[weight].shape), steps)


def _traced_steps(name: str, shape: tuple[int, ...], steps: list[fx.Node]) -> _Origin | str:
    """What the steps from a parameter to its use leave of it."""
    flipped, left = False, [(0, size) for size in shape]
    for node in steps:
        step = _undone(node)
        if step is not None:
            if step[1] and len(shape) != 2 and not _swaps_last_two(node, len(shape)):
                return f"its weight is reordered in the graph (by {node.name})"
            flipped ^= step[1]
            continue
        if is_pieces(node):
            continue  # which piece is said by the getitem behind it
        if len(shape) > 2:
            return f"its weight is sliced in the graph (by {node.name})"
        dim = slice_dimension(node) % len(shape)
        dim = 1 - dim if flipped else dim
        start, stop = left[dim]
        part = slice_of(node, stop - start)
        if part is None:
            return f"its weight is sliced in the graph, by sizes that are no plain numbers (by {node.name})"
        left[dim] = start + part[0], start + part[1]
    return _Origin(name, flipped, tuple(left), shape)


def _source_of(node: fx.Node) -> fx.Node | None:
    """What the node transposes, copies or slices; None for any other node."""
    step = _undone(node)
    if step is not None:
        return step[0]
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    return source if source is not None and (is_slice(node) or is_pieces(node)) else None


def _undone(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """(what the node transposes or copies, whether it transposes), or None for any other node."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or node.op not in ("call_function", "call_method"):
        return None
    rest = node.args[1:]
    if node.target in _TRANSPOSES:
        return source, True
    if node.target is getattr and rest and rest[0] in ("T", "mT"):
        return source, True
    if node.target in _SWAPS and sorted(_dimensions(rest)) == [0, 1]:
        return source, True
    if node.target in _PERMUTES:
        dims = _dimensions(rest)
        if len(dims) == 2:
            return source, dims == [1, 0]
    if node.target in _COPIES:
        return source, False
    return None


def _swaps_last_two(node: fx.Node, ndim: int) -> bool:
    """Whether a transpose turns each matrix of a stack of them."""
    rest = [dim % ndim for dim in node.args[1:] if isinstance(dim, int)]
    return node.target is _aten.mT.default or (node.target in _SWAPS and sorted(rest) == [ndim - 2, ndim - 1])


def _dimensions(args: tuple[Any, ...]) -> list[int]:
    """Dimensions of a matrix, given one by one or as a list, counted from the front."""
    dims = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    return [dim % 2 for dim in dims if isinstance(dim, int)]


def is_step(node: fx.Node) -> bool:
    """Whether the node only transposes, copies or slices its argument."""
    return _source_of(node) is not None


def steps_to(node: fx.Node) -> list[fx.Node]:
    """The transposes, copies and slices between a weight's read and `node`, first to last."""
    steps: list[fx.Node] = []
    while (source := _source_of(node)) is not None:
        steps.insert(0, node)
        node = source
    return steps


def _own_name(
    attribute: str,
    stack: list[tuple[str, str]],
    use: Use,
    parameters: dict[str, nn.Parameter],
    reading: Reading,
) -> str:
    """The parameter's name at the module that applies it: the tracers route tied weights by any of their names."""
    if use.node.op == "call_module" or not stack:
        return attribute
    path, cls = reading.aliases.get(stack[-1][0], stack[-1][0]), stack[-1][1]
    aliases = [n for n in reading.names[attribute] if is_same_view(parameters[n], parameters[attribute])]
    own = [n for n in aliases if n.rpartition(".")[0] == path]
    if own:
        return attribute if attribute in own else own[0]
    lost = f"{path}.weight"
    # strict export drops the second name of a tied weight
    if cls in (_LINEAR_CLASS, _EMBEDDING_CLASS) and path and lost not in parameters:
        return lost
    return attribute


def _path_of(weight: str) -> str:
    owner, _, name = weight.rpartition(".")
    return owner if name == "weight" else weight


def _check_not_decomposed(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        is_product = node.target in _PRODUCTS
        in_linear = is_product and bool(stack := module_stack(node)) and stack[-1][1] == _LINEAR_CLASS
        if in_linear or node.target in _DECOMPOSED:
            raise GraphError(
                f"this graph was decomposed: it holds {node.target}, and its linears are spread over several "
                "nodes. Use the graph before run_decompositions(): "
                "torch.export.export(model, args).module(), or lora_fx.trace(model, args)"
            )
