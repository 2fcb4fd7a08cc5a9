"""The tensors of a checkpoint, by the names that an adapter has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapter_arrays import AdapterArrays, LowRankArrays
from .adapter_places import AdapterPlaces, find_renaming, joined
from .errors import closest
from .hf_checkpoint import Checkpoint
from .stored_tensors import StoredTensor

# What tied weights are called, and the classes of models that do nothing else for being tied.
TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "word_embedding")
HEADS = ("lm_head", "embed_out")
DECODERS = ("ForCausalLM", "LMHeadModel")
_WITH_HEADS = (*DECODERS, "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining", "LMHead")


class CheckpointPlaces(AdapterPlaces):
    """The tensors of a checkpoint, by the names that an adapter has for them."""

    def __init__(self, checkpoint: Checkpoint, adapter: AdapterArrays) -> None:
        super().__init__(adapter)
        self.checkpoint = checkpoint
        known = {name.rpartition(".")[0] for name in checkpoint.tensors}
        known |= {name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 3}
        paths = [low.path for low in adapter.low_rank] or list(adapter.rows)
        paths = paths or [name.rpartition(".")[0] for name in adapter.full]
        heads = [path for path in paths if last_of(path) in HEADS and path not in known]  # tied, if they are anywhere
        self.rename = find_renaming([path for path in paths if path not in heads], known)

    def tensor(self, name: str) -> StoredTensor | None:
        """A tensor by its full name in the adapter."""
        return self.checkpoint.tensors.get(self.rename(name))

    def shape_of_parameter(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a tensor by its full name in the adapter; None if there is none."""
        found = self.tensor(parameter)
        return None if found is None else found.shape

    def has_module(self, low: LowRankArrays) -> bool:
        """Whether there is the weight of the module that A and B are named after."""
        return self.tensor(joined(low.path, "weight")) is not None

    def _no_parameter(self, meant: list[str]) -> str:
        return self.no_place(meant[0])

    def no_place(self, name: str) -> str:
        """What to say where there is no tensor of that name."""
        names, own = list(self.checkpoint.tensors), self.rename(name)
        twins = [f"{own}_v", f"{own}_g", own.replace(".weight", ".parametrizations.weight.original0")]
        computed = next((each for each in twins if each in self.checkpoint.tensors), None)
        if computed is not None:
            return (
                f"the checkpoint has {computed!r}, of which {own!r} is computed, so there is no weight to fold into; "
                "fold with the model: lora-fx fold MODEL ADAPTER OUT"
            )
        return (
            f"the checkpoint has no tensor for the adapter's {own!r}.{closest(own, names)} Is this adapter of this "
            "model? If names differ between the files and the model, fold with it: lora-fx fold MODEL ADAPTER OUT"
        )

    @property
    def model_type(self) -> str | None:
        """What config.json says."""
        found = self.checkpoint.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def is_tied(self) -> bool:
        """Whether transformers would tie what the checkpoint has once; where nothing is said, the class decides."""
        config = self.checkpoint.config
        said = [each.get("tie_word_embeddings") for each in (config, *_nested(config))]
        return bool(config) and False not in said

    @property
    def has_head(self) -> bool:
        """Whether the model gives back words, so that its table may be tied to what makes them."""
        named = self.checkpoint.config.get("architectures")
        names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        return not names or any(name.endswith(_WITH_HEADS) for name in names)

    def table_of_head(self, path: str, shape: tuple[int, ...] | None) -> StoredTensor | None:
        """The table that a head is tied to, of which the checkpoint has nothing; None if it is no such head."""
        if last_of(path) not in HEADS or not self.is_tied:
            return None
        tables = [t for name, t in self.checkpoint.tensors.items() if last_of(module_of(name)) in TABLES]
        fitting = [table for table in tables if shape is None or table.shape == shape]
        return fitting[0] if len(fitting) == 1 else None


def _nested(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, Mapping)]


def last_of(path: str) -> str:
    """The last part of a dotted name."""
    return path.rpartition(".")[2]


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]
