"""One output of ONNX Runtime against torch's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Errors of a deep model's float arithmetic, in units of the dtype's eps, relative to max |y|. Two correct
# runtimes differ by up to about 100; a wrong weight differs by 1e5 or more (float32).
TOLERANCE_IN_EPS = {torch.float64: 4096.0, torch.float32: 1024.0, torch.float16: 32.0, torch.bfloat16: 32.0}

# What makes a level of values a constant such as masked_fill(-1e4) rather than a result: see `_results`.
_CONSTANT_AT_LEAST = 1e3
_CONSTANT_WITHIN = 0.01
_GAP, _GAP_OF_ONE_VALUE = 100.0, 1e4
_ROUNDING_IN_EPS = 4.0


@dataclass(frozen=True)
class OutputError:
    """How far one output of ONNX Runtime is from torch's.

    Attributes:
        name: the output's name in the file.
        max_abs: largest |difference| where both are finite, without masks.
        max_rel: max_abs / max |torch's output|, without masks.
        tolerance: what max_rel may be.
        problem: why the outputs cannot be equal whatever the numbers (shape, dtype, NaN), or "".
        compared: how many values that says something about; 0 if the output is empty, or all NaN,
            infinite or masked.
    """

    name: str
    max_abs: float
    max_rel: float
    tolerance: float
    problem: str = ""
    compared: int = 0

    @property
    def ok(self) -> bool:
        """Whether the outputs agree within the tolerance."""
        return not self.problem and self.max_rel <= self.tolerance

    @property
    def verdict(self) -> str:
        """One word, or the problem."""
        if self.problem or not self.ok:
            return self.problem or "FAILED"
        return "ok" if self.compared else "nothing comparable"


def coarsest_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The floating dtype among the tensors' with the largest eps; float32 if there is none."""
    dtypes = {tensor.dtype for tensor in tensors} & set(TOLERANCE_IN_EPS)
    return max(dtypes or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def compare_output(name: str, wanted: torch.Tensor, got: Any, weights: torch.dtype) -> OutputError:
    """Compare one output: `wanted` from torch, `got` from ONNX Runtime, computed from weights of that dtype.

    Floats are compared relative to the largest |value| of torch's output. Masks are left out of that
    measure, or everything would be equal beside them: values near the end of the dtype's range, and
    constants far above all other values that both sides have to the last bits. They must be equal themselves.
    """
    got = torch.from_numpy(np.asarray(got, order="C"))  # ascontiguousarray makes a loss one-dimensional
    wanted = wanted.detach().cpu()
    if got.shape != wanted.shape:
        return OutputError(name, 0.0, 0.0, 0.0, f"shape {list(got.shape)} instead of {list(wanted.shape)}")
    if got.dtype != wanted.dtype:
        problem = f"dtype {got.dtype} instead of {wanted.dtype}; compare it with a graph in {got.dtype}"
        return OutputError(name, 0.0, 0.0, 0.0, problem)
    if not wanted.is_floating_point():
        unequal = int((got != wanted).sum())
        problem = f"{unequal} values differ" if unequal else ""
        return OutputError(name, float(unequal > 0), float(unequal > 0), 0.0, problem, wanted.numel())
    dtype = max((weights, wanted.dtype), key=lambda d: torch.finfo(d).eps)
    tolerance = TOLERANCE_IN_EPS.get(dtype, 32.0) * torch.finfo(dtype).eps
    huge = torch.finfo(wanted.dtype).max / 4
    a, b = wanted.double(), got.double()
    usual = a.isfinite() & (a.abs() < huge)
    if not torch.equal(usual, b.isfinite() & (b.abs() < huge)) or not torch.equal(a.isnan(), b.isnan()):
        return OutputError(
            name, float("inf"), float("inf"), tolerance, "NaN, infinite or masked values at other places"
        )
    if not torch.equal(a[~usual].nan_to_num().sign(), b[~usual].nan_to_num().sign()):
        return OutputError(name, float("inf"), float("inf"), tolerance, "infinite or masked values of another sign")
    if not bool(usual.any()):
        return OutputError(name, 0.0, 0.0, tolerance)
    a, b = _results(a[usual], b[usual], torch.finfo(dtype).eps)
    error, scale = float((a - b).abs().max()), float(a.abs().max())
    return OutputError(name, error, error / scale if scale else error, tolerance, compared=a.numel())


def _results(a: torch.Tensor, b: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without the levels of constants at their top: -1e9, or -1e4 plus what was there before.

    A level is all that lies within 1 % of the largest |value|. It is a constant if it is huge, far above all
    that is below it, and equal on both sides but for the last rounding, which results of a deep model are not.
    One value alone may be a result; it must lie so far above that beside it nothing else would be compared.
    """
    while True:
        sizes = a.abs()
        top = float(sizes.max())
        level = sizes >= (1 - _CONSTANT_WITHIN) * top
        below = float(sizes[~level].max()) if not bool(level.all()) else 0.0
        gap = _GAP if int(level.sum()) > 1 else _GAP_OF_ONE_VALUE
        is_far = top >= _CONSTANT_AT_LEAST and below > 0.0 and float(sizes[level].min()) >= gap * below
        if not is_far or bool(((a - b).abs()[level] > _ROUNDING_IN_EPS * eps * top).any()):
            return a, b
        a, b = a[~level], b[~level]
