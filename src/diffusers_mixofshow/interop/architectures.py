"""Which base model's layers a file names: Stable Diffusion 1.x, 2.x or XL, or Toyland."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.edlora.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of base models.

    Args:
        name: What people call it.
        width: Width of the text states that its cross-attention reads.
        kohya: What kohya's trainers call it in a file's metadata.
        layers: The cross-attention layers in order down, mid, up.
        embeddings: Name of the text encoder, as files spell it, to the width of its embeddings.
        base: The base model that is taken where nobody tells; empty where that would be a guess.
    """

    name: str
    width: int
    kohya: str
    layers: tuple[str, ...]
    embeddings: Mapping[str, int]
    base: str = ""

    @property
    def is_xl(self) -> bool:
        """Whether it has two text encoders, and kohya names its U-Net as the original code does."""
        return len(self.embeddings) > 1


def _layers(blocks: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Layers of blocks that have (attentions, transformer blocks in each)."""
    return tuple(
        f"{block}.attentions.{attention}.transformer_blocks.{number}.attn2"
        for block, (attentions, numbers) in blocks.items()
        for attention in range(attentions)
        for number in range(numbers)
    )


_FIRST = _layers(
    {f"down_blocks.{block}": (2, 1) for block in range(3)}
    | {"mid_block": (1, 1)}
    | {f"up_blocks.{block}": (3, 1) for block in range(1, 4)}
)
_XL = _layers(
    {"down_blocks.1": (2, 2), "down_blocks.2": (2, 10), "mid_block": (1, 10)}
    | {"up_blocks.0": (3, 10), "up_blocks.1": (3, 2)}
)

CLIP_L, CLIP_G = "clip_l", "clip_g"
SD1 = Architecture(
    name="Stable Diffusion 1.x",
    width=768,
    kohya="sd_v1",
    layers=_FIRST,
    embeddings={CLIP_L: 768},
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
)
SD2 = Architecture(name="Stable Diffusion 2.x", width=1024, kohya="sd_v2", layers=_FIRST, embeddings={CLIP_L: 1024})
SDXL = Architecture(
    name="Stable Diffusion XL",
    width=2048,
    kohya="sdxl_base_v1-0",
    layers=_XL,
    embeddings={CLIP_L: 768, CLIP_G: 1280},
)
EMBEDDED = Architecture(
    name="Toyland, the base in diffusers-mixofshow",
    width=128,
    kohya="toyland",
    layers=_layers(
        {"down_blocks.1": (1, 1), "down_blocks.2": (1, 1), "mid_block": (1, 1)}
        | {"up_blocks.0": (2, 1), "up_blocks.1": (2, 1)}
    ),
    embeddings={CLIP_L: 128},
    base=TOYLAND,
)
ARCHITECTURES = (SD1, SD2, SDXL, EMBEDDED)


def recognised(lora: Mapping[str, LowRank], vectors: Iterable[Mapping[str, int]] = ()) -> Architecture | None:
    """The family that a LoRA's layers and embeddings' widths belong to, or None.

    Args:
        lora: Site name to update.
        vectors: For every embedding, text encoder to width.
    """
    reading = {update.down.shape[1] for site, update in lora.items() if re.search(r"\.attn2\.to_[kv]$", site)}
    for architecture in ARCHITECTURES:
        # Any small model may be as wide as the embedded one; it has its own layers.
        if reading == {architecture.width} and not (architecture is EMBEDDED and foreign_layers(lora, EMBEDDED)):
            return architecture
    if reading:
        return None
    if any(site.startswith("text_encoder_2.") for site in lora) or any(CLIP_G in widths for widths in vectors):
        return SDXL
    named = {attention for site in lora if (attention := _attention_of(site))}
    if named:
        return next((one for one in (SD1, SDXL) if named <= set(one.layers)), None)
    encoder = {update.down.shape[1] for site, update in lora.items() if site.endswith("self_attn.q_proj")}
    widths = encoder | {width for one in vectors for width in one.values()}
    return next((one for one in (SD1, SD2, EMBEDDED) if widths == set(one.embeddings.values())), None)


def layers_of(lora: Mapping[str, LowRank], width: int | None, count: int | None = None) -> tuple[str, ...]:
    """Cross-attention layers of the U-Net that a file was made for; empty if nothing in it tells.

    Args:
        lora: Site name to update.
        width: Width of the embeddings.
        count: Number of layers, where it is known.
    """
    family = recognised(lora, [{CLIP_L: width}] if width else [])
    if family is not None and count in (None, len(family.layers)):
        return family.layers
    named = sorted({attention for site in lora if (attention := _attention_of(site))}, key=_natural)
    return tuple(named) if named and count in (None, len(named)) else ()


def foreign_layers(lora: Mapping[str, LowRank], architecture: Architecture) -> list[str]:
    """Sites of attention layers that a family of models does not have."""
    return [site for site in lora if (attention := _attention_of(site)) and attention not in architecture.layers]


def _attention_of(site: str) -> str | None:
    match = re.fullmatch(r"unet\.(.+)\.attn[12]\..+", site)
    return f"{match[1]}.attn2" if match else None


def _natural(path: str) -> tuple[object, ...]:
    """Order down, mid, up, and by numbers within."""
    stage = ("down_blocks", "mid_block", "up_blocks").index(path.partition(".")[0])
    return (stage, *(int(number) for number in re.findall(r"\.(\d+)", path)))
