"""The pass that gives a flat graph its modules back, to be wrapped one by one: for `fully_shard` and its like.

Before: any graph. After: the same operations in the same order, those of one block in a function that is called through
the block's own module. Everything that reads the graph (fold, save_adapter, a second inject) still reads the flat one:
as with `optimize`, it is a copy that is compiled.

What wraps a module changes its parameters before its forward and after it, so nothing else may read them: a module that
shares a parameter with something outside is no block, and its nodes are its parent's.
"""

from __future__ import annotations

import copy
import itertools
import operator
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from .applications import bodies_of, body_module, module_stack
from .attributes import get_attribute, get_parameter, set_attribute
from .blocks import Block
from .copying import copy_graph
from .direct_calls import call_directly
from .errors import ConfigError, GraphError, TargetError, closest
from .graph_module import (
    ROLE,
    LoraGraphModule,
    Lowering,
    check_editable,
    checked_graph_module,
    copy_sharing_tensors,
    record_of,
)
from .matching import matches_names
from .rewrites.plain_ops import asks

# A value of the flat graph: what a node gives, or the attribute of a name.
Value = fx.Node | str

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"  # torch's word for a node that it made up


@dataclass(frozen=True)
class Blocks:
    """Calls the modules at these paths; what `LoraGraphModule.recompile` compiles is a tree of functions."""

    paths: tuple[str, ...]
    first: Lowering | None = None
    trains_only: ClassVar[bool] = False

    def behind(self, first: Lowering) -> Blocks:
        """A tree of what `first` makes."""
        return Blocks(self.paths, first if self.first is None else self.first.behind(first))

    def on_whole_tensors(self) -> Blocks:
        """The tree of what is left."""
        return Blocks(self.paths, None if self.first is None else self.first.on_whole_tensors())

    def __call__(self, gm: LoraGraphModule, graph: fx.Graph) -> fx.Graph:
        """A graph that calls the blocks; `graph` stays as it is."""
        reasons = entangled(gm, self.paths)
        if self.first is not None and (not self.first.trains_only or _is_trained(gm, graph)):
            graph = self.first(gm, graph)
            _check_apart(gm, graph, [path for path in self.paths if path not in reasons])
        lowered = _Writer(gm, graph, [path for path in self.paths if path not in reasons]).write()
        lowered.owning_module = gm
        lowered.lint()
        if _flow(lowered) != _flow(graph):
            raise GraphError(
                "the tree of blocks does not run what the graph runs; this is a fault of lora_fx, please report it. "
                "Train the graph as it is: it needs no unflatten"
            )
        return lowered


def _is_trained(gm: LoraGraphModule, graph: fx.Graph) -> bool:
    """Whether a graph is for training; others are compiled as they are, as `Rewrites` asks for."""
    return record_of(gm).views.get(False) is not graph and any(ROLE in node.meta for node in graph.nodes)


def _check_apart(gm: LoraGraphModule, graph: fx.Graph, blocks: Sequence[str]) -> None:
    """Whether a rewritten graph has calls of each block's own."""
    for block, why in entangled(gm, blocks, [graph]).items():
        raise GraphError(
            f"a rewrite joined operations of {block!r} with others ({why}), so it can be no block of its own. "
            "Unflatten the graph that was optimised: lora_fx.unflatten(lora_fx.inject(gm, config))"
        )


