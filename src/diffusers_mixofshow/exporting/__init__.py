"""Convert layer-wise concepts to one embedding for all layers, for programs that cannot read layer-wise ones."""

from diffusers_mixofshow.exporting.shared import share_layers


__all__ = ["share_layers"]
