"""LoraConfig: PEFT's vocabulary, frozen, keyword-only, validated when it is made.

Names, defaults and meaning are those of `peft.LoraConfig` 0.21. An option of PEFT that this package
does not support is refused by its name as soon as it says anything but its neutral value; nothing is
ignored. No torch is needed here.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import regex

from .errors import ConfigError, closest, warn
from .init_options import INITS, CordaConfig, EvaConfig, InitOptions, LoftQConfig, LoraGAConfig, init_of

ALL_LINEAR = "all-linear"

BIAS_MODES = ("none", "all", "lora_only")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# PEFT's other options, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# Options that only have a meaning beside one of those above.
WITHOUT_EFFECT = ("megatron_core", "qalora_group_size", "runtime_config")

Names = Sequence[str] | str | None


class _OptionsChecked(type):
    """Looks at the option names before `__init__` does, to refuse them in this package's words."""

    if not TYPE_CHECKING:  # pyright would take this signature for the class's, and check no option

        def __call__(cls, *args: Any, **options: Any) -> Any:
            if args:
                raise ConfigError(
                    f"LoraConfig takes keyword arguments only, for instance r={args[0]!r}; name each of them"
                )
            return super().__call__(**_supported(options))


@dataclass(frozen=True, kw_only=True)
class LoraConfig(metaclass=_OptionsChecked):
    """What to adapt and how; see `peft.LoraConfig` for the same fields.

    Attributes:
        r: rank of A (r, in) and B (out, r); > 0.
        target_modules: a list of names (exact or dotted suffix), one regular expression that must
            match a whole name, or "all-linear" (every linear but the output head).
        exclude_modules: the same forms; taken away from the targets first.
        lora_alpha: scaling = lora_alpha / r (LoRA, arXiv 2106.09685, section 4.1).
        lora_dropout: probability in [0, 1) of dropping elements of A's input in training.
        fan_in_fan_out: accepted for PEFT's sake. How a weight is stored is read from the graph.
        bias: "none", "all" or "lora_only": which biases of the base are trained and saved too.
        use_rslora: scaling = lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).
        modules_to_save: modules that are trained in full and saved with the adapter.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/r, B
            zero), False (both random, for debugging), or from the weight: "pissa", "pissa_niter_16",
            "olora", "orthogonal", "mica", "loftq"; or from data, see `lora_fx.calibrate`: "eva", "corda", "lora_ga".
        eva_config, corda_config, lora_ga_config, loftq_config: options of the start of that name.
        use_dora: train the norm of each output beside its direction (DoRA, arXiv 2402.09353).
        lora_bias: B has a bias; folding it needs a bias in the base.
        trainable_token_indices: rows of the input embedding that are trained as they are, or {name of an embedding:
            rows}; a head that is tied with it follows.
        ensure_weight_tying: layers of one tied weight are adapted together, by one adapter.
        layers_to_transform: layer index or indices to keep; needs a list in target_modules.
        layers_pattern: name(s) of the container that the layer index stands behind.
        rank_pattern, alpha_pattern: {regular expression anchored at the end of a name: value}.
        target_parameters: parameters to adapt, by exact or dotted-suffix names such as "experts.gate_up_proj".
        task_type, base_model_name_or_path, revision, inference_mode, auto_mapping: notes that PEFT
            keeps in its files. They change nothing here and survive load and save.

    Raises:
        ConfigError: on a wrong type, a value out of range, or an option that is not supported.
    """

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_parameters: Sequence[str] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    eva_config: EvaConfig | Mapping[str, Any] | None = None
    corda_config: CordaConfig | Mapping[str, Any] | None = None
    lora_ga_config: LoraGAConfig | Mapping[str, Any] | None = None
    loftq_config: LoftQConfig | Mapping[str, Any] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._set("lora_dropout", _dropout(self.lora_dropout))
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            self._set(name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save={self.modules_to_save!r} is a string; give a list of module names, "
                f"for instance modules_to_save=[{self.modules_to_save!r}]"
            )
        self._set("modules_to_save", _names("modules_to_save", self.modules_to_save))
        if isinstance(self.target_parameters, str):
            raise ConfigError(f"target_parameters={self.target_parameters!r} is a string; give a list of names")
        self._set("target_parameters", _names("target_parameters", self.target_parameters) or None)
        if self.target_parameters and self.lora_dropout:
            raise ConfigError(
                f"lora_dropout={self.lora_dropout} drops elements of what a module takes, and target_parameters names "
                "parameters, which take nothing; leave one of the two out"
            )
        self._set("layers_to_transform", _layers(self.layers_to_transform))
        self._set("r", _rank("r", self.r))
        self._set("lora_alpha", _alpha("lora_alpha", self.lora_alpha))
        self._set("rank_pattern", _pattern("rank_pattern", self.rank_pattern, _rank))
        self._set("alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _alpha))
        for name in (
            *("fan_in_fan_out", "use_rslora", "inference_mode"),
            *("use_dora", "lora_bias", "ensure_weight_tying"),
        ):
            _check_bool(name, getattr(self, name))
        _check_choice("bias", self.bias, BIAS_MODES)
        if self.task_type is not None:
            self._set("task_type", _text("task_type", self.task_type))
            _check_choice("task_type", self.task_type, TASK_TYPES)
        self._set("trainable_token_indices", _tokens(self.trainable_token_indices))
        self._check_init()
        self._check_variants()
        for name in ("base_model_name_or_path", "revision"):
            if getattr(self, name) is not None:
                self._set(name, _text(name, getattr(self, name)))
        _check_json("auto_mapping", self.auto_mapping)
        self._check_layers()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen to everyone else

    def _check_init(self) -> None:
        init = None
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower() != "gaussian":
            init = init_of(self.init_lora_weights)
        elif not isinstance(self.init_lora_weights, (bool, str)):
            init_of(self.init_lora_weights)  # which says what it may be
        if isinstance(self.init_lora_weights, str):
            self._set("init_lora_weights", _text("init_lora_weights", self.init_lora_weights).lower())
        for other in INITS.values():
            if other.field is None or other.options is None:
                continue
            given = getattr(self, other.field)
            if given is None or given == {}:
                self._set(other.field, {} if other.name == "loftq" else None)  # as PEFT says none
                continue
            try:
                self._set(other.field, other.options.from_peft(given))
            except ConfigError as error:
                raise ConfigError(f"{other.field}: {error}") from error
            if init is None or init.name != other.name:
                warn(
                    f"{other.field} is given, but init_lora_weights={self.init_lora_weights!r} does not use it; "
                    f"init_lora_weights={other.name!r} does"
                )

    def _check_variants(self) -> None:
        """What PEFT refuses together, and what has no meaning together."""
        if self.use_dora and self.lora_bias:
            raise ConfigError(
                "use_dora and lora_bias do not go together: DoRA scales the product without a bias. Leave one out"
            )
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"lora_bias goes with init_lora_weights=True or False, not {self.init_lora_weights!r}, which makes A "
                "and B only; choose one of the two"
            )
        for name in ("use_dora", "lora_bias"):
            if getattr(self, name) and self.target_parameters:
                raise ConfigError(
                    f"{name} is of modules, and target_parameters={list(self.target_parameters)!r} names parameters; "
                    "leave one of the two out"
                )

    def _check_layers(self) -> None:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform={self.layers_to_transform!r} filters a list of names, but "
                f"target_modules={self.target_modules!r} is a string; put the layer numbers into the "
                "expression, or give target_modules as a list"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} says where layer numbers stand, but "
                "layers_to_transform is not given; give both or neither"
            )

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, for names that no pattern changes."""
        return scaling_of(self.lora_alpha, self.r, use_rslora=self.use_rslora)

    @classmethod
    def from_peft(cls, config: object) -> LoraConfig:
        """A LoraConfig from PEFT's config object, from a mapping of its fields, or itself.

        Raises:
            ConfigError: if it is not a LoRA configuration, or uses what is not supported here.
        """
        if isinstance(config, cls):
            return config
        options = _peft_fields(config)
        peft_type = _text("peft_type", options.pop("peft_type", "LORA"))
        if peft_type != "LORA":
            hint = " Did you mean 'LORA'?" if peft_type.upper() == "LORA" else ""
            raise ConfigError(f"peft_type is {peft_type!r}; only 'LORA' adapters are supported.{hint}")
        options.pop("peft_version", None)
        return cls(**_supported(options))

    def to_peft(self) -> dict[str, Any]:
        """The fields as PEFT's adapter_config.json holds them (JSON types only)."""
        fields: dict[str, Any] = {"peft_type": "LORA"}
        for f in dataclasses.fields(self):
            fields[f.name] = _plain(getattr(self, f.name))
        return fields


