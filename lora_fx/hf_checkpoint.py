"""A Hugging Face checkpoint as it lies: shards, what says which tensor is in which, and all other files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LoraFxError
from .stored_tensors import StoredFile, StoredTensor, read_stored

INDEX_ENDING, ENDING = ".safetensors.index.json", ".safetensors"
CONFIG = "config.json"

# Weights in another form, which are the base's whatever is done to the shards, and adapters.
_WEIGHTS = {
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".npz", ".pkl",
    ".tflite", ".mlmodel", ".nemo", ".safetensors",
}  # fmt: skip
_ADAPTERS = ("adapter_config.json", "adapter_model")
_LARGEST_JSON = 2**28


@dataclass(frozen=True)
class Checkpoint:
    """A directory of weights.

    Attributes:
        directory: without links.
        shards: the files of tensors, in the order of their names.
        tensors: {name: where it lies}.
        index: the file that says which tensor is in which shard; None if there is one shard.
        config: what config.json says; empty without one.
        others: files that go along, as paths from the directory.
        left_out: files that hold the base's weights in another form, and directories of tools.
    """

    directory: Path
    shards: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]
    index: str | None
    config: Mapping[str, Any]
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]

    def shard_of(self, tensor: StoredTensor) -> StoredFile:
        """The file that a tensor lies in."""
        return next(shard for shard in self.shards if shard.path == tensor.path)


def read_checkpoint(
    directory: str | os.PathLike[str], error: type[LoraFxError], aside: Path | None = None
) -> Checkpoint:
    """What a directory of safetensors holds: headers are read, and no tensor.

    Args:
        directory: of the checkpoint.
        aside: where its index and config.json are meanwhile, if they are not in their place.

    Raises:
        error: if there is none, files are missing or broken, or what they say cannot be: a shard outside of the
            directory, a tensor in two of them.
    """
    if not isinstance(directory, (str, os.PathLike)) or "\0" in os.fspath(directory):
        raise error(f"{directory!r} must be the path of a directory with {ENDING} files")
    root = Path(os.path.realpath(directory))
    try:
        if not root.is_dir():
            raise error(f"there is no directory {str(directory)!r}; give the one that holds the {ENDING} files")
        files = sorted(_files(root, error))
        hidden = [] if aside is None else [aside / name for name in os.listdir(aside)]
        places = {file.name: root / file for file in files if len(file.parts) == 1}
        places |= {path.name: path for path in hidden if path.name not in places}
        index, names = _shards(places, root, error)
        shards = tuple(read_stored(root / name, error) for name in names)
        tensors = _tensors(shards, error)
        if index is not None:
            _check_index(places[index], shards, error)
        own = {*map(Path, names), *([Path(index)] if index else [])}
        others = [file for file in files if file not in own and not _is_left_out(file)]
        left_out = [file for file in files if file not in own and _is_left_out(file)]
        config = read_json(places[CONFIG], error) if CONFIG in places else {}
    except OSError as cause:
        raise error(
            f"{str(directory)!r} cannot be read ({cause.strerror or cause}); look at its permissions"
        ) from cause
    return Checkpoint(root, shards, tensors, index, config, tuple(others), tuple(left_out))


def read_json(path: Path, error: type[LoraFxError]) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        error: if it holds none.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("it is too large to be one")
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{str(path)!r} is no readable JSON file: {cause}; mend it, or copy it anew") from cause
    if not isinstance(found, dict):
        raise error(f"{str(path)!r} holds a JSON {type(found).__name__}, and must hold an object; copy it anew")
    return found


def _files(root: Path, error: type[LoraFxError]) -> Iterator[Path]:
    """Regular files below the root, as paths from there; directories that begin with a dot are tools' own."""
    for place, directories, names in os.walk(root):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for path in (Path(place, name) for name in [*names, *directories]):
            if path.is_symlink():
                _check_link(root, path, error)
            elif path.name in directories:
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                raise error(f"{str(path)!r} is no regular file; replace it by one, or remove it from the checkpoint")
            yield path.relative_to(root)


