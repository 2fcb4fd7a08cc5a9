"""How A and B lie beside a weight of a checkpoint, told from names and shapes.

There is no model to ask. A and B of another shape than each other tell; where they do not, what the checkpoint says of
the weight's siblings and its config.json do; what still means two things is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from .adapter_arrays import AdapterArrays, LowRankArrays
from .adapter_files import TURNED
from .adapter_integrity import OURS, WRITER
from .adapter_places import joined
from .checkpoint_changes import tensor_of
from .checkpoint_places import CheckpointPlaces, last_of, module_of
from .dora import why_no_magnitude
from .errors import AdapterError
from .layouts import Experts, Kernel, Layout, Matrix
from .stored_tensors import StoredTensor

# transformers' classes whose linears are stored (in, out), and what these are called there.
_TURNED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_TURNED_NAMES = ("c_attn", "q_attn", "c_fc", "c_proj")
# Those whose experts are stored (experts, in, out) whatever their sizes.
_TURNED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")


def layout_of(
    places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor, *, is_parameter: bool
) -> Layout:
    """How A and B lie beside a tensor.

    Args:
        places: the checkpoint's tensors.
        low: A and B.
        name: the tensor's, in the adapter.
        tensor: what they are added to.
        is_parameter: target_parameters means it.

    Raises:
        AdapterError: if shapes or ranks do not fit, or the files leave open how the tensor lies.
    """
    if is_parameter or len(tensor.shape) == 3 == low.a.ndim + 1:
        layout = _parameter_layout(places, low, name, tensor)
    else:
        places.check_rank(low)
        layout = _module_layout(places, low, name, tensor)
    _check_magnitude(low, layout)
    return layout


def _misfit(low: LowRankArrays, tensor: StoredTensor) -> AdapterError:
    return AdapterError(
        f"A {list(low.a.shape)} and B {list(low.b.shape)} of {low.path!r} do not make a delta for {tensor.name!r}, "
        f"which has the shape {list(tensor.shape)}; is this adapter of this model? Take the base of it"
    )


def _module_layout(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> Layout:
    """How A and B of a module lie beside its weight, of that full name in the adapter."""
    if low.a.ndim > 2:
        return _kernel(places, low, name, tensor)
    out, into = len(low.b), low.a.shape[1]
    if low.is_lookup:
        if tensor.shape != (into, out):
            raise _misfit(low, tensor)
        return Matrix(into, out, stored_in_out=True)
    if tensor.shape not in ((out, into), (into, out)):
        raise _misfit(low, tensor)
    turned = _is_turned(places, low, name, tensor) if out == into else tensor.shape == (into, out)
    return Matrix(*tensor.shape, stored_in_out=turned)


def _is_turned(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> bool:
    """Whether a square weight is stored (in, out).

    Raises:
        AdapterError: if the files say both.
    """
    adapter = places.adapter
    if adapter.metadata.get(WRITER) == OURS:
        return name in turned_of(adapter)
    said = adapter.config.fan_in_fan_out
    siblings = set(_turned_siblings(places, tensor))
    if len(siblings) == 1:
        found = siblings.pop()
    elif siblings:
        raise AdapterError(_unclear(low, tensor, "other weights of that name lie either way"))
    elif places.model_type is None:
        return said
    else:
        found = places.model_type in _TURNED_MODELS and last_of(low.path) in _TURNED_NAMES
    if said and not found and not any(_lies_turned(places, other) for other in adapter.low_rank):
        raise AdapterError(
            _unclear(low, tensor, "adapter_config.json says fan_in_fan_out, and the base has its weights (out, in)")
        )
    return found


def _unclear(low: LowRankArrays, tensor: StoredTensor, why: str) -> str:
    return (
        f"{tensor.name!r} is square, {list(tensor.shape)}, and whether it lies (out, in) or (in, out) cannot be told: "
        f"{why}; correct adapter_config.json, or fold with the model: lora-fx fold MODEL ADAPTER OUT"
    )


def _turned_siblings(places: CheckpointPlaces, tensor: StoredTensor) -> Iterator[bool]:
    """How weights of the same last name lie in the checkpoint, where their shape and their bias's tell."""
    last = last_of(module_of(tensor.name))
    for name, other in places.checkpoint.tensors.items():
        if last_of(module_of(name)) != last or last_of(name) != "weight" or len(other.shape) != 2:
            continue
        bias = places.checkpoint.tensors.get(joined(module_of(name), "bias"))
        rows, columns = other.shape
        if rows != columns and bias is not None and len(bias.shape) == 1 and bias.shape[0] in other.shape:
            yield bias.shape[0] == columns