def unflatten(
    gm: fx.GraphModule, *, blocks: Collection[str] | str = (), dtype: torch.dtype | None = None
) -> LoraGraphModule:
    """The graph as a tree of blocks, each an nn.Module with parameters of its own that is called where it was traced.

    `fully_shard(block)` for each block, then `fully_shard(tree)`, shards the frozen base and the adapters. The tree
    computes what `gm` computes, bit for bit, and so are its gradients; `state_dict()` has the same keys. Its graph is
    still the flat one, and all that takes a graph module takes it: lora_parameters, set_adapters, save_adapter, fold.

    The layers are blocks: modules behind a number, such as `model.layers.0`, the outermost ones. One that shares a
    parameter with something outside stays part of its parent. `.train()` and `.eval()` of the tree exchange its graph;
    of a block alone, they set what it holds as a module (the adapters' dropout), as they do for `gm`.

    A graph of `optimize` keeps its rewrites where they join operations of one layer, as a Llama's. Where they reach
    across it is refused: layers that end in a norm (BERT's), since the next one computes that, and `checkpoint=True`.

    Args:
        gm: a graph module, injected or not; it is untouched, tensors are shared. Let go of it before sharding the tree:
            its parameters hold the whole tensors.
        blocks: names of more modules to be blocks, inside layers or beside them, as in target_modules.
        dtype: what it is going to compute in under `MixedPrecisionPolicy(param_dtype=dtype)`: the graph's own dtypes
            are then those of the model with its parameters in that dtype. Parameters and buffers stay as they are.

    Raises:
        ConfigError: for arguments of another kind.
        TargetError: if one of `blocks` means no module of the graph.
        GraphError: if one of `blocks` shares a parameter with something outside of it, if a rewrite of `optimize`
            reaches across blocks, if `gm` is folded in place, batched or sharded, or if the model that could tell the
            dtypes is gone.
    """
    gm = checked_graph_module(gm)
    check_editable(gm)
    _check_arguments(blocks, dtype)
    first = record_of(gm).lowering
    _check_plain(first)
    result = copy_sharing_tensors(gm)
    paths = _block_paths(result, blocks)
    if dtype is not None:
        views = dict(record_of(result).views)
        result.follow_dtype(dtype, casts_buffers=False)
        record_of(result).wide = views
    for path in paths:
        set_attribute(result, path, _as_block(get_attribute(result, path)))
    record_of(result).lowering = Blocks(tuple(paths), first)
    for graph in record_of(result).views.values():
        if first is not None and _is_trained(result, graph):  # which may not be the one that is shown
            _check_apart(result, first(result, graph), paths)
    result.recompile()
    return result


def _check_plain(lowering: Lowering | None) -> None:
    if isinstance(lowering, Blocks):
        raise GraphError("this graph is a tree of blocks already; unflatten the graph that it was made from")
    if lowering is not None and not lowering.trains_only:
        raise GraphError(
            "this graph is distributed, and its parameters lie where they are; take the other order: "
            "lora_fx.distribute(lora_fx.unflatten(gm), mesh)"
        )


def _check_arguments(blocks: object, dtype: object) -> None:
    names = [blocks] if isinstance(blocks, str) else blocks
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"blocks={blocks!r} must be a list of module names, or a regular expression")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} must be a floating point torch.dtype, such as torch.bfloat16")


def _block_paths(gm: LoraGraphModule, names: Collection[str] | str) -> list[str]:
    """The paths of all blocks, in the order of the graph: layers, and modules of these names."""
    modules = called_modules(gm)
    layers = dict.fromkeys(match[0] for match in map(_LAYER.match, modules) if match is not None)
    asked = [path for path in modules if matches_names(path, names)]
    for name in [names] if isinstance(names, str) else names:
        if not any(matches_names(path, names if isinstance(names, str) else [name]) for path in modules):
            raise TargetError(
                f"blocks names {name!r}, which is no module of the graph that is called and has parts of its own."
                f"{closest(name, modules)} print(gm.graph) and find_sites(gm) show what there is"
            )
    paths = [path for path in modules if path in layers or path in asked]
    reasons = entangled(gm, paths)
    for path in asked:
        if path in reasons:
            raise GraphError(
                f"{path!r} can be no block: {reasons[path]}, and what shards a block changes its parameters while it "
                "does not run. Leave it out of blocks, or name a module that holds both"
            )
    return [path for path in paths if path not in reasons]


