"""Z-Image: one joint stream for picture and text, after a separate refiner for each."""

from __future__ import annotations

import re

from diffusers_mixofshow.families.family import BaseModel, Family
from diffusers_mixofshow.families.original_code import in_block, one, same_names, stack
from diffusers_mixofshow.families.transformer import QUERY_KEY_VALUE, groups, text_first


_BLOCK = r"(noise_refiner|context_refiner|layers)\.\d+\."
_ATTENTION = r"attention\.(to_[qkv]|to_out\.0)"
_ORIGINAL = {
    name: layer
    for block in ("noise_refiner.N", "context_refiner.N", "layers.N")
    for name, layer in in_block(
        block,
        block,
        {
            "attention.qkv": stack("attention.to_q", "attention.to_k", "attention.to_v"),
            "attention.out": one("attention.to_out.0", rows=1),
            **same_names("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
        },
    ).items()
}

Z_IMAGE = Family(
    name="Z-Image",
    pipeline="ZImagePipeline",
    denoiser="transformer",
    denoiser_class="ZImageTransformer2DModel",
    text_encoders={},
    adapted=re.compile(_BLOCK + _ATTENTION),
    linear=re.compile(rf"{_BLOCK}({_ATTENTION}|feed_forward\.w[123]|adaLN_modulation\.0)"),
    inputs=(
        (re.compile(r"transformer\..*\.adaLN_modulation\.0"), "transformer.modulation"),
        (re.compile(r"(.*\.feed_forward)\.(w1|w3)"), r"\1.w1+w3"),
        QUERY_KEY_VALUE,
    ),
    stages=text_first(r"transformer\.context_refiner\..*"),
    groups=groups(attention=r".*\.attention\..*", modulation=r".*\.adaLN.*", feed_forward=r".*\.feed_forward\..*"),
    models=(BaseModel(name="Z-Image", kohya="zimage", id="Tongyi-MAI/Z-Image-Turbo", guidance=0.0),),
    guidance_off=0.0,
    original=_ORIGINAL,
    shared_names="diffusion_model.{path}",
)
