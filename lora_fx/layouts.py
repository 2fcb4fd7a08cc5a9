"""How A and B of one site lie, and how they make the delta of its weight: shapes are PEFT's, one class per kind.

Whatever the kind, the delta is scaling · left @ right, a batch of matrix products in the order in which the
weight is stored: left (n, rows, q), right (n, q, columns), added to the weight seen as (n, rows, columns). That
is all that folding, combining and initialising need to know. The functions here are written in aten ops, so that
they work on tensors and, to write nodes, on `fx.Proxy`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

_aten = torch.ops.aten

Shape = tuple[int, ...]


class Layout(Protocol):
    """How A and B make a weight's delta."""

    @property
    def shape(self) -> Shape:
        """Of the weight."""

    @property
    def in_features(self) -> int:
        """Size of what the op takes: channels for convolutions, the vocabulary for embeddings."""

    @property
    def out_features(self) -> int:
        """Size of what the op gives."""

    @property
    def stored_in_out(self) -> bool:
        """The weight is stored (in, out) rather than (out, in)."""

    @property
    def count(self) -> int:
        """How many matrices of in × out there are: experts, and 1 for all other kinds."""

    def a_shape(self, r: int) -> Shape:
        """Shape of A for rank r."""

    def b_shape(self, r: int) -> Shape:
        """Shape of B for rank r."""

    def why_not_rank(self, r: int) -> str | None:
        """Why there can be no adapter of rank r, or None."""

    def why_no_weight(self) -> str | None:
        """Why no weight of that shape can hold what A and B do, or None."""

    @property
    def whole(self) -> Layout:
        """Of the whole weight, where this is of some of its outputs; else itself."""

    def widened(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(A, B) of the `whole` layout with the same delta."""

    def own_outputs(self, values: Any) -> Any:
        """Of one value for each output of the whole weight (out,), those that are this layout's."""

    def among_outputs(self, values: Any, others: float) -> Any:
        """One value for each output of the whole weight: `values` (out_features,) and `others` for the rest."""

    def matrices(self, weight: Any) -> Any:
        """The weight as (n, rows, columns); a view where its memory allows one."""

    def factors(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(left (n, rows, q), right (n, q, columns)): the delta without its scaling is left @ right."""

    def delta(self, a: Any, b: Any) -> Any:
        """left @ right in the weight's own shape."""

    def split(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(B as (n, out, q), A as (n, q, in)), however the weight is stored; `join` takes it back."""

    def join(self, up: Any, down: Any) -> tuple[Any, Any]:
        """(A, B) of such matrices."""

    def rank(self, q: int) -> int:
        """The r of an adapter whose matrices have q ranks each."""

    def turned(self) -> Layout | None:
        """The layout of the same weight for an op that takes it the other way round; None if there is no such op."""

    def turn(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(A, B) of the `turned` layout with the same delta."""


class _Whole:
    """What is the same for all layouts of whole weights."""

    @property
    def whole(self) -> Any:
        return self

    def widened(self, a: Any, b: Any) -> tuple[Any, Any]:
        return a, b

    def own_outputs(self, values: Any) -> Any:
        return values

    def among_outputs(self, values: Any, others: float) -> Any:
        return values

    def why_not_rank(self, r: int) -> str | None:
        return None

    def why_no_weight(self) -> str | None:
        return None


@dataclass(frozen=True)
class Matrix(_Whole):
    """One matrix: linears, products, embeddings (which take one-hot vectors of the vocabulary), any 2-D parameter.

    A is (r, in), B is (out, r); the delta is B @ A, or its transpose where the weight is stored (in, out).
    """

    rows: int
    columns: int
    stored_in_out: bool = False
    count: int = 1

    @property
    def shape(self) -> Shape:
        return self.rows, self.columns

    @property
    def in_features(self) -> int:
        return self.rows if self.stored_in_out else self.columns

    @property
    def out_features(self) -> int:
        return self.columns if self.stored_in_out else self.rows

    def a_shape(self, r: int) -> Shape:
        return r, self.in_features

    def b_shape(self, r: int) -> Shape:
        return self.out_features, r

    def matrices(self, weight: Any) -> Any:
        return _aten.unsqueeze.default(weight, 0)

    def factors(self, a: Any, b: Any) -> tuple[Any, Any]:
        left, right = (_aten.t.default(a), _aten.t.default(b)) if self.stored_in_out else (b, a)
        return _aten.unsqueeze.default(left, 0), _aten.unsqueeze.default(right, 0)

    def delta(self, a: Any, b: Any) -> Any:
        left, right = (_aten.t.default(a), _aten.t.default(b)) if self.stored_in_out else (b, a)
        return _aten.matmul.default(left, right)

    def split(self, a: Any, b: Any) -> tuple[Any, Any]:
        return _aten.unsqueeze.default(b, 0), _aten.unsqueeze.default(a, 0)

    def join(self, up: Any, down: Any) -> tuple[Any, Any]:
        return _aten.squeeze.dim(down, 0), _aten.squeeze.dim(up, 0)

    def rank(self, q: int) -> int:
        return q

    def turned(self) -> Layout:
        return Matrix(self.rows, self.columns, not self.stored_in_out)

    def turn(self, a: Any, b: Any) -> tuple[Any, Any]:
        return _aten.t.default(b), _aten.t.default(a)


@dataclass(frozen=True)
class Part:
    """Some of the outputs of a matrix that several projections are packed in: q, k or v, gate or up.

    A is (r, in), of its own; B is (stop − start, r).
    """

    whole: Matrix
    start: int
    stop: int
    count: int = 1

    @property
    def shape(self) -> Shape:
        return self.whole.shape

    @property
    def in_features(self) -> int:
        return self.whole.in_features

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def stored_in_out(self) -> bool:
        return self.whole.stored_in_out

    def a_shape(self, r: int) -> Shape:
        return r, self.in_features

    def b_shape(self, r: int) -> Shape:
        return self.out_features, r

    def why_not_rank(self, r: int) -> str | None:
        return None

    def why_no_weight(self) -> str | None:
        return None

    def widened(self, a: Any, b: Any) -> tuple[Any, Any]:
        return a, _aten.constant_pad_nd.default(b, [0, 0, self.start, self.whole.out_features - self.stop])

    def own_outputs(self, values: Any) -> Any:
        return _aten.slice.Tensor(values, 0, self.start, self.stop)

    def among_outputs(self, values: Any, others: float) -> Any:
        return _aten.constant_pad_nd.default(values, [self.start, self.whole.out_features - self.stop], others)

    def matrices(self, weight: Any) -> Any:
        return self.whole.matrices(weight)

    def factors(self, a: Any, b: Any) -> tuple[Any, Any]:
        return self.whole.factors(*self.widened(a, b))

    def block(self, a: Any, b: Any) -> tuple[Any, Any]:
        """`factors` of the part alone."""
        rows, columns = (self.in_features, self.out_features)[:: 1 if self.stored_in_out else -1]
        return Matrix(rows, columns, self.stored_in_out).factors(a, b)

    def delta(self, a: Any, b: Any) -> Any:
        return self.whole.delta(*self.widened(a, b))

    def split(self, a: Any, b: Any) -> tuple[Any, Any]:
        return self.whole.split(a, b)

    def join(self, up: Any, down: Any) -> tuple[Any, Any]:
        return self.whole.join(up, down)

    def rank(self, q: int) -> int:
        return q

    def turned(self) -> Layout:
        return self.whole.turned()

    def turn(self, a: Any, b: Any) -> tuple[Any, Any]:
        return self.whole.turn(*self.widened(a, b))


@dataclass(frozen=True)
class Kernel(_Whole):
    """A convolution's kernel (out, in / groups, *k), or a transposed one's (in, out / groups, *k).

    A has the kernel's extent, (r, in / groups, *k), and B is pointwise, (out, r / groups, 1, …): each group has
    r / groups ranks of its own. PEFT's A is (r, in, *k) for any groups: `dense` and `grouped` lead there and back.

    Attributes:
        mixes_groups: A is (r, in, *k) and not zero between groups, so that each rank sees all groups of inputs. That
            can be computed beside the op, and no grouped kernel can hold it.
    """

    shape: Shape
    groups: int = 1
    is_transposed: bool = False
    mixes_groups: bool = field(default=False, compare=False)
    stored_in_out: bool = False
    count: int = 1

    @property
    def in_features(self) -> int:
        return self.shape[0] if self.is_transposed else self.shape[1] * self.groups

    @property
    def out_features(self) -> int:
        return self.shape[1] * self.groups if self.is_transposed else self.shape[0]

    @property
    def extent(self) -> Shape:
        """Sizes of the kernel along the axes that it moves on."""
        return self.shape[2:]

    def a_shape(self, r: int) -> Shape:
        return r, self.in_features // (1 if self.mixes_groups else self.groups), *self.extent

    def b_shape(self, r: int) -> Shape:
        return self.out_features, r // self.groups, *(1 for _ in self.extent)

    def why_not_rank(self, r: int) -> str | None:
        if r % self.groups == 0:
            return None
        return f"r={r} is no multiple of its {self.groups} groups, which share the ranks out among them"

    def why_no_weight(self) -> str | None:
        if not self.mixes_groups:
            return None
        return f"its A mixes the {self.groups} groups of inputs, which the convolution's grouped kernel keeps apart"

    def dense_shape(self, r: int) -> Shape:
        """Shape of A as PEFT has it."""
        return self.a_shape(r) if self.is_transposed else (r, self.in_features, *self.extent)

    def dense(self, a: torch.Tensor) -> torch.Tensor:
        """A as PEFT has it, (r, in, *k): zero between groups."""
        if self.groups == 1 or self.is_transposed or self.mixes_groups:
            return a
        blocks = a.reshape(self.groups, len(a) // self.groups, -1).unbind()
        whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return whole.reshape(len(a), self.in_features, *self.extent)

    def grouped(self, whole: torch.Tensor) -> torch.Tensor | None:
        """A of PEFT's (r, in, *k); None if it mixes the groups."""
        inputs = self.in_features // self.groups
        rows = whole.reshape(self.groups, -1, self.groups, inputs, *self.extent)
        own = torch.stack([rows[group, :, group] for group in range(self.groups)])
        a = own.reshape(-1, inputs, *self.extent)
        return a if bool((self.dense(a) == whole).all()) else None

    def matrices(self, weight: Any) -> Any:
        points = math.prod(self.extent)
        if self.is_transposed:
            return _aten.reshape.default(weight, [self.in_features, self.out_features // self.groups, points])
        per_group = self.in_features // self.groups * points
        return _aten.reshape.default(weight, [self.groups, self.out_features // self.groups, per_group])

    def factors(self, a: Any, b: Any) -> tuple[Any, Any]:
        groups, points = self.groups, math.prod(self.extent)
        inputs, outputs = self.in_features // groups, self.out_features // groups
        left = _aten.reshape.default(b, [groups, outputs, -1])
        if not self.is_transposed:
            return left, _aten.reshape.default(_aten.reshape.default(a, [groups, -1]), [groups, -1, inputs * points])
        ranks = _aten.reshape.default(a, [groups, -1, inputs, points])
        right = _aten.reshape.default(_aten.permute.default(ranks, [0, 2, 1, 3]), [groups * inputs, -1, points])
        return _aten.repeat_interleave.self_int(left, inputs, 0), right

    def delta(self, a: Any, b: Any) -> Any:
        left, right = self.factors(a, b)
        return _aten.reshape.default(_aten.matmul.default(left, right), list(self.shape))

    def split(self, a: Any, b: Any) -> tuple[Any, Any]:
        up = _aten.reshape.default(b, [self.groups, self.out_features // self.groups, -1])
        return up, _aten.reshape.default(
            a, [self.groups, a.shape[0] // self.groups, self.in_features // self.groups * math.prod(self.extent)]
        )

    def join(self, up: Any, down: Any) -> tuple[Any, Any]:
        r = self.rank(down.shape[1])
        return _aten.reshape.default(down, list(self.a_shape(r))), _aten.reshape.default(up, list(self.b_shape(r)))

    def rank(self, q: int) -> int:
        return q * self.groups

    def turned(self) -> None:
        return None

    def turn(self, a: Any, b: Any) -> tuple[Any, Any]:
        raise AssertionError("kernels are not turned")


@dataclass(frozen=True)
class Experts(_Whole):
    """A stack of matrices (E, out, in), or (E, in, out), one for each expert of a mixture.

    PEFT's order: A is (E · r, in) with the expert slowest, B is (out, r · E) with the expert fastest.
    """

    shape: Shape
    stored_in_out: bool = False

    @property
    def count(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1] if self.stored_in_out else self.shape[2]

    @property
    def out_features(self) -> int:
        return self.shape[2] if self.stored_in_out else self.shape[1]

    def a_shape(self, r: int) -> Shape:
        return self.count * r, self.in_features

    def b_shape(self, r: int) -> Shape:
        return self.out_features, r * self.count

    def matrices(self, weight: Any) -> Any:
        return weight

    def per_expert(self, a: Any, b: Any) -> tuple[Any, Any]:
        """A as (E, r, in) and B as (E, out, r)."""
        stacked = _aten.reshape.default(a, [self.count, -1, self.in_features])
        spread = _aten.reshape.default(b, [self.out_features, -1, self.count])
        return stacked, _aten.permute.default(spread, [2, 0, 1])

    def factors(self, a: Any, b: Any) -> tuple[Any, Any]:
        stacked, spread = self.per_expert(a, b)
        if not self.stored_in_out:
            return spread, stacked
        return _aten.transpose.int(stacked, 1, 2), _aten.transpose.int(spread, 1, 2)

    def delta(self, a: Any, b: Any) -> Any:
        left, right = self.factors(a, b)
        return _aten.matmul.default(left, right)

    def split(self, a: Any, b: Any) -> tuple[Any, Any]:
        down, up = self.per_expert(a, b)
        return up, down

    def join(self, up: Any, down: Any) -> tuple[Any, Any]:
        a = _aten.reshape.default(down, [-1, self.in_features])
        return a, _aten.reshape.default(_aten.permute.default(up, [1, 2, 0]), [self.out_features, -1])

    def rank(self, q: int) -> int:
        return q

    def turned(self) -> Layout:
        return Experts(self.shape, not self.stored_in_out)

    def turn(self, a: Any, b: Any) -> tuple[Any, Any]:
        up, down = self.split(a, b)
        turned = self.turned()
        return turned.join(_aten.transpose.int(down, 1, 2), _aten.transpose.int(up, 1, 2))


def without_start(a: Any, b: Any, a0: Any, b0: Any) -> tuple[Any, Any]:
    """A and B of B @ A − B0 @ A0: of twice the rank. For matrices, and kernels without groups."""
    return _aten.cat.default([a, a0], 0), _aten.cat.default([b, _aten.neg.default(b0)], 1)


def as_stored(layout: Layout) -> Layout:
    """How PEFT's target_parameters reads a parameter: a matrix as it is stored, whatever applies it."""
    return Matrix(layout.rows, layout.columns) if isinstance(layout, Matrix) else layout


def layout_of(shape: Shape, *, stored_in_out: bool = False) -> Layout | str:
    """The layout of a parameter of any op, as PEFT's target_parameters reads it; or why there is none."""
    if len(shape) == 2:
        return Matrix(shape[0], shape[1], stored_in_out)
    if len(shape) == 3:
        return Experts(tuple(shape), stored_in_out)
    if len(shape) > 3:
        return Kernel(tuple(shape))
    return f"it has {len(shape)} dimensions, and LoRA needs two"
