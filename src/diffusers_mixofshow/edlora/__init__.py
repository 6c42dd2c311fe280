"""The ED-LoRA, one tuned concept or several fused ones: data type, file format, and Hub access."""

from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.edlora.pack import EDLoRA


__all__ = ["EDLoRA", "LowRank"]
