"""Fusing tuned concepts into one model: record each concept's features, solve, and pack."""

from diffusers_mixofshow.fusion.fuser import GradientFuser


__all__ = ["GradientFuser"]
