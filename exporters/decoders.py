"""Hugging Face models in the form that generates: keys and values of past tokens come in, and go out, as flat tensors.

A flat model shares the modules of the model it is made of, under their own names: what fits the one, adapters and
`target_modules` among it, fits the other.

    flat = flat_cache_model(model)                     # Llama, GPT-2, ...
    inputs, shapes = decoder_example(flat)
    gm = lora_fx.trace(flat, (), inputs, dynamic_shapes=shapes)
    export_onnx(gm, "decoder.onnx")

An encoder-decoder (T5, Whisper) becomes two files: `flat_encoder` and `flat_decoder`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx import ExportError

Tensors = Mapping[str, torch.Tensor]
Call = tuple[dict[str, Any], dict[str, Any]]

PAST, PRESENT = "past_key_values", "present"

# Sizes of the examples: all different, and none is 1, which tracers take for a constant.
_BATCH, _SEQUENCE, _PAST, _SOURCE = 2, 3, 5, 7
_TOKENS = {0: "batch", 1: "sequence"}
_SOURCE_TOKENS = {0: "batch", 1: "source"}


def flat_cache_model(model: nn.Module) -> nn.Module:
    """A causal language model whose cache is tensors, `past_key_values.{i}.key` and `present.{i}.key` (and value).

    Its forward takes input_ids (batch, sequence), attention_mask (batch, past + sequence), 0 for padding, position_ids
    (batch, sequence), if the model has them, and past_key_values, {name: (batch, heads, past, head size)}, which may be
    empty. It returns a dictionary of the logits (batch, sequence, vocabulary) and the tensors of the cache.

    Args:
        model: of Hugging Face. It is left as it was, and shares its modules with the result.

    Raises:
        ExportError: if it is no such model, or its cache is not plain keys and values (sliding windows are not).
    """
    config = _checked(model, "past_key_values")
    if config.is_encoder_decoder:
        raise ExportError(f"{type(model).__name__} is an encoder-decoder; use flat_encoder and flat_decoder")
    return _with_form(model, _FlatDecoder)


def flat_encoder(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder, with the names that its modules have in the whole model.

    Its forward takes input_ids and attention_mask, both (batch, source), or input_features (batch, mel bins, frames),
    and returns {"last_hidden_state": (batch, source, hidden)}.

    Raises:
        ExportError: if `model` is no such model.
    """
    _checked(model, "encoder_outputs")
    return _with_form(model, _AudioEncoder if model.main_input_name == "input_features" else _TextEncoder)


def flat_decoder(model: nn.Module) -> nn.Module:
    """The decoder of an encoder-decoder, with the names that its modules have in the whole model.

    Its forward takes input_ids (batch, sequence), encoder_hidden_states (batch, source, hidden), for texts
    encoder_attention_mask (batch, source), and past_key_values, the self-attention's, as `flat_cache_model` has them.
    Keys and values of the cross-attention are computed again in each call.

    Raises:
        ExportError: as for `flat_cache_model`.
    """
    _checked(model, "encoder_outputs", "past_key_values")
    return _with_form(model, _CrossDecoder)


def decoder_example(model: nn.Module) -> Call:
    """Keyword arguments to trace a flat decoder with, and dynamic_shapes: batch, sequence and past are free.

    Args:
        model: from `flat_cache_model` or `flat_decoder`.

    Raises:
        ExportError: if it is neither.
    """
    if not isinstance(model, _FlatDecoder | _CrossDecoder):
        raise ExportError(f"{type(model).__name__} is no flat decoder; make one: flat_cache_model(model)")
    with torch.no_grad():
        return model.example()


def encoder_example(model: nn.Module) -> Call:
    """Keyword arguments to trace a flat encoder with, and dynamic_shapes: batch, and the length of texts, are free.

    Args:
        model: from `flat_encoder`.

    Raises:
        ExportError: if it is none.
    """
    if not isinstance(model, _TextEncoder | _AudioEncoder):
        raise ExportError(f"{type(model).__name__} is no flat encoder; make one: flat_encoder(model)")
    return model.example()


