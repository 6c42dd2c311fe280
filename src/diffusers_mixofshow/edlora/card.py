"""The model card (README.md) beside an ED-LoRA: what it holds, how to prompt it, and code that runs when pasted."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.concepts import Concept


CARD_NAME = "README.md"
PICTURES_NAME = "samples.png"
"""Sheet of pictures that a training leaves beside the pack."""

_TAGS = ("mix-of-show", "edlora", "lora", "diffusers", "text-to-image", "stable-diffusion")
_MARK = "<!-- written by diffusers-mixofshow; remove this line to keep your own changes -->"
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MOST_REGIONS = 3
_STOCK_PACK = (
    "Stock diffusers loads the file as a LoRA (`pipe.load_lora_weights(...)`), without the concepts' embeddings."
)
_STOCK_MERGED = "`StableDiffusionPipeline.from_pretrained` loads it as well, without the concepts' embeddings."


def model_card(
    concepts: Sequence[Concept],
    base_model: str,
    location: str,
    rank: int,
    *,
    merged: bool,
    training: Mapping[str, object],
    pictures: bool,
) -> ModelCard:
    """Write the card of a pack.

    Args:
        concepts: The concepts it holds.
        base_model: Id of the model it was tuned on; becomes a link on the Hub if it has the form of a Hub id.
        location: What the code example loads: the Hub id or the folder.
        rank: The highest rank of its updates.
        merged: Whether it is a complete pipeline with the updates in its weights.
        training: How it was tuned; shown if it names the settings.
        pictures: Whether `PICTURES_NAME` lies beside it.
    """
    names = [concept.placeholder for concept in concepts]
    on_hub = _REPO_ID.fullmatch(base_model) is not None
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation=("finetune" if merged else "adapter") if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(_TAGS),
        instance_prompt=_prompt(concepts[0]),
    )
    title = f"ED-LoRA of {names[0]}" if len(names) == 1 else f"Mix-of-Show: {', '.join(names)} in one model"
    body = [
        _MARK,
        f"# {_inline(title)}",
        _summary(len(names), base_model, rank, merged=merged),
        _table(concepts),
        f"```python\n{example(concepts, base_model, location, merged=merged)}```",
        f"{_STOCK_MERGED if merged else _STOCK_PACK} Method: [Mix-of-Show](https://arxiv.org/abs/2305.18292).",
        *([f"![Samples, by strength of the LoRA]({PICTURES_NAME})"] if pictures else []),
        *([_training_record(training)] if isinstance(training.get("settings"), Mapping) else []),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n")


def write_card(folder: Path, card: ModelCard) -> None:
    """Write README.md into a folder, unless there is one that this package did not write."""
    path = folder / CARD_NAME
    if not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace"):
        path.write_text(str(card), encoding="utf-8")


def example(concepts: Sequence[Concept], base_model: str, location: str, *, merged: bool) -> str:
    """Python code that loads the pack and draws its concepts, together in regions if there are several."""
    if merged:
        imports = "from diffusers_mixofshow import MixOfShowPipeline, Region\n"
        pipe = f"pipe = MixOfShowPipeline.from_pretrained({location!r})"
    elif base_model == TOYLAND:
        imports = "from diffusers_mixofshow import MixOfShowPipeline, Region, toyland\n"
        pipe = "pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)"
    else:
        imports = "from diffusers_mixofshow import MixOfShowPipeline, Region\n"
        pipe = f"pipe = MixOfShowPipeline.from_pretrained({base_model!r})"
    if len(concepts) == 1:
        imports = imports.replace(", Region", "")
    return (
        f"import torch\n{imports}\n"
        f'{pipe}.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        + ("" if merged else f"pipe.load_edlora({location!r})\n")
        + f"{_call(concepts)}"
        f'image.save("{concepts[0].name}.png")\n'
    )


def _call(concepts: Sequence[Concept]) -> str:
    if len(concepts) == 1:
        return f"image = pipe({_prompt(concepts[0])!r}).images[0]\n"
    shown = concepts[:_MOST_REGIONS]
    regions = "".join(
        f"        Region({_prompt(concept)!r}, box=({i / len(shown):.2f}, 0.1, {(i + 1) / len(shown):.2f}, 1.0)),\n"
        for i, concept in enumerate(shown)
    )
    together = " and ".join(_article(concept.class_word) for concept in shown)
    return f"image = pipe(\n    {together!r},\n    regions=[\n{regions}    ],\n).images[0]\n"


def _summary(count: int, base_model: str, rank: int, *, merged: bool) -> str:
    holds = "one concept" if count == 1 else f"{count} concepts, fused so that each keeps its looks"
    parts = (
        f"layer-wise embeddings, and `{_inline(base_model)}` with a LoRA of rank {rank} in its weights"
        if merged
        else f"layer-wise embeddings and a LoRA (rank {rank}) for `{_inline(base_model)}`"
    )
    return f"Holds {holds}: {parts}, made with diffusers-mixofshow (`pip install diffusers-mixofshow`)."


def _table(concepts: Collection[Concept]) -> str:
    rows = [
        f"| `{concept.placeholder}` | {_inline(concept.class_word)} | {concept.kind} | `{_inline(_prompt(concept))}` |"
        for concept in concepts
    ]
    return "\n".join(["| in prompts | class | kind | example |", "|---|---|---|---|", *rows])


def _training_record(training: Mapping[str, object]) -> str:
    record = json.dumps(dict(training), indent=1, sort_keys=True).replace("`", "'")
    return f"<details><summary>How it was tuned</summary>\n\n```json\n{record}\n```\n\n</details>"


def _prompt(concept: Concept) -> str:
    return concept.placeholder if concept.kind == "scene" else f"a {concept.placeholder}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _inline(text: str) -> str:
    """Free text that cannot break out of a table cell, a heading or a code span."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
