"""Parameters that are spread over processes: what `fully_shard` and DTensor leave in a module, and how it is read.

Reading a spread tensor takes all processes that have a part of it (a collective call); writing a file takes one. None
of this imports torch.distributed: where nobody has, nothing is spread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import GraphError, LoraFxError

MARK = "_is_fsdp_managed_module"  # what `fully_shard` sets on each module whose parameters it takes


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """The module's class; `fully_shard` puts one of its own before that."""
    kind = type(module)
    if not _is_a(module, "torch.distributed.fsdp", "FSDPModule"):
        return kind
    return kind.__mro__[kind._orig_cls_mro_index]  # type: ignore[attr-defined]


def is_spread(tensor: object) -> bool:
    """Whether a tensor lies in parts on several processes, or claims to."""
    return _is_a(tensor, "torch.distributed.tensor", "DTensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of the module are spread over processes, or would be but for this moment of a step."""
    settle(module)
    one_of_each_kind = {type(parameter): parameter for parameter in module.parameters()}
    return any(map(is_spread, one_of_each_kind.values()))


def settle(module: nn.Module) -> None:
    """Let parameters be the spread ones that are trained, not copies that FSDP2 gathered for a forward pass."""
    for part in module.modules():
        if type(part) is not nn.Module and _is_a(part, "torch.distributed.fsdp", "FSDPModule"):
            part.reshard()  # type: ignore[operator]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a spread one, gathered: all processes have to call this, and each gets it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def check_not_sharded(module: nn.Module, doing: str) -> None:
    """Raise GraphError if parameters are spread over processes; `doing` is what cannot be done with them."""
    if is_sharded(module):
        name = next(name for name, parameter in module.named_parameters() if is_spread(parameter))
        raise GraphError(
            f"{name!r} is spread over processes, by fully_shard or as a DTensor, and {doing}. Do that before it is "
            "spread, and spread the result"
        )


def on_first_process(module: nn.Module, work: Callable[[], None]) -> None:
    """Call `work` where the module is whole; where it is spread, in one process of those that have a part of it.

    The others wait. Those that `work` fails in, all fail in.

    Raises:
        LoraFxError: of the kind that `work` raised, in every process.
    """
    spread: list[Any] = [parameter for parameter in module.parameters() if is_spread(parameter)]
    if not spread:
        work()
        return
    mesh = max((parameter.device_mesh for parameter in spread), key=lambda mesh: int(mesh.size()))
    outcome: list[Any] = [None]
    try:
        if not any(mesh.get_coordinate()):
            work()
    except LoraFxError as error:
        outcome = [error]
    except BaseException as error:
        outcome = [LoraFxError(f"the process that writes failed with {error!r}; mend that there, and call again")]
        _tell(mesh, outcome)
        raise
    _tell(mesh, outcome)
    if outcome[0] is not None:
        raise outcome[0]


def _tell(mesh: Any, outcome: list[Any]) -> None:
    """Give what the first process of a mesh has to all of it, one dimension after the other."""
    import torch.distributed as dist

    for dimension in range(mesh.ndim):
        dist.broadcast_object_list(outcome, group=mesh.get_group(dimension), group_src=0)


def _is_a(value: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)
