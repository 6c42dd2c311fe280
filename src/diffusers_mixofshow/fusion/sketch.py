"""Sketch the Gram matrix of a wide layer: its products with a few fixed directions, and its trace."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffusers_mixofshow.fusion.compression import Spectrum
from diffusers_mixofshow.fusion.gram import GramFactor


WIDEST_MATRIX = 2048
"""Inputs of at most this many features keep their full Gram matrix; wider ones are sketched."""
DIRECTIONS = 96
"""Columns of a sketch. On the embedded base 64 to 96 give the same residuals as the full matrix."""


def count_stored_values(width: int) -> int:
    """Number of values that recording stores for the Gram matrix of an input."""
    return width * width if width <= WIDEST_MATRIX else width * DIRECTIONS


class GramSketch:
    """A sum of outer products G = X^T X of rows X, stored as Y = G Omega and tr G (arXiv:1706.05736).

    Omega is a fixed orthonormal matrix, the same for all layers of equal width, so that sketches can be added over
    tokens, prompts, seeds and processes as matrices can. Memory is linear in the width.
    """

    def __init__(self, width: int, directions: int | None = None) -> None:
        """Start with nothing seen.

        Args:
            width: Features of the layer's input.
            directions: Columns of Omega; `DIRECTIONS` by default.
        """
        self._width, self._directions = width, min(DIRECTIONS if directions is None else directions, width)
        self._image: torch.Tensor | None = None  # Y, (width, directions)
        self._trace = torch.zeros((), dtype=torch.float64)
        self._found: tuple[int, GramFactor] | None = None  # cache: used several times while a file is written

    def add(self, rows: torch.Tensor) -> None:
        """Add X^T (X Omega) to Y, and the sum of squares of X to the trace.

        Args:
            rows: X, shape (tokens, width), float64 on a CPU, float32 elsewhere.
        """
        image, self._found = rows.T @ (rows @ self._omega(rows)), None
        self._image = image if self._image is None else self._image + image
        self._trace += rows.square().sum(dtype=torch.float32 if rows.device.type == "mps" else torch.float64).cpu()

    def offload(self) -> None:
        """Move the sums to the CPU."""
        if self._image is not None:
            self._image = self._image.cpu()

    def gram(self, tokens: int) -> GramFactor:
        """The matrix per token as a low-rank factor with a tail (Nystrom, algorithm 3 of arXiv:1706.05736).

        G is approximated by Y (Omega^T Y)^+ Y^T, whose eigenvalues never exceed G's. The rest of the trace is
        spread evenly over the other directions.

        Args:
            tokens: Number of rows that were added, above 0.
        """
        if self._found is None or self._found[0] != tokens:
            self._found = (tokens, self._factor(tokens))
        return self._found[1]

    def _factor(self, tokens: int) -> GramFactor:
        if self._image is None:
            raise RuntimeError("Nothing was added to this sketch.")
        eps = torch.finfo(self._image.dtype).eps
        image = self._image.cpu().double() / tokens
        if not image.isfinite().all():
            return GramFactor(rows=image.T)  # which is not finite either, and named where factors are written
        omega = self._omega(image)
        # The shift keeps the core positive definite despite rounding of Y; the eigenvalues are corrected for it below.
        shift = eps * self._width**0.5 * torch.linalg.matrix_norm(image, ord=2)
        image = image + shift * omega
        core = omega.T @ image
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        known = values > values.max().clamp_min(0) * eps
        half = image @ (vectors[:, known] / values[known].sqrt())  # half half^T = Y (Omega^T Y)^+ Y^T
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        found = (singular.square() - shift).clamp_min(0)
        trace = (self._trace / tokens).clamp_min(found.sum())
        # Keep only directions that are stronger than an even share of the remaining trace.
        counts = torch.arange(1, len(found) + 1)
        shares = (trace - found.cumsum(0)) / (self._width - counts).clamp_min(1)
        kept = int((found > shares).sum())
        rest = (trace - found[:kept].sum()).clamp_min(0) / max(1, self._width - kept)
        return Spectrum(torch.cat([found[:kept], rest.expand(self._width - kept)]), left[:, :kept]).leading(kept)

    def _omega(self, like: torch.Tensor) -> torch.Tensor:
        return _directions(self._width, self._directions).to(like)


@lru_cache(maxsize=16)
def _directions(width: int, count: int) -> torch.Tensor:
    """Omega, orthonormal columns of shape (width, count), float64, the same in every run and on every machine."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q
