"""Updates of layers of a family's original code, as updates of diffusers' layers, and back; both exactly.

The original code has one matrix where diffusers has several: queries, keys and values, in FLUX.1 with a part of the
feed-forward layer. Its update ``up @ down`` is that of each of them by its own rows of ``up`` with the same ``down``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from diffusers_mixofshow.edlora.defects import listed
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.recognition import families_with


def in_diffusers(lora: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], list[str]]:
    """Name every layer as diffusers does.

    Args:
        lora: Site name to update; of layers that the original code alone calls so, their path there in its place.

    Returns:
        Site name to update, of all layers of the family that most of them fit, and what is wrong with the others.
    """
    if not lora or families_with(lora):
        return dict(lora), []
    family = max(FAMILIES, key=lambda family: _likeness(family, lora))
    found: dict[str, LowRank] = {}
    misfits, twice = [], []
    for site, update in lora.items():
        rows = _rows(family, site, update)
        if not rows:
            misfits.append(f"{site} {(update.up.shape[0], update.down.shape[1])}")
        twice += [each for each in rows if each in found]
        found |= _parts(family, site, update, rows)
    defects = []
    if misfits:
        defects.append(
            f"layers whose names or (out, in) sizes are not {family.name}'s, as others are: {listed(misfits)}"
        )
    if twice:
        defects.append(f"layers given twice: {listed(twice)}")
    return found, defects


def _likeness(family: Family, lora: Mapping[str, LowRank]) -> tuple[int, int]:
    """How many layers have a name and shape of a family's, and how many a name."""
    fitting = sum(bool(_rows(family, site, update)) for site, update in lora.items())
    return fitting, sum(family.original_layer(site.partition(".")[2]) is not None for site in lora)


def _rows(family: Family, site: str, update: LowRank) -> dict[str, int]:
    """How many rows of a layer each of diffusers' has; none if the family has no layer of this name and shape."""
    out, width = update.up.shape[0], update.down.shape[1]
    if family.has_site(site):
        return {site: out}
    component, _, path = site.partition(".")
    layer = family.original_layer(path) if component == family.denoiser else None
    sizes = layer.split(out, width) if layer else ()
    return (
        {f"{component}.{each}": size for each, size in zip(layer.paths, sizes, strict=True)} if layer and sizes else {}
    )


def _parts(family: Family, site: str, update: LowRank, rows: Mapping[str, int]) -> dict[str, LowRank]:
    """The updates of the layers in diffusers that have these rows; of those that it changes, if it changes any."""
    layer = family.original_layer(site.partition(".")[2])
    if layer and layer.halves_are_swapped(update.up.shape[0], update.down.shape[1]):
        update = replace(update, up=_swapped(update.up))
    parts = (
        {each: _trimmed(update, up) for each, up in zip(rows, update.up.split(list(rows.values())), strict=True)}
        if len(rows) > 1
        else dict.fromkeys(rows, update)
    )
    changing = {each: part for each, part in parts.items() if bool(part.up.any())}
    return changing or parts


def _trimmed(update: LowRank, up: torch.Tensor) -> LowRank:
    """The update by some rows of its `up`, without the ranks that these have no part in.

    Where several updates were put into one matrix, one beside the other, each has ranks of its own.
    """
    used = up.any(dim=0)
    if not used.any() or used.all():
        return replace(update, up=up)
    rank = int(used.sum())
    return replace(update, down=update.down[used], up=up[:, used], alpha=update.scaling * rank)


def _swapped(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])
