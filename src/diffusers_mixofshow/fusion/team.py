"""Fusion by several processes: each records and reads its share of the sources; sums are all-reduced.

Every process solves every layer from the same sums. That costs little compared with recording, and gives all of them
the same fused layers for recording the next stage.
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
    """Rank of this process, from 0, and the number of processes."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Team:
        """The process group that ``accelerate launch`` or ``torchrun`` has set up; else a team of one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, items: Sequence[Item]) -> dict[int, Item]:
        """This process's share of the items, by their index among all items."""
        return {place: item for place, item in enumerate(items) if place % self.size == self.rank}

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes, on the tensor's device."""
        if self.size == 1:
            return tensor
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        moved = tensor.detach().clone().to(device)
        distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def sum_gram(self, weighted: Iterable[tuple[Gram, float]], width: int, device: Device) -> Gram:
        """Sum, on a device, of the weighted Gram matrices of all processes; this one may have none."""
        if self.size == 1:
            return sum_grams(weighted, as_matrix=width <= WIDEST_MATRIX)
        none = DenseGram(torch.zeros(width, width, dtype=torch.float64, device=device))
        return DenseGram(self.all_reduce(sum_grams(itertools.chain([(none, 1.0)], weighted), as_matrix=True).matrix()))

    def all_gather(self, found: Mapping[Name, Item]) -> dict[Name, Item]:
        """Merge the entries of all processes into one mapping; a barrier for all processes."""
        if self.size == 1:
            return dict(found)
        parts: list[Mapping[Name, Item]] = [{}] * self.size
        distributed.all_gather_object(parts, dict(found))
        return {name: item for part in parts for name, item in part.items()}
