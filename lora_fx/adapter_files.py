"""PEFT's two files, without torch: where they are, what the config says, what a tensor's key means.

`adapter_config.json` holds the configuration, `adapter_model.safetensors` the tensors, under keys such as
`base_model.model.encoder.layer.0.attention.self.query.lora_A.weight`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from .adapter_integrity import Integrity, check_seal, metadata_of
from .config import LoraConfig
from .errors import AdapterError, ConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Metadata: names of weights that lie the other way round, as a JSON list: matrices that are stored (in, out), experts
# of such, kernels of transposed convolutions. Square ones do not tell.
TURNED = "lora_fx.turned"

# What A and B are called in the file: of embeddings, and of everything else.
KEYS_OF_LOOKUPS = ("lora_embedding_A", "lora_embedding_B")
KEYS = ("lora_A.weight", "lora_B.weight")
# With lora_bias, and with use_dora.
KEY_OF_BIAS, KEY_OF_MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
# Rows of trainable_token_indices, as they are, whatever the name says.
KEY_OF_ROWS = "token_adapter.trainable_tokens_delta"

# The last lora_A or lora_B counts: a module may be called that itself.
_HALF = re.compile(r"^((?P<path>.*)\.)?(?P<name>lora_[AB])(\.(?P<adapter>[^.]+))?\.weight$")
_BIAS = re.compile(r"^((?P<path>.*)\.)?lora_B(\.(?P<adapter>[^.]+))?\.bias$")
_MAGNITUDE = re.compile(r"^((?P<path>.*)\.)?lora_magnitude_vector(\.[^.]+){0,2}$")
_LOOKUP = re.compile(r"^((?P<path>.*)\.)?(?P<name>lora_embedding_[AB])(\.(?P<adapter>[^.]+))?$")
_SAVED_COPY = re.compile(r"\.modules_to_save\.([^.]+\.)?(?=[^.]+$)")
_ROWS = re.compile(r"^((?P<path>.*)\.)?token_adapter\.trainable_tokens_delta(\.[^.]+)?$")
_OTHER_LORA = re.compile(r"\blora_(diag|A\.bias)")


@dataclass(frozen=True)
class TensorKey:
    """What a key in adapter_model.safetensors means.

    Attributes:
        key: as it stands in the file.
        path: the module's name for A and B; the tensor's full name for tensors trained in full.
        end: what follows the module's name, without the adapter's, as in `KEYS`; None for tensors trained in full.
    """

    key: str
    path: str
    end: str | None


def find_adapter_directory(directory: str | os.PathLike[str], adapter_name: str) -> Path:
    """`directory`, or the sub-directory of that name, where PEFT puts adapters that are not "default".

    Raises:
        AdapterError: if neither holds an adapter.
    """
    root = checked_path(directory)
    # The root of a directory of several adapters holds "default"; another name means its own sub-directory first.
    for candidate in (root, root / adapter_name) if adapter_name == "default" else (root / adapter_name, root):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    if not root.exists():
        raise AdapterError(f"there is no directory {str(root)!r}; give the one that holds {CONFIG_FILE}")
    if root.is_file():
        raise AdapterError(f"{str(root)!r} is a file; give the directory that it is in: {str(root.parent)!r}")
    raise AdapterError(
        f"{str(root)!r} holds no {CONFIG_FILE}, so it is no adapter directory; "
        "lora_fx.save_adapter and PEFT's save_pretrained write one"
    )


def checked_path(directory: object) -> Path:
    """The path that `directory` says.

    Raises:
        AdapterError: if it says none.
    """
    if not isinstance(directory, (str, os.PathLike)) or "\0" in os.fspath(directory):
        raise AdapterError(f"directory={directory!r} must be the path of an adapter's directory")
    return Path(directory)


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter, read once, and found to belong together.

    Attributes:
        folder: where they lie.
        config: what adapter_config.json says.
        weights: adapter_model.safetensors, as it is.
        metadata: of its header.
        let_go: of a mapped file, gives back the memory of what was read; else does nothing.
    """

    folder: Path
    config: LoraConfig
    weights: bytes | memoryview
    metadata: dict[str, str]
    let_go: Callable[[], object] = lambda: None

    @property
    def where(self) -> str:
        """The weights' file, for messages."""
        return repr(str(self.folder / WEIGHTS_FILE))


