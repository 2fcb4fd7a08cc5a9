"""Linears whose weights are stored in a few bits: bitsandbytes' Linear4bit and Linear8bitLt, torchao's tensors.

How they compute is theirs: in a graph such a linear stays the module that it is, called by name, with its own kernels
and its own backward pass, which keeps the few bits and not what they stand for. lora_fx knows how large it is, what its
weight stands for, and how to store another one so. It imports none of these packages: who has such a module, has.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import FoldError, GraphError

_FOUR_BIT = "bitsandbytes.nn.modules.Linear4bit"
_EIGHT_BIT = "bitsandbytes.nn.modules.Linear8bitLt"


def is_quantized(module: object) -> bool:
    """Whether it is a linear whose weight is stored in another form than it is applied in."""
    if _is_a(module, _FOUR_BIT):
        return getattr(module.weight, "quant_state", None) is not None  # type: ignore[attr-defined]
    if _is_a(module, _EIGHT_BIT):
        state, weight = module.state, module.weight  # type: ignore[attr-defined]
        return not state.has_fp16_weights and (state.SCB is not None or getattr(weight, "SCB", None) is not None)
    return type(module) is nn.Linear and _is_wrapped(module.weight)


def _is_a(module: object, name: str) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" == name for cls in type(module).__mro__)


def _is_wrapped(weight: torch.Tensor) -> bool:
    """DTensor, say, is a wrapper too, and has what any tensor has."""
    return is_traceable_wrapper_subclass(weight) and type(weight).dequantize is not torch.Tensor.dequantize


def shared_state(module: nn.Module) -> list[object]:
    """What a copy of the module has in common with it, beside buffers: bits, and scales of them."""
    if not is_quantized(module):
        return []
    parts = [getattr(module, name, None) for name in ("weight", "quant_state", "state")]
    return [part for part in parts if part is not None]


def keep_trainable(module: nn.Module) -> None:
    """Keep a Linear4bit of a graph from the form that bitsandbytes gives it for inference on some CPUs.

    In that form it has no backward pass, and it stays so. The bits are the user's model's, too, whose eval() may do it.
    """
    if _is_a(module, _FOUR_BIT):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        module.register_forward_pre_hook(unpack)


def unpack(module: nn.Module, args: Any = ()) -> None:
    """Bring the bits of a Linear4bit into the usual order, as bitsandbytes does before it saves them."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()


def dense_weight(module: nn.Module) -> torch.Tensor:
    """What the stored weight stands for, (out, in), as the module applies it."""
    weight, shape = _weight_of(module), (module.out_features, module.in_features)
    found: Any
    if _is_a(module, _FOUR_BIT):
        unpack(module)
        found = _bitsandbytes().dequantize_4bit(weight.data, weight.quant_state)
    elif _is_a(module, _EIGHT_BIT):
        codes, scales = _eight_bits(module)
        found = codes.float() * (scales.float() / 127).unsqueeze(1)
    else:
        found = weight.dequantize()
    dense: torch.Tensor = found.detach().reshape(shape)
    return dense


def _weight_of(module: nn.Module) -> Any:
    return module.weight


def stored_again(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A module like this one, which `check_storable` takes, with another weight (out, in), stored in as few bits."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers, twin._modules = dict(module._parameters), dict(module._buffers), {}
    old = _weight_of(module)
    if _is_a(module, _FOUR_BIT):
        wide = weight.to(old.quant_state.dtype)
        options = {
            key: getattr(old, key) for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        new = type(old)(wide.cpu(), requires_grad=False, module=twin, **options).to(old.device)
        twin._parameters["weight"] = new
        twin.__dict__["quant_state"] = new.quant_state
        return twin
    state: Any = module.state
    twin.__dict__["state"] = fresh = type(state)()
    for name in ("threshold", "has_fp16_weights", "use_pool"):
        setattr(fresh, name, getattr(state, name))
    options = {"requires_grad": False, "has_fp16_weights": False}
    twin._parameters["weight"] = type(old)(weight.float().cpu(), **options).to(old.device)
    return twin


def check_storable(module: nn.Module) -> None:
    """Raise FoldError if `stored_again` cannot store another weight as the module does."""
    if not (_is_a(module, _FOUR_BIT) or _is_a(module, _EIGHT_BIT)):
        raise FoldError(
            f"fold(quantized='requantize') cannot make another {type(module.weight).__name__}, which does not remember "
            "how it was made; use quantized='dequantize', and quantize the result as the model was"
        )


def _eight_bits(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (out, in), scales (out,)); they move from the weight to the state when the module first runs."""
    state, weight = module.state, module.weight
    codes, scales = (
        getattr(state, name) if getattr(state, name) is not None else getattr(weight, name) for name in ("CB", "SCB")
    )
    return (weight.data if codes is None else codes), scales


def _bitsandbytes() -> Any:
    return sys.modules["bitsandbytes.functional"]


# In graphs ------------------------------------------------------------------------------------------


@torch.library.custom_op("lora_fx::quantized_linear", mutates_args=())
def quantized_linear(x: torch.Tensor, path: str, out_features: int) -> torch.Tensor:
    """What stands in a traced graph until `call_modules` writes the call of the module there.

    Raises:
        GraphError: if it is run.
    """
    raise GraphError(f"{path!r} stands for a quantized linear; trace the model with lora_fx.trace(model, args)")


@quantized_linear.register_fake
def _(x: torch.Tensor, path: str, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class _StandIn(nn.Module):
    """In the module's place while torch.export runs, which knows no tensor that has more to it than its elements."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = module  # no submodule, or its parameters would be exported
        self.path = path
        self.training = module.training

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.lora_fx.quantized_linear(input, self.path, self.out_features)
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"], name)


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Meanwhile, each quantized linear of the model is one op with its name in it.

    Raises:
        GraphError: if the model is a quantized linear itself.
    """
    if is_quantized(model):
        raise GraphError(f"the model is one {type(model).__name__}; wrap it: torch.nn.Sequential(model)")
    stand_ins = {module: _StandIn(module, path) for path, module in model.named_modules() if is_quantized(module)}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in stand_ins
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = stand_ins[child]
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def call_modules(gm: fx.GraphModule, model: nn.Module) -> None:
    """Let the traced graph call the model's own quantized linears.

    Raises:
        GraphError: if one of them is called in the body of a higher-order op, which can call no module.
    """
    _check_not_in_a_body(gm)
    nodes = [node for node in gm.graph.nodes if node.target is torch.ops.lora_fx.quantized_linear.default]
    for node in nodes:
        path = str(node.args[1])
        gm.add_submodule(path, model.get_submodule(path))
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(path, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    if nodes:
        gm.recompile()


def _check_not_in_a_body(gm: fx.GraphModule) -> None:
    for body in (module for module in gm.modules() if isinstance(module, fx.GraphModule) and module is not gm):
        for node in body.graph.nodes:
            if node.target is torch.ops.lora_fx.quantized_linear.default:
                raise GraphError(
                    f"the quantized linear {node.args[1]!r} is called under torch.no_grad, autocast or the like inside "
                    "the model, where a graph can call no module; take that out of the model, or dequantize the module"
                )


def has_quantized(gm: nn.Module) -> bool:
    """Whether a module in it is a linear that stores its weight in a few bits."""
    return any(is_quantized(module) for module in gm.modules())


def quantized_calls(gm: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """The nodes that call quantized linears."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return [node for node in calls if is_quantized(gm.get_submodule(str(node.target)))]
