"""How large a fused file becomes: the ranks of its updates, known before any layer is solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.errors import warn
from diffusers_mixofshow.fusion.solving import Method, Settings


OF_FULL_RANK: tuple[Method, ...] = ("ties", "dare")
"""Methods that change single values of the dense updates, which leaves them with the full rank of the layer."""

_LARGE = 100_000_000
"""Bytes of a file from which on a full rank is worth a warning."""

Updates = Sequence[Mapping[str, LowRank]]
"""For each source, site to its update."""


def find_ranks(updates: Updates, settings: Settings) -> dict[str, int]:
    """Find the rank of every fused update; some updates may turn out smaller."""
    ranks: dict[str, list[int]] = {}
    for lora in updates:
        for site, update in lora.items():
            ranks.setdefault(site, []).append(update.rank)
    full = {site: min(size) for site, size in find_sizes(updates).items()}
    found = {site: max(own) if settings.method == "svd" else sum(own) for site, own in ranks.items()}
    found = full if settings.method in OF_FULL_RANK else found
    return {site: min(rank, full[site], settings.max_rank or rank) for site, rank in found.items()}


def find_sizes(updates: Updates) -> dict[str, tuple[int, int]]:
    """Find (out_features, in_features) of every layer that is changed."""
    return {site: (update.up.shape[0], update.down.shape[1]) for lora in updates for site, update in lora.items()}


def count_values(updates: Updates, settings: Settings) -> int:
    """Count the values of all fused updates."""
    sizes = find_sizes(updates)
    return sum(rank * sum(sizes[site]) for site, rank in find_ranks(updates, settings).items())


def warn_of_full_rank(updates: Updates, settings: Settings, dtype: torch.dtype = torch.float16) -> None:
    """Warn of a large file, if the method is one of `OF_FULL_RANK` and no `max_rank` is given.

    Warns:
        MixOfShowWarning: Names both sizes, and the `max_rank` that makes the file as small as other methods do.
    """
    if settings.method not in OF_FULL_RANK or settings.max_rank is not None:
        return
    usual = Settings(method="sum")
    size, smaller = (dtype.itemsize * count_values(updates, each) for each in (settings, usual))
    if size < _LARGE:
        return
    rank = max(find_ranks(updates, usual).values())
    warn(
        f"{settings.method!r} changes single values, so that every update has the full rank of its layer: the "
        f"file gets {size / 1e6:.0f} MB, where other methods make one of {smaller / 1e6:.0f} MB. "
        f"max_rank={rank} (on the command line --max-rank {rank}) makes it as small, and loses what does not fit."
    )