def open_adapter(
    directory: str | os.PathLike[str], adapter_name: str, integrity: Integrity, *, mapped: bool = False
) -> AdapterFiles:
    """Read an adapter directory, or its sub-directory `adapter_name`.

    Args:
        integrity: see `check_seal`.
        mapped: leave the tensors where they are, in a file that may be larger than the memory.

    Raises:
        AdapterError: if files are missing, broken, or not those that were saved together.
        ConfigError: if the configuration is none, or not supported.
    """
    folder = find_adapter_directory(directory, adapter_name)
    try:
        text = (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise AdapterError(f"{str(folder / CONFIG_FILE)!r} cannot be read: {error.strerror}") from error
    config = _config_of(text, folder / CONFIG_FILE)
    path = weights_path(folder)
    let_go: Callable[[], object] = lambda: None
    try:
        weights: bytes | memoryview
        if mapped:
            weights, let_go = _mapped(path)
        else:
            weights = path.read_bytes()
            safetensors.deserialize(weights)  # type: ignore[no-untyped-call]
        metadata = metadata_of(weights)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{str(path)!r} is no readable safetensors file: {error}; copy it whole, or save it again"
        ) from error
    check_seal(weights, text, repr(str(folder)), integrity, let_go if mapped else None)
    return AdapterFiles(folder, config, weights, metadata, let_go)


def _mapped(path: Path) -> tuple[memoryview, Callable[[], object]]:
    """The bytes of a readable safetensors file, and what lets go of those that were read."""
    with safetensors.safe_open(path, "np"):  # which looks at all of the header
        pass
    with open(path, "rb") as file:
        # A private copy that nobody writes to: arrays of it count as writable, which torch asks for.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    let_go = lambda: mapping.madvise(mmap.MADV_DONTNEED) if hasattr(mmap, "MADV_DONTNEED") else None
    return memoryview(mapping), let_go


def weights_path(directory: Path) -> Path:
    """The safetensors file of an adapter directory.

    Raises:
        AdapterError: if there is none; a pickled `.bin` is not read.
    """
    path = directory / WEIGHTS_FILE
    if path.is_file():
        return path
    if (directory / "adapter_model.bin").exists():
        raise AdapterError(
            f"{str(directory)!r} holds adapter_model.bin, a pickle, which can run code and is not read; "
            "load it with PEFT and save it again: model.save_pretrained(directory)"
        )
    raise AdapterError(
        f"{str(directory)!r} has no {WEIGHTS_FILE}; the adapter is incomplete, so copy it whole, or save it again"
    )


def read_config(directory: Path) -> LoraConfig:
    """The configuration in a directory's adapter_config.json.

    Raises:
        AdapterError: if the file is not a JSON object, or says a key twice.
        ConfigError: if it is no LoRA configuration, or uses what is not supported.
    """
    path = directory / CONFIG_FILE
    try:
        return _config_of(path.read_bytes(), path)
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _config_of(text: bytes, path: Path) -> LoraConfig:
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{str(path)!r} is not a JSON configuration: {error}; copy it whole, or save it again"
        ) from error
    if not isinstance(fields, dict):
        raise AdapterError(
            f"{str(path)!r} holds a JSON {type(fields).__name__}, not an object of fields; save it again"
        )
    for required in ("peft_type", "r"):
        if required not in fields:
            raise AdapterError(
                f"{str(path)!r} has no {required!r}; is it an adapter's configuration? save_adapter writes one"
            )
    try:
        return LoraConfig.from_peft(fields)
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error


def config_text(config: LoraConfig, **changes: Any) -> str:
    """adapter_config.json's text. The order in rank_pattern and alpha_pattern decides, so it is kept."""
    return json.dumps(dict(sorted((config.to_peft() | changes).items())), indent=2) + "\n"


def parse_key(key: str, file: str) -> TensorKey:
    """What a tensor's key means.

    Raises:
        AdapterError: for a kind of adapter tensor that is not supported.
    """
    name = key.removeprefix(PREFIX)
    if _OTHER_LORA.search(name):
        raise AdapterError(f"{file!r} holds {key!r}: a kind of adapter that lora_fx does not support")
    if match := _HALF.match(name):
        return TensorKey(key, match["path"] or "", f"{match['name']}.weight")
    if match := _BIAS.match(name):
        return TensorKey(key, match["path"] or "", KEY_OF_BIAS)
    if match := _MAGNITUDE.match(name):
        return TensorKey(key, match["path"] or "", KEY_OF_MAGNITUDE)
    if match := _ROWS.match(name):
        return TensorKey(key, match["path"] or "", KEY_OF_ROWS)
    if match := _LOOKUP.match(name):
        return TensorKey(key, match["path"] or "", match["name"])
    name = name.replace(".base_layer.", ".").removeprefix("base_layer.")
    return TensorKey(key, _SAVED_COPY.sub(".", name), None)


def is_left_behind(key: str) -> bool:
    """Whether the tensor is the base's own, which a module trained in full does not use; bias="all" writes it too."""
    return ".original_module." in key


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key!r} stands twice")
        fields[key] = value
    return fields


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