def called_modules(gm: fx.GraphModule) -> list[str]:
    """The paths of all modules whose calls the graph has in parts, outer ones first."""
    nodes = [node for graph in record_of(gm).views.values() for node in graph.nodes]
    ran = dict.fromkeys(prefix for node in nodes for prefix in _prefixes(_path_of(node) or ""))
    return [path for path in ran if type(get_attribute(gm, path)) in (nn.Module, Block)]


def _as_block(module: nn.Module) -> Block:
    block = Block()
    block.__dict__.update(module.__dict__)
    return block


def _prefixes(path: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    parts = path.split(".") if path else []
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _innermost(path: str, blocks: Collection[str]) -> str:
    """The block that a path lies in; the root is ''."""
    return next((outer for outer in reversed([*_prefixes(path)]) if outer in blocks), "")


def _path_of(node: fx.Node) -> str | None:
    """The module in whose forward a node was traced; None for nodes that tracing made up."""
    if node.target == "_guards_fn":
        return ""  # torch.export's check of the inputs, which has the place of whatever comes behind it
    stack = module_stack(node)
    own = stack[-1][0] if stack and stack[-1][0] != _NO_STACK else None
    inner = [path for body in bodies_of(node)[0] for n in body_module(body).graph.nodes if (path := _path_of(n))]
    if not inner:
        return own
    common = _common(inner)  # a checkpointed layer is called from outside
    return common if own is None or _is_inside(common, own) else own


def _common(paths: Sequence[str]) -> str:
    """The longest path that all of them lie in."""
    parts = [path.split(".") for path in paths]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in same)


def _places(graph: fx.Graph, blocks: Collection[str]) -> dict[fx.Node, str]:
    """{node: the block that runs it}, of all but inputs, outputs and attributes.

    Nodes that tracing made up go with those before and behind them.
    """
    nodes = [node for node in graph.nodes if node.op.startswith("call_")]
    known = {node: _innermost(path, blocks) for node in nodes if (path := _path_of(node)) is not None}
    places: dict[fx.Node, str] = {}
    behind = dict.fromkeys(nodes, "")
    nearest = ""
    for node in reversed(nodes):
        behind[node] = nearest = known.get(node, nearest)
    before = ""
    for node in nodes:
        places[node] = known[node] if node in known else _innermost(_common([before, behind[node]]), blocks)
        before = places[node]
    return places


