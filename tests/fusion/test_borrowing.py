"""Which pipelines `GradientFuser` takes, and the one line that others are refused with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)

import packs
import tiny
from diffusers_mixofshow import GradientFuser, MixOfShowControlNetPipeline, MixOfShowImg2ImgPipeline, MixOfShowPipeline
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import FusionError
from families.pipelines import tiny_pipeline


def _plain(kind: type = StableDiffusionPipeline) -> Any:
    return kind(**tiny.components(), requires_safety_checker=False)


def _xl() -> StableDiffusionXLPipeline:
    parts = tiny.components()
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    two = {"text_encoder_2": parts["text_encoder"], "tokenizer_2": parts["tokenizer"]}
    return StableDiffusionXLPipeline(**{name: parts[name] for name in names}, **two, add_watermarker=False)


def _xl_for_pictures() -> StableDiffusionXLImg2ImgPipeline:
    return StableDiffusionXLImg2ImgPipeline(**_xl().components, add_watermarker=False)


def _unconditional() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def _controlled() -> MixOfShowControlNetPipeline:
    parts = tiny.components()
    return MixOfShowControlNetPipeline(
        **parts, controlnet=tiny.controlnet(parts["unet"]), requires_safety_checker=False
    )


HINT = r"Give MixOfShowPipeline\.from_pipe\(pipe\)"
REFUSED: dict[str, tuple[Any, str]] = {
    "a text": (lambda: "user/base", r"'user/base'\. Load it: MixOfShowPipeline\.from_pretrained\('user/base'\)"),
    "a path": (lambda: Path("base"), r"MixOfShowPipeline\.from_pretrained\('base'\)"),
    "a class": (lambda: MixOfShowPipeline, r"the class MixOfShowPipeline"),
    "a number": (lambda: 3, "a int, which is not a pipeline"),
    "a dict of parts": (tiny.components, "a dict, which is not a pipeline"),
    "a U-Net": (lambda: tiny.components()["unet"], "a UNet2DConditionModel, which is not a pipeline"),
    "an ED-LoRA": (lambda: packs.random_pack(tiny.components()), "a EDLoRA, which is not a pipeline"),
    "one for pictures": (lambda: _plain(StableDiffusionImg2ImgPipeline), rf"needs an input image\. {HINT}"),
    "ours for pictures": (lambda: _plain(MixOfShowImg2ImgPipeline), rf"needs an input image\. {HINT}"),
    "ours with a ControlNet": (_controlled, HINT),
    "SDXL for pictures": (_xl_for_pictures, r"needs an input image\. Give MixOfShowXLPipeline\.from_pipe"),
    "another family": (_unconditional, "a DDPMPipeline without text_encoder, tokenizer"),
    "without a text encoder": (
        lambda: MixOfShowPipeline(**tiny.components() | {"text_encoder": None}, requires_safety_checker=False),
        "without text_encoder",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_borrowed_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(FusionError, match=rf"needs a loaded MixOfShowPipeline, got .*{message}") as told:
        GradientFuser(make())
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 250


def _concept_for(pipe: Any) -> EDLoRA:
    """A concept that fits as far as the pipeline's family can have one: else with embeddings alone."""
    able = "unet" in pipe.components
    pack = packs.random_pack(pipe.components if able else tiny.components(), "rex", ranks=(2,))
    return pack if able else dataclasses.replace(pack, lora={})


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (_plain, HINT),
        (
            lambda: tiny_pipeline("Stable Diffusion XL"),
            r"Give MixOfShowXLPipeline\.from_pipe\(pipe\), which shares its models",
        ),
        (lambda: tiny_pipeline("FLUX.1"), r"Only plain LoRAs of FLUX\.1 can be fused; concepts need Stable Diffusion"),
    ],
    ids=["SD 1", "SDXL", "FLUX.1"],
)
def test_diffusers_own_pipelines_take_no_concepts(make: Any, advice: str) -> None:
    pipe = make()
    message = rf"got a {type(pipe).__name__}, which cannot load concepts\. {advice}"
    fuser = GradientFuser(pipe, steps=1, prompts=["a <TOK>"])
    for act in (fuser.fuse, lambda given: fuser.record(given[0])):
        with pytest.raises(FusionError, match=message):
            act([_concept_for(pipe)])


@pytest.mark.parametrize("make", [_plain, lambda: _plain(MixOfShowImg2ImgPipeline), _controlled])
def test_the_pipeline_that_the_line_names_fuses_and_leaves_the_given_one_as_it_was(make: Any) -> None:
    plain = make()
    parts = {name: part for name, part in plain.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    scheduler, device, words = plain.scheduler, plain.device, len(plain.tokenizer)
    pack = packs.random_pack(plain.components, "rex", ranks=(2,))
    fused = GradientFuser(MixOfShowPipeline.from_pipe(plain), steps=1, prompts=["a <TOK>"]).fuse([pack])
    assert [concept.placeholder for concept in fused.concepts] == ["<rex>"]
    assert (plain.scheduler, plain.device, len(plain.tokenizer)) == (scheduler, device, words)
    for name, part in parts.items():
        assert getattr(plain, name) is part
        state = part.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())
