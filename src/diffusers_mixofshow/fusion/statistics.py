"""Statistics of a concept: the Gram matrix of every layer's inputs, accumulated while the concept is sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from diffusers_mixofshow.fusion.gram import DenseGram, Gram, sum_grams
from diffusers_mixofshow.fusion.sketch import WIDEST_MATRIX, GramSketch


Part = Literal["fit", "held_out"]
"""``fit``: inputs of most prompts; ``held_out``: inputs of the prompts by which ``ridge='auto'`` chooses a ridge.

The final solution uses both.
"""

PARTS: tuple[Part, ...] = ("fit", "held_out")


class GramStatistics(ABC):
    """Gram matrices of one concept's layer inputs, in memory or in a file."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[tuple[str, Part], int]:
        """Number of tokens seen at each input in each part; inputs are named as by `Family.input_of`."""

    @abstractmethod
    def read(self, name: str, parts: Sequence[Part]) -> Iterable[Gram]:
        """Gram matrices per token of an input, on the CPU; one for each of these parts, which were all recorded."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(dict.fromkeys(name for name, _ in self.counts))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that were recorded."""
        return tuple(part for part in PARTS if any(part == seen for _, seen in self.counts))

    def tokens(self, name: str, part: Part | None = None) -> int:
        """Number of tokens seen at an input, in one part or in all; 0 for an unknown input."""
        return sum(self.counts.get((name, one), 0) for one in (PARTS if part is None else (part,)))

    def gram(self, name: str, part: Part | None = None) -> Gram:
        """Gram matrix per token, X X^T / tokens, so that weights of concepts do not depend on recording length.

        Args:
            name: The input's name, see `Family.input_of`.
            part: Which part; all by default.

        Raises:
            KeyError: If the input was not recorded.
            FusionError: If a file's matrix holds NaN or Inf, or the file was replaced since its header was loaded.
        """
        wanted = [one for one in (PARTS if part is None else (part,)) if (name, one) in self.counts]
        if not wanted:
            raise KeyError(name)
        shares = [self.counts[name, one] / self.tokens(name, part) for one in wanted]
        return sum_grams(zip(self.read(name, wanted), shares, strict=True))


class ConceptStatistics(GramStatistics):
    """Streaming Gram matrices X X^T of one concept's layer inputs; wide ones are sketched, features are never kept.

    Products are taken in float64 on a CPU and in float32 elsewhere, and summed in float64 where the device has it.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._sums: dict[tuple[str, Part], _DenseSum | GramSketch] = {}
        self._tokens: dict[tuple[str, Part], int] = {}

    def add(self, name: str, features: torch.Tensor, part: Part = "fit") -> None:
        """Add a batch of input features of a layer.

        Args:
            name: The input's name, see `Family.input_of`.
            features: Any number of tokens, shape (..., in_features).
            part: The part they belong to.
        """
        rows = features.detach().flatten(end_dim=-2)
        if (name, part) not in self._sums:
            self._sums[name, part] = _DenseSum() if rows.shape[1] <= WIDEST_MATRIX else GramSketch(rows.shape[1])
        with _exact_products(rows) as exact:
            self._sums[name, part].add(exact)
        self._tokens[name, part] = self._tokens.get((name, part), 0) + len(rows)

    def offload(self) -> None:
        """Move the sums to the CPU, so that a GPU holds those of one concept at a time."""
        for one in self._sums.values():
            one.offload()

    @property
    def counts(self) -> Mapping[tuple[str, Part], int]:
        """Number of tokens seen so far at each input in each part."""
        return self._tokens

    def read(self, name: str, parts: Sequence[Part]) -> Iterator[Gram]:
        """Gram matrices per token of the parts of an input, one at a time."""
        return (self._sums[name, part].gram(self._tokens[name, part]) for part in parts)


class _DenseSum:
    """A sum of outer products X^T X of rows X, (in_features, in_features)."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        product = rows.T @ rows
        if self._sum is None:
            self._sum = product.to(torch.float32 if product.device.type == "mps" else torch.float64)
        else:
            self._sum += product

    def offload(self) -> None:
        self._sum = None if self._sum is None else self._sum.cpu()

    def gram(self, tokens: int) -> DenseGram:
        if self._sum is None:
            raise RuntimeError("Nothing was added to this sum.")
        return DenseGram(self._sum.cpu().double() / tokens)


@contextmanager
def _exact_products(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows whose products are computed in float64 on a CPU, else in true float32, whatever the user's settings.

    TensorFloat-32 keeps ten bits, and autocast would multiply in half precision.
    """
    device = rows.device.type
    if device == "cpu":
        yield rows.double()
        return
    matmul: Any = torch.backends.cuda.matmul
    # Where there is a newer setting, reading the older one fails if the user has changed the newer one.
    setting, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    users = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        with torch.autocast(device, enabled=False):
            yield rows.float()
    finally:
        setattr(matmul, setting, users)
