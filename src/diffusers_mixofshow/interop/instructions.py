"""The text beside a LoRA that was written for other programs: how to use it there, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers_mixofshow.interop.concept_names import plain_name
from diffusers_mixofshow.interop.textual_inversion import Vectors


def instructions(lora_file: str, vectors: Mapping[str, Vectors], lost: Sequence[str]) -> str:
    """Write the text.

    Args:
        lora_file: Name of the LoRA file.
        vectors: Word of every embedding to its vectors; their files are named after the words.
        lost: What the files do not hold, each as a sentence.
    """
    names = [plain_name(word) for word in vectors]
    stem = lora_file.removesuffix(".safetensors")
    loading = "\n".join(
        f'    pipe.load_textual_inversion("embeddings/{name}.safetensors", token="<{name}>")' for name in names
    )
    unsaid = "\n".join(f"- {sentence}" for sentence in (*lost, *_ALWAYS[: len(names)]))
    return f"""\
{stem}: {", ".join(names)}
Written by diffusers-mixofshow, https://arxiv.org/abs/2305.18292 (Mix-of-Show)

HOW TO USE
A LoRA and one embedding for each concept belong together: without its embedding a concept does not show.

A1111 and its forks: {lora_file} into models/Lora, the files in embeddings/ into embeddings/. Prompt:
    photo of a {names[0]} <lora:{stem}:1>

ComfyUI: {lora_file} into models/loras, the files in embeddings/ into models/embeddings. Load the LoRA for the model
and for CLIP, both at strength 1. Prompt:
    photo of a embedding:{names[0]}

diffusers:
    pipe.load_lora_weights("{lora_file}")
{loading}
    pipe("photo of a <{names[0]}>")

WHAT IS LOST HERE
{unsaid}
"""


_ALWAYS = (
    "Nothing of the weight updates: every layer's rank, alpha and values are those of the original.",
    "Prompts for regions, which keep several concepts apart in one picture: they need diffusers-mixofshow, or the "
    "program's own regional prompting.",
)
"""Sentences for one concept, and for several."""
