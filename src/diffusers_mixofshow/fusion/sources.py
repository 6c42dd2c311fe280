"""What is to be fused: ED-LoRAs with their weights and recording prompts, checked together before any work starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from diffusers_mixofshow.concepts import check_distinct
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.errors import ConceptError, EDLoRAFormatError, FusionError
from diffusers_mixofshow.fusion.prompts import PromptSet, recording_prompts
from diffusers_mixofshow.fusion.solvers import Factors


EDLoRASource = EDLoRA | str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One ED-LoRA that takes part: a single concept, or a pack of several that share their updates.

    Args:
        edlora: The ED-LoRA, its scale already folded in.
        weight: Its share; the weights of all sources sum to 1.
        scale: What every update was multiplied by.
        prompts: Recording prompts by placeholder.
    """

    edlora: EDLoRA
    weight: float
    scale: float
    prompts: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """Placeholders of its concepts, e.g. ``<potter>``, or ``<potter>+<thanos>`` of a pack."""
        return "+".join(self.prompts)

    def factors(self, site: str, shape: tuple[int, int]) -> Factors:
        """Its update of one layer, float64, on the CPU; of rank 0 where it leaves the layer alone.

        Args:
            site: The layer, see `sites`.
            shape: The layer's (out_features, in_features).
        """
        update = self.edlora.lora.get(site)
        if update is None:
            return Factors(down=torch.zeros(0, shape[1]).double(), up=torch.zeros(shape[0], 0).double())
        return Factors(down=update.scaling * update.down.cpu().double(), up=update.up.cpu().double())


def gather(
    given: Sequence[EDLoRASource],
    components: Mapping[str, object],
    *,
    prompts: PromptSet | None,
    weights: Sequence[float] | None,
    scales: Sequence[float] | None,
) -> tuple[Source, ...]:
    """Read the ED-LoRAs and check that they can be fused with each other and with the model.

    Args:
        given: ED-LoRAs, or what `EDLoRA.from_pretrained` reads.
        components: ``pipeline.components`` of the model.
        prompts: See `recording_prompts`.
        weights: Share of each, any positive numbers; equal by default.
        scales: Factor on all updates of each; 1 by default.

    Raises:
        FusionError: If anything does not fit; lists everything that is wrong.
    """
    edloras = [one if isinstance(one, EDLoRA) else EDLoRA.from_pretrained(one) for one in given]
    weights = [1.0] * len(edloras) if weights is None else weights
    scales = [1.0] * len(edloras) if scales is None else scales
    defects = [
        *_number_defects("weights", weights, len(edloras), positive=True),
        *_number_defects("scales", scales, len(edloras), positive=False),
        *_mutual_defects(edloras),
        *_model_defects(edloras, components),
    ]
    if defects:
        raise FusionError("These ED-LoRAs cannot be fused: " + "; ".join(defects))
    return tuple(
        Source(
            edlora=_scaled(edlora, scale),
            weight=weight / sum(weights),
            scale=scale,
            prompts={concept.placeholder: recording_prompts(concept, prompts) for concept in edlora.concepts},
        )
        for edlora, weight, scale in zip(edloras, weights, scales, strict=True)
    )


def _scaled(edlora: EDLoRA, scale: float) -> EDLoRA:
    if scale == 1:
        return edlora
    updates = {
        site: LowRank(down=update.down, up=update.up, alpha=scale * update.alpha)
        for site, update in edlora.lora.items()
    }
    return replace(edlora, lora=updates)


def _number_defects(what: str, numbers: Sequence[float], count: int, *, positive: bool) -> list[str]:
    defects = []
    if len(numbers) != count:
        defects.append(f"got {len(numbers)} {what} for {count} ED-LoRAs; give one for each")
    wrong = [number for number in numbers if not math.isfinite(number) or (positive and number <= 0)]
    if wrong:
        defects.append(f"{what} must be finite{' and above 0' if positive else ''}, got {wrong}")
    return defects


def _mutual_defects(edloras: Sequence[EDLoRA]) -> list[str]:
    if not edloras:
        return ["none was given; give at least one"]
    defects = []
    bases = {edlora.base_model: _names(edlora) for edlora in reversed(edloras)}
    if len(bases) > 1:
        tuned = ", ".join(f"{names} on {base!r}" for base, names in reversed(bases.items()))
        defects.append(f"they were tuned on different base models ({tuned}); tune them on the same one")
    if len({edlora.layers for edlora in edloras}) > 1:
        counts = ", ".join(f"{_names(edlora)} {len(edlora.layers)}" for edlora in edloras)
        defects.append(f"they name different cross-attention layers (numbers of layers: {counts})")
    try:
        check_distinct(concept for edlora in edloras for concept in edlora.concepts)
    except ConceptError as error:
        defects.append(str(error))
    return defects


def _model_defects(edloras: Sequence[EDLoRA], components: Mapping[str, object]) -> list[str]:
    defects = []
    for edlora in edloras:
        try:
            edlora.check_fits(components)
        except EDLoRAFormatError as error:
            defects.append(str(error))
    return defects


def _names(edlora: EDLoRA) -> str:
    return ", ".join(concept.placeholder for concept in edlora.concepts)