def entangled(gm: fx.GraphModule, blocks: Sequence[str], graphs: Collection[fx.Graph] = ()) -> dict[str, str]:
    """{block that shares a parameter with something outside: what it shares with whom}.

    Args:
        graphs: what to look at in place of the traced graphs.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for group in names.values():
        for block in blocks:
            inside = [name for name in group if _is_inside(name, block)]
            if inside and len(inside) < len(group):
                other = next(name for name in group if name not in inside)
                found.setdefault(block, f"its {inside[0]!r} is {other!r}, too")
    for graph in graphs or record_of(gm).views.values():
        places = _places(graph, {block for block in blocks if block not in found})
        for node, place in places.items():
            for name in _parameters_read(node, gm):
                twins = names[id(get_parameter(gm, name))]
                for block in blocks:
                    if any(_is_inside(twin, block) for twin in twins) and not _is_inside(place, block):
                        found.setdefault(block, f"{node.name} reads its {name!r} from outside")
    # Nodes of a block that is none are its parent's, which may entangle blocks inside of it: they read as outside.
    inner = [block for block in blocks if block not in found]
    return found | entangled(gm, inner, graphs) if len(inner) < len(blocks) else found


def _parameters_read(node: fx.Node, gm: fx.GraphModule) -> Iterator[str]:
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and isinstance(get_attribute(gm, str(operand.target)), nn.Parameter):
            yield str(operand.target)
    if node.op == "call_module":
        module = get_attribute(gm, str(node.target))
        yield from (f"{node.target}.{name}" for name, _ in module.named_parameters(remove_duplicate=False))


class _Writer:
    """Writes the graph of the root, and those of the blocks that it calls."""

    def __init__(self, gm: LoraGraphModule, graph: fx.Graph, blocks: Sequence[str]) -> None:
        self._gm, self._graph, self._blocks = gm, graph, frozenset(blocks)
        self._places = _places(graph, blocks)
        self._calls: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def write(self) -> fx.Graph:
        """The root's, with the inputs and outputs of the flat one."""
        part = _Part("", fx.Graph(tracer_cls=self._graph._tracer_cls), keeps_names=True)
        for node in self._graph.nodes:
            if node.op == "placeholder":
                part.values[node] = part.graph.node_copy(node)
        self._fill(part, list(self._places))
        output = self._graph.output_node()
        result = part.graph.output(fx.map_arg(output.args[0], part.operand), output.type)
        result.meta = copy.copy(output.meta)
        part.graph._codegen = copy.copy(self._graph._codegen)
        return part.graph

    def _fill(self, part: _Part, nodes: Sequence[fx.Node]) -> None:
        """Copy the nodes, in their order; runs of those of an inner block become one call of it."""
        for child, group in itertools.groupby(nodes, key=lambda node: self._child(part.block, self._places[node])):
            if child is None:
                for node in group:
                    part.copy(node)
            else:
                self._call(part, child, list(group))

    def _child(self, block: str, place: str) -> str | None:
        """The outermost block inside of `block` that `place` lies in; None if there is none."""
        return next((b for b in _prefixes(place) if b in self._blocks and b != block and _is_inside(b, block)), None)

    def _call(self, part: _Part, block: str, nodes: Sequence[fx.Node]) -> None:
        inside = set(nodes)
        read = dict.fromkeys(value for node in nodes for value in _read(node, self._places[node]))
        outside = [v for v in read if (not _is_inside(v, block) if isinstance(v, str) else v not in inside)]
        inputs = [value for value in outside if not asks(value)]
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        own = _Part(block, fx.Graph())
        for place, value in enumerate(inputs):
            own.values[value] = own.graph.placeholder(f"input_{place}")
        self._fill(own, nodes)
        own.graph.output(tuple(own.values[node] for node in outputs))
        arguments = (part.attribute(block), *(part.value(value) for value in inputs))
        call = part.graph.call_function(self._target(own), arguments)
        for place, node in enumerate(outputs):
            part.values[node] = part.graph.call_function(operator.getitem, (call, place))
            part.values[node].meta = {key: node.meta[key] for key in ("val",) if key in node.meta}

    def _target(self, part: _Part) -> Callable[..., Any]:
        """What to call with the block and its inputs. Layers that are alike share one, which compiles once, too."""
        code = part.graph.python_code("self")
        key = (code.src, *((name, id(value)) for name, value in sorted(code.globals.items())))
        if key not in self._calls:
            compiled = fx.GraphModule(self._gm.get_submodule(part.block), call_directly(copy_graph(part.graph, {})))
            self._calls[key] = _call_of(type(compiled).forward, part.graph)
            part.graph.owning_module = None  # which holds the parameters of now
        return self._calls[key]


