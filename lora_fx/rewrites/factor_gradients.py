"""How A and B of a group lie in memory, and gradients of theirs that are cast in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..arena import joined
from .group_operands import Needed, Operands


def packing_order(factors: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> list[torch.Tensor]:
    """In which order `inject` puts a group's A and B into memory: all A, so that they are one matrix; then all B."""
    return [a for pairs in factors for a, _ in pairs] + [b for pairs in factors for _, b in pairs]


def unpacked(
    flat: torch.Tensor, like: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Parts of a vector in the packing order, in the shapes of `like`."""
    parts, at = [], 0
    for t in packing_order(like):
        parts.append(flat.as_strided(t.shape, (t.shape[1], 1), at))
        at += t.numel()
    count = sum(len(pairs) for pairs in like)
    pairs = iter(zip(parts[:count], parts[count:], strict=True))
    return [[next(pairs) for _ in each] for each in like]


@dataclass
class FactorGradients:
    """Where gradients of A and B go: if they have to be cast, into one vector that is cast in one go.

    Attributes:
        flat: that vector, in the packing order; None where each gradient has its own memory.
        parts: views of it.
    """

    flat: torch.Tensor | None
    parts: list[list[tuple[torch.Tensor, torch.Tensor]]]

    @classmethod
    def of(cls, given: Operands, narrowed: Operands, needed: Needed) -> FactorGradients:
        """For a call that was given `given`, and computed with `narrowed`, whose factors may be cast ones."""
        if narrowed is given or not any(given.factors) or not needed.all_factors:
            return _APART
        first = narrowed.factors[next(i for i, pairs in enumerate(given.factors) if pairs)][0][0]
        size = sum(t.numel() for pairs in given.factors for pair in pairs for t in pair)
        flat = first.new_zeros(size)  # a linear whose result nobody used leaves zeros
        return cls(flat, unpacked(flat, given.factors))

    def of_a(self, terms: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        """Room for dA of some terms, one below the other."""
        if self.flat is None:
            return None
        parts = [self.parts[number][place][0] for number, place in terms]
        piece = joined(parts)
        return None if piece is None else piece.view(-1, parts[0].shape[1])

    def of_b(self, term: tuple[int, int]) -> torch.Tensor | None:
        """Room for dB of a term."""
        return None if self.flat is None else self.parts[term[0]][term[1]][1]

    def widened(
        self,
        of_a: dict[tuple[int, int], torch.Tensor],
        of_b: dict[tuple[int, int], torch.Tensor],
        given: Operands,
    ) -> tuple[dict[tuple[int, int], torch.Tensor], dict[tuple[int, int], torch.Tensor]]:
        """The gradients in the dtypes of A and B."""
        if self.flat is None:
            return (
                {(n, t): da.to(given.factors[n][t][0].dtype) for (n, t), da in of_a.items()},
                {(n, t): db.to(given.factors[n][t][1].dtype) for (n, t), db in of_b.items()},
            )
        for which, gradients in enumerate((of_a, of_b)):
            for (number, place), gradient in gradients.items():
                part = self.parts[number][place][which]
                if gradient.data_ptr() != part.data_ptr():
                    part.copy_(gradient)
        dtype = next(t.dtype for pairs in given.factors for pair in pairs for t in pair)
        wide = unpacked(self.flat.to(dtype), given.factors)
        return {(n, t): wide[n][t][0] for n, t in of_a}, {(n, t): wide[n][t][1] for n, t in of_b}


_APART = FactorGradients(None, [])
