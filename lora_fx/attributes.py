"""Attributes of modules by dotted name: get, set, delete."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import GraphError


def get_attribute(root: nn.Module, target: str) -> Any:
    """The object behind a dotted name, or None."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part, None)
        if value is None:
            return None
    return value


def get_parameter(root: nn.Module, target: str) -> nn.Parameter:
    """The parameter at a dotted name that has one. Passes ask by the thousand, and torch's own way is slow.

    Raises:
        GraphError: if the user let something else stand there, as parametrizations and pruning do.
    """
    *containers, name = target.split(".")
    owner: Any = root
    try:
        for part in containers:
            owner = owner._modules[part]
        parameter: nn.Parameter = owner._parameters[name]
    except KeyError:
        return _wrapped_parameter(root, target)
    return parameter


def _wrapped_parameter(root: nn.Module, target: str) -> nn.Parameter:
    """What the wrapper of a module on the way gives for its attribute, as those of activation checkpointing do."""
    found = get_attribute(root, target)
    if isinstance(found, nn.Parameter):
        return found
    what = "is gone" if found is None else "is computed from others when it is read"
    raise GraphError(
        f"{target!r} was a parameter, and {what}. Take back what was put in its place, as "
        "torch.nn.utils.parametrize.remove_parametrizations and torch.nn.utils.prune.remove do, and call again"
    )


def set_attribute(root: nn.Module, target: str, value: Any, *, persistent: bool = True) -> None:
    """Put a parameter, tensor or module at a dotted name, making the containers on the way."""
    *containers, name = target.split(".")
    owner = root
    for part in containers:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(name, value, persistent=persistent)
    else:
        setattr(owner, name, value)


def delete_attribute(root: nn.Module, target: str) -> None:
    """Remove what stands at a dotted name, and the plain containers that are empty without it."""
    parts = target.split(".")
    owners = [root]
    for part in parts[:-1]:
        owners.append(getattr(owners[-1], part))
    delattr(owners[-1], parts[-1])
    for owner, container, name in zip(owners[-2::-1], owners[:0:-1], parts[-2::-1], strict=True):
        if type(container) is not nn.Module or container._modules or container._parameters or container._buffers:
            break
        delattr(owner, name)


def holds_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has any: those of the meta device and of FakeTensorMode have a shape and a type only."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def check_holds_values(module: nn.Module, doing: str) -> None:
    """Raise GraphError if a parameter has no values; `doing` is what cannot be done then."""
    for name, parameter in module.named_parameters():
        if not holds_values(parameter):
            raise GraphError(
                f"{name!r} {why_no_values(parameter)}, so {doing}; load the weights first: lora_fx.bind_weights(gm, "
                "directory)"
            )


def why_no_values(tensor: torch.Tensor) -> str:
    """What to say of one that has none."""
    return f"is {'on the meta device' if tensor.is_meta else 'a fake tensor'} and holds no values"
