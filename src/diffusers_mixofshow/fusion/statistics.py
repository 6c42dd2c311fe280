"""What fusion has to know about a concept: the Gram matrix of every layer's inputs, gathered as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch

from diffusers_mixofshow.fusion.compression import GramFactor
from diffusers_mixofshow.fusion.sketch import WIDEST_MATRIX, GramSketch


Part = Literal["fit", "held_out"]
"""Inputs of the prompts that are only fitted, and of those by which a ridge can be judged as well."""

PARTS: tuple[Part, ...] = ("fit", "held_out")


class GramStatistics(Protocol):
    """Gram matrices of one concept's layer inputs, wherever they are kept."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, see `Family.input_of`."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Which parts were recorded."""

    def tokens(self, name: str, part: Part | None = None) -> int:
        """Number of tokens seen at an input, in one part or in all; 0 if it was never met."""

    def gram(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Gram matrix per token, (in_features, in_features), float64, on the CPU; of one part or of all."""

    def factor(self, name: str, part: Part | None = None) -> GramFactor | None:
        """The Gram matrix of one part or of all as a low-rank factor, where it is kept as one."""


class ConceptStatistics:
    """Streaming Gram matrices X X^T of one concept's layer inputs; no feature is kept, and of wide inputs no matrix.

    Products are taken in float64 on a CPU and in float32 elsewhere, and summed in float64 where the device has it.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._sums: dict[tuple[str, Part], torch.Tensor] = {}
        self._sketches: dict[tuple[str, Part], GramSketch] = {}
        self._tokens: dict[tuple[str, Part], int] = {}

    def add(self, name: str, features: torch.Tensor, part: Part = "fit") -> None:
        """Add the features that went into a layer.

        Args:
            name: The input's name, see `Family.input_of`.
            features: Any number of tokens, shape (..., in_features).
            part: What they are for, see `Part`.
        """
        rows = features.detach().flatten(end_dim=-2)
        with _exact_products(rows) as exact:
            if rows.shape[1] > WIDEST_MATRIX:
                self._sketches.setdefault((name, part), GramSketch(rows.shape[1])).add(exact)
            else:
                self._add_product(name, part, exact.T @ exact)
        self._tokens[name, part] = self._tokens.get((name, part), 0) + len(rows)

    def _add_product(self, name: str, part: Part, product: torch.Tensor) -> None:
        """Add X^T X, (in_features, in_features)."""
        if (name, part) not in self._sums:
            dtype = torch.float32 if product.device.type == "mps" else torch.float64
            self._sums[name, part] = torch.zeros(product.shape, dtype=dtype, device=product.device)
        self._sums[name, part] += product

    def offload(self) -> None:
        """Move what was gathered to the CPU, so that a GPU holds no more than one concept's sums at a time."""
        self._sums = {key: gram.cpu() for key, gram in self._sums.items()}
        for sketch in self._sketches.values():
            sketch.offload()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs seen so far."""
        return tuple(dict.fromkeys(name for name, _ in self._tokens))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts seen so far."""
        return tuple(part for part in PARTS if any(part == seen for _, seen in self._tokens))

    def tokens(self, name: str, part: Part | None = None) -> int:
        """Number of tokens seen at an input, in one part or in all; 0 if it was never met."""
        return sum(self._tokens.get((name, one), 0) for one in (PARTS if part is None else (part,)))

    def gram(self, name: str, part: Part | None = None) -> torch.Tensor:
        """Gram matrix per token, X X^T / tokens, so that concepts weigh the same however long they were recorded.

        Args:
            name: The input's name, see `Family.input_of`.
            part: Of which inputs; all by default.

        Returns:
            Shape (in_features, in_features), float64, on the CPU.
        """
        wanted = [one for one in (PARTS if part is None else (part,)) if (name, one) in self._tokens]
        if not wanted:
            raise KeyError(name)
        if factor := self.factor(name, part):
            return factor.gram()
        total = sum(self._sums[name, one].cpu().double() for one in wanted)
        return torch.as_tensor(total) / self.tokens(name, part)

    def factor(self, name: str, part: Part | None = None) -> GramFactor | None:
        """What is known of a wide input's matrix; None of others, of which the matrix itself is gathered."""
        wanted = [one for one in (PARTS if part is None else (part,)) if (name, one) in self._sketches]
        if not wanted:
            return None
        factors = [self._sketches[name, one].factor(self._tokens[name, one]) for one in wanted]
        return GramFactor.summed(factors, [self._tokens[name, one] / self.tokens(name, part) for one in wanted])


@contextmanager
def _exact_products(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows whose products are taken in float64 on a CPU, else in true float32, whatever the user turned on.

    TensorFloat-32 keeps ten bits, and autocast would multiply in half precision.
    """
    device = rows.device.type
    if device == "cpu":
        yield rows.double()
        return
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield rows.float()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def summed_factor(statistics: Sequence[GramStatistics], name: str, part: Part | None = None) -> GramFactor | None:
    """Factor of `summed_gram`; None unless every concept keeps one."""
    factors = [factor for one in statistics if (factor := one.factor(name, part)) is not None]
    return GramFactor.summed(factors, [1.0] * len(factors)) if len(factors) == len(statistics) else None


def summed_gram(statistics: Iterable[GramStatistics], name: str, part: Part | None = None) -> torch.Tensor:
    """Gram matrix of several concepts that share one update, every concept weighing the same.

    Args:
        statistics: One per concept.
        name: The input's name, see `Family.input_of`.
        part: Of which inputs; all by default.

    Returns:
        Shape (in_features, in_features), float64, on the CPU.
    """
    return torch.stack([one.gram(name, part) for one in statistics]).sum(dim=0)
