"""The first values of A and B that are computed from W, or from data: pure functions of one matrix.

Each takes W (out, in), the rank, the scaling s and a context, and gives A (r, in), B (out, r) and, where base and
adapter together are to compute what the base did, the matrix that the base holds from now on: W − s · B @ A.
The formulas are those of the papers and of PEFT 0.21; where PEFT departs from its paper, a comment says so.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .attributes import holds_values, why_no_values
from .errors import ConfigError
from .init_options import CordaConfig, EvaConfig, InitOptions, LoftQConfig, LoraGAConfig, init_of
from .merging import Delta, merge
from .site_statistics import SiteStatistics

# CorDA: share of C's mean diagonal that is added to it, doubled until its inverse is one.
_DAMPING, _INVERSE_ERROR = 0.01, 0.05

# NormalFloat: quantiles from here to one half on either side of zero (arXiv 2305.14314, appendix E), in blocks.
_OUTERMOST, _BLOCK = 0.9677083, 64


@dataclass(frozen=True)
class Context:
    """What an initializer may need beside the matrix.

    Attributes:
        site: path of the site, for messages.
        options: of the method; None for its defaults.
        calibration: what data told about the site, for the methods that need it. A gradient is (out, in), as W is.
        dtype: of A and B; None is the matrix's. They are rounded to it before the base is made up for them.
    """

    site: str
    options: InitOptions | None = None
    calibration: SiteStatistics | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Start:
    """First values.

    Attributes:
        a, b: (r, in) and (out, r), in the context's dtype.
        base: the matrix that the base holds from now on, in float32 or wider; None if it stays as it is.
        frozen: which of "a" and "b" are not trained.
    """

    a: torch.Tensor
    b: torch.Tensor
    base: torch.Tensor | None = None
    frozen: frozenset[str] = frozenset()


Initializer = Callable[[torch.Tensor, int, float, Context], Start]


def initializer_of(init_lora_weights: str) -> Initializer:
    """The function for a name such as "pissa" or "pissa_niter_16", with its checks before and after.

    Raises:
        ConfigError: if there is none of that name.
    """
    init = init_of(init_lora_weights)
    function = INITIALIZERS[init.name]
    if init.iterations is not None:
        function = functools.partial(_pissa, iterations=init.iterations)

    @torch.no_grad()
    def initializer(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
        if not holds_values(matrix):
            mend = "load the weights first: lora_fx.bind_weights(gm, directory)"
            raise _error(context, init.name, f"its weight {why_no_values(matrix)}", mend)
        if not bool(torch.isfinite(matrix).all()):
            raise _error(context, init.name, "its weight has NaN or infinite elements", "mend the model's weights")
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        with torch.autocast(matrix.device.type, enabled=False):
            start = function(wide, r, scaling, context)
        for name, factor in (("A", start.a), ("B", start.b)):
            if not bool(torch.isfinite(factor).all()):
                raise _error(context, init.name, f"{name} would have NaN or infinite elements in {factor.dtype}")
        if not bool(start.a.any()) and not bool(start.b.any()):
            raise _error(context, init.name, "A and B would both be zero, and never get a gradient")
        return start

    return initializer


# From the weight ----------------------------------------------------------------------------------


def _pissa(matrix: torch.Tensor, r: int, scaling: float, context: Context, *, iterations: int | None = None) -> Start:
    """PiSSA (arXiv 2404.02948): s · B @ A is the best approximation of W of rank r; `iterations` make it a quick one.

    The quick one draws from torch's global generator.
    """
    _check_rank(matrix, r, context, "pissa")
    if iterations is None:
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, sigma, v = torch.svd_lowrank(matrix, q=r, niter=iterations)
        vh = v.mT
    b, a = _halves(u[:, :r], sigma[:r], vh[:r], scaling)
    return _with_residual(matrix, a, b, scaling, context)


def _olora(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """OLoRA (arXiv 2406.01775): the first r columns of Q and rows of R of W = Q R."""
    _check_rank(matrix, r, context, "olora")
    q, upper = torch.linalg.qr(matrix)
    return _with_residual(matrix, upper[:r], q[:, :r], scaling, context)


def _mica(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """MiCA (arXiv 2604.01694): B stays the r left singular vectors that W uses least; A starts at zero."""
    _check_rank(matrix, r, context, "mica")
    u, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    dtype = context.dtype or matrix.dtype
    a = torch.zeros(r, matrix.shape[1], dtype=dtype, device=matrix.device)
    return Start(a, u[:, -r:].to(dtype).contiguous(), frozen=frozenset({"b"}))


def _orthogonal(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """B @ A = 0 with neither of them zero: they are spanned by alternate rows of one orthogonal matrix."""
    if r % 2:
        raise _error(
            context,
            "orthogonal",
            f"r={r} is odd, and A and B take half of it each",
            f"choose an even rank, such as r={r + 1}",
        )
    out_features, in_features = matrix.shape
    draw = functools.partial(torch.randn, dtype=matrix.dtype, device=matrix.device)
    q, _ = torch.linalg.qr(draw(r, r))
    a = (draw(in_features, r // 2) @ q[0::2]).mT / 10  # (in, r/2) @ (r/2, r)
    b = draw(r // 2, out_features).mT @ q[1::2] / 10  # (out, r/2) @ (r/2, r)
    dtype = context.dtype or matrix.dtype
    return Start(a.to(dtype).contiguous(), b.to(dtype).contiguous())


# From data ----------------------------------------------------------------------------------------


def _eva(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """EVA: A is the r leading principal directions of what the site takes, B is zero."""
    options = EvaConfig.from_peft(context.options)
    found = _statistics(context, "eva")
    if found.components is None or found.singular_values is None:
        raise _uncalibrated(context, "eva")
    if found.components.shape[1] != matrix.shape[1]:
        raise _other_shape(context, "eva", found.components, matrix)
    if len(found.components) < r:
        raise _error(
            context,
            "eva",
            f"the calibration has {len(found.components)} directions, too few for r={r}",
            "use the configuration that calibrate gave: calibration.config",
        )
    a, sigma = found.components[:r].to(matrix), found.singular_values[:r].to(matrix)
    if options.whiten:
        if float(sigma[-1]) <= float(sigma[0]) * torch.finfo(a.dtype).eps * len(a):
            raise _error(
                context,
                "eva",
                f"whiten divides by singular values, and of its {r} some are zero: its inputs have fewer directions",
                "choose a smaller r, or give more data",
            )
        a = a / sigma.sqrt()[:, None]
    dtype = context.dtype or matrix.dtype
    b = torch.zeros(matrix.shape[0], r, dtype=dtype, device=matrix.device)
    return Start(a.to(dtype).contiguous(), b)


def _corda(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """CorDA: W C = U Σ Vᵀ, so W = U Σ (Vᵀ C⁻¹), of which A and B take the first ("ipm") or last ("kpm") r terms."""
    options = CordaConfig.from_peft(context.options)
    _check_rank(matrix, r, context, "corda")
    covariance = _statistics(context, "corda").covariance
    if covariance is None:
        raise _uncalibrated(context, "corda")
    if covariance.shape[0] != matrix.shape[1]:
        raise _other_shape(context, "corda", covariance, matrix)
    damped, inverse = _damped(covariance.to(matrix), context)
    u, sigma, vh = torch.linalg.svd(matrix @ damped, full_matrices=False)
    kept = slice(None, r) if options.corda_method == "ipm" else slice(len(sigma) - r, None)
    b, a = _halves(u[:, kept], sigma[kept], vh[kept] @ inverse, scaling)
    return _with_residual(matrix, a, b, scaling, context)


def _damped(covariance: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """C with enough of the identity added that it has an inverse, and that."""
    scale = covariance.diagonal().mean()
    if not bool(torch.isfinite(covariance).all()) or float(scale) <= 0:
        raise _error(context, "corda", "the covariance of its inputs is zero or not finite", "give other data")
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for doublings in itertools.count():
        damped = covariance + identity * (scale * _DAMPING * 2**doublings)
        inverse, info = torch.linalg.inv_ex(damped)
        if not int(info) and float(torch.dist(damped @ inverse, identity)) < _INVERSE_ERROR:
            return damped, inverse
    raise AssertionError("unreachable: the identity outgrows C")


def _lora_ga(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """LoRA-GA: A and B from the 2 r leading singular directions of the gradient; B's carry its singular values.

    It draws from torch's global generator. (PEFT takes `out` for "stable" from the stored shape, which is `in` for a
    weight stored (in, out).)
    """
    options = LoraGAConfig.from_peft(context.options)
    if 2 * r > min(matrix.shape):
        raise _error(
            context,
            "lora_ga",
            f"r={r} needs 2 r = {2 * r} singular directions of a gradient that has {min(matrix.shape)}",
            f"choose r={max(1, min(matrix.shape) // 2)} at most",
        )
    gradient = _statistics(context, "lora_ga").gradient
    if gradient is None:
        raise _uncalibrated(context, "lora_ga")
    if gradient.shape != matrix.shape:
        raise _other_shape(context, "lora_ga", gradient, matrix)
    gradient = gradient.to(matrix)
    if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        raise _error(context, "lora_ga", "the loss's gradient there is zero or not finite", "give other data")
    u, sigma, v = torch.svd_lowrank(gradient, q=min(4 * r, *matrix.shape), niter=4)
    for_a, for_b = _directions(options.direction, r)
    a, b = v.mT[for_a], u[:, for_b] * sigma[for_b]
    factor = 1.0
    if options.scale == "stable":
        factor = matrix.shape[0] ** 0.25 / math.sqrt(options.stable_gamma)
    elif options.scale == "weight_svd" and float(sigma[for_b][0]) > 0:
        _, largest, _ = torch.svd_lowrank(matrix, q=min(4 * r, *matrix.shape), niter=4)
        factor = float(largest[0]) / float(sigma[for_b][0])
    elif options.scale == "gd_scale":
        a, factor = a / scaling, 1 / scaling
    return _with_residual(matrix, a, b * factor, scaling, context)


def _directions(direction: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the singular directions for A and for B."""
    order = torch.arange(2 * r)
    if direction == "ArBr":
        return order[1::2], order[0::2]
    if direction == "A2rBr":
        return order[r:], order[:r]
    if direction == "ArB2r":
        return order[:r], order[r:]
    chosen = torch.randperm(2 * r)[:r]
    return chosen, chosen


