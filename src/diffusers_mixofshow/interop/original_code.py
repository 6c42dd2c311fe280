"""Updates of layers of a family's original code, as updates of diffusers' layers, and back; both exactly.

The original code has one matrix where diffusers has several: queries, keys and values, in FLUX.1 with a part of the
feed-forward layer. Its update ``up @ down`` is that of each of them by its own rows of ``up`` with the same ``down``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diffusers_mixofshow.edlora.defects import listed
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError
from diffusers_mixofshow.families import FAMILIES, Family
from diffusers_mixofshow.families.original_code import OriginalLayer
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
        update = replace(update, up=_swap_halves(update.up))
    parts = (
        {each: _trim(update, up) for each, up in zip(rows, update.up.split(list(rows.values())), strict=True)}
        if len(rows) > 1
        else dict.fromkeys(rows, update)
    )
    changing = {each: part for each, part in parts.items() if bool(part.up.any())}
    return changing or parts


def _trim(update: LowRank, up: torch.Tensor) -> LowRank:
    """The update by some rows of its `up`, without the ranks that these have no part in.

    Where several updates were put into one matrix, one beside the other, each has ranks of its own.
    """
    used = up.any(dim=0)
    if not used.any() or used.all():
        return replace(update, up=up)
    rank = int(used.sum())
    return replace(update, down=update.down[used], up=up[:, used], alpha=update.scaling * rank)


@dataclass(frozen=True)
class Joined:
    """Updates in the layers of a family's original code.

    Args:
        lora: The component and the layer's path there to its update; those of text encoders stay as they were.
        ranks: Site name to the rank that diffusers reads.
    """

    lora: Mapping[str, LowRank]
    ranks: Mapping[str, int]


def in_original_code(family: Family, lora: Mapping[str, LowRank], *, taken_apart: bool) -> Joined:
    """Put the updates of diffusers' layers into those of the family's original code.

    Args:
        family: The family that has all these sites.
        lora: Site name to update, without scaling (see `LowRank.folded`).
        taken_apart: Whether diffusers gives each part its own ranks again where several were put beside each other, as
            it does in kohya's names of FLUX.

    Raises:
        EDLoRAFormatError: If layers do not have the shapes of those that they are part of; names all.
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
        whole, rank = _whole(layer, parts)
        found[front + name] = whole
        ranks |= dict.fromkeys(sites, rank if taken_apart else whole.rank)
    if misfits:
        raise EDLoRAFormatError(
            f"Layers whose parts do not have the shapes of {family.name}'s: {listed(misfits)}. Convert it to "
            "'diffusers'."
        )
    return Joined(lora=found, ranks=ranks)


def _are_parts(layer: OriginalLayer, parts: Sequence[LowRank | None]) -> bool:
    """Whether each of them has its rows of the layer, and all read one width."""
    present = [part for part in parts if part is not None]
    heights = layer.heights(present[0].down.shape[1])
    own = [part and part.up.shape[0] for part in parts]
    one_width = len({part.down.shape[1] for part in present}) == 1
    return one_width and all(height in (None, wanted) for height, wanted in zip(own, heights, strict=False))


def _whole(layer: OriginalLayer, parts: Sequence[LowRank | None]) -> tuple[LowRank, int]:
    """A layer's update of those of its parts, and the rank that each of these has in it."""
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
    """A factor with zeros up to a rank."""
    missing = rank - factor.shape[axis]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if axis == 0 else (0, missing))


def _swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])
