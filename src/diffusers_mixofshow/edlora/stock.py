"""Metadata that make stock diffusers scale the updates of a file as this package does."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping

from diffusers_mixofshow.edlora.low_rank import LowRank


KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY


def adapter_metadata(lora: Mapping[str, LowRank]) -> dict[str, str]:
    """Safetensors metadata from which `load_lora_weights` makes its PEFT configuration.

    Stock loaders take alpha == rank where nothing is said, so nothing is said where that is right: then other
    programs, which do not know this metadata, are right as well. Where ranks differ between layers it is said all the
    same, as diffusers 0.38 then takes one layer's rank for the alpha of all. A denoiser's patterns match whole names;
    those of text encoders match ends of names, since transformers puts ``text_model.`` in front or not.

    Args:
        lora: Site name to update.

    Returns:
        Nothing, or one entry.
    """
    return _metadata({site: (update.rank, update.alpha) for site, update in lora.items()})


def metadata_of_ranks(ranks: Mapping[str, int]) -> dict[str, str]:
    """The same of updates without any scaling but their own: site name to rank."""
    return _metadata({site: (rank, float(rank)) for site, rank in ranks.items()})


def _metadata(updates: Mapping[str, tuple[int, float]]) -> dict[str, str]:
    """The metadata of site name to rank and alpha."""
    if all(alpha == rank for rank, alpha in updates.values()) and len({rank for rank, _ in updates.values()}) <= 1:
        return {}
    values: dict[str, object] = {}
    for component in dict.fromkeys(site.partition(".")[0] for site in updates):
        shapes = {
            site.removeprefix(f"{component}.").removeprefix("text_model."): shape
            for site, shape in updates.items()
            if site.startswith(f"{component}.")
        }
        (usual_rank, usual_alpha), _ = Counter(shapes.values()).most_common(1)[0]
        ranks = {_pattern(component, path): rank for path, (rank, _) in shapes.items() if rank != usual_rank}
        alphas = {_pattern(component, path): alpha for path, (_, alpha) in shapes.items() if alpha != usual_alpha}
        config = {
            "r": usual_rank,
            "lora_alpha": usual_alpha,
            "target_modules": list(shapes),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
        values |= {f"{component}.{key}": value for key, value in config.items()}
    return {KEY: json.dumps(values)}


def _pattern(component: str, path: str) -> str:
    """A regular expression for one layer, by PEFT's rule, which matches ends of names unless told otherwise."""
    return f"{'' if component.startswith('text_encoder') else '^'}{re.escape(path)}"
