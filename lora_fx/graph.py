"""The only module that edits graphs.

Everything it inserts carries a `Role` in its node's meta, so that it can be found and erased again. A
weight's way into the body of a higher-order op (torch.no_grad, autocast, cond, checkpoint) is one more
operand of the call and one more placeholder of the body.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from .applications import Application, Scope, bodies_of, body_module, is_step, steps_from_read, unsummed
from .attributes import get_attribute
from .dora import gain
from .errors import GraphError
from .graph_module import ROLE, LoraGraphModule, record_of
from .layouts import Part, without_start
from .ops.use import argument, dialect_of, operands_of
from .paths import BatchedPath, LowRankPath, Role, RowsPath
from .rewrites.attention_masks import MaskNodes, attend, look_at
from .rewrites.checkpointing import BlockNodes
from .rewrites.groups import GroupNodes, is_assertion
from .rewrites.isolation import BiasNodes, MagnitudeNodes
from .rewrites.normalization import NormalizationNodes, inverse_rms, normalize
from .rewrites.plain_ops import asks, needs_plain_ops
from .rewrites.rotation import RotationNodes, rotate

_aten = torch.ops.aten


def insert_low_rank_path(application: Application, path: LowRankPath) -> None:
    """Write result + scaling · B(A(dropout(x))) behind the node and give it to the node's users.

    Where lora_fx does not read the op, W + scaling · delta is written before it, and the op takes that. Paths of
    several adapters add up in the order in which they were inserted.
    """
    if application.use.family.is_on_weight:
        _insert_on_weight(application, path)
        return
    use, scope = application.use, application.scope
    graph, dialect = scope.graph, dialect_of(use.node)
    role = Role(path.adapter)
    read = _reads(application, path, role)
    base = _last_sum(use.node)
    behind = base.next
    with graph.inserting_before(behind):
        a, b = _whole_factors(read)
        layout = path.layout
        if isinstance(layout, Part):
            (a, b), layout = write(layout.widened, a, b), layout.whole
        if application.layout != layout:  # the op takes the weight the other way round than its site
            a, b = write(layout.turn, a, b)
            layout = application.layout
        if application.rows is not None:
            b = _own_rows(application, b)
        x = _last_sum(use.x)  # what feeds this op may have got its own path in this very pass
        if path.needs_cast and not use.family.takes_indices:
            x = graph.call_function(dialect.cast_like, (x, a))
        if path.dropout is not None:
            x = _call_dropout(scope, path.dropout, x)
        delta = use.family.emit(use, layout, x, a, b)
        if path.lora_bias is not None:
            added = read["lora_bias"]
            if isinstance(path.layout, Part):
                added = write(lambda bias: path.layout.among_outputs(bias, 0.0), added)
            added = _along_outputs(application, added)
            if use.family.bias_factor(use) != use.factor:  # it counts as the op's own bias does
                added = graph.call_function(dialect.mul, (added, use.family.bias_factor(use) / use.factor))
            delta = graph.call_function(dialect.add, (delta, added))
        if path.magnitude is None:
            delta = graph.call_function(dialect.mul, (delta, path.scaling * path.strength * use.factor))
        else:
            delta = graph.call_function(dialect.mul, (delta, path.scaling * use.factor))
            delta = _with_magnitude(application, path, read, delta)
        # Under autocast, the op gives another type than its parameters have.
        if path.needs_cast or path.magnitude is not None or path.lora_bias is not None:
            delta = graph.call_function(dialect.cast_like, (delta, base))
        total = graph.call_function(dialect.add, (base, delta))
    inserted = _mark_between(base, behind, role, use.node)
    total.meta[ROLE] = Role(path.adapter, is_sum=True)
    base.replace_all_uses_with(total, delete_user_cb=lambda user: user not in inserted)


def insert_batched_path(application: Application, path: BatchedPath) -> None:
    """Write result + B(gate · A(x)), with A and B of all adapters stacked, and the gate of each row.

    Ranks of adapters that a row does not choose are multiplied with 0: one product for all of them, whatever the mix.
    """
    use, scope = application.use, application.scope
    graph, dialect, role = scope.graph, dialect_of(use.node), Role(path.role)
    if path.stacks is None:
        stacks, reads = None, [_reads(application, each, role) for each in path.paths]
    else:
        stacks, reads = [_read(scope, name, use.node, role) for name in path.stacks], []
    base = _last_sum(use.node)
    behind = base.next
    with graph.inserting_before(behind):
        if stacks is None:
            a, b = _stacked(application, path.paths, reads)
        elif application.layout != path.paths[0].layout:
            a, b = write(path.paths[0].layout.turn, *stacks)
        else:
            a, b = stacks
        if application.rows is not None:
            b = _own_rows(application, b)
        x = _last_sum(use.x)
        needs_cast = path.paths[0].needs_cast
        if needs_cast and not use.family.takes_indices:
            x = graph.call_function(dialect.cast_like, (x, a))
        if path.paths[0].dropout is not None:
            x = _call_dropout(scope, path.paths[0].dropout, x)

        def gated(down: fx.Node, rank_axis: int) -> fx.Node:
            return _gated(application, path, down, rank_axis)

        delta = use.family.emit(use, application.layout, x, a, b, gated)
        if use.factor != 1:
            delta = graph.call_function(dialect.mul, (delta, use.factor))
        if needs_cast:
            delta = graph.call_function(dialect.cast_like, (delta, base))
        total = graph.call_function(dialect.add, (base, delta))
    inserted = _mark_between(base, behind, role, use.node)
    total.meta[ROLE] = Role(path.role, is_sum=True)
    base.replace_all_uses_with(total, delete_user_cb=lambda user: user not in inserted)


def _stacked(
    application: Application, paths: Sequence[LowRankPath], reads: list[dict[str, fx.Node]]
) -> tuple[fx.Node, fx.Node]:
    """A and B of all adapters, as the op takes them."""
    factors = []
    for path, read in zip(paths, reads, strict=True):
        (a, b), layout = _whole_factors(read), path.layout
        if isinstance(layout, Part):
            (a, b), layout = write(layout.widened, a, b), layout.whole
        factors.append(write(layout.turn, a, b) if application.layout != layout else (a, b))
    graph = application.scope.graph
    a = graph.call_function(_aten.cat.default, ([a for a, _ in factors], 0))
    return a, graph.call_function(_aten.cat.default, ([b for _, b in factors], 1))


def _gated(application: Application, path: BatchedPath, down: fx.Node, rank_axis: int) -> fx.Node:
    """What A gives, times the gate of the row that it belongs to."""
    graph, use, scope, role = down.graph, application.use, application.scope, Role(path.role)
    sizes = [*use.x.meta["val"].shape, *([None] if use.family.takes_indices else [])]
    sizes[rank_axis] = None
    axis, is_flattened = path.find_batch(sizes)
    shape = [1] * len(sizes)
    shape[axis], shape[rank_axis] = -1, sum(each.ranks for each in path.paths)
    is_turned = axis > len(sizes) + rank_axis
    if is_flattened:
        gate = _gate(scope, path, role, (), is_turned=False)
        rows = graph.call_function(_aten.sym_size.int, (down, axis))
        batch = graph.call_function(_aten.sym_size.int, (gate, 0))
        repeats = graph.call_function(operator.floordiv, (rows, batch))
        gate = graph.call_function(_aten.repeat_interleave.self_int, (gate, repeats, 0))
        gate = graph.call_function(_aten.reshape.default, (gate, shape))
    else:
        gate = _gate(scope, path, role, tuple(shape), is_turned=is_turned)
    dialect = dialect_of(use.node)
    product = graph.call_function(dialect.mul, (down, gate))
    return graph.call_function(dialect.cast_like, (product, down)) if path.is_narrow else product


def _gate(scope: Scope, path: BatchedPath, role: Role, shape: tuple[int, ...], *, is_turned: bool) -> fx.Node:
    """The gates of all rows, (batch, ranks) or in that shape, behind the input that says whose they are."""
    graph = path.ids.graph
    known = path.gates_of.get((graph, path.gates, shape))
    if known is None:
        behind = path.ids.next
        with graph.inserting_before(behind):
            table = graph.get_attr(path.gates)
            known = graph.call_function(_aten.embedding.default, (table, path.ids))  # refuses ids that are none
            if is_turned:
                known = graph.call_function(_aten.t.default, (known,))
            if shape:
                known = graph.call_function(_aten.reshape.default, (known, list(shape)))
        _mark_between(path.ids, behind, role, path.ids)
        path.gates_of[graph, path.gates, shape] = known
    return _bring(scope, known, role)


def _bring(scope: Scope, node: fx.Node, role: Role) -> fx.Node:
    """A node of the root's graph, as an operand of the bodies down to `scope`."""
    if scope.parent is None or scope.call is None:
        return node
    return _pass_in(scope.call, _bring(scope.parent, node, role), scope.graph, role)


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """One more input of a graph, by name, behind all others."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    args, kwargs = pytree.tree_unflatten([0] * info.in_spec.num_leaves, info.in_spec)
    spec = pytree.tree_structure((args, {**kwargs, name: 0}))
    graph.set_codegen(_PyTreeCodeGen(info._replace(orig_args=[*info.orig_args, name], in_spec=spec)))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


def insert_rows(application: Application, path: RowsPath) -> None:
    """Let one application of a table see the trained rows in place of the base's, by what they differ.

    A lookup gets the difference of the rows that it looks up, a product that of the outputs that are these rows.
    """
    use, scope = application.use, application.scope
    graph, role = scope.graph, Role(path.adapter)
    names = {"weight": application.attribute, "rows": path.rows, "index": path.index, "slots": path.slots}
    read = {name: _read(scope, attribute, use.node, role) for name, attribute in names.items()}
    if use.family.is_on_weight:
        base = next(operand for operand in operands_of(use.node) if unsummed(operand) is use.weight)
        before, behind = use.node.prev, use.node
    else:
        base = _last_sum(use.node)
        before, behind = base, base.next
    with graph.inserting_before(behind):
        difference = write(_difference, read["rows"], read["weight"], read["index"])  # (k, dim), in the rows' dtype
        if path.strength != 1:
            difference = graph.call_function(_aten.mul.Tensor, (difference, path.strength))
        if path.needs_cast:
            difference = graph.call_function(_aten.type_as.default, (difference, base))
        if use.family.is_on_weight:
            total = graph.call_function(_aten.index_add.default, (base, 0, read["index"], difference))
        elif use.family.takes_indices:
            delta = write(_looked_up, difference, read["slots"], _last_sum(use.x))
            total = graph.call_function(_aten.add.Tensor, (base, delta))
        else:
            is_product = not application.layout.stored_in_out and use.family.is_linear and application.rows is None
            if not is_product or use.family.out_axis(use) != -1:
                raise GraphError(
                    f"{application.path!r} applies the table of trainable_token_indices as {use.kind}, where lora_fx "
                    "cannot tell its rows; untie it before tracing, or leave trainable_token_indices out"
                )
            x = _last_sum(use.x)
            delta = graph.call_function(_aten.linear.default, (x, difference))  # (..., dim) @ (k, dim)ᵀ -> (..., k)
            if use.factor != 1:
                delta = graph.call_function(_aten.mul.Tensor, (delta, use.factor))
            total = graph.call_function(_aten.index_add.default, (base, -1, read["index"], delta))
    inserted = _mark_between(before, behind, role, use.node)
    total.meta[ROLE] = Role(path.adapter, is_sum=True, is_on_weight=use.family.is_on_weight)
    if use.family.is_on_weight:
        use.node.replace_input_with(base, total)
    else:
        base.replace_all_uses_with(total, delete_user_cb=lambda user: user not in inserted)


def _difference(rows: Any, weight: Any, index: Any) -> Any:
    """By what the trained rows differ from the base's."""
    return _aten.sub.Tensor(rows, _aten.type_as.default(_aten.index_select.default(weight, 0, index), rows))