def scaling_of(lora_alpha: float, r: int, *, use_rslora: bool) -> float:
    """The factor on B @ A: lora_alpha / r, rank-stabilised lora_alpha / sqrt(r)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def _peft_fields(config: object) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config) and hasattr(config, "peft_type") and not isinstance(config, type):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    raise ConfigError(
        f"{type(config).__name__} is not a LoRA configuration; pass lora_fx.LoraConfig(...), "
        "a peft.LoraConfig, or a mapping of its fields"
    )


# What others call them.
_MEANT = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def _supported(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that are not supported but hold their neutral value; others are refused."""
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    for name in [name for name in options if name not in known and name not in WITHOUT_EFFECT]:
        if not isinstance(name, str):
            raise ConfigError(f"LoraConfig has no option {name!r}; option names must be strings")
        if name not in UNSUPPORTED:
            near = f" Did you mean {_MEANT[name]!r}?" if name in _MEANT else closest(name, known)
            raise ConfigError(f"LoraConfig has no option {name!r} (given {options[name]!r}).{near}")
        if not any(options[name] is value or options[name] == value for value in UNSUPPORTED[name]):
            raise ConfigError(
                f"{name}={options[name]!r} is not supported by lora_fx yet; "
                f"leave it out (its neutral value is {UNSUPPORTED[name][0]!r})"
            )
    return {name: value for name, value in options.items() if name in known}


