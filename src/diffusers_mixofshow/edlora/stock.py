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

    Without it, stock loaders assume alpha == rank. It is omitted if that is right, so that programs which do not know
    it are right as well; but it is written if ranks differ, because diffusers 0.38 would then use one layer's rank as
    the alpha of all. Patterns for a denoiser match whole names, those for text encoders the ends of names, because
    the prefix ``text_model.`` depends on the transformers version.

    Args:
        lora: Site name to update.

    Returns:
        One entry, or none.
    """
    return metadata_of({site: (update.rank, update.alpha) for site, update in lora.items()})


def metadata_of(updates: Mapping[str, tuple[int, float]]) -> dict[str, str]:
    """See `adapter_metadata`; `updates` is site name to (rank, alpha)."""
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
    """A regular expression for one layer; PEFT matches the ends of names unless the pattern starts with ``^``."""
    return f"{'' if component.startswith('text_encoder') else '^'}{re.escape(path)}"
