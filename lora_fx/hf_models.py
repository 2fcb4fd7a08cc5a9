"""Hugging Face model directories: the model that one holds, and example inputs to trace it with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GraphError, LoraFxError

if TYPE_CHECKING:
    from torch import nn

# What an architecture's name ends with, or a PEFT adapter's task_type says → transformers' Auto class.
_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForCTC": "AutoModelForCTC",
    "ForAudioClassification": "AutoModelForAudioClassification",
}
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_model(directory: Path, task_type: str | None = None) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """The model of a Hugging Face directory in eval mode, keyword arguments to trace it with, and what it lacks.

    The third value names the parameters that the directory's files do not hold: they are random.

    Args:
        directory: holds config.json and safetensors.
        task_type: an adapter's, which decides the head; None reads it from the config's architectures.

    Raises:
        GraphError: if the directory holds no such model, or one whose inputs are not known here.
    """
    if not (directory / "config.json").is_file():
        raise GraphError(f"{str(directory)!r} holds no config.json, so it is no Hugging Face model directory")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        auto = getattr(transformers, _auto_class(config, task_type))
        model, loading = auto.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except LoraFxError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphError(f"{str(directory)!r} cannot be loaded as a Hugging Face model: {first}") from error
    return model.eval(), _example(model), sorted(loading["missing_keys"])


def _auto_class(config: Any, task_type: str | None) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith("ForConditionalGeneration") and hasattr(config, "num_mel_bins"):
        return "AutoModelForSpeechSeq2Seq"
    if task_type is not None:
        return _TASKS[task_type]
    return next((auto for ending, auto in _HEADS.items() if architecture.endswith(ending)), "AutoModel")


def _example(model: Any) -> dict[str, Any]:
    """Random inputs of the kind the model says it takes: batch 2, sequence 12."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        height, width = _pair(getattr(config, "image_size", 224))
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    if model.main_input_name == "input_values":  # a raw waveform: half a second at 16 kHz
        return {"input_values": torch.randn((2, 8000), generator=generator).to(model.dtype)}
    if model.main_input_name == "input_features" and config.is_encoder_decoder:
        # Whisper's first convolutions halve the frames, which its positions then count.
        frames = 2 * config.max_source_positions
        features = torch.randn((2, config.num_mel_bins, frames), generator=generator).to(model.dtype)
        ids = torch.randint(1, config.vocab_size, (2, 7), generator=generator)
        return {"input_features": features, "decoder_input_ids": ids, "use_cache": False}
    if model.main_input_name != "input_ids":
        raise GraphError(
            f"{type(model).__name__} takes {model.main_input_name!r}, for which the command line makes no example; "
            "use the Python interface: lora_fx.trace(model, args, kwargs)"
        )
    ids = torch.randint(1, config.get_text_config().vocab_size, (2, 12), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7].clone()
    if hasattr(config, "use_cache"):
        config.use_cache = False
        if getattr(model, "can_generate", lambda: False)():
            inputs["use_cache"] = False
    return inputs


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
