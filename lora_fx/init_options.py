"""The ways of starting A and B that `init_lora_weights` names, and the options of those that have some.

`EvaConfig`, `CordaConfig`, `LoraGAConfig` and `LoftQConfig` have the field names and defaults of PEFT's classes of the
same names (0.21). A value that means something this package does not do is refused by its field's name. No torch is
needed here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .errors import ConfigError, closest


class _FieldsChecked(type):
    """Looks at field names before `__init__` does, to refuse them in this package's words."""

    if not TYPE_CHECKING:  # pyright would take this signature for the class's, and check no option

        def __call__(cls, *args: Any, **fields: Any) -> Any:
            if args:
                raise ConfigError(f"{cls.__name__} takes keyword arguments only, not {args[0]!r}")
            known = [f.name for f in dataclasses.fields(cls)]
            for name, value in fields.items():
                if name not in known:
                    raise ConfigError(
                        f"{cls.__name__} has no field {name!r} (given {value!r}); it has {', '.join(known)}."
                        f"{closest(str(name), known)}"
                    )
            return super().__call__(**fields)


@dataclass(frozen=True, kw_only=True)
class InitOptions(metaclass=_FieldsChecked):
    """What the four have in common.

    Attributes:
        neutral: {field: the one value that is supported, why}.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, str]]] = {}

    def __post_init__(self) -> None:
        for name, (value, reason) in self.neutral.items():
            given = getattr(self, name)
            if type(given) is not type(value) or given != value:
                raise ConfigError(
                    f"{type(self).__name__}.{name}={given!r} is not supported: {reason}. Leave it out "
                    f"(its neutral value is {value!r})"
                )
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for values of a wrong type or out of range."""

    @classmethod
    def from_peft(cls, value: object) -> Self:
        """From PEFT's object of the same name, a mapping of its fields, one of these, or None for the defaults.

        Raises:
            ConfigError: if it is none of these, or holds what is not supported.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls(**{str(name): item for name, item in value.items()})
        if dataclasses.is_dataclass(value) and type(value).__name__ == cls.__name__:
            return cls(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        raise ConfigError(
            f"{type(value).__name__} is no {cls.__name__}; give a {cls.__name__} of lora_fx or of PEFT, or a mapping "
            "of its fields"
        )

    def to_peft(self) -> dict[str, Any]:
        """The fields as PEFT's adapter_config.json holds them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class EvaConfig(InitOptions):
    """EVA (arXiv 2410.07170): A is the principal directions of what a site takes.

    Attributes:
        rho: no site gets a rank above rho times its own when ranks are shared out anew; 1 leaves them as they are.
        tau: reading stops once every direction's cosine similarity with that of the batch before reaches this.
        use_label_mask, label_mask_value: leave out the tokens whose `labels` in the batch are this value.
        whiten: divide each direction by the square root of its singular value.
        adjust_scaling_factors: lora_alpha grows and shrinks with a site's new rank.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def _check(self) -> None:
        _check_number(self, "rho", 1, 1e6)
        _check_number(self, "tau", 0, 1)
        _check_integer(self, "label_mask_value", None)
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"EvaConfig.{name}={getattr(self, name)!r} must be True or False")


@dataclass(frozen=True, kw_only=True)
class CordaConfig(InitOptions):
    """CorDA (arXiv 2406.05223): singular directions of W times the covariance C of what the site takes.

    Attributes:
        corda_method: "ipm", the r largest directions, to learn what the data shows; "kpm", the r smallest, to keep it.
        cache_file, covariance_file: None only; a `Calibration` is a value to keep, and tensors to save.
        verbose, use_float16_for_covariance, prune_temporary_fields: PEFT's defaults only.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    neutral: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "cache_file": (None, "lora_fx.calibrate gives a value that can be kept and used again"),
        "covariance_file": (None, "lora_fx.calibrate gives a value that can be kept and used again"),
        "verbose": (False, "nothing is printed"),
        "use_float16_for_covariance": (False, "sums of squares overflow in float16"),
        "prune_temporary_fields": (True, "there are no temporary fields"),
    }

    def _check(self) -> None:
        _check_choice(self, "corda_method", ("ipm", "kpm"))