# Quantised ----------------------------------------------------------------------------------------


def _loftq(matrix: torch.Tensor, r: int, scaling: float, context: Context) -> Start:
    """LoftQ: Q quantises what the low-rank product leaves of W, the product is the best one for what Q leaves of W.

    s · B @ A is that product. (PEFT takes it for B @ A alone, so there Q + s · B @ A misses W unless s is 1.)
    """
    options = LoftQConfig.from_peft(context.options)
    _check_rank(matrix, r, context, "loftq")
    product = torch.zeros_like(matrix)
    for _ in range(options.loftq_iter):
        quantised = quantise(matrix - product, options.loftq_bits)
        u, sigma, vh = torch.linalg.svd(matrix - quantised, full_matrices=False)
        product = u[:, :r] * sigma[:r] @ vh[:r]  # (out, r) @ (r, in)
    b, a = _halves(u[:, :r], sigma[:r], vh[:r], scaling)
    dtype = context.dtype or matrix.dtype
    return Start(a.to(dtype).contiguous(), b.to(dtype).contiguous(), quantised)


def quantise(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """The matrix as it comes back from `bits` bits an element: NormalFloat for 2 and 4, integers for 8."""
    if bits == 8:
        scale = _divisor(matrix.abs().amax(dim=1, keepdim=True))
        return (matrix / scale * 127).round() * (scale / 127)
    flat = matrix.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).reshape(-1, _BLOCK)
    scale = _divisor(blocks.abs().amax(dim=1, keepdim=True))
    levels = torch.tensor(normal_float(bits), dtype=matrix.dtype, device=matrix.device)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).reshape(-1)[: len(flat)].reshape(matrix.shape)


