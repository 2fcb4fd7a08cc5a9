"""Text from an ONNX file: the likeliest token, again and again, with the cache of the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from lora_fx import ExportError

from .adapter_session import Adapters, AdapterSession
from .onnx_weights import Array
from .text import reason, some

Session: TypeAlias = ort.InferenceSession | AdapterSession

_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def greedy(
    session: Session,
    input_ids: Array,
    max_new_tokens: int,
    *,
    attention_mask: Array | None = None,
    eos_token_id: int | None = None,
    adapter: Adapters = None,
) -> Array:
    """The prompts and what follows them, int64 (batch, length): `model.generate(do_sample=False)`, token for token.

    Args:
        session: of a file made from `flat_cache_model`; an `AdapterSession`, if adapters are to be chosen.
        input_ids: (batch, length), padded on the left.
        max_new_tokens: where to stop at the latest.
        attention_mask: 0 for padding; None if there is none.
        eos_token_id: ends a row, which is filled up with it until the last row ends; None never does.
        adapter: as for `AdapterSession.run`.

    Raises:
        ExportError: if the file is no such decoder, or the inputs do not fit it.
        AdapterError: as `AdapterSession.run`.
    """
    decoder = _Decoder.of(session, adapter, optional={"attention_mask", "position_ids"})
    ids = _checked_ids(input_ids, max_new_tokens, eos_token_id)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask).astype(np.int64)
    if mask.shape != ids.shape or not mask[:, -1].all():
        raise ExportError(
            f"attention_mask {list(mask.shape)} must have the shape {list(ids.shape)} of input_ids and end in 1 in "
            'each row: pad on the left, tokenizer(..., padding_side="left")'
        )
    if not mask.all() and "attention_mask" not in decoder.inputs:
        raise ExportError("the file takes no attention_mask, so padding would count; give prompts of one length")
    return _follow(decoder, ids, max_new_tokens, eos_token_id, mask, {})


def greedy_seq2seq(
    encoder: Session,
    decoder: Session,
    inputs: Mapping[str, Array],
    decoder_input_ids: Array,
    max_new_tokens: int,
    *,
    eos_token_id: int | None = None,
    adapter: Adapters = None,
) -> Array:
    """`decoder_input_ids` and what follows them, int64 (batch, length), of the two files of an encoder-decoder.

    Args:
        encoder, decoder: of files made from `flat_encoder` and `flat_decoder`.
        inputs: the encoder's, by name; its attention_mask, if it has one, is the decoder's encoder_attention_mask, too.
        decoder_input_ids: (batch, length), what each row begins with: the model's decoder_start_token_id, say.
        max_new_tokens, eos_token_id: as for `greedy`.
        adapter: for each session that is an `AdapterSession`.

    Raises:
        ExportError, AdapterError: as `greedy`.
    """
    second = _Decoder.of(decoder, adapter, optional={"encoder_hidden_states", "encoder_attention_mask"})
    ids = _checked_ids(decoder_input_ids, max_new_tokens, eos_token_id)
    first_adapter = adapter if isinstance(encoder, AdapterSession) else None
    states = _run(encoder, {name: np.asarray(value) for name, value in inputs.items()}, first_adapter)
    if "last_hidden_state" not in states:
        raise ExportError(f"the encoder's file returns {some(states)}; export what flat_encoder(model) gives")
    source = {"encoder_hidden_states": states["last_hidden_state"]}
    if "attention_mask" in inputs:
        source["encoder_attention_mask"] = np.asarray(inputs["attention_mask"])
    return _follow(second, ids, max_new_tokens, eos_token_id, None, source)


@dataclass(frozen=True)
class _Decoder:
    """A session with a cache.

    Attributes:
        past: {input of the cache: (its shape, with 0 for batch and past; its type)}.
        inputs: names of all inputs.
    """

    session: Session
    adapter: Adapters
    past: dict[str, tuple[tuple[int, ...], Any]]
    inputs: frozenset[str]

    @classmethod
    def of(cls, session: Session, adapter: Adapters, optional: set[str]) -> _Decoder:
        own = _session_of(session)
        ports = {port.name: port for port in own.get_inputs()}
        outputs = {port.name for port in own.get_outputs()}
        past = {name: port for name, port in ports.items() if name.startswith(_PAST)}
        lacks = [name for name in ("logits", *map(_present, past)) if name not in outputs]
        lacks += ["input_ids"] if "input_ids" not in ports else []
        strange = [name for name in ports if name not in {"input_ids", "adapter_ids", *optional, *past}]
        strange += [name for name, port in past.items() if port.type not in _DTYPES or len(port.shape) != 4]
        if lacks or strange or not past:
            why = f"it lacks {some(lacks)}" if lacks else f"it takes {some(strange)}" if strange else "it has no cache"
            raise ExportError(
                f"this file is no decoder with a cache: {why}. Export one: "
                "export_onnx(lora_fx.trace(flat_cache_model(model), (), inputs, dynamic_shapes=shapes), path)"
            )
        sizes = {name: tuple(n if isinstance(n, int) else 0 for n in port.shape) for name, port in past.items()}
        cache = {name: (sizes[name], _DTYPES[port.type]) for name, port in past.items()}
        return cls(session, adapter, cache, frozenset(ports))

    def empty(self, batch: int) -> dict[str, Array]:
        """The cache of no token."""
        return {name: np.zeros((batch, *shape[1:]), dtype) for name, (shape, dtype) in self.past.items()}

    def step(self, feed: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The likeliest next token of each row, (batch,), and the new cache."""
        outputs = _run(self.session, {name: value for name, value in feed.items() if name in self.inputs}, self.adapter)
        return outputs["logits"][:, -1].argmax(-1), {name: outputs[_present(name)] for name in self.past}


