"""Layer-wise concepts as concepts with one embedding for all layers, which other programs can draw."""

from diffusers_mixofshow.exporting.shared import share_layers


__all__ = ["share_layers"]