@functools.cache
def normal_float(bits: int) -> tuple[float, ...]:
    """The 2ᵇⁱᵗˢ levels of NormalFloat in order: quantiles of the normal distribution, 0, and 1 at the end."""
    half = 2 ** (bits - 1)
    above = [_quantile(_OUTERMOST + (0.5 - _OUTERMOST) * i / half) for i in range(half)]
    below = [-_quantile(_OUTERMOST + (0.5 - _OUTERMOST) * i / (half - 1)) for i in range(half - 1)]
    return tuple(sorted(level / max(above) for level in (*below, 0.0, *above)))


def _quantile(probability: float) -> float:
    return statistics.NormalDist().inv_cdf(probability)


def _divisor(largest: torch.Tensor) -> torch.Tensor:
    """The largest elements, to divide by; what is all zero, or nearly, becomes zero."""
    return torch.where(largest >= torch.finfo(largest.dtype).tiny, largest, torch.ones_like(largest))


# Parts --------------------------------------------------------------------------------------------


def _halves(
    u: torch.Tensor, sigma: torch.Tensor, vh: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) with s · B @ A = U Σ Vᵀ, Σ / s shared evenly between them; a negative s is in B's sign."""
    root = (sigma / abs(scaling)).sqrt()
    return u * root * math.copysign(1, scaling), root[:, None] * vh


