"""What a group of linears on one input is, and the tensors that its call takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .chains import Chain, Derivative


@dataclass(frozen=True)
class Term:
    """One adapter at one linear: scaling · drop(x) Aᵀ Bᵀ; `takes_dropout`: the module for that comes with the call."""

    scaling: float
    takes_dropout: bool = False


@dataclass(frozen=True)
class Linear:
    """One linear of a group.

    Attributes:
        base: how its own result comes: "linear" takes W (out, in), "product" takes W (in, out), "given" is a tensor.
        has_bias: whether a bias (out,) comes with W.
        terms: the adapters on it.
    """

    base: str
    has_bias: bool
    terms: tuple[Term, ...]

    @property
    def operands(self) -> int:
        """How many tensors it takes."""
        return 1 + self.has_bias + 2 * len(self.terms)


@dataclass(frozen=True)
class Group:
    """Linears that read one x.

    Attributes:
        linears: see above; none for a chain of cheap ops alone.
        inputs: how many tensors x is made from.
        chain: makes x from them; None: x is the only input.
        gives_x: whether x is a result too, behind those of the linears.
        computes_narrow: A and B are cast to x's dtype, rather than x to theirs.
        dropout: "exact" draws the masks that nn.Dropout would; "cut" cuts them from one draw; "shared" is one for all.
        may_merge: whether W + s · B A may be built where tokens are so many that it takes fewer operations.
    """

    linears: tuple[Linear, ...]
    inputs: int = 1
    chain: Chain | None = field(default=None, compare=False)
    gives_x: bool = False
    computes_narrow: bool = True
    dropout: str = "exact"
    may_merge: bool = False
    tensor_input: int = 0  # the number of an input that is a tensor

    @cached_property
    def operands(self) -> int:
        """How many tensors it takes."""
        return self.inputs + sum(linear.operands for linear in self.linears)


@dataclass(frozen=True)
class Lane:
    """Terms that multiply the same x, dropped out at one rate.

    Attributes:
        terms: (number of the linear, number of the term) of each.
        p: the rate.
        scalings: of each term, with that of what dropout leaves in them.
    """

    terms: tuple[tuple[int, int], ...]
    p: float = 0.0
    scalings: dict[tuple[int, int], float] = field(default_factory=dict, compare=False)

    @cached_property
    def scaling(self) -> float | None:
        """The one of all terms; None if they differ."""
        return self.scalings[self.terms[0]] if len({*self.scalings.values()}) == 1 else None


class Operands:
    """The tensors of a call, told apart: those that x is made from; W, bias, and (A, B) of each term, by linear."""

    __slots__ = ("bases", "biases", "factors", "inputs")

    def __init__(self, group: Group, tensors: Sequence[Any]) -> None:
        # Loops and += rather than comprehensions and append, here and below: a call takes as long as a small kernel.
        self.inputs: list[Any] = [*tensors[: group.inputs]]
        self.bases: list[torch.Tensor] = []
        self.biases: list[torch.Tensor | None] = []
        self.factors: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        at = group.inputs
        for linear in group.linears:
            self.bases += [tensors[at]]
            at += 1
            self.biases += [tensors[at] if linear.has_bias else None]
            at += linear.has_bias
            pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
            for _ in linear.terms:
                pairs += [(tensors[at], tensors[at + 1])]
                at += 2
            self.factors += [pairs]

    def with_factors(self, factors: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> Operands:
        """The same with other A and B."""
        result = object.__new__(Operands)
        result.inputs, result.bases, result.biases, result.factors = self.inputs, self.bases, self.biases, factors
        return result


class Needed(Operands):
    """Which of a call's tensors need a gradient.

    Attributes:
        of_x: whether x does.
        wanted: the places of those inputs that do.
        all_factors, some_base: whether each A and B does; whether a W, a bias or a given result does.
        derivative: of the chain, for the wanted inputs; None where autograd is to find their gradients.
    """

    __slots__ = ("all_factors", "derivative", "of_x", "some_base", "wanted")

    def __init__(self, group: Group, needs: Sequence[bool]) -> None:
        super().__init__(group, needs)
        self.wanted = [place for place, need in enumerate(self.inputs) if need]
        self.of_x = bool(self.wanted)
        self.all_factors = all(need for pairs in self.factors for pair in pairs for need in pair)
        self.some_base = any(self.bases) or any(self.biases)
        self.derivative: Derivative | None = None
        if group.chain is not None and self.of_x:
            self.derivative = group.chain.derivative(self.wanted, gives_x=bool(group.linears))
