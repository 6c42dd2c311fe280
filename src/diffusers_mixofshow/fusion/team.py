"""The processes that fuse together: each records and reads its share of the sources; sums are all-reduced.

Every process solves every layer from the same sums, which costs little beside recording, so that all of them hold the
same fused layers when the next stage is recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from diffusers_mixofshow.fusion.gram import DenseGram, Device, Gram, sum_grams
from diffusers_mixofshow.fusion.sketch import WIDEST_MATRIX


Name = TypeVar("Name")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Team:
    """This process among its equals.

    Args:
        rank: Its number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> Team:
        """The process group that ``accelerate launch`` or ``torchrun`` has set up; one process without."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, items: Sequence[Item]) -> dict[int, Item]:
        """The items that are this process's to record and to read, by their place among all."""
        return {place: item for place, item in enumerate(items) if place % self.size == self.rank}

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes, the same everywhere, of any shape; on the tensor's device."""
        if self.size == 1:
            return tensor
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        moved = tensor.detach().clone().to(device)
        distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def sum_gram(self, weighted: Iterable[tuple[Gram, float]], width: int, device: Device) -> Gram:
        """Sum of the Gram matrices of all processes, the same everywhere, of which this one may have none.

        Args:
            weighted: Its own matrices and their weights.
            width: Of the input that they are of.
            device: Where the sum is taken.
        """
        if self.size == 1:
            return sum_grams(weighted, as_matrix=width <= WIDEST_MATRIX)
        none = DenseGram(torch.zeros(width, width, dtype=torch.float64, device=device))
        return DenseGram(self.summed(sum_grams(itertools.chain([(none, 1.0)], weighted), as_matrix=True).matrix()))

    def joined(self, found: Mapping[Name, Item]) -> dict[Name, Item]:
        """Entries of all processes in one mapping; every process waits here for all others."""
        if self.size == 1:
            return dict(found)
        parts: list[Mapping[Name, Item]] = [{}] * self.size
        distributed.all_gather_object(parts, dict(found))
        return {name: item for part in parts for name, item in part.items()}
