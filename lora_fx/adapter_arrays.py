"""An adapter directory as numpy arrays: for work on files, where there is neither a model nor torch.

What `load_adapter` reads with a graph at hand is read here without one: keys, scalings and arrays, in PEFT's shapes.
What they mean for a weight is for whoever has the weight to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .adapter_files import (
    CONFIG_FILE,
    KEY_OF_BIAS,
    KEY_OF_MAGNITUDE,
    KEY_OF_ROWS,
    KEYS,
    KEYS_OF_LOOKUPS,
    PREFIX,
    WEIGHTS_FILE,
    AdapterFiles,
    checked_path,
    is_left_behind,
    open_adapter,
    parse_key,
)
from .adapter_integrity import Integrity, digest_of, sha256_of, views_of
from .base_note import KEY
from .config import ALL_LINEAR, LoraConfig, scaling_of
from .errors import AdapterError, ConfigError
from .init_options import init_of
from .matching import matches_names, matches_target, matching_key
from .packed_notes import METADATA, part_keys

Array = NDArray[Any]
T = TypeVar("T")

# safetensors' names of types; bfloat16, which numpy has not, is widened.
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
_PIECE = 1 << 16  # elements that are looked at in one go
_FLOATS = ("F32", "F16", "BF16")
_NESTED = re.compile(r"(\.base_layer)+$")


@dataclass(frozen=True, eq=False)
class LowRankArrays:
    """A and B of one module, or of one of its parameters.

    Attributes:
        path: the module's name.
        nesting: how many `base_layer`s deep PEFT keeps them: of several parameters of one module that
            target_parameters means, the first registered lies deepest.
        a, b: float32, or float64, in PEFT's shapes: (r, in) and (out, r); (r, in, *kernel) and (out, r / groups, 1, …);
            or, of experts, (experts · r, in) and (out, r · experts).
        bias: of B, (out,), with lora_bias.
        magnitude: of each output, with use_dora.
        is_lookup: whether they are an embedding's, whose `in` is the vocabulary.
    """

    path: str
    nesting: int
    a: Array
    b: Array
    bias: Array | None = None
    magnitude: Array | None = None
    is_lookup: bool = False


@dataclass(frozen=True, eq=False)
class AdapterArrays:
    """What an adapter directory holds.

    Attributes:
        directory: where it was read from.
        config: its configuration.
        low_rank: A and B, in the order of the file.
        full: {tensor's full name: value} of what was trained in full: modules_to_save, and biases.
        rows: {module: rows of its embedding, (rows, dim)}, of trainable_token_indices.
        metadata: the file's own.
        sha256: of the tensors' file.
        data_sha256: of the tensors' bytes alone, whatever the header says: `adapter_integrity.digest_of`.
    """

    directory: Path
    config: LoraConfig
    low_rank: tuple[LowRankArrays, ...]
    full: Mapping[str, Array]
    rows: Mapping[str, Array]
    metadata: Mapping[str, str]
    sha256: str
    data_sha256: str

    def rank_at(self, *names: str) -> int:
        """r for a module, or a parameter, that goes by these names."""
        key = matching_key(names, self.config.rank_pattern)
        return self.config.r if key is None else self.config.rank_pattern[key]

    def scaling_at(self, *names: str) -> float:
        """What multiplies B @ A of a module, or a parameter, that goes by these names."""
        key = matching_key(names, self.config.alpha_pattern)
        alpha = self.config.lora_alpha if key is None else self.config.alpha_pattern[key]
        return scaling_of(alpha, self.rank_at(*names), use_rslora=self.config.use_rslora)


def read_adapter(
    directory: str | os.PathLike[str], *, adapter_name: str = "default", integrity: Integrity = "checked"
) -> AdapterArrays:
    """An adapter directory that PEFT or `save_adapter` wrote, as numpy arrays; torch is not needed.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        adapter_name: a PEFT directory of several adapters is searched for the sub-directory of that name.
        integrity: as for `load_adapter`; "ignored" also keeps others from looking at the note on the base.

    Raises:
        AdapterError: if files are missing, broken, or not those that were saved together, a tensor is not finite, or
            one of A and B is missing.
        ConfigError: if the configuration cannot be followed, or the adapter took something out of the base.
    """
    return _read(directory, adapter_name, integrity, mapped=False)[0]


def map_adapter(
    directory: str | os.PathLike[str], *, adapter_name: str = "default", integrity: Integrity = "checked"
) -> tuple[AdapterArrays, Callable[[], object]]:
    """What `read_adapter` reads, as views of the mapped file: an adapter may be larger than the memory.

    16 bits stay as they are stored, float16 as such and bfloat16 as uint16.

    Returns:
        The arrays, and what lets go of the pages that were read of them.

    Raises:
        AdapterError, ConfigError: as `read_adapter`.
    """
    return _read(directory, adapter_name, integrity, mapped=True)


def _read(
    directory: str | os.PathLike[str], adapter_name: str, integrity: Integrity, *, mapped: bool
) -> tuple[AdapterArrays, Callable[[], object]]:
    if adapter_name != "default" and not (checked_path(directory) / adapter_name).is_dir():
        raise AdapterError(
            f"{str(directory)!r} has no sub-directory {adapter_name!r}; leave adapter_name out for its own"
        )
    files = open_adapter(directory, adapter_name, integrity, mapped=mapped)
    _check_start(files.config, files.folder)
    path = files.folder / WEIGHTS_FILE
    views = _views(files)
    in_parts = part_keys(files.metadata.get(METADATA))  # which the whole has, too
    tensors = {
        key: _array(key, *view, path, mapped=mapped)
        for key, view in zip(views, _one_by_one(views.values(), files.let_go), strict=True)
        if key.removeprefix(PREFIX) not in in_parts
    }
    if not tensors:
        raise AdapterError(f"{str(path)!r} holds no tensor; save the adapter again")
    low_rank, full, rows = _sorted_out(tensors, path)
    _check_config(files.config, low_rank, full, files.folder)
    sha256 = sha256_of(files.weights, files.let_go)
    metadata = {name: text for name, text in files.metadata.items() if integrity != "ignored" or name != KEY}
    arrays = AdapterArrays(files.folder, files.config, low_rank, full, rows, metadata, sha256, data_sha256_of(files))
    return arrays, files.let_go


def data_sha256_of(files: AdapterFiles) -> str:
    """sha256 of the tensors' bytes alone, whatever the header says: `AdapterArrays.data_sha256`."""
    return digest_of(_one_by_one((data for _, _, data in _views(files).values()), files.let_go))


def _views(files: AdapterFiles) -> dict[str, tuple[str, list[int], memoryview]]:
    """{key: (type, shape, bytes)} of what the adapter is."""
    return {key: view for key, view in views_of(files.weights).items() if not is_left_behind(key)}


def _one_by_one(items: Iterable[T], let_go: Callable[[], object]) -> Iterator[T]:
    """The items, letting go of the memory of each when it is done with."""
    for item in items:
        yield item
        let_go()


def _check_config(
    config: LoraConfig, low_rank: tuple[LowRankArrays, ...], full: Mapping[str, Array], folder: Path
) -> None:
    """Whether the tensors are those that the configuration asks for, as far as that can be told without a model."""
    for low in low_rank:
        for option, wanted, there in (
            ("use_dora", config.use_dora, low.magnitude is not None),
            ("lora_bias", config.lora_bias, low.bias is not None),
        ):
            if wanted != there:
                raise AdapterError(
                    f"{str(folder)!r}: adapter_config.json says {option}={wanted}, and the tensors of {low.path!r} "
                    f"{'are with' if there else 'are without'} it; the two files do not belong together. Take both "
                    "from where they were saved"
                )
        is_named = config.target_parameters or config.ensure_weight_tying  # which adapts more than the targets
        if not is_named and not _is_targeted(low.path, config):
            raise AdapterError(
                f"{str(folder)!r} holds A and B of {low.path!r}, which target_modules and exclude_modules of "
                "adapter_config.json rule out; the two files do not belong together. Take both from where they were "
                "saved"
            )
    missing = [
        entry
        for entry in config.modules_to_save or ()
        if config.task_type is None and not any(f".{name}".find(f".{entry}.") >= 0 for name in full)
    ]
    if missing and not full:
        raise AdapterError(
            f"{str(folder)!r}: adapter_config.json says modules_to_save={list(config.modules_to_save or ())!r}, and "
            f"the file has no tensor of {missing[0]!r}; it is incomplete, so save it again"
        )


def _is_targeted(path: str, config: LoraConfig) -> bool:
    """Whether a module may be meant; the output projection of an attention goes with the attention."""
    targets = config.target_modules
    paths = [path, path.removesuffix("out_proj").removesuffix("."), f"{path}.in_proj_weight".lstrip(".")]
    if config.exclude_modules and matches_names(path, config.exclude_modules):
        return False
    if targets is None or targets == ALL_LINEAR or not targets:
        return True
    return any(matches_target(name, targets, config.layers_to_transform, config.layers_pattern) for name in paths)


def _check_start(config: LoraConfig, folder: Path) -> None:
    """What an adapter took out of the base is not in its file."""
    start = config.init_lora_weights
    if isinstance(start, str) and start != "gaussian" and init_of(start).changes_base:
        raise ConfigError(
            f"{str(folder / CONFIG_FILE)!r}: init_lora_weights={start!r} takes A and B out of the base's weights, "
            "which is undone only with the model at hand; save the adapter as plain LoRA first: lora_fx.save_adapter "
            "always does, PEFT with path_initial_model_for_weight_conversion="
        )


def _array(key: str, kind: str, shape: list[int], data: memoryview, path: Path, *, mapped: bool) -> Array:
    """16 bits become float32, which takes twice their size and nothing besides; others stay in the file's memory.

    Those of a mapped file stay there, whatever they are.
    """
    if kind not in _TYPES or (".lora_" in key and kind not in (*_FLOATS, "F64")):
        raise AdapterError(f"{str(path)!r}: {key!r} is {kind}; adapters are float32, float16 or bfloat16; save it so")
    stored = np.frombuffer(data, _TYPES[kind])
    values = stored if mapped else wide(stored)
    if kind in (*_FLOATS, "F64") and not all(
        np.isfinite(wide(values[at : at + _PIECE])).all() for at in range(0, values.size, _PIECE)
    ):
        raise AdapterError(f"{str(path)!r}: {key!r} holds NaN or Inf; train it again, or take an earlier one")
    return values.reshape(shape)


def wide(values: Array) -> Array:
    """What `map_adapter` reads, in the type in which `read_adapter` has it: 16 bits become float32."""
    if values.dtype == np.uint16:  # bfloat16
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return values.astype(np.float32) if values.dtype == np.float16 else values


def widened(low: LowRankArrays) -> LowRankArrays:
    """A and B of `map_adapter` as `read_adapter` has them."""
    bias, magnitude = (None if each is None else wide(each) for each in (low.bias, low.magnitude))
    return replace(low, a=wide(low.a), b=wide(low.b), bias=bias, magnitude=magnitude)


def _sorted_out(
    tensors: Mapping[str, Array], path: Path
) -> tuple[tuple[LowRankArrays, ...], dict[str, Array], dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    full: dict[str, Array] = {}
    for key, value in tensors.items():
        meant = parse_key(key, repr(str(path)))
        place, name = (full, meant.path) if meant.end is None else (found.setdefault(meant.path, {}), meant.end)
        if name in place and not np.array_equal(place[name], value):
            raise AdapterError(f"{str(path)!r} holds two tensors that {key!r} may mean; keep one of them")
        place[name] = value
    rows = {_module(name): tensors.pop(KEY_OF_ROWS) for name, tensors in found.items() if KEY_OF_ROWS in tensors}
    low_rank = tuple(_low_rank(name, tensors, path) for name, tensors in found.items() if tensors)
    return low_rank, full, rows


def _low_rank(name: str, tensors: Mapping[str, Array], path: Path) -> LowRankArrays:
    is_lookup = any(key in tensors for key in KEYS_OF_LOOKUPS)
    for key in KEYS_OF_LOOKUPS if is_lookup else KEYS:
        if key not in tensors:
            there = ", ".join(tensors)
            raise AdapterError(
                f"{str(path)!r} holds {there} of {name!r}, but no {key}; it is incomplete: save it again"
            )
    a, b = (tensors[key] for key in (KEYS_OF_LOOKUPS if is_lookup else KEYS))
    if a.ndim < 2 or a.ndim != b.ndim or 0 in (*a.shape, *b.shape) or len(a) % b.shape[1]:
        raise AdapterError(
            f"{str(path)!r}: A of {name!r} has the shape {list(a.shape)} and B {list(b.shape)}, which do not fit "
            "each other; save the adapter again"
        )
    nested = _NESTED.search(name)
    return LowRankArrays(
        _module(name),
        nested[0].count(".") if nested else 0,
        a,
        b,
        tensors.get(KEY_OF_BIAS),
        tensors.get(KEY_OF_MAGNITUDE),
        is_lookup,
    )


def _module(name: str) -> str:
    """A module's own name, of one that PEFT nests in `base_layer`s."""
    return name.replace(".base_layer", "").removeprefix("base_layer.")