def _lies_turned(places: CheckpointPlaces, low: LowRankArrays) -> bool:
    """Whether the shapes of A and B alone say that a weight is stored (in, out)."""
    shape = places.shape_of_parameter(joined(low.path, "weight"))
    out, into = len(low.b), low.a.shape[1]
    return not low.is_lookup and shape == (into, out) != (out, into)


def turned_of(adapter: AdapterArrays) -> frozenset[str]:
    """The weights of which `save_adapter` noted that they lie the other way round.

    Raises:
        AdapterError: if the note cannot be read.
    """
    text = adapter.metadata.get(TURNED)
    try:
        found = json.loads(text) if text is not None else []
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError("it is no list of names")
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{str(adapter.directory)!r}: the note on weights ({TURNED}) cannot be read: {error}; save it again"
        ) from error
    return frozenset(found)


def _kernel(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> Kernel:
    """Of a convolution, or of a transposed one, which lora_fx alone adapts."""
    out, extent = len(low.b), low.a.shape[2:]
    if tensor.shape[2:] != extent or any(size != 1 for size in low.b.shape[2:]):
        raise _misfit(low, tensor)
    is_transposed = name in turned_of(places.adapter)
    if is_transposed:
        groups = _ratio(out, tensor.shape[1])
        fits = tensor.shape[0] == low.a.shape[1] * groups
    else:
        groups = _ratio(low.a.shape[1], tensor.shape[1])
        fits = tensor.shape[0] == out and groups > 0 and out % groups == 0
    if not fits or low.b.shape[1] * groups != len(low.a):
        raise _misfit(low, tensor)
    layout = Kernel(tensor.shape, groups, is_transposed)
    if groups > 1 and not is_transposed and layout.grouped(tensor_of(low.a)) is None:
        raise AdapterError(
            f"A of {low.path!r} mixes the {groups} groups of inputs, which the convolution's grouped kernel keeps "
            "apart; it can be computed beside the convolution, and not folded into it: load_adapter does that"
        )
    return layout


def _ratio(size: int, per_group: int) -> int:
    """Into how many groups a size is shared out; 0 if that does not come out even."""
    return size // per_group if per_group and size % per_group == 0 else 0


def _parameter_layout(places: CheckpointPlaces, low: LowRankArrays, name: str, tensor: StoredTensor) -> Layout:
    """Of target_parameters, and of stacks of matrices."""
    if low.magnitude is not None or low.bias is not None:
        raise AdapterError(
            f"{name!r} is a parameter of its own, for which use_dora and lora_bias are not defined; train without"
        )
    out, into = len(low.b), low.a.shape[1]
    if len(tensor.shape) == 2:
        return Matrix(out, into)  # `parameter_of` has looked at its shape
    count, rows, columns = tensor.shape
    r = places.adapter.rank_at(*places.names_at_slot(low))
    if len(low.a) != r * count or low.b.shape[1] != len(low.a) or (rows, columns) not in ((out, into), (into, out)):
        raise _misfit(low, tensor)
    if rows != columns:
        return Experts(tensor.shape, stored_in_out=(rows, columns) == (into, out))
    if places.adapter.metadata.get(WRITER) == OURS:
        return Experts(tensor.shape, stored_in_out=name in turned_of(places.adapter))
    if places.model_type is None:
        raise AdapterError(
            f"{tensor.name!r} holds square matrices, {list(tensor.shape)}, and whether they lie (out, in) or (in, out) "
            "cannot be told without the base's config.json; lay it beside the weights"
        )
    return Experts(tensor.shape, stored_in_out=places.model_type in _TURNED_EXPERTS)


def _check_magnitude(low: LowRankArrays, layout: Layout) -> None:
    if low.magnitude is None:
        return
    if reason := why_no_magnitude(layout):
        raise AdapterError(f"{low.path!r}: {reason}; train it without use_dora")
    if low.magnitude.size != layout.out_features:
        raise AdapterError(
            f"lora_magnitude_vector of {low.path!r} has {low.magnitude.size} values, and its weight "
            f"{layout.out_features} outputs; is this adapter of this model? Take the one that it was trained over"
        )
