"""Layers of a family's original code, whose names kohya's trainers, ai-toolkit and ComfyUI use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
"""Number of a block in a path; the first match counts."""


@dataclass(frozen=True, kw_only=True)
class OriginalLayer:
    """A linear layer of the original code, and the diffusers layers that it consists of.

    Args:
        paths: Paths of the diffusers layers in the denoiser, with ``N`` for the block's number; several if the
            original matrix is theirs stacked along the rows.
        rows: Rows of each diffusers layer as multiples of (input width / `width`); empty for one layer of any shape.
        width: See `rows`.
        swapped: If a layer has this multiple of rows, its halves are swapped in diffusers: shift and scale in the
            original code, scale and shift there. 0 if that never happens.
    """

    paths: tuple[str, ...]
    rows: tuple[int, ...] = ()
    width: int = 1
    swapped: int = 0

    def heights(self, width: int) -> tuple[int, ...]:
        """Rows of each of its diffusers layers for an input width; empty if any number is allowed."""
        return tuple(part * width // self.width for part in self.rows)

    def split(self, rows: int, width: int) -> tuple[int, ...]:
        """Rows of each of its diffusers layers for a matrix of this shape; empty if the shape is impossible."""
        sizes = self.heights(width) or (rows,)
        return sizes if width % self.width == 0 and sum(sizes) == rows else ()

    def halves_are_swapped(self, rows: int, width: int) -> bool:
        """Whether a matrix of this shape has its halves swapped in diffusers; see `swapped`."""
        return bool(self.swapped) and rows == self.swapped * width


def same_names(*paths: str) -> Mapping[str, OriginalLayer]:
    """Layers with the same path in the original code and in diffusers."""
    return {path: OriginalLayer(paths=(path,)) for path in paths}


def one(path: str, rows: int = 0, width: int = 1, swapped: int = 0) -> OriginalLayer:
    """A layer of the original code that is one layer in diffusers."""
    return OriginalLayer(paths=(path,), rows=(rows,) if rows else (), width=width, swapped=swapped)


def stack(*paths: str) -> OriginalLayer:
    """A layer of the original code that stacks several square layers of diffusers."""
    return OriginalLayer(paths=paths, rows=(1,) * len(paths))


def in_block(name: str, path: str, layers: Mapping[str, OriginalLayer]) -> dict[str, OriginalLayer]:
    """Prefix the names and paths of layers by those of their block.

    Args:
        name: The block's name in the original code, with ``N`` for its number.
        path: The block's path in diffusers, likewise.
        layers: Name inside the block to layer, its paths relative to the block.
    """
    return {
        f"{name}.{inner}": replace(layer, paths=tuple(f"{path}.{each}" for each in layer.paths))
        for inner, layer in layers.items()
    }


def strip_block_number(path: str) -> tuple[str, str]:
    """Replace the block's number in a path by ``N``; returns the path and the number, which may be empty."""
    number = _BLOCK.search(path)
    return (_BLOCK.sub("N", path, count=1), number[0]) if number else (path, "")


def insert_block_number(path: str, number: str) -> str:
    """Replace ``N`` in a path by the block's number; the reverse of `strip_block_number`."""
    return re.sub(r"\bN\b", number, path, count=1)