def _follow(
    decoder: _Decoder,
    ids: Array,
    max_new_tokens: int,
    eos_token_id: int | None,
    mask: Array | None,
    source: Mapping[str, Array],
) -> Array:
    new, cache = ids, decoder.empty(len(ids))
    running = np.ones(len(ids), bool)
    for _ in range(max_new_tokens):
        feed = {"input_ids": new, **source, **cache}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clip(min=0)
            feed |= {"attention_mask": mask, "position_ids": positions[:, -new.shape[1] :]}
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        best, cache = decoder.step(feed)
        if eos_token_id is not None:
            best = np.where(running, best, eos_token_id)
            running &= best != eos_token_id
        new = best[:, None]
        ids = np.concatenate([ids, new], 1)
        if not running.any():
            break
    return ids


def _checked_ids(input_ids: Array, max_new_tokens: int, eos_token_id: Any) -> Array:
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise ExportError(
            f"input ids are {ids.dtype} {list(ids.shape)}; they must be integers, (batch, length), not empty"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ExportError(f"max_new_tokens={max_new_tokens!r} must be a number of 1 or more")
    if not isinstance(eos_token_id, int | None):
        raise ExportError(f"eos_token_id={eos_token_id!r} must be one token, or None")
    return ids.astype(np.int64)


def _run(session: Session, feed: dict[str, Array], adapter: Adapters) -> dict[str, Array]:
    names = [port.name for port in _session_of(session).get_outputs()]
    if isinstance(session, AdapterSession):
        return dict(zip(names, session.run(feed, adapter), strict=True))
    if adapter is not None:
        raise ExportError(
            f"adapter={adapter!r} needs an AdapterSession, not an InferenceSession, which has no adapters"
        )
    try:
        return dict(zip(names, session.run(None, feed), strict=True))
    except Exception as error:
        raise ExportError(f"the file cannot run with these inputs: {reason(error)}") from error


def _session_of(session: Session) -> ort.InferenceSession:
    return session.session if isinstance(session, AdapterSession) else session


def _present(past: str) -> str:
    return _PRESENT + past.removeprefix(_PAST)