def _looked_up(difference: Any, slots: Any, ids: Any) -> Any:
    """The difference of each row that is looked up, 0 for those that are not trained: (...) -> (..., dim)."""
    with_zero = _aten.constant_pad_nd.default(difference, [0, 0, 1, 0])
    return _aten.embedding.default(with_zero, _aten.index.Tensor(slots, [ids]))


def _reads(application: Application, path: LowRankPath, role: Role) -> dict[str, fx.Node]:
    """{field of the path: the node that reads its tensor}; DoRA reads the weight and the op's bias too."""
    use, scope = application.use, application.scope
    fields = ("lora_a", "lora_b", "lora_bias", "magnitude", "start_a", "start_b")
    names: dict[str, str | None] = {name: getattr(path, name) for name in fields}
    if path.magnitude is not None:
        bias = None if use.family.is_on_weight else use.family.bias(use)
        names |= {"weight": application.attribute, "bias": bias if isinstance(bias, str) else None}
    return {name: _read(scope, target, use.node, role) for name, target in names.items() if target is not None}


def _whole_factors(read: dict[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
    """A and B, and with them what they started from, which is taken off."""
    if "start_a" not in read:
        return read["lora_a"], read["lora_b"]
    a, b = write(without_start, *(read[name] for name in ("lora_a", "lora_b", "start_a", "start_b")))
    return a, b


def _own_rows(application: Application, values: fx.Node) -> fx.Node:
    """The part of B, or of anything else with the outputs first, that belongs to the slice that the op applies."""
    if application.rows is None:
        return values
    return values.graph.call_function(_aten.slice.Tensor, (values, 0, *application.rows))


def _along_outputs(application: Application, values: fx.Node) -> fx.Node:
    """(out,), of the whole weight, so that it broadcasts along the outputs of the op's result."""
    return _along_axis(application, _own_rows(application, values))


def _along_axis(application: Application, values: fx.Node) -> fx.Node:
    """One value for each output of the op, so that they broadcast along the outputs of its result."""
    axis = application.use.family.out_axis(application.use)
    if axis is None:
        raise GraphError(
            f"{application.path!r}: on which axis of the result of {application.use.node.name} its outputs lie is not "
            "to be seen in the graph, and use_dora and lora_bias need it; leave it out with exclude_modules"
        )
    if axis == -1:
        return values
    return values.graph.call_function(_aten.reshape.default, (values, [-1, *(1 for _ in range(-axis - 1))]))


def _with_magnitude(application: Application, path: LowRankPath, read: dict[str, fx.Node], delta: fx.Node) -> fx.Node:
    """strength · (gain · (own + delta) − own), of the product without bias: exactly 0 while gain is 1 and delta 0."""
    use, graph, dialect = application.use, delta.graph, dialect_of(application.use.node)
    own = use.node
    if path.needs_cast:
        own = graph.call_function(dialect.cast_like, (own, read["lora_a"]))
    bias = read.get("bias") or use.family.bias(use)
    if isinstance(bias, fx.Node):
        if use.family.bias_is_per_output:
            bias = _along_axis(application, bias)
        if (factor := use.family.bias_factor(use)) != 1:
            bias = graph.call_function(dialect.mul, (bias, factor))
        own = graph.call_function(dialect.sub, (own, bias))
    gains = _along_outputs(application, _gains(path, read))
    changed = graph.call_function(dialect.mul, (graph.call_function(dialect.add, (own, delta)), gains))
    delta = graph.call_function(dialect.sub, (changed, own))
    return delta if path.strength == 1 else graph.call_function(dialect.mul, (delta, path.strength))


def _gains(path: LowRankPath, read: dict[str, fx.Node]) -> fx.Node:
    """m / ‖W + ΔW‖, (out,)."""
    a, b = _whole_factors(read)
    weight = read["weight"]
    if path.needs_cast:
        weight = weight.graph.call_function(_aten.type_as.default, (weight, read["lora_a"]))

    def gains(weight: Any, a: Any, b: Any, magnitude: Any) -> Any:
        return gain(path.layout, weight, a, b, magnitude, path.scaling)

    found: fx.Node = write(gains, weight, a, b, read["magnitude"])
    return found


def _insert_on_weight(application: Application, path: LowRankPath) -> None:
    """Feed W + scaling · delta to the op, in the weight's own dtype. Each op that reads the weight has its own sum."""
    use, scope = application.use, application.scope
    role = Role(path.adapter)
    read = _reads(application, path, role)
    weight = next(operand for operand in operands_of(use.node) if unsummed(operand) is use.weight)
    before = use.node.prev
    with scope.graph.inserting_before(use.node):
        delta = write(path.layout.delta, *_whole_factors(read))
        if path.magnitude is None:
            delta = scope.graph.call_function(_aten.mul.Tensor, (delta, path.scaling * path.strength))
        else:
            delta = scope.graph.call_function(_aten.mul.Tensor, (delta, path.scaling))
            delta = _weight_with_magnitude(scope.graph, path, read, delta)
        if path.needs_cast:
            delta = scope.graph.call_function(_aten.type_as.default, (delta, weight))
        total = scope.graph.call_function(_aten.add.Tensor, (weight, delta))
    _mark_between(before, use.node, role, use.node)
    total.meta[ROLE] = Role(path.adapter, is_sum=True, is_on_weight=True)
    use.node.replace_input_with(weight, total)


def _weight_with_magnitude(graph: fx.Graph, path: LowRankPath, read: dict[str, fx.Node], delta: fx.Node) -> fx.Node:
    """strength · (gain · (W + delta) − W)."""
    gains, weight = _gains(path, read), read["weight"]
    if path.needs_cast:
        weight = graph.call_function(_aten.type_as.default, (weight, delta))
    if not path.layout.stored_in_out:
        gains = graph.call_function(_aten.reshape.default, (gains, [-1, *(1 for _ in path.layout.shape[1:])]))
    changed = graph.call_function(_aten.mul.Tensor, (graph.call_function(_aten.add.Tensor, (weight, delta)), gains))
    delta = graph.call_function(_aten.sub.Tensor, (changed, weight))
    return graph.call_function(_aten.mul.Tensor, (delta, path.strength))


def write_groups(
    graph: fx.Graph, groups: Sequence[GroupNodes], target_of: Callable[[GroupNodes, bool], Callable[..., Any]]
) -> None:
    """Put one call in place of each group's nodes; `graph` is a copy that is only compiled, never read again.

    `target_of` is told whether x is read outside, too, and gives what to call: with `is_plain`, the inputs, then what
    each linear takes, then the dropout modules.
    """
    inside = {node for group in groups for node in group.nodes}
    results: list[tuple[fx.Node, fx.Node]] = []
    is_plain = _is_plain(graph) if groups else None
    for group, before in [(group, _place_of(group)) for group in groups]:
        own = group.nodes
        gives_x = bool(group.chain) and any(user not in own for user in group.x.users)
        with graph.inserting_before(before):
            args: list[fx.Node | None] = [is_plain, *(group.inputs if group.chain else [group.x])]
            for linear in group.linears:
                args += [linear.node] if linear.base == "given" else [_here(linear.weight)]
                args += [] if linear.bias is None else [_here(linear.bias)]
                args += [_here(node) for term in linear.terms for node in (term.a, term.b)]
            terms = [term for linear in group.linears for term in linear.terms]
            args += [graph.get_attr(term.dropout) for term in terms if term.dropout is not None]
            call = graph.call_function(target_of(group, gives_x), tuple(args))
            call.meta["nn_module_stack"] = group.x.meta.get("nn_module_stack", {})
            ends = [linear.total for linear in group.linears] + ([group.x] if gives_x else [])
            for place, end in enumerate(ends):
                result = graph.call_function(operator.getitem, (call, place))
                result.meta["val"] = end.meta.get("val")
                results.append((end, result))
    for end, result in results:  # when all calls are there, so that those among them that take it are told
        end.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in sorted(inside, reverse=True):
        graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:  # to read it takes longer than anything else in Python here
            graph.erase_node(node)


def write_magnitudes(graph: fx.Graph, found: Sequence[MagnitudeNodes]) -> None:
    """gain · (own + scaling · Δ) + bias, where own + scaling · Δ is marked as the adapter's sum."""
    written: dict[fx.Node, fx.Node] = {}  # one may read another's result
    for each in found:
        dialect, op = dialect_of(each.op), each.op
        with graph.inserting_before(each.total):
            if each.bare is not None:
                target, operands = each.bare
                op = graph.call_function(target, tuple(written.get(node, node) for node in operands))
                _describe(op, each.op)
            inner = _plain_sum(op, each.scaled, each.total)
            result = graph.call_function(dialect.mul, (inner, each.gains))
            if each.bias is not None:
                result = graph.call_function(dialect.add, (result, each.bias))
            result = graph.call_function(dialect.cast_like, (result, inner))
        _describe(result, each.op)
        written[each.total] = result
        _replace_sum(graph, each.total, result, each.inside)
        if each.bare is not None:
            _replace(graph, each.op, op)


def write_biases(graph: fx.Graph, found: Sequence[BiasNodes]) -> None:
    """(base + scaling · Δ) + scaling · bias, where base + scaling · Δ is marked as the adapter's sum."""
    written: dict[fx.Node, fx.Node] = {}  # one may add to another's result
    for each in found:
        base = written.get(each.base, each.base)
        dialect = dialect_of(base)
        with graph.inserting_before(each.total):
            scaled = graph.call_function(dialect.mul, (each.up, each.scaling))
            scaled.meta[ROLE] = Role(each.total.meta[ROLE].adapter)
            inner = _plain_sum(base, scaled, each.total)
            added = graph.call_function(dialect.mul, (each.bias, each.scaling))
            result = graph.call_function(dialect.add, (inner, added))  # the wider dtype of both, of gradients, too
            result = graph.call_function(dialect.cast_like, (result, inner))
        _describe(result, base)
        written[each.total] = result
        _replace_sum(graph, each.total, result, each.inside)


def _plain_sum(base: fx.Node, scaled: fx.Node, total: fx.Node) -> fx.Node:
    """base + scaled, in the base's dtype, with the mark that `total` has."""
    dialect, role = dialect_of(base), total.meta[ROLE]
    delta = base.graph.call_function(dialect.cast_like, (scaled, base))
    delta.meta[ROLE] = Role(role.adapter)
    inner = base.graph.call_function(dialect.add, (base, delta))
    inner.meta[ROLE] = role
    _describe(inner, base)
    return inner


def _replace_sum(graph: fx.Graph, total: fx.Node, result: fx.Node, inside: Sequence[fx.Node]) -> None:
    _replace(graph, total, result)
    for node in inside:
        graph.erase_node(node)


def write_normalizations(graph: fx.Graph, found: Sequence[NormalizationNodes]) -> None:
    """`inverse_rms` and `normalize` in place of the ops of each."""
    written: dict[fx.Node, fx.Node] = {}  # one may read another's result
    for each in found:
        h = written.get(each.h, each.h)
        with graph.inserting_before(each.result):
            inverse = graph.call_function(inverse_rms, (h, each.eps))
            result = graph.call_function(normalize, (h, inverse, each.eps, _is_plain(graph)))
        _describe(inverse, each.inside[0])
        _describe(result, each.result)
        written[each.result] = result
        _replace(graph, each.result, result)
        for node in each.inside:
            _replace(graph, node, inverse)


def write_rotations(graph: fx.Graph, found: Sequence[RotationNodes]) -> None:
    """`rotate` in place of the ops of each."""
    written: dict[fx.Node, fx.Node] = {}  # one may read another's result
    for each in found:
        operands = [written.get(node, node) for node in (each.x, each.cos, each.sin)]
        with graph.inserting_before(each.result):
            result = graph.call_function(rotate, (*operands, _is_plain(graph)))
        _describe(result, each.result)
        written[each.result] = result
        _replace(graph, each.result, result)
        for node in each.inside:
            _replace(graph, node, result)


def write_blocks(
    graph: fx.Graph, blocks: Sequence[BlockNodes], target_of: Callable[[BlockNodes], Callable[..., Any]]
) -> None:
    """One call in place of each layer, of what it reads; it gives a tuple of what is read behind it."""
    for block in blocks:
        with graph.inserting_before(block.nodes[-1].next):
            # An earlier block may have given what this one reads.
            inputs = list(dict.fromkeys(n for node in block.nodes for n in operands_of(node) if n not in block.nodes))
            target = target_of(replace(block, inputs=tuple(inputs)))
            call = graph.call_function(target, tuple(_here(node) for node in inputs))
            results = [graph.call_function(operator.getitem, (call, place)) for place in range(len(block.outputs))]
        for end, result in zip(block.outputs, results, strict=True):
            result.meta["val"] = end.meta.get("val")
            end.replace_all_uses_with(result, delete_user_cb=_is_outside(block.nodes))
        for node in reversed(block.nodes):
            graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)


def write_conversions(
    graph: fx.Graph,
    run: Collection[fx.Node],
    flow: Collection[fx.Node],
    enter: Callable[..., Any],
    leave: Callable[..., Any],
    targets: Mapping[Any, Callable[..., Any]],
) -> None:
    """Let nodes in `run` take values of another kind, and give what they give as it was, but for those in `flow`.

    `enter` makes a value one of that kind, and `leave` makes it what it was; values in `flow` are of that kind for the
    nodes in `run` behind them. What only asserts something about values of that kind is left out, and `targets` are
    called in place of ops that cannot take them.
    """
    entered: dict[fx.Node, fx.Node] = {}
    left: dict[fx.Node, fx.Node] = {}

    def converted(operand: fx.Node, known: dict[fx.Node, fx.Node], function: Callable[..., Any]) -> fx.Node:
        if operand not in known:
            known[operand] = graph.call_function(function, (operand,))
            known[operand].meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
        return known[operand]

    for node in list(graph.nodes):
        if is_assertion(node) and any(operand in run for operand in node.all_input_nodes):
            graph.erase_node(node)
            continue
        if node in run:
            node.target = targets.get(node.target, node.target)
        with graph.inserting_before(node):
            for operand in node.all_input_nodes:
                is_tensor = isinstance(operand.meta.get("val", torch.Tensor()), (torch.Tensor, tuple, list))
                if node in run and operand not in flow and is_tensor:
                    node.replace_input_with(operand, converted(operand, entered, enter))
                elif node not in run and operand in flow:
                    node.replace_input_with(operand, converted(operand, left, leave))
        if node in run and node not in flow:
            with graph.inserting_after(node):
                whole = converted(node, left, leave)
            node.replace_all_uses_with(whole, delete_user_cb=_is_outside({whole}))


def _is_outside(nodes: Collection[fx.Node]) -> Callable[[fx.Node], bool]:
    return lambda node: node not in nodes


def _describe(new: fx.Node, old: fx.Node) -> None:
    """A value in another's place is like it, and made in the same module."""
    new.meta |= {key: old.meta[key] for key in ("val", "nn_module_stack") if key in old.meta}


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Give the old node's readers the new one; what only asserts something about the old one goes with it."""
    for user in list(old.users):
        if is_assertion(user):
            graph.erase_node(user)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def write_masks(graph: fx.Graph, found: Sequence[MaskNodes]) -> None:
    """Look at each mask once, and give attention ops what was seen."""
    for each in found:
        is_plain = _is_plain(graph)
        with graph.inserting_before(_behind(each.mask)):
            verdict = graph.call_function(look_at, (each.mask, is_plain))
        for user in each.users:
            names = ("query", "key", "value", "", "dropout_p", "is_causal", "scale", "enable_gqa")
            given = dict(zip(names, user.args, strict=False)) | dict(user.kwargs)
            first = tuple(given.pop(name) for name in names[:3])
            options = {name: value for name, value in given.items() if name not in ("", "attn_mask", "is_causal")}
            with graph.inserting_before(user):
                result = graph.call_function(attend, (verdict, *first, is_plain), options)
            _describe(result, user)
            _replace(graph, user, result)


def _place_of(group: GroupNodes) -> fx.Node:
    """Before which node to write the call: as soon as x is there, or, if not all else can be read there, at the end."""
    if any(not linear.is_movable for linear in group.linears):  # then it is the only one
        return group.linears[0].total
    return _behind(group.x)


def _behind(node: fx.Node) -> fx.Node:
    """The first place where a value can be read, behind what a graph begins with."""
    place = node.next
    while place.op == "placeholder" or place.target == "_guards_fn" or asks(place):
        place = place.next
    return place


def _is_plain(graph: fx.Graph) -> fx.Node:
    """The node at the start of the graph that asks whether it is to run plain operations; the first use writes it."""
    known = graph.find_nodes(op="call_function", target=needs_plain_ops)
    if known:
        node: fx.Node = known[0]
        return node
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return graph.call_function(needs_plain_ops)


def _here(node: fx.Node | None) -> fx.Node:
    """A parameter, read at the insertion point; others are there already."""
    assert node is not None
    return node.graph.get_attr(str(node.target)) if node.op == "get_attr" else node


def write(function: Callable[..., Any], *nodes: fx.Node) -> Any:
    """The nodes of a function of tensors, at the insertion point of the graph that its operands are in."""
    tracer = fx.proxy.GraphAppendingTracer(nodes[0].graph)
    result = function(*(fx.Proxy(node, tracer) for node in nodes))
    return tuple(proxy.node for proxy in result) if isinstance(result, tuple) else result.node


def _mark_between(first: fx.Node, end: fx.Node, role: Role, of: fx.Node) -> set[fx.Node]:
    """Give all nodes between the two the role; they belong to the module of `of`."""
    inserted = set()
    node = first.next
    while node is not end:
        node.meta |= {ROLE: role, "nn_module_stack": of.meta.get("nn_module_stack", {})}
        inserted.add(node)
        node = node.next
    return inserted


def erase_low_rank_paths(gm: LoraGraphModule, adapters: Collection[str]) -> None:
    """Take the paths of `adapters` out of every view; what is left is as if they had never been there.

    Call `finish` behind it.
    """
    for graph in record_of(gm).views.values():
        for scope_graph in _graphs(graph):
            _erase(scope_graph, adapters)
        _erase_operands(graph, adapters)


def rebind_weight(application: Application, attribute: str) -> None:
    """Let one application read its weight from `attribute`; other users of the old one keep it."""
    use, scope = application.use, application.scope
    if isinstance(use.weight, str):
        return  # a module reads its own parameter
    steps = steps_from_read(use.weight, scope)
    source = _read(scope, attribute, use.node, None)
    with scope.graph.inserting_before(use.node):
        for step in steps:  # each takes the one before it as its first argument
            copied = scope.graph.node_copy(step, lambda node: node)
            copied.args = (source, *step.args[1:])
            source = copied
    old = use.weight
    use.node.replace_input_with(old, source)
    _drop_unused(old)


def rename_reads(gm: LoraGraphModule, attribute: str, new: str) -> None:
    """Let every view read `new` where it reads `attribute`."""
    for graph in record_of(gm).views.values():
        for node in graph.find_nodes(op="get_attr", target=attribute):
            node.target = new


def finish(gm: LoraGraphModule) -> None:
    """Check every view, and have the shown one compiled; call it when the edits of one pass are done."""
    for graph in record_of(gm).views.values():
        graph.owning_module = gm
        graph.lint()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule) and module is not gm:
            module.graph.lint()
            module.recompile()
    gm.recompile_later()


