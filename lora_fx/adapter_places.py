"""Which weights of a file an adapter's names mean, where there is no model to ask: rules of names and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from .adapter_arrays import AdapterArrays, LowRankArrays
from .config import ALL_LINEAR
from .errors import AdapterError
from .matching import matches_names
from .tables import some_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Renaming:
    """What the file's names begin with and the adapter's do not, or the other way round."""

    added: str = ""
    cut: str = ""

    def __call__(self, name: str) -> str:
        """The file's name for the adapter's."""
        return self.added + name.removeprefix(self.cut)

    @property
    def note(self) -> str | None:
        """What to say about it."""
        if self.cut:
            return f"names of the adapter begin with {self.cut!r}, which the file's have not"
        return f"names in the file begin with {self.added!r}, which the adapter's have not" if self.added else None


def find_renaming(paths: list[str], known: set[str]) -> Renaming:
    """How names differ, if none is found as it is and exactly one difference in the beginning explains all of them.

    Args:
        paths: the adapter's names of modules.
        known: the file's.
    """
    if not paths or any(path in known for path in paths):
        return Renaming()
    first = paths[0]
    found = [Renaming(added=name[: -len(first)]) for name in known if name.endswith(f".{first}")]
    found += [Renaming(cut=first[: -len(name)]) for name in known if name and first.endswith(f".{name}")]
    fitting = [each for each in found if all(path.startswith(each.cut) and each(path) in known for path in paths)]
    return fitting[0] if len(fitting) == 1 else Renaming()


def joined(path: str, name: str) -> str:
    """The full name of a module's own tensor."""
    return f"{path}.{name}" if path else name


class AdapterPlaces:
    """What an adapter's A and B are for, among the weights of one file."""

    # What tells a file's names where they are lost.
    _HELP = "fold in the graph, and write that"

    def __init__(self, adapter: AdapterArrays) -> None:
        self.adapter = adapter
        self.rename = Renaming()

    def shape_of_parameter(self, parameter: str) -> Shape | None:
        """The shape, in the model, of a parameter by its full name in the adapter; None if the file has none."""
        raise NotImplementedError

    def has_module(self, low: LowRankArrays) -> bool:
        """Whether the file has the weight of the module that A and B are named after."""
        raise NotImplementedError

    def attention_of(self, path: str) -> str | None:
        """The nn.MultiheadAttention whose output projection this is: PEFT's patterns name it by that."""
        attention = path.removesuffix("out_proj").removesuffix(".")
        if attention == path:
            return None
        is_adapted = any(low.path == attention for low in self.adapter.low_rank)  # a file may have lost the names
        packed = self.shape_of_parameter(joined(attention, "in_proj_weight"))
        return attention if is_adapted or packed is not None else None

    def pattern_names(self, path: str) -> tuple[str, ...]:
        """What the keys of rank_pattern and alpha_pattern are matched with."""
        attention = self.attention_of(path)
        return (path,) if attention is None else (path, attention)

    def names_at_slot(self, low: LowRankArrays) -> tuple[str, ...]:
        """What the keys of the patterns are matched with, for modules and for parameters."""
        parameter = self.parameter_of(low)
        if parameter is None:
            return self.pattern_names(low.path)
        return (parameter,) if self.adapter.config.target_parameters else (low.path,)

    def scaling_at_slot(self, low: LowRankArrays) -> float:
        """What multiplies B @ A, for modules and for parameters."""
        return self.adapter.scaling_at(*self.names_at_slot(low)) * self._times_counted(low)

    def scaling_of_bias(self, low: LowRankArrays) -> float:
        """What multiplies the bias of B, which is never counted twice."""
        return self.adapter.scaling_at(*self.names_at_slot(low))

    def _times_counted(self, low: LowRankArrays) -> int:
        """2 for the output projection of an attention that PEFT adapts whole: it applies that twice (peft#3774)."""
        attention = self.attention_of(low.path)
        doubled = attention is not None and any(other.path == attention for other in self.adapter.low_rank)
        return 2 if doubled else 1

    def check_rank(self, low: LowRankArrays) -> None:
        """Whether A has the ranks that the configuration says.

        Raises:
            AdapterError: if not.
        """
        wanted = self.adapter.rank_at(*self.pattern_names(low.path))
        if len(low.a) != wanted:
            raise AdapterError(
                f"A of {low.path!r} has {len(low.a)} ranks, and by adapter_config.json it is "
                f"{wanted} (r and rank_pattern); the two files do not belong together, so "
                "take both from where they were saved"
            )

    def parameter_of(self, low: LowRankArrays) -> str | None:
        """The parameter that A and B are for, if it is not the module's weight that is meant.

        Raises:
            AdapterError: if it may be one of several.
        """
        named = self.adapter.config.target_parameters
        if not named:
            packed = joined(low.path, "in_proj_weight")
            if self.shape_of_parameter(packed) is not None:
                return packed
            itself = self.shape_of_parameter(low.path)  # the adapter names the parameter
            return low.path if itself is not None and not (len(itself) == 2 and self.has_module(low)) else None
        endings = dict.fromkeys(entry.rpartition(".")[2] for entry in named)
        own = [joined(low.path, ending) for ending in endings]
        meant = [name for name in own if any(f".{name}".endswith(f".{entry}") for entry in named)]
        own = [name for name in meant if self.shape_of_parameter(name) is not None]
        if meant and not own and not self._is_targeted(low.path):
            raise AdapterError(self._no_parameter(meant))
        fitting = [name for name in own if self._may_be(low, name)]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        raise AdapterError(
            f"A and B of {low.path!r} may be of {some_of(map(repr, fitting), 5)}, and the files do not tell which; "
            "fold with the model: lora_fx.load_adapter"
        )

    def _no_parameter(self, meant: list[str]) -> str:
        return f"target_parameters means {some_of(map(repr, meant), 5)}, whose name the file has lost; {self._HELP}"

    def _is_targeted(self, path: str) -> bool:
        """Whether the adapter may mean the module as well as its parameter."""
        targets = self.adapter.config.target_modules or ()
        return targets == ALL_LINEAR or matches_names(path, targets)

    def _may_be(self, low: LowRankArrays, name: str) -> bool:
        shape, r = self.shape_of_parameter(name), self.adapter.rank_at(name)
        assert shape is not None
        if len(shape) == 2:
            return (len(low.b), low.a.shape[1]) == shape and len(low.a) == r
        return len(shape) == 3 and len(low.a) == r * shape[0] and {len(low.b), low.a.shape[1]} == set(shape[1:])