class _FlatDecoder(nn.Module):
    """Stands before a model's own class: the same modules, with another forward."""

    config: Any

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Tensors | None = None,
    ) -> dict[str, torch.Tensor]:
        cache = _filled_cache(self.config, past_key_values or {})
        positions = {} if position_ids is None else {"position_ids": position_ids}
        outputs = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        return {"logits": outputs.logits} | _flat(cache, PRESENT)

    def example(self) -> Call:
        """Tokens with a past, of which one row is padded."""
        ids = _ids(self.config, _PAST + _SEQUENCE)
        mask = _mask(ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        shapes: dict[str, Any] = {"input_ids": _TOKENS, "attention_mask": {0: "batch", 1: "past + sequence"}}
        if "position_ids" in _parameters(self):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            shapes["position_ids"] = _TOKENS
        past = _past_of(self(**{name: value[:, :_PAST] for name, value in inputs.items()}))
        # Copies, since torch.export also guards the tensor that a view is of.
        now = {name: value if name == "attention_mask" else value[:, _PAST:].clone() for name, value in inputs.items()}
        return now | {PAST: past}, shapes | {PAST: _past_shapes(past)}


class _TextEncoder(nn.Module):
    config: Any

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[operator]
        return {"last_hidden_state": outputs.last_hidden_state}

    def example(self) -> Call:
        ids = _ids(self.config, _SOURCE)
        inputs = {"input_ids": ids, "attention_mask": _mask(ids).flip(1)}
        return inputs, dict.fromkeys(inputs, _SOURCE_TOKENS)


class _AudioEncoder(nn.Module):
    config: Any
    dtype: Any

    def forward(self, input_features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.get_encoder()(input_features).last_hidden_state}  # type: ignore[operator]

    def example(self) -> Call:
        config = self.config
        # The model's positions fix the number of frames: its convolutions halve them.
        shape = (_BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        return {"input_features": features}, {"input_features": {0: "batch"}}


class _CrossDecoder(nn.Module):
    config: Any
    dtype: Any
    main_input_name: str

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Tensors | None = None,
    ) -> dict[str, torch.Tensor]:
        from transformers import EncoderDecoderCache

        cache = _filled_cache(self.config, past_key_values or {})
        mask = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        outputs = super().forward(
            decoder_input_ids=input_ids,
            encoder_outputs=(encoder_hidden_states,),
            past_key_values=EncoderDecoderCache(cache, _forgetful_cache(self.config)),
            use_cache=True,
            **mask,
        )
        return {"logits": outputs.logits} | _flat(cache, PRESENT)

    def example(self) -> Call:
        ids = _ids(self.config, _PAST + _SEQUENCE)
        generator = torch.Generator().manual_seed(0)
        is_audio = self.main_input_name == "input_features"
        length = self.config.max_source_positions if is_audio else _SOURCE
        states = torch.randn((_BATCH, length, self.config.hidden_size), generator=generator).to(self.dtype)
        source: dict[str, Any] = {"encoder_hidden_states": states}
        if not is_audio:
            source["encoder_attention_mask"] = _mask(states[..., 0]).flip(1)
        past = _past_of(self(ids[:, :_PAST], **source))
        shapes = {"input_ids": _TOKENS, **dict.fromkeys(source, _SOURCE_TOKENS), PAST: _past_shapes(past)}
        return {"input_ids": ids[:, _PAST:].clone(), **source, PAST: past}, shapes


def _checked(model: Any, *needed: str) -> Any:
    """The configuration of a model that can be made flat."""
    from transformers import DynamicCache, PreTrainedModel
    from transformers.cache_utils import DynamicLayer

    if not isinstance(model, PreTrainedModel):
        is_peft = hasattr(model, "get_base_model")
        fix = "; load the base model, and its adapter with lora_fx.load_adapter" if is_peft else ""
        raise ExportError(f"this takes a model of transformers, not {type(model).__name__}{fix}")
    if isinstance(model, _FlatDecoder | _CrossDecoder | _TextEncoder | _AudioEncoder):
        raise ExportError(f"{type(model).__name__} is flat already")
    lacks = [name for name in needed if name not in _parameters(model)]
    if lacks or model.get_output_embeddings() is None:
        what = f"takes no {lacks[0]}" if lacks else "has no head that gives logits"
        raise ExportError(f"{type(model).__name__} {what}, so it does not generate; load it with its generating head")
    other = [
        type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) is not DynamicLayer
    ]
    if other:
        raise ExportError(
            f"{type(model).__name__} keeps its past as {other[0]}, and only plain keys and values are done here; "
            "export it without a cache: lora_fx.trace(model, (), {..., 'use_cache': False})"
        )
    return model.config


def _with_form(model: nn.Module, form: type[nn.Module]) -> nn.Module:
    flat = copy.copy(model)
    flat.__class__ = type(f"Flat{type(model).__name__}", (form, type(model)), {})
    return flat


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    """Of the forward of the model's own class."""
    own: Any = next(kind for kind in type(model).__mro__ if kind.__module__ != __name__)
    return inspect.signature(own.forward).parameters


def _filled_cache(config: Any, past: Tensors) -> Any:
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers if past else ()):
        key, value = past[f"{PAST}.{i}.key"], past[f"{PAST}.{i}.value"]
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value  # not `update`, which would join them to an empty constant
    return cache


def _forgetful_cache(config: Any) -> Any:
    """For cross-attention: it has what it is given, in the one call that it lives."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=config)
    cache.update = lambda key, value, *_, **__: (key, value)
    return cache


def _flat(cache: Any, prefix: str) -> dict[str, torch.Tensor]:
    both = [(f"{prefix}.{i}", layer) for i, layer in enumerate(cache.layers)]
    return {name: part for at, each in both for name, part in ((f"{at}.key", each.keys), (f"{at}.value", each.values))}


def _past_of(outputs: Tensors) -> dict[str, torch.Tensor]:
    return {name.replace(PRESENT, PAST): tensor for name, tensor in outputs.items() if name.startswith(PRESENT)}


def _past_shapes(past: Tensors) -> dict[str, dict[int, str]]:
    return {name: {0: "batch", 2: "past"} for name in past}


def _ids(config: Any, length: int) -> torch.Tensor:
    size = config.get_text_config(decoder=True).vocab_size
    return torch.randint(1, size, (_BATCH, length), generator=torch.Generator().manual_seed(0))


def _mask(rows: torch.Tensor) -> torch.Tensor:
    """Ones, but for two places on the left of the last row."""
    mask = torch.ones(rows.shape, dtype=torch.long)
    mask[-1, :2] = 0
    return mask
