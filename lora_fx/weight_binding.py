"""Weights for a graph that was planned without any: from a checkpoint's files, by name, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .aliasing import view_of
from .attributes import holds_values, set_attribute
from .errors import GraphError, closest
from .fold_work import IN_PLACE, InPlace
from .graph import finish
from .graph_module import LoraGraphModule, checked_graph_module, copy_sharing_tensors, record_of
from .hf_checkpoint import read_checkpoint
from .literals import move_literals
from .stored_tensors import DTYPES, StoredTensor, bytes_of, read_into
from .tables import some_of

_PIECE = 1 << 24  # bytes


def bind_weights(
    gm: fx.GraphModule,
    directory: str | os.PathLike[str],
    *,
    buffers: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> LoraGraphModule:
    """A graph with the values of a checkpoint, for one whose weights have none: traced on the meta device, or as fakes.

    A plan that was made of the graph without values is one for the result:

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        gm = lora_fx.trace(model, kwargs=inputs)
        plan = lora_fx.make_plan(gm, adapters)                       # 70 billion parameters, and no memory
        gm = lora_fx.inject(lora_fx.bind_weights(gm, directory), plan)

    Each parameter takes the tensor of its name, of the same shape and type; tied ones take one tensor, and stay tied.
    Device literals of the graph follow. Example inputs that have no values become ones (integers) and normal numbers.

    Args:
        gm: a graph module without adapters.
        directory: of safetensors shards, as `fold_checkpoint` reads them.
        buffers: {name: value} of what no file holds: buffers that the model computes when it is made, such as
            `rotary_emb.inv_freq`. `dict(small.named_buffers())` of a small model of the class has them.
        device: where to.

    Raises:
        GraphError: if a parameter has no tensor, a tensor no parameter, or shapes or types differ; all of them are
            named. `gm` is as it was, in any case.
    """
    gm = checked_graph_module(gm)
    if record_of(gm).adapters:
        raise GraphError(
            "the graph has adapters, whose first values were never drawn; bind the weights of the graph without them, "
            "and inject the plan then: lora_fx.inject(lora_fx.bind_weights(gm, directory), plan)"
        )
    checkpoint = read_checkpoint(directory, GraphError)
    if InPlace(checkpoint.directory / IN_PLACE, "").known_key() is not None:
        raise GraphError(
            f"{str(directory)!r} is half folded; make the call again that was interrupted, fold_checkpoint"
        )
    target = _checked_device(device)
    groups = list(_groups(gm))
    sources = _sources(groups, checkpoint.tensors, _checked_buffers(buffers), str(directory))
    old = next((tensor.device for _, tensor in groups), target)
    result = copy_sharing_tensors(gm)
    for names, tensor in groups:
        source = sources[names[0]]
        if source is None:
            continue
        value = (_read(source) if isinstance(source, StoredTensor) else source.detach().clone()).to(target)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        for name in names:
            set_attribute(result, name, value, persistent=name in _persistent(gm))
    record = record_of(result)
    if old != target:
        move_literals((graph for graph in _graphs(result)), old, target)
    if record.trace is not None:
        examples = record.trace.args, record.trace.kwargs
        args, kwargs = pytree.tree_map(lambda leaf: _with_values(leaf, target), examples)
        record.trace = replace(record.trace, args=args, kwargs=kwargs, retrace=_has_no_model)
    finish(result)
    return result


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise GraphError(
            f"device={device!r} is none that this machine has: {str(error).strip().splitlines()[0]}. Give one, such as "
            "'cpu' or 'cuda:0'"
        ) from error
    return target


def _checked_buffers(buffers: object) -> dict[str, torch.Tensor]:
    given = {} if buffers is None else buffers
    if not isinstance(given, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in given.items()
    ):
        raise GraphError("buffers must be a mapping of names to tensors, such as dict(model.named_buffers())")
    return dict(given)


def _has_no_model(dtype: torch.dtype, *, casts_buffers: bool = True) -> None:
    """The model that could be traced again has no values."""


def _graphs(gm: LoraGraphModule) -> Iterator[fx.Graph]:
    yield from record_of(gm).views.values()
    yield from (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule) and module is not gm)


def _groups(gm: fx.GraphModule) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """(all names, tensor) of parameters and buffers, each tensor once."""
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    found: dict[Any, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in named:
        found.setdefault(view_of(tensor) if tensor.numel() else name, []).append((name, tensor))
    for members in found.values():
        yield tuple(name for name, _ in members), members[0][1]


def _persistent(gm: fx.GraphModule) -> set[str]:
    return set(gm.state_dict())


def _sources(
    groups: list[tuple[tuple[str, ...], torch.Tensor]],
    stored: Mapping[str, StoredTensor],
    given: dict[str, torch.Tensor],
    where: str,
) -> dict[str, StoredTensor | torch.Tensor | None]:
    """{first name of a tensor: what it takes; None keeps what it has}.

    Raises:
        GraphError: if there is something that does not fit.
    """
    found: dict[str, StoredTensor | torch.Tensor | None] = {}
    missing, wrong, left = list[str](), list[str](), set(stored) | set(given)
    for names, tensor in groups:
        sources: list[StoredTensor | torch.Tensor] = [stored[name] for name in names if name in stored]
        sources += [given[name] for name in names if name in given]
        left -= set(names)
        found[names[0]] = sources[0] if sources else None
        if not sources and not holds_values(tensor):
            missing.append(names[0])
        wrong += [text for source in sources if (text := _misfit(names[0], tensor, source)) is not None]
        if any(not _is_same(sources[0], other) for other in sources[1:]):
            what = "are tied in the graph, and differ" if len(names) > 1 else "differs in the files and in buffers"
            wrong.append(f"{' and '.join(map(repr, names))} {what}")
    problems = []
    if missing:
        near = closest(missing[0], left)
        problems.append(f"No tensor for {some_of(map(repr, missing), 5)} ({len(missing)}).{near}")
        parameters = {names[0] for names, tensor in groups if isinstance(tensor, nn.Parameter)}
        if not parameters.issuperset(missing):
            problems.append("buffers= takes {name: value} of buffers that no file holds.")
    if left:
        near = closest(min(left), [name for names, _ in groups for name in names])
        problems.append(f"No place for {some_of(map(repr, sorted(left)), 5)} ({len(left)}).{near}")
    if problems or wrong:
        text = " ".join([*problems, *(f"{each}." for each in wrong[:5])])
        raise GraphError(f"{where!r} is not of this graph. {text} Give the checkpoint that the model's config is of")
    return found


def _misfit(name: str, tensor: torch.Tensor, source: StoredTensor | torch.Tensor) -> str | None:
    dtype = DTYPES.get(source.kind) if isinstance(source, StoredTensor) else source.dtype
    kind = source.kind if isinstance(source, StoredTensor) else str(source.dtype)
    if tuple(source.shape) == tuple(tensor.shape) and dtype == tensor.dtype:
        return None
    return f"{name!r} is {tensor.dtype} {list(tensor.shape)} here, and {kind} {list(source.shape)} there"


def _is_same(a: StoredTensor | torch.Tensor, b: StoredTensor | torch.Tensor) -> bool:
    values = [_read(each) if isinstance(each, StoredTensor) else each for each in (a, b)]
    return values[0].dtype == values[1].dtype and torch.equal(*values)


def _read(source: StoredTensor) -> torch.Tensor:
    value = torch.empty(source.shape, dtype=source.dtype)
    try:
        with open(source.path, "rb") as file:
            data = bytes_of(value)
            for start in range(0, len(data), _PIECE):
                read_into(file.fileno(), source.start + start, data[start : start + _PIECE])
    except OSError as error:
        raise GraphError(f"{str(source.path)!r} cannot be read: {error.strerror or error}; copy it whole") from error
    return value


def _with_values(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor) or holds_values(leaf):
        return leaf
    shape = tuple(int(size) for size in leaf.shape)
    if not leaf.is_floating_point():
        return torch.ones(shape, dtype=leaf.dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, leaf.dtype)