def _names(name: str, value: Any) -> tuple[str, ...] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if name == "target_modules" and value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        if name == "layers_pattern":
            return _names(name, [value] if value else [])
        _check_expression(name, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name}={value!r} must be a list of names or a string, not {type(value).__name__}")
    entries = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    for entry in entries:
        if not isinstance(entry, str):
            raise ConfigError(f"{name} holds {entry!r}, a {type(entry).__name__}; every entry must be a string")
        if name == "layers_pattern":
            _check_expression(name, entry, rf"(?:^|.*?\.){entry}\.(?P<index>\d+)\.")
    return tuple(dict.fromkeys(entries))


def _check_expression(name: str, expression: str, used: str | None = None) -> None:
    """`used` is the whole expression that this one becomes part of (see matching.py)."""
    whole = expression if used is None else used
    try:
        with warnings.catch_warnings():  # of what may mean something else in a later Python
            warnings.simplefilter("ignore")
            for module in (re, regex):  # what PEFT takes, and what it is matched with here
                module.compile(expression)
                module.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{name}={expression!r} is not a regular expression: {error}. Give a list of names if these are plain names"
        ) from error


def _plain(value: Any) -> Any:
    """A field's value in JSON's types."""
    if isinstance(value, InitOptions):
        return value.to_peft()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _tokens(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """Rows of embeddings, each once, in the order given: that is the order in PEFT's files."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        found = {key: _tokens(rows) for key, rows in value.items()}
        if not found or not all(
            isinstance(key, str) and key and isinstance(rows, tuple) for key, rows in found.items()
        ):
            raise ConfigError(f"trainable_token_indices={value!r} must map names of embeddings to lists of rows")
        return found  # type: ignore[return-value]
    if not isinstance(value, (list, tuple, range)) or not value:
        raise ConfigError(
            f"trainable_token_indices={value!r} must be a list of rows, or map names of embeddings to such lists"
        )
    for row in value:
        if isinstance(row, bool) or not isinstance(row, int) or row < 0:
            raise ConfigError(f"trainable_token_indices holds {row!r}; rows must be integers from 0")
    if len(set(value)) != len(value):
        raise ConfigError(f"trainable_token_indices={list(value)!r} holds a row twice; name each once")
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...] | int | None:
    if value is None:
        return None
    entries = list(value) if isinstance(value, (list, tuple, set, frozenset, range)) else [value]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
            raise ConfigError(f"layers_to_transform holds {entry!r}; layer indices must be integers from 0")
    if isinstance(value, int):
        return value
    return tuple(entries) or None


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{name}={value!r} must be an integer above 0")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < 1e30:
        raise ConfigError(f"{name}={value!r} must be a finite number other than 0, below 1e30")
    return value


def _dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"lora_dropout={value!r} must be a number from 0 up to, and without, 1")
    return float(value)


def _pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r} must map regular expressions to values")
    checked = {}
    for key, entry in value.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name} has the key {key!r}; keys must be regular expressions on module names")
        _check_expression(f"the key of {name}", key, rf"(.*\.)?({key})$")
        checked[key] = check(f"{name}[{key!r}]", entry)
    return checked


def _text(name: str, value: Any) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be a string")
    return value


def _check_json(name: str, value: Any) -> None:
    """A note that goes into adapter_config.json as it stands."""
    if not isinstance(value, dict | None):
        raise ConfigError(f"{name}={value!r} must be a dict or None")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}={value!r} cannot be written as JSON: {error}") from error


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False, not {type(value).__name__}")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        near = closest(str(value), [c for c in choices if isinstance(c, str)])
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.{near}")
