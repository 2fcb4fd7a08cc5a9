"""What is trainable in an injected graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from .arena import flatten
from .attributes import get_attribute, get_parameter
from .errors import AdapterError, closest
from .graph_module import checked_graph_module, record_of
from .injection import Adapter
from .sharding import is_sharded, settle
from .stack_parts import StackPart


def lora_parameters(gm: fx.GraphModule, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters to give to the optimizer: A, B, and what modules_to_save and bias train in full.

    Args:
        gm: an injected graph.
        adapter_name: one adapter's only; None for all. Of a graph from `batch_adapters`, one adapter's are parts of the
            stacks, which an optimizer can give a learning rate of their own; their gradient is zero if no row chose it.

    Raises:
        AdapterError: if the graph has no adapter, or none of that name.
    """
    gm = checked_graph_module(gm)
    settle(gm)
    adapters, batched = record_of(gm).adapters, record_of(gm).batched
    if not adapters:
        raise AdapterError("the graph has no adapter; inject one: gm = lora_fx.inject(gm, config)")
    if batched is not None:
        if adapter_name is not None:
            return _parts_of(gm, find_adapter(gm, adapter_name))
        return list({id(p): p for p in (get_parameter(gm, n) for n in (*batched.stacks, *batched.single))}.values())
    chosen = list(adapters.values()) if adapter_name is None else [find_adapter(gm, adapter_name)]
    unique = {id(p): p for adapter in chosen for p in _parameters_of(gm, adapter)}
    return list(unique.values())


def flat_parameters(gm: fx.GraphModule, adapter_name: str | None = None) -> list[nn.Parameter]:
    """What `lora_parameters` gives, with all A and B of an adapter as one vector: an optimizer's step is a few kernels.

    The vector shares the memory of A and B, and its gradient is theirs; it is a parameter of the optimizer only, and
    names, files and graphs know nothing of it. What an adapter trains in full stays as it is, and so does what is
    spread over processes. Values and the states of
    element-wise optimizers (SGD, Adam, AdamW and their like) are those of separate parameters; those that look at a
    tensor as a whole (LAMB, Adafactor, Muon) see another tensor. An optimizer's state_dict() belongs to this form.

    Args:
        gm: an injected graph, on the device and in the dtype that it trains in.
        adapter_name: one adapter's only; None for all.

    Raises:
        AdapterError: if the graph has no adapter, or none of that name. GraphError, when the gradient is asked for: if
            only some of the parameters have one, or if they were moved or exchanged meanwhile.
    """
    if is_sharded(gm):
        return lora_parameters(gm, adapter_name)
    wanted = {id(parameter) for parameter in lora_parameters(gm, adapter_name)}
    named = {id(p): (name, p) for name, p in gm.named_parameters() if id(p) in wanted}
    extra = [p for p in lora_parameters(gm, adapter_name) if id(p) not in named]  # of adapters that do not count
    return flatten(dict(named.values()), gm) + extra


def find_adapter(gm: fx.GraphModule, name: str) -> Adapter:
    """The injected adapter of that name.

    Raises:
        AdapterError: naming those that there are.
    """
    record = record_of(gm)
    adapters = record.adapters
    if isinstance(name, str) and name in adapters:
        return adapters[name]
    if record.folded is not None:
        raise AdapterError("this graph is folded in place, without its adapters; lora_fx.unfold(gm) brings them back")
    have = f"it has {', '.join(map(repr, adapters))}" if adapters else "it has none"
    raise AdapterError(f"the graph has no adapter {name!r}; {have}.{closest(str(name), adapters)} inject adds one")


def trainable_parameters(gm: nn.Module) -> tuple[int, int]:
    """(trainable, all): how many numbers are trained, and how many there are; tied ones count once."""
    parameters = list(gm.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def print_trainable_parameters(gm: nn.Module) -> None:
    """Print one line in PEFT's form: `trainable params: … || all params: … || trainable%: …`."""
    trainable, total = trainable_parameters(gm)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201


def trained_tensor(gm: fx.GraphModule, name: str) -> torch.Tensor:
    """A tensor that an adapter trains in full, whether or not the adapter counts at the moment."""
    tensor: torch.Tensor = record_of(gm).stashed.get(name, get_attribute(gm, name))
    return tensor


def _parts_of(gm: fx.GraphModule, adapter: Adapter) -> list[nn.Parameter]:
    """What an adapter of a batched graph has: parts of the stacks, and parameters that are not stacked."""
    batched = record_of(gm).batched
    if adapter.name not in batched.names:
        raise AdapterError(
            f"adapter {adapter.name!r} was left out when the graph was batched; it has {', '.join(batched.names)}. "
            "batch_adapters(gm) takes all of them"
        )
    own = {name for member in adapter.members for name in member.tensors.values()}
    found: list[nn.Parameter] = []
    for stack, pieces in batched.stacks.items():
        found += [StackPart.of(gm, stack, dim, start, stop) for name, dim, start, stop in pieces if name in own]
    single = {id(p): p for p in (get_parameter(gm, name) for name in batched.single if name in own)}
    return found + list(single.values())


def _parameters_of(gm: fx.GraphModule, adapter: Adapter) -> Iterator[nn.Parameter]:
    for member in adapter.members:
        for attribute in member.tensors.values():
            yield get_parameter(gm, attribute)
    for name in adapter.saved:
        value = trained_tensor(gm, name)
        if isinstance(value, nn.Parameter):
            yield value