def write_float_linears(gm: LoraGraphModule, floats: dict[str, nn.Module]) -> None:
    """Write y = x @ Wᵀ + b for each call of the modules at these paths, and put what holds W and b in their place."""
    for path, holder in floats.items():
        for graph in record_of(gm).views.values():
            for node in [node for node in graph.nodes if node.op == "call_module" and node.target == path]:
                with graph.inserting_before(node):
                    names = [name for name in ("weight", "bias") if getattr(holder, name) is not None]
                    operands = [graph.get_attr(f"{path}.{name}") for name in names]
                    linear = graph.call_function(_aten.linear.default, (argument(node, 0, "input"), *operands))
                linear.meta = dict(node.meta)
                node.replace_all_uses_with(linear)
                graph.erase_node(node)
        gm.set_submodule(path, holder)


def _read(scope: Scope, attribute: str, before: fx.Node, role: Role | None) -> fx.Node:
    """A node of `scope` that holds an attribute of the root module."""
    if scope.parent is None or scope.call is None:
        with scope.graph.inserting_before(before):
            node = scope.graph.create_node("get_attr", attribute)  # it is there: `lint` says so in the end
        return _marked(node, role)
    outer = _read(scope.parent, attribute, scope.call, role)
    return _pass_in(scope.call, outer, scope.graph, role)