@dataclass(frozen=True, kw_only=True)
class LoraGAConfig(InitOptions):
    """LoRA-GA (arXiv 2407.05000): A and B from singular directions of the loss's gradient with respect to W.

    Attributes:
        direction: which of the 2 r leading directions go where: "ArB2r" gives A the first r and B the next, "A2rBr"
            the other way round, "ArBr" alternates, "random" gives both the same r.
        scale: of B, and for "gd_scale" of A: "stable" (∜out / √stable_gamma), "weight_svd", "gd_scale" or "unit".
        stable_gamma: see scale.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def _check(self) -> None:
        _check_choice(self, "direction", ("ArBr", "A2rBr", "ArB2r", "random"))
        _check_choice(self, "scale", ("stable", "weight_svd", "gd_scale", "unit"))
        _check_number(self, "stable_gamma", 1e-6, 1e12)


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(InitOptions):
    """LoftQ (arXiv 2310.08659): W as a quantised matrix plus the low-rank product nearest to what that loses.

    Attributes:
        loftq_bits: 4 (NormalFloat in blocks of 64), 2 (the same with four levels) or 8 (integers, a scale a row).
        loftq_iter: how often quantising and taking the low-rank product alternate.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def _check(self) -> None:
        if self.loftq_bits not in (2, 4, 8) or isinstance(self.loftq_bits, bool):
            raise ConfigError(f"LoftQConfig.loftq_bits={self.loftq_bits!r} must be 2, 4 or 8")
        _check_integer(self, "loftq_iter", 1)


@dataclass(frozen=True)
class Init:
    """One way of starting A and B.

    Attributes:
        name: as `initializers.INITIALIZERS` has it.
        changes_base: whether the base's weight changes, so that base and adapter together compute what it did.
        calibration: what it needs of data: "components", "covariance" or "gradient"; None for nothing.
        field: the option of LoraConfig that holds its options.
        options: their class.
        iterations: the N of "pissa_niter_N".
        frozen: which of "lora_a" and "lora_b" are not trained.
    """

    name: str
    changes_base: bool = False
    calibration: str | None = None
    field: str | None = None
    options: type[InitOptions] | None = None
    iterations: int | None = None
    frozen: tuple[str, ...] = ()


# What `init_lora_weights` may say beside True, False and "gaussian".
INITS = {
    init.name: init
    for init in (
        Init("corda", changes_base=True, calibration="covariance", field="corda_config", options=CordaConfig),
        Init("eva", calibration="components", field="eva_config", options=EvaConfig),
        Init("loftq", changes_base=True, field="loftq_config", options=LoftQConfig),
        Init("lora_ga", changes_base=True, calibration="gradient", field="lora_ga_config", options=LoraGAConfig),
        Init("mica", frozen=("lora_b",)),
        Init("olora", changes_base=True),
        Init("orthogonal"),
        Init("pissa", changes_base=True),
    )
}


def init_of(value: object) -> Init:
    """What an `init_lora_weights` such as "pissa_niter_16" means; names are read as PEFT does, in any case.

    Raises:
        ConfigError: for anything else. True, False and "gaussian" draw from distributions and are not here.
    """
    name = value.lower() if isinstance(value, str) else ""
    if name in INITS:
        return INITS[name]
    if match := re.fullmatch(r"pissa_niter_(\d{1,4})", name):
        return dataclasses.replace(INITS["pissa"], iterations=int(match[1]))
    names = ["gaussian", *INITS, "pissa_niter_[number of iterations]"]
    raise ConfigError(
        f"init_lora_weights={value!r} must be True, False or one of {', '.join(map(repr, names))}."
        f"{closest(str(value), names)}"
    )


def _check_number(options: InitOptions, name: str, low: float, high: float) -> None:
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{type(options).__name__}.{name}={value!r} must be a number from {low:g} to {high:g}")


def _check_integer(options: InitOptions, name: str, low: int | None) -> None:
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        raise ConfigError(
            f"{type(options).__name__}.{name}={value!r} must be an integer" + ("" if low is None else f" from {low}")
        )


def _check_choice(options: InitOptions, name: str, choices: Sequence[str]) -> None:
    value = getattr(options, name)
    if value not in choices:
        raise ConfigError(
            f"{type(options).__name__}.{name}={value!r} must be one of {', '.join(map(repr, choices))}."
            f"{closest(str(value), choices)}"
        )
