"""Instructions beside a LoRA that was converted for other programs: how to use it there, and what is lost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from diffusers_mixofshow.families.clip import CLIP_G, CLIP_L
from diffusers_mixofshow.interop.formats import Format


def compose_instructions(
    lora_file: str, embeddings: Mapping[str, Collection[str]], lost: Sequence[str], target: Format
) -> str:
    """Compose the instructions.

    Args:
        lora_file: Name of the LoRA file.
        embeddings: Name of every embedding's file, without extension, to the text encoders that it has vectors for.
        lost: What the conversion lost, each as a sentence.
        target: ``kohya`` or ``diffusers``.
    """
    stem, first = lora_file.removesuffix(".safetensors"), next(iter(embeddings))
    lines = [line for name, encoders in embeddings.items() for line in _list_loading(name, encoders)]
    loading = "\n".join(dict.fromkeys(lines))  # one import for all
    programs = _KOHYA if target is Format.KOHYA else _DIFFUSERS
    unsaid = "\n".join(f"- {sentence}" for sentence in (*lost, *_ALWAYS[: len(embeddings)]))
    return f"""\
{stem}: {", ".join(embeddings)}
Written by diffusers-mixofshow, https://arxiv.org/abs/2305.18292 (Mix-of-Show)

HOW TO USE
A LoRA and one embedding for each concept belong together: without its embedding a concept does not show.

{programs.format(lora_file=lora_file, stem=stem, first=first, loading=loading)}
WHAT IS LOST HERE
{unsaid}
"""


def _list_loading(name: str, encoders: Collection[str]) -> list[str]:
    """Lines of Python that load an embedding: diffusers takes one text encoder at a time."""
    file = f"embeddings/{name}.safetensors"
    if list(encoders) == [CLIP_L]:
        return [f'    pipe.load_textual_inversion("{file}", token="<{name}>")']
    return [
        "    import safetensors.torch",
        f'    embedding = safetensors.torch.load_file("{file}")',
        *(
            f'    pipe.load_textual_inversion(embedding["{encoder}"], token="<{name}>", '
            f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number})"
            for encoder, number in {CLIP_L: "", CLIP_G: "_2"}.items()
            if encoder in encoders
        ),
    ]


_IN_DIFFUSERS = """\
diffusers:
    pipe.load_lora_weights("{lora_file}")
{loading}
    pipe("photo of a <{first}>")
"""
_KOHYA = (
    """\
A1111 and its forks: {lora_file} into models/Lora, the files in embeddings/ into embeddings/. Prompt:
    photo of a {first} <lora:{stem}:1>

ComfyUI: {lora_file} into models/loras, the files in embeddings/ into models/embeddings. Load the LoRA for the model
and for CLIP, both at strength 1. Prompt:
    photo of a embedding:{first}

"""
    + _IN_DIFFUSERS
)
_DIFFUSERS = (
    _IN_DIFFUSERS
    + """
Not for A1111 and ComfyUI: of a LoRA in these names they load nothing, or the text encoder's part alone. For them,
convert it anew: mixofshow convert SOURCE OUTPUT --to kohya
"""
)
_ALWAYS = (
    "Nothing of the weight updates, which are written exactly.",
    "Prompts for regions, which keep several concepts apart in one picture: they need diffusers-mixofshow, or the "
    "program's own regional prompting.",
)
"""Sentences for one concept, and for several."""