def _check_link(root: Path, path: Path, error: type[LoraFxError]) -> None:
    """A link may stay inside, or lead where the hub's cache has its files: what it leads to is copied with the rest."""
    real = Path(os.path.realpath(path))
    if real.is_relative_to(root):
        return
    repository = root.parent.parent  # models--x/snapshots/revision, and models--x/blobs
    if root.parent.name == "snapshots" and real.is_relative_to(repository / "blobs"):
        return
    raise error(
        f"{str(path)!r} leads out of the checkpoint, to {str(real)!r}; replace the link by the file, or remove it"
    )


def _shards(places: Mapping[str, Path], root: Path, error: type[LoraFxError]) -> tuple[str | None, list[str]]:
    """(the index, the shards' names), of {name: where it is}."""
    indexes = [name for name in places if name.endswith(INDEX_ENDING)]
    files = [name for name in places if name.endswith(ENDING) and not name.startswith("adapter_model")]
    if len(indexes) > 1:
        raise error(f"{str(root)!r} holds several indexes, {indexes!r}; leave the one that is meant in a directory")
    if not indexes:
        chosen = ["model.safetensors"] if "model.safetensors" in files else files
        if not files:
            if "adapter_config.json" in places:
                raise error(
                    f"{str(root)!r} holds an adapter, and no weights of a base model; give the directory of the base "
                    "here, and this one as the adapter"
                )
            raise error(f"{str(root)!r} holds no {ENDING} file; give a directory that does, or convert its weights")
        if len(chosen) > 1:
            raise error(
                f"{str(root)!r} holds {len(files)} {ENDING} files, {files[:3]!r} among them, and no "
                f"model{INDEX_ENDING} to say which are the shards; copy it along"
            )
        return None, chosen
    index = indexes[0]
    single = index.removesuffix(".index.json")
    said = read_json(places[index], error).get("weight_map")
    if not isinstance(said, dict) or not said or not all(isinstance(each, str) for each in said.values()):
        raise error(f"{str(root / index)!r} has no weight_map of names to files; copy it whole")
    shards = sorted(set(said.values()))
    for shard in shards:
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(ENDING):
            raise error(f"{str(root / index)!r} names {shard!r}, which must be a {ENDING} file beside it; copy it anew")
        if shard not in places:
            raise error(f"{str(root)!r} lacks {shard!r}, which {index} names; copy the checkpoint whole")
    if single in files and single not in shards:
        raise error(f"{str(root)!r} holds both {single} and {index}, two sets of weights; remove one of them")
    return index, shards


def _tensors(shards: tuple[StoredFile, ...], error: type[LoraFxError]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in found:
            raise error(
                f"{tensor.name!r} stands in {found[tensor.name].path.name} and in {tensor.path.name}; leave it in one"
            )
        found[tensor.name] = tensor
    return found


def _check_index(index: Path, shards: tuple[StoredFile, ...], error: type[LoraFxError]) -> None:
    said = read_json(index, error)["weight_map"]
    there = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
    wrong = sorted(name for name in said if said[name] != there.get(name))
    if wrong:
        name = wrong[0]
        place = there.get(name)
        raise error(
            f"{str(index)!r} says that {name!r} is in {said[name]!r}, and it is in {place or 'none of the files'} "
            f"({len(wrong)} such tensors); copy the checkpoint whole"
        )


def _is_left_out(file: Path) -> bool:
    return file.suffix.lower() in _WEIGHTS or file.name.startswith(_ADAPTERS) or file.name.endswith(".index.json")


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says, and the configs within it, without tied embeddings."""
    return _untied(config) | {"tie_word_embeddings": False}


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: _untied(value) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {"tie_word_embeddings": False} if "tie_word_embeddings" in config else changed