def _pass_in(call: fx.Node, operand: fx.Node, graph: fx.Graph, role: Role | None) -> fx.Node:
    """Make `operand` one more operand of a higher-order call; the placeholder for it in `graph`."""
    bodies, _, _ = bodies_of(call)
    if isinstance(call.args[-1], (list, tuple)):  # cond
        call.args = (*call.args[:-1], (*call.args[-1], operand))
    else:
        call.args = (*call.args, operand)
    result: fx.Node | None = None
    for body in bodies:
        module = body_module(body)
        last = [node for node in module.graph.nodes if node.op == "placeholder"][-1:]
        with module.graph.inserting_after(last[0]) if last else module.graph.inserting_before():
            placeholder = _marked(module.graph.placeholder(operand.name), role)
        if module.graph is graph:
            result = placeholder
    assert result is not None
    return result


def _marked(node: fx.Node, role: Role | None) -> fx.Node:
    if role is not None:
        node.meta[ROLE] = role
    return node


def _last_sum(node: fx.Node) -> fx.Node:
    """The sum of the node's result and all paths inserted so far."""
    for user in node.users:
        role = user.meta.get(ROLE)
        if isinstance(role, Role) and role.is_sum and not role.is_on_weight and user.args[0] is node:
            return _last_sum(user)
    return node


