"""Hugging Face model directories: the model that one holds, and example inputs to trace it with."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import GraphError

if TYPE_CHECKING:
    import torch

_LONGEST_REASON = 240  # characters of another library's message
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")  # loggers

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


@dataclass(frozen=True)
class HfModel:
    """A model that a Hugging Face directory holds.

    Attributes:
        directory: where it was read from.
        model: in eval mode.
        inputs: keyword arguments to trace it with.
        missing: parameters that the directory's files do not hold: they are random.
        task_type: the adapter's task that decided the head, if one did.
    """

    directory: Path
    model: Any
    inputs: dict[str, Any]
    missing: tuple[str, ...]
    task_type: str | None

    @property
    def is_bfloat16(self) -> bool:
        """Whether the model's weights are."""
        return str(self.model.dtype) == "torch.bfloat16"

    @property
    def takes_one_text(self) -> bool:
        """Whether the model, for want of a padding token, refuses more than one text at a time."""
        return any(len(value) == 1 for value in self.inputs.values() if hasattr(value, "shape"))


def load_model(directory: Path, task_type: str | None = None, dtype: torch.dtype | None = None) -> HfModel:
    """The model of a Hugging Face directory, and example inputs.

    Args:
        directory: holds config.json and safetensors.
        task_type: an adapter's, which decides the head; None reads it from the config's architectures.
        dtype: to load it in; None takes the directory's.

    Raises:
        GraphError: if the directory holds no such model, or one whose inputs are not known here.
    """
    if directory.is_file():
        raise GraphError(f"{str(directory)!r} is a file; give the directory that it is in: {str(directory.parent)!r}")
    if not directory.is_dir():
        raise GraphError(
            f"there is no directory {str(directory)!r}; give one that holds config.json and safetensors. Nothing is "
            "downloaded: hf download MODEL --local-dir DIRECTORY fetches a model by its name on the hub"
        )
    if not (directory / "config.json").is_file():
        raise GraphError(f"{str(directory)!r} holds no config.json, so it is no Hugging Face model directory")
    with importing_quietly():
        return _loaded_model(directory, task_type, dtype)


@contextmanager
def importing_quietly() -> Iterator[None]:
    """transformers imports what it finds installed, asked for or not; what that says of its own files helps nobody."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _loaded_model(directory: Path, task_type: str | None, dtype: torch.dtype | None) -> HfModel:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _telling(directory):
        config = transformers.AutoConfig.from_pretrained(directory, **options)
    auto = getattr(transformers, _auto_class(directory, config, task_type))
    with _telling(directory):
        model, loading = auto.from_pretrained(
            directory,
            **options,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are told, and refused below by name
        )
    _check_sizes(directory, loading["mismatched_keys"])
    return HfModel(directory, model.eval(), _example(model), tuple(sorted(loading["missing_keys"])), task_type)


@contextmanager
def _telling(directory: Path) -> Iterator[None]:
    """Whatever transformers raises about a damaged directory, and it raises many kinds, is bad input."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        _check_readable(directory)
        raise GraphError(f"{str(directory)!r} cannot be loaded as a Hugging Face model: {_reason(error)}") from error


def _check_readable(directory: Path) -> None:
    """Name the first file of weights that cannot be read; transformers does not."""
    import safetensors

    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="pt"):  # reads the header, and looks at the length
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise GraphError(f"{str(file)!r} is cut off or damaged ({error}); copy or download it again") from error


def _reason(error: Exception) -> str:
    """The first sentence of an exception's text."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}…"


def _check_sizes(directory: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    wrong = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in mismatched)
    if not wrong:
        return
    name, stored, wanted = wrong[0]
    raise GraphError(
        f"{str(directory)!r}: {name!r} has the shape {stored} in the weights and {wanted} by config.json "
        f"({len(wrong)} such tensors in all): the two are of different models"
    )


def _auto_class(directory: Path, config: Any, task_type: str | None) -> str:
    architectures = getattr(config, "architectures", None) or [""]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise GraphError(
            f"{str(directory / 'config.json')!r}: 'architectures' is {architectures!r}; it must be a list of class "
            'names, such as ["BertModel"], or be left out'
        )
    architecture = architectures[0]
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
    if (getattr(config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in inspect.signature(
        model.forward
    ).parameters:
        inputs["token_type_ids"] = (torch.arange(12) >= 7).long().expand(2, 12).clone()  # which tokenizers give, too
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7].clone()
    if hasattr(config, "use_cache"):
        config.use_cache = False
        if getattr(model, "can_generate", lambda: False)():
            inputs["use_cache"] = False
    if _takes_one_text(model, inputs):
        inputs |= {name: value[:1] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return inputs


def _takes_one_text(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the model, for want of a padding token, refuses a batch: decoders that classify do."""
    import torch

    if model.config.get_text_config().pad_token_id is not None:
        return False
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return False
    try:
        with torch.no_grad():
            model(**inputs)
    except ValueError:
        return True
    return False


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
