"""Weights in a file beside the .onnx: where they are, and whether they are those it was written with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx import ExportError

if TYPE_CHECKING:
    import onnx

DATA_HASH_KEY = "lora_fx.data_sha256"


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """Hash of a file's size, and of 128 blocks spread evenly over it: which file it was, not whether it is whole."""
    digest, size, block = hashlib.sha256(), path.stat().st_size, 2**16
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for number in range(min(128, -(-size // block))):
            file.seek(max(0, size - block) * number // 127)
            digest.update(file.read(block))
    return digest.hexdigest()


def data_locations(model: onnx.ModelProto) -> list[str]:
    """The files that the graph's weights are in, as the graph names them; the .onnx itself may be renamed."""
    nodes = itertools.chain(model.graph.node, *(function.node for function in model.functions))
    graphs = (model.graph, *_inside(nodes))
    entries = [entry for graph in graphs for tensor in graph.initializer for entry in tensor.external_data]
    return list(dict.fromkeys(entry.value for entry in entries if entry.key == "location"))


def _inside(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """The graphs inside of nodes: branches, and bodies of loops."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        for graph in (attribute.g, *attribute.graphs):
            yield graph
            yield from _inside(graph.node)


def check_external_data(file: Path, model: onnx.ModelProto) -> None:
    """The graph names the hash of its weights: another file of the same size would load without a word.

    Args:
        file: the .onnx file.
        model: what is in it, without its external data.

    Raises:
        ExportError: if the weights are not those that the graph was written with.
    """
    expected = next((prop.value for prop in model.metadata_props if prop.key == DATA_HASH_KEY), None)
    places = data_locations(model)
    if expected is None or len(places) != 1:
        return  # not ours, or another tool has moved the weights since
    data = file.parent / places[0]
    if data.is_file() and sha256(data) != expected:
        raise ExportError(
            f"{data.name} does not hold the weights that {file.name} was written with (sha256 differs): one of the "
            f"two was replaced or damaged; export both again. A tool that writes the weights anew on purpose "
            f"has to drop the graph's metadata entry {DATA_HASH_KEY!r}"
        )
