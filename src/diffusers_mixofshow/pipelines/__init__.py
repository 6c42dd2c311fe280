"""Pipelines that know concepts and regions: diffusers' own, with the mixins of this folder."""

from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.pipelines.stable_diffusion import MixOfShowPipeline


__all__ = ["EDLoRALoader", "MixOfShowPipeline"]
