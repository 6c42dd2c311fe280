"""The layers of a family's original code, after which kohya's trainers, ai-toolkit and ComfyUI name theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace


_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a block in a path; the first one is meant."""


@dataclass(frozen=True, kw_only=True)
class OriginalLayer:
    """A linear layer of the original code, as the layers of diffusers that it is.

    Args:
        paths: Their paths in the denoiser, with ``N`` for the number of the block; several where the layer's rows are
            theirs, one below the other.
        rows: How many rows each has where its input is `width` wide, and in these proportions anywhere else; empty for
            one layer of any shape.
        width: See `rows`.
        swapped: Rows, likewise, of the one kind of this layer whose halves stand the other way round in diffusers: a
            shift and a scale, there a scale and a shift. 0 where none does.
    """

    paths: tuple[str, ...]
    rows: tuple[int, ...] = ()
    width: int = 1
    swapped: int = 0

    def heights(self, width: int) -> tuple[int, ...]:
        """Rows of each of its layers in diffusers where its input has this width; empty where any number is right."""
        return tuple(part * width // self.width for part in self.rows)

    def split(self, rows: int, width: int) -> tuple[int, ...]:
        """Rows of each of its layers in diffusers; none if the original code has no layer of this shape here."""
        sizes = self.heights(width) or (rows,)
        return sizes if width % self.width == 0 and sum(sizes) == rows else ()

    def halves_are_swapped(self, rows: int, width: int) -> bool:
        """Whether it is of the kind whose halves stand the other way round."""
        return bool(self.swapped) and rows == self.swapped * width


def alike(*paths: str) -> Mapping[str, OriginalLayer]:
    """Layers that have the same paths in diffusers."""
    return {path: OriginalLayer(paths=(path,)) for path in paths}


def one(path: str, rows: int = 0, width: int = 1, swapped: int = 0) -> OriginalLayer:
    """A layer that is one layer in diffusers."""
    return OriginalLayer(paths=(path,), rows=(rows,) if rows else (), width=width, swapped=swapped)


def stack(*paths: str) -> OriginalLayer:
    """A layer whose rows are those of several layers, each as high as its input is wide."""
    return OriginalLayer(paths=paths, rows=(1,) * len(paths))


def in_block(name: str, path: str, layers: Mapping[str, OriginalLayer]) -> dict[str, OriginalLayer]:
    """Layers of every block.

    Args:
        name: What the original code calls the block, with ``N`` for its number.
        path: What diffusers calls it.
        layers: By their names inside it, with paths inside it.
    """
    return {
        f"{name}.{inner}": replace(layer, paths=tuple(f"{path}.{each}" for each in layer.paths))
        for inner, layer in layers.items()
    }


def without_number(path: str) -> tuple[str, str]:
    """A path with ``N`` for the number of its block, and that number; empty where it has none."""
    number = _BLOCK.search(path)
    return (_BLOCK.sub("N", path, count=1), number[0]) if number else (path, "")


def with_number(path: str, number: str) -> str:
    """The path of the block of this number."""
    return re.sub(r"\bN\b", number, path, count=1)
