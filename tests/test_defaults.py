"""Defaults are promises: what is drawn, recorded and fused by those who set nothing does not change unasked."""

import inspect

import pytest
import torch

from diffusers_mixofshow import Draft, FusionConfig, GradientFuser, Isolation, Layout, Refinement, Region
from diffusers_mixofshow.conditioning.attention import layerwise_attention, regional_attention
from diffusers_mixofshow.fusion import FusionSource, LoRASource
from diffusers_mixofshow.fusion.collection import Recording, collect
from diffusers_mixofshow.fusion.pack import FusedPack
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.solving import LBFGS_STEPS, METHODS, Settings
from diffusers_mixofshow.lora import inject, merged
from diffusers_mixofshow.pipelines import MixOfShowAdapterPipeline, MixOfShowPipeline, refine_regions


PROMISED = {
    GradientFuser.__init__: {"pipe": None, "config": None},
    FusionConfig: {
        "prompts": None,
        "steps": 20,
        "guidance_scale": None,
        "negative_prompt": "",
        "seeds": (0,),
        "ridge": None,
        "prior": 0.0,
        "prior_prompts": None,
        "max_rank": None,
        "sequential": None,
        "statistics": None,
        "statistics_bytes": "auto",
        "text_tokens": "all",
        "batch_size": 4,
        "device": "cpu",
        "dtype": torch.float16,
        "height": None,
        "width": None,
    },
    GradientFuser.fuse: {"method": "closed-form", "weights": None, "scales": None},
    GradientFuser.record: {"alongside": ()},
    Recording: {
        "steps": 20,
        "guidance_scale": None,
        "negative_prompt": "",
        "seeds": (0,),
        "batch_size": 4,
        "text_tokens": "all",
        "height": None,
        "width": None,
    },
    collect: {"hold_out": False},
    Settings: {"method": "closed-form", "ridge": None, "max_rank": None, "in_stages": False},
    FusionSource: {"weight": 1.0, "scale": 1.0, "statistics": None},
    LoRASource: {"weight": 1.0, "scale": 1.0, "name": "", "statistics": None},
    FusedPack.save_pretrained: {
        "merged": False,
        "samples": None,
        "license": None,
        "sources": False,
        "overwrite": False,
    },
    SourceStatistics.save: {"max_bytes": "auto", "overwrite": False},
    Region: {
        "box": None,
        "mask": None,
        "negative_prompt": None,
        "weight": 1.0,
        "feather": 0.0,
        "order": 0,
        "guidance_scale": None,
        "start": 0.0,
        "end": 1.0,
        "control_scale": 1.0,
        "rounding": "nearest",
    },
    Isolation: {"start": 0.0, "end": 1.0, "scales": None},
    Draft: {"steps": 3, "until": 0.5, "repeat_subject": True},
    Refinement: {"strength": 0.6, "steps": None},
    Layout: {"regions": (), "prompt": None, "negative_prompt": None, "width": None, "height": None},
    Layout.save: {"overwrite": False},
    refine_regions: {
        "strength": 0.6,
        "size": None,
        "margin": 0.0,
        "feather": 0.05,
        "batch_size": 4,
        "generator": None,
    },
    MixOfShowPipeline.load_edlora: {"scale": 1.0, "adapter_name": None},
    MixOfShowPipeline.unload_edlora: {"names": None},
    MixOfShowPipeline.save_edlora: {"name": None, "overwrite": False},
    MixOfShowPipeline.push_to_hub: {
        "repo_id": None,
        "commit_message": None,
        "private": None,
        "token": None,
        "create_pr": False,
        "revision": None,
        "samples": None,
        "license": None,
    },
    MixOfShowPipeline.__call__: {"regions": None, "isolation": None, "draft": None, "refine": None},
    MixOfShowAdapterPipeline.__call__: {
        "image": None,
        "height": None,
        "width": None,
        "adapter_conditioning_scale": 1.0,
    },
    merged: {"scale": 1.0},
    inject: {"scale": 1.0},
    layerwise_attention: {"tokens": 77, "layers": None},
    regional_attention: {"steps": None, "isolation": None},
}


@pytest.mark.parametrize("called", PROMISED, ids=lambda called: called.__qualname__)
def test_defaults_are_those_promised(called) -> None:
    given = {
        name: parameter.default
        for name, parameter in inspect.signature(called).parameters.items()
        if name in PROMISED[called]
    }
    assert given == PROMISED[called]
    assert [type(value) for value in given.values()] == [type(value) for value in PROMISED[called].values()]


def test_numbers_of_the_papers_solver() -> None:
    assert LBFGS_STEPS == {"text": 500, "spatial": 50}
    assert METHODS == ("closed-form", "lbfgs", "ssr", "average", "sum", "ties", "dare", "svd")
