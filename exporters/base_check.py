"""Whether a file's weights are those that an adapter was trained over, as far as its note on the base tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_fx import AdapterError
from lora_fx.base_note import EPS, KEY, NOTED, is_noted, noted_values, places_of

from .onnx_weights import Array, read_stamps

if TYPE_CHECKING:
    from .named_weights import Held, OnnxWeights


def check_base_note(weights: OnnxWeights) -> None:
    """Look for some values of each adapted weight among those that `lora_fx.save_adapter` noted.

    Only where that can tell: a weight that is quantized, packed with others, or made of others when the file was
    written, and a file into which something is folded already, hold other values on purpose.

    Raises:
        AdapterError: if a weight is another, or the note cannot be read.
    """
    if read_stamps(weights.model.metadata_props):
        return
    where = str(weights.adapter.directory)
    noted = noted_values(weights.adapter.metadata.get(KEY), where)
    for low in () if noted is None else weights.adapter.low_rank:
        name = weights.weight_of(low)
        for held in () if name is None else weights.held(name):
            own = _values(held, is_recorded=held.value.name in weights.recorded)
            if own is not None and noted is not None and not is_noted(noted, *own):
                raise AdapterError(
                    f"{where} was saved over a base model with other weights ({held.value.name!r} is another, for "
                    "one); take the file of that base. If this one is meant, read_adapter(directory, "
                    "integrity='ignored') reads the adapter all the same"
                )


def _values(held: Held, *, is_recorded: bool) -> tuple[Array, str] | None:
    """(one row of values for each way in which the weight may lie, its type); None if that says nothing."""
    tensor = held.value.const_value
    dtype = "" if tensor is None else tensor.dtype.name.lower()
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    if dtype not in EPS or held.value.shape is None or np.prod(held.own_shape) < NOTED:
        return None
    assert tensor is not None
    stored = tensor.numpy()  # a view of the file, of which a few values are read
    own = stored if held.perm is None else stored.transpose(np.argsort(held.perm))
    lying = [own] if is_recorded or own.ndim != 2 else [own, own.T]
    rows = [each[np.unravel_index(places_of(each.size, NOTED), each.shape)] for each in lying]
    return np.stack(rows).astype(np.float32), dtype