def _call_dropout(scope: Scope, dropout: str, x: fx.Node) -> fx.Node:
    """A call of the dropout module; a body calls its own attribute of it, since modules are no operands."""
    if scope.parent is None:
        return scope.graph.call_module(dropout, (x,))
    module = get_attribute(scope.root.module, dropout)
    name = dropout.replace(".", "_")
    scope.module.add_module(name, module)
    return scope.graph.call_module(name, (x,))


def _graphs(graph: fx.Graph) -> Iterator[fx.Graph]:
    yield graph
    for node in graph.nodes:
        for body in bodies_of(node)[0]:
            yield from _graphs(body_module(body).graph)


def _erase(graph: fx.Graph, adapters: Collection[str]) -> None:
    for node in reversed(graph.nodes):
        if not _belongs(node, adapters):
            continue
        if node.meta[ROLE].is_sum:
            node.replace_all_uses_with(node.args[0])
        if node.op == "placeholder" or node.users:
            continue  # operands go with their calls
        if node.op == "call_module" and "." not in str(node.target) and graph.owning_module is not None:
            graph.owning_module.delete_submodule(str(node.target))  # a body's own reference to the dropout
        graph.erase_node(node)


def _erase_operands(graph: fx.Graph, adapters: Collection[str]) -> None:
    """Innermost first: an operand can go when nothing in the bodies reads its placeholder."""
    for call in list(graph.nodes):
        bodies, operands, _ = bodies_of(call)
        modules = [body_module(body) for body in bodies]
        for module in modules:
            _erase_operands(module.graph, adapters)
        for index in reversed(range(len(operands))):
            if not _belongs(operands[index], adapters):
                continue
            for module in modules:
                placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
                module.graph.erase_node(placeholders[index])
            _remove_operand(call, operands[index])
            if not operands[index].users and operands[index].op == "get_attr":
                graph.erase_node(operands[index])


def _belongs(node: fx.Node, adapters: Collection[str]) -> bool:
    role = node.meta.get(ROLE)
    return isinstance(role, Role) and role.adapter in adapters


def _remove_operand(call: fx.Node, operand: fx.Node) -> None:
    if isinstance(call.args[-1], (list, tuple)):
        call.args = (*call.args[:-1], tuple(arg for arg in call.args[-1] if arg is not operand))
    else:
        call.args = tuple(arg for arg in call.args if arg is not operand)


def _drop_unused(node: fx.Node) -> None:
    """Erase a weight's transposes that lost their last user; the read itself stays, as exported graphs keep it."""
    while not node.users and is_step(node):
        source = node.args[0]
        node.graph.erase_node(node)
        assert isinstance(source, fx.Node)
        node = source


__all__ = [
    "add_input",
    "erase_low_rank_paths",
    "finish",
    "insert_batched_path",
    "insert_low_rank_path",
    "insert_rows",
    "rebind_weight",
    "rename_reads",
    "write_blocks",
    "write_conversions",
    "write_groups",
    "write_masks",
    "write_normalizations",
]