class _Part:
    """The graph of one call of a block, while it is written.

    Attributes:
        block, graph: whose, and what there is of it.
        values: {value of the flat graph: the node that has it here}.
        keeps_names: name nodes as the flat graph does. Blocks name them by what they are, so that layers are alike.
    """

    def __init__(self, block: str, graph: fx.Graph, *, keeps_names: bool = False) -> None:
        self.block, self.graph, self.values, self.keeps_names = block, graph, dict[Value, fx.Node](), keeps_names

    def copy(self, node: fx.Node) -> None:
        """Write a node of the flat graph."""
        args, kwargs = fx.map_arg(node.args, self.operand), fx.map_arg(node.kwargs, self.operand)
        name = node.name if self.keeps_names else None
        if node.op != "call_module":
            new = self.graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        elif _is_inside(str(node.target), self.block):
            own = self._own(str(node.target))
            new = self.graph.create_node(node.op, own, args, kwargs, name or _variable(own), node.type)
        else:
            new = self.graph.call_function(operator.call, (self.value(str(node.target)), *args), kwargs)
        new.meta = copy.copy(node.meta)
        self.values[node] = new

    def operand(self, node: fx.Node) -> fx.Node:
        """What has the value of a node of the flat graph."""
        return self.value(str(node.target) if node.op == "get_attr" else node)

    def value(self, value: Value) -> fx.Node:
        """What has a value of the flat graph; attributes of this block are read here, and `asks` is asked here."""
        if value not in self.values and isinstance(value, str):
            self.values[value] = self.attribute(value)
        elif value not in self.values and asks(value):
            self.copy(cast("fx.Node", value))
        return self.values[value]

    def attribute(self, name: str) -> fx.Node:
        """Read an attribute of the block, by its full name."""
        return self.graph.create_node("get_attr", self._own(name), name=_variable(self._own(name)))

    def _own(self, name: str) -> str:
        return name.removeprefix(f"{self.block}.")


def _variable(name: str) -> str:
    """What to call a value that has an attribute's name; BERT has a module called `self`."""
    return "self_" if name == "self" else name.replace(".", "_")


def _read(node: fx.Node, place: str) -> Iterator[Value]:
    """What a node takes: values of other nodes, and attributes; modules of other blocks among them."""
    for operand in node.all_input_nodes:
        yield str(operand.target) if operand.op == "get_attr" else operand
    if node.op == "call_module" and not _is_inside(str(node.target), place):
        yield str(node.target)


def _call_of(function: Callable[..., Any], graph: fx.Graph) -> Callable[..., Any]:
    def call_block(block: nn.Module, *inputs: Any) -> Any:
        return block(function, *inputs)

    call_block.__qualname__ = call_block.__name__
    call_block.__dict__["graph"] = graph
    return call_block


def _flow(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph runs, in order, blocks seen through: operations, and which values they take."""
    calls: list[tuple[Any, ...]] = []
    names = [f"input {node.target}" for node in graph.find_nodes(op="placeholder")]
    result = _follow(graph, "", names, calls)
    return [*calls, ("output", result)]


def _follow(graph: fx.Graph, prefix: str, inputs: Sequence[Any], calls: list[tuple[Any, ...]]) -> Any:
    known: dict[fx.Node, Any] = {}
    remaining = iter(inputs)

    def seen_leaf(leaf: Any) -> Any:
        return _Seen(known[leaf]) if isinstance(leaf, fx.Node) else leaf

    def seen(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, seen_leaf)

    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = next(remaining)
        elif node.op == "get_attr":
            known[node] = f"{prefix}{node.target}"
        elif node.op == "output":
            return seen(node.args[0])
        elif asks(node):
            known[node] = node.target
        elif inner := getattr(node.target, "__dict__", {}).get("graph"):
            path, *taken = (known[argument] for argument in node.args)
            known[node] = [leaf.value for leaf in _follow(inner, f"{path}.", taken, calls)]
        elif node.target is operator.getitem and isinstance(known.get(node.args[0]), list):
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = len(calls)
            calls.append(_operation(node, prefix, seen))
    return None


def _operation(node: fx.Node, prefix: str, seen: Callable[[Any], Any]) -> tuple[Any, ...]:
    """(op, target, args, kwargs), names in full; a module that came in as a value is one that is called."""
    args, kwargs = seen(node.args), seen(node.kwargs)
    if node.target is operator.call:
        return "call_module", args[0].value, args[1:], kwargs
    target = f"{prefix}{node.target}" if node.op == "call_module" else node.target
    return node.op, target, args, kwargs


@dataclass(frozen=True)
class _Seen:
    """A value in an argument: the number of the operation that gives it, or the name of an input or attribute."""

    value: Any
