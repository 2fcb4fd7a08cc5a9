"""What aliases what: parameters that are the same tensor, or whose elements overlap, told by memory and not by name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch


def overlapping_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """{name: all names whose memory overlaps it, itself among them, in the order of `tensors`}.

    Tied parameters overlap in full, views of a fused weight in part. Parameters that lie side by side in one
    storage, as flat buffers hold them, do not.
    """
    by_storage: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_storage.setdefault(storage_of(tensor), []).append((*_extent(tensor), name))
    order = {name: position for position, name in enumerate(tensors)}
    found: dict[str, list[str]] = {name: [name] for name in tensors}
    for spans in by_storage.values():
        spans.sort()
        for index, (_, end, name) in enumerate(spans):
            for other_start, _, other in spans[index + 1 :]:
                if other_start >= end:
                    break
                found[name].append(other)
                found[other].append(name)
    return {name: sorted(names, key=order.__getitem__) for name, names in found.items()}


def storage_of(tensor: torch.Tensor) -> int:
    """An identity for the tensor's storage that also works on the meta device."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # wrapper subclasses have no storage of their own
        return id(tensor)


def view_of(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same elements of the same storage, in the same order."""
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def is_same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same elements of the same storage."""
    return a is b or view_of(a) == view_of(b)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of the memory that the tensor's elements lie in."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