def _with_residual(matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, context: Context) -> Start:
    """A and B rounded to their dtype, and W less what they then add to it."""
    dtype = context.dtype or matrix.dtype
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    base = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    delta = Delta(b.to(matrix.dtype)[None], a.to(matrix.dtype)[None], -scaling)
    merge(matrix[None], [delta], into=base[None])
    return Start(a, b, base)


def _statistics(context: Context, name: str) -> SiteStatistics:
    if context.calibration is None:
        raise _uncalibrated(context, name)
    return context.calibration


def _check_rank(matrix: torch.Tensor, r: int, context: Context, name: str) -> None:
    largest = min(matrix.shape)
    if r > largest:
        raise _error(
            context,
            name,
            f"r={r} is above the {largest} singular directions of its {matrix.shape[0]} × {matrix.shape[1]} weight",
            f"choose r={largest} at most, for this site alone with rank_pattern",
        )


def _error(context: Context, name: str, fact: str, fix: str = "") -> ConfigError:
    mend = f"{fix}; or " if fix else ""
    return ConfigError(
        f"init_lora_weights={name!r} cannot start {context.site!r}: {fact}. To mend it, {mend}leave the site out with "
        "exclude_modules, or use init_lora_weights=True"
    )


def _uncalibrated(context: Context, name: str) -> ConfigError:
    return _error(
        context,
        name,
        "it needs data, and there is no calibration of this site",
        "make one with lora_fx.calibrate(gm, config, batches) and give it to inject",
    )


def _other_shape(context: Context, name: str, found: torch.Tensor, matrix: torch.Tensor) -> ConfigError:
    return _error(
        context,
        name,
        f"its calibration has a {tuple(found.shape)} tensor, which does not fit its {tuple(matrix.shape)} weight",
        "calibrate with this graph",
    )


INITIALIZERS: dict[str, Initializer] = {
    "corda": _corda,
    "eva": _eva,
    "loftq": _loftq,
    "lora_ga": _lora_ga,
    "mica": _mica,
    "olora": _olora,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
}
