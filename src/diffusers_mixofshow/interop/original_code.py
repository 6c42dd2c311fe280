"""Convert updates of a family's original layers to diffusers' layers and back, both exactly.

The original code has one matrix where diffusers has several: queries, keys and values, in FLUX.1 also a part of the
feed-forward layer. Splitting its update ``up @ down``, each part takes its rows of ``up`` and the same ``down``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diffusers_mixofshow.edlora.defects import list_names
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.original_code import OriginalLayer
from diffusers_mixofshow.families.recognition import families_with


def to_diffusers(lora: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], list[str]]:
    """Convert every layer to diffusers' names.

    Args:
        lora: Site name to update; layers of the original code have their original path.

    Returns:
        Site name to update, for the layers of the family that fits most of them, and the defects of the others.
    """
    if not lora or families_with(lora):
        return dict(lora), []
    family = max(FAMILIES, key=lambda family: _likeness(family, lora))
    found: dict[str, LowRank] = {}
    misfits, twice = [], []
    for site, update in lora.items():
        rows = _rows_in_diffusers(family, site, update)
        if not rows:
            misfits.append(f"{site} {(update.up.shape[0], update.down.shape[1])}")
        twice += [each for each in rows if each in found]
        found |= _split_update(family, site, update, rows)
    defects = []
    if misfits:
        defects.append(f"layers whose names or (out, in) sizes are not those of {family.name}: {list_names(misfits)}")
    if twice:
        defects.append(f"layers given twice: {list_names(twice)}")
    return found, defects


def _likeness(family: Family, lora: Mapping[str, LowRank]) -> tuple[int, int]:
    """How many layers fit a family by name and shape, and how many by name alone."""
    fitting = sum(bool(_rows_in_diffusers(family, site, update)) for site, update in lora.items())
    return fitting, sum(family.original_layer(site.partition(".")[2]) is not None for site in lora)


def _rows_in_diffusers(family: Family, site: str, update: LowRank) -> dict[str, int]:
    """Site in diffusers to its rows of the layer; empty if the family has no layer of this name and shape."""
    out, width = update.up.shape[0], update.down.shape[1]
    if family.has_site(site):
        return {site: out}
    component, _, path = site.partition(".")
    layer = family.original_layer(path) if component == family.denoiser else None
    sizes = layer.split(out, width) if layer else ()
    return (
        {f"{component}.{each}": size for each, size in zip(layer.paths, sizes, strict=True)} if layer and sizes else {}
    )


def _split_update(family: Family, site: str, update: LowRank, rows: Mapping[str, int]) -> dict[str, LowRank]:
    """Split an update by rows into diffusers' layers; unchanged layers are dropped, unless all are."""
    layer = family.original_layer(site.partition(".")[2])
    if layer and layer.halves_are_swapped(update.up.shape[0], update.down.shape[1]):
        update = replace(update, up=_swap_halves(update.up))
    parts = (
        {each: _trim(update, up) for each, up in zip(rows, update.up.split(list(rows.values())), strict=True)}
        if len(rows) > 1
        else dict.fromkeys(rows, update)
    )
    changing = {each: part for each, part in parts.items() if bool(part.up.any())}
    return changing or parts


def _trim(update: LowRank, up: torch.Tensor) -> LowRank:
    """The update of some rows of `up`, without ranks whose columns are 0 in these rows.

    Such ranks occur if several updates were joined as a block-diagonal `up`.
    """
    used = up.any(dim=0)
    if not used.any() or used.all():
        return replace(update, up=up)
    rank = int(used.sum())
    return replace(update, down=update.down[used], up=up[:, used], alpha=update.scaling * rank)


@dataclass(frozen=True)
class Joined:
    """Updates of a family's original layers.

    Args:
        lora: Component and original path to update; text encoder layers are unchanged.
        ranks: Site name to the rank that diffusers will read.
    """

    lora: Mapping[str, LowRank]
    ranks: Mapping[str, int]


def to_original_code(family: Family, lora: Mapping[str, LowRank], *, taken_apart: bool) -> Joined:
    """Join the updates of diffusers' layers into those of the family's original layers.

    Args:
        family: The family that has all these sites.
        lora: Site name to update, without scaling (see `LowRank.folded`).
        taken_apart: Whether diffusers splits joined updates into their own ranks again when it loads them, as it does
            for FLUX in kohya's names.

    Raises:
        EDLoRAFormatError: If layers do not have the shapes of the original layers; lists all.
    """
    front = f"{family.denoiser}."
    found = {site: update for site, update in lora.items() if not site.startswith(front)}
    ranks = {site: update.rank for site, update in found.items()}
    misfits = []
    for name in dict.fromkeys(family.original_name(site.removeprefix(front)) for site in lora if site not in ranks):
        layer = family.original_layer(name)
        sites = [front + path for path in layer.paths] if layer else []
        parts = [lora.get(site) for site in sites]
        if layer is None or not _are_parts(layer, parts):
            misfits.append(front + name)
            continue
        whole, rank = _join_parts(layer, parts)
        found[front + name] = whole
        ranks |= dict.fromkeys(sites, rank if taken_apart else whole.rank)
    if misfits:
        raise EDLoRAFormatError(
            f"Layers whose parts do not have the shapes of {family.name}'s: {list_names(misfits)}. Convert it to "
            "'diffusers'."
        )
    return Joined(lora=found, ranks=ranks)


def _are_parts(layer: OriginalLayer, parts: Sequence[LowRank | None]) -> bool:
    """Whether every part has the rows that the layer needs, and all have the same input width."""
    present = [part for part in parts if part is not None]
    heights = layer.heights(present[0].down.shape[1])
    own = [part and part.up.shape[0] for part in parts]
    one_width = len({part.down.shape[1] for part in present}) == 1
    return one_width and all(height in (None, wanted) for height, wanted in zip(own, heights, strict=False))


def _join_parts(layer: OriginalLayer, parts: Sequence[LowRank | None]) -> tuple[LowRank, int]:
    """Join the updates of a layer's parts; returns the update and the rank of each part in it."""
    first, *others = (part for part in parts if part is not None)
    width = first.down.shape[1]
    if len(parts) == 1:
        swapped = layer.halves_are_swapped(first.up.shape[0], width)
        return (replace(first, up=_swap_halves(first.up)) if swapped else first), first.rank
    heights = layer.heights(width)
    if all(torch.equal(part.down, first.down) for part in others):
        ups = [
            first.up.new_zeros(height, first.rank) if part is None else part.up
            for height, part in zip(heights, parts, strict=True)
        ]
        return replace(first, up=torch.cat(ups)), first.rank
    rank = max(part.rank for part in (first, *others))
    downs = [first.down.new_zeros(rank, width) if part is None else _pad(part.down, rank, 0) for part in parts]
    ups = [
        first.up.new_zeros(height, rank) if part is None else _pad(part.up, rank, 1)
        for height, part in zip(heights, parts, strict=True)
    ]
    return LowRank(down=torch.cat(downs), up=torch.block_diag(*ups), alpha=float(rank * len(parts))), rank


def _pad(factor: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """Pad a factor with zeros to a rank."""
    missing = rank - factor.shape[axis]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if axis == 0 else (0, missing))


def _swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """Move the second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])
