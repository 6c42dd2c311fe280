"""The ED-LoRA: one tuned concept, or several fused ones, as data, as a file, and on the Hub."""

from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.edlora.pack import EDLoRA


__all__ = ["EDLoRA", "LowRank"]
