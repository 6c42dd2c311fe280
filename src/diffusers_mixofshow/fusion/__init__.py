"""Fuse tuned concepts into one model: record each concept's layer inputs, solve every layer, write a pack."""

from diffusers_mixofshow.fusion.config import FusionConfig
from diffusers_mixofshow.fusion.fuser import GradientFuser
from diffusers_mixofshow.fusion.pack import FusedPack
from diffusers_mixofshow.fusion.sources import FusionSource, LoRASource


__all__ = ["FusedPack", "FusionConfig", "FusionSource", "GradientFuser", "LoRASource"]
