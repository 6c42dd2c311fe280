"""The model card (README.md) beside an ED-LoRA: what it holds, how to prompt it, and code that runs when pasted.

The generated section is between two marks and is replaced when saved again; text around it is never changed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffusers_mixofshow.atomic import encode_picture, write_whole
from diffusers_mixofshow.base_models import embedded_base, license_of, public_name
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora.embeddings import family_of_embeddings
from diffusers_mixofshow.edlora.file import Contents
from diffusers_mixofshow.edlora.fusion_record import (
    as_mapping,
    as_number,
    find_mean_residuals,
    find_members,
    find_prompts,
    list_entries,
    record_of,
)
from diffusers_mixofshow.edlora.hub import REPO_ID
from diffusers_mixofshow.edlora.low_rank import input_widths
from diffusers_mixofshow.errors import ConfigurationError, PictureError
from diffusers_mixofshow.families import BaseModel
from diffusers_mixofshow.families.recognition import family_of_updates, recognise
from diffusers_mixofshow.pictures import read_image


CARD_NAME = "README.md"

Samples = Mapping[str, "Image.Image | str | os.PathLike[str]"]
"""Prompt to the picture it produced."""

_TAGS = ("mix-of-show", "edlora", "lora", "diffusers", "text-to-image", "stable-diffusion")
_PLAIN_TAGS = ("mix-of-show", "lora", "diffusers", "text-to-image")
_BEGIN = (
    "<!-- diffusers-mixofshow: begin. The text between these marks is replaced whenever the pack is saved; write your "
    "own text outside of them. -->"
)
_END = "<!-- diffusers-mixofshow: end -->"
_SECTION = re.compile(r"<!-- diffusers-mixofshow: begin\b.*?-->.*?<!-- diffusers-mixofshow: end -->", re.DOTALL)
_METADATA = re.compile(r"\A\s*---[ \t\r]*\n.*?\n---[ \t\r]*(\n|\Z)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_SPECIAL = re.compile(r"[\\*_{}\[\]<>()#!|~]")
_GALLERY = "<Gallery />"
"""Tag that the Hub replaces by the widget's pictures."""
_MOST_REGIONS = 3
_MOST_PROMPTS = 3
"""Prompts of a plain LoRA that its card shows."""
_PLACE = " in a meadow"
"""Background in examples for the embedded base, if no concept is a scene."""
_BASE_SETTING = "pretrained_model_name_or_path"
"""The setting that names the base model; of a local path, which is private, the card shows only the last part."""
_LONGEST_RECORD = 10_000


def model_card(
    contents: Contents,
    location: str,
    *,
    merged: bool,
    samples: Mapping[str, str],
    license_id: str | None,
) -> ModelCard:
    """Write the card of a pack; of one without concepts, that of a plain LoRA.

    Args:
        contents: Fields of the pack. Its base model becomes a link if it has the form of a Hub id; of a local path
            only the last part is shown.
        location: What the code example loads: the Hub id, or the folder's name.
        merged: Whether it is a complete pipeline with the updates in its weights.
        samples: Path of a picture beside the card to the prompt that it shows.
        license_id: As the Hub spells it, e.g. ``apache-2.0``; None for that of a known base model.
    """
    if contents["concepts"]:
        text = _describe_concepts(contents, location, samples, merged=merged)
    else:
        text = _describe_plain(contents, location, samples)
    text = text.replace("<!--", "<! --")  # so that text from a file cannot end the section
    data = _metadata(contents, merged=merged, samples=samples, license_id=license_id)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_BEGIN}\n\n{text}\n{_END}\n")


def _describe_concepts(contents: Contents, location: str, samples: Mapping[str, str], *, merged: bool) -> str:
    """Write the generated section of a pack with concepts."""
    concepts, training = contents["concepts"], contents["training"]
    family = family_of_embeddings(contents["embeddings"])
    table, notes = _concept_table(concepts, training)
    return _fill_in(
        "card.md.jinja",
        concepts=concepts,
        gallery=_GALLERY,
        samples=samples,
        merged=merged,
        base_model=public_name(contents["base_model"]),
        rank=_rank(contents),
        concept_table=table,
        notes=notes,
        example=example(concepts, contents["base_model"], location, merged=merged, pipeline=family.concept_pipeline),
        pipeline=family.pipeline,
        record=_training_record(training),
        source_table=_source_table(training),
        method=str(record_of(training).get("method", "")),
    )


def _describe_plain(contents: Contents, location: str, samples: Mapping[str, str]) -> str:
    """Write the generated section of a plain LoRA that was fused from others."""
    training, widths = contents["training"], input_widths(contents["lora"])
    prompts, model = find_prompts(training), recognise(widths)
    base_id = public_name(contents["base_model"]) or (model.id if model else "")
    embedded = embedded_base(base_id)
    rows: list[tuple[str, ...]] = [("LoRA", "prompts that it was fused with")]
    rows += [(f"`{_code(name)}`", _list_prompts(texts)) for name, texts in prompts.items()]
    table, notes = _add_columns(rows, list(prompts), training)
    return _fill_in(
        "card_plain.md.jinja",
        names=list(prompts),
        gallery=_GALLERY,
        samples=samples,
        base=family_of_updates(widths).name if model is None else model.name,
        base_id=base_id,
        is_embedded=embedded is not None,
        guidance=None if embedded is None else embedded.guidance,
        rank=_rank(contents),
        table=table,
        notes=notes,
        prompt=_first_prompt(contents),
        location=location,
        source_table=_source_table(training),
        method=str(record_of(training).get("method", "")),
    )


def refresh_text(existing: str | None, card: ModelCard, *, anew: bool = False) -> str:
    """Text of an existing card with its generated section and metadata brought up to date.

    Text outside of the marks and foreign entries of the metadata are kept. A card without marks is not changed, unless
    it has only metadata, as the Hub creates it: then the section is added.

    Args:
        existing: Text of the existing card; None if there is none.
        card: The new card, see `model_card`.
        anew: Whether the pack is another one than before, so that existing sample pictures do not belong to it.
    """
    if existing is None or not existing.strip():
        return str(card)
    section = _SECTION.search(str(card))
    text = _METADATA.sub("", existing, count=1)
    if section is None or (text.strip() and not _SECTION.search(text)):
        return existing
    written = section.group()
    if not anew and _GALLERY in text and _GALLERY not in written:  # keep the existing pictures
        begin, heading, rest = written.split("\n\n", 2)
        written = "\n\n".join([begin, heading, _GALLERY, rest])
    body = _SECTION.sub(lambda _: written, text, count=1) if text.strip() else f"\n{written}\n"
    there = _read_metadata(existing)
    if there is None:  # metadata that the client cannot parse is never changed
        return existing
    data = _join_metadata(there, card.data.to_dict())
    if anew and not card.data.get("widget"):
        data.pop("widget", None)
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n" + body


def write_card(folder: Path, card: ModelCard, *, anew: bool = False) -> None:
    """Write or refresh README.md in a folder, see `refresh_text`."""
    existing = _read_text(folder)
    text = refresh_text(existing, card, anew=anew)
    if text != existing:
        write_whole(folder / CARD_NAME, text.encode())


def list_samples(folder: Path) -> list[Path]:
    """Sample pictures in a folder that were written with its card; those that the card does not name are others'."""
    widget = (_read_metadata(_read_text(folder) or "") or {}).get("widget")
    shown = widget if isinstance(widget, list) else []
    named = [as_mapping(as_mapping(entry).get("output")).get("url") for entry in shown]
    numbered = (path for path in folder.glob("samples/*.png") if path.stem.isdigit())
    return sorted(path for path in numbered if path.relative_to(folder).as_posix() in named)


def name_samples(samples: Samples) -> dict[str, str]:
    """Path of each sample picture in the pack's folder, to its prompt."""
    return {f"samples/{number}.png": prompt for number, prompt in enumerate(samples)}


def read_samples(samples: Samples) -> dict[str, Image.Image]:
    """Prompt to the picture it produced, without embedded metadata.

    Raises:
        ConfigurationError: If a picture cannot be read.
    """
    return {prompt: _read_picture(picture) for prompt, picture in samples.items()}


def write_samples(folder: Path, samples: Samples) -> dict[str, str]:
    """Write sample pictures as ``samples/0.png`` and so on, without their embedded metadata, in place of earlier ones.

    Without samples, earlier ones stay.

    Returns:
        Path relative to the folder, to prompt.

    Raises:
        ConfigurationError: If a picture cannot be read.
    """
    paths, pictures = name_samples(samples), read_samples(samples)
    for name, prompt in paths.items():
        write_whole(folder / name, encode_picture(pictures[prompt]))
    for path in list_samples(folder) if samples else ():
        if path.relative_to(folder).as_posix() not in paths:
            path.unlink()
    return paths


def example(
    concepts: Sequence[Concept], base_model: str, location: str, *, merged: bool, pipeline: str = "MixOfShowPipeline"
) -> str:
    """Python code that loads the pack and samples its concepts, in regions if there are several."""
    scene, guidance, size = "", None, None
    shown, (top, bottom) = concepts[:_MOST_REGIONS], BaseModel.standing
    if base := embedded_base(base_model):
        guidance = base.guidance
        if things := [concept for concept in concepts if concept.kind != "scene"]:
            shown, (top, bottom) = things[:_MOST_REGIONS], base.standing
            scene = next((f" in a {one.placeholder}" for one in concepts if one.kind == "scene"), _PLACE)
            size = (96, 64) if len(shown) > 2 else None
    boxes = [f"{i / len(shown):.2f}, {top}, {(i + 1) / len(shown):.2f}, {bottom}" for i in range(len(shown))]
    return _fill_in(
        "card_example.py.jinja",
        concepts=concepts,
        pipeline=pipeline,
        merged=merged,
        location=location,
        source=location if merged else public_name(base_model),
        together=" and ".join(_article(concept.class_word) for concept in shown) + scene,
        regions=list(zip(shown, boxes, strict=True)),
        scene=scene,
        guidance=guidance,
        size=size,
    )


def _fill_in(template: str, **values: object) -> str:
    """Render a template of this folder; values are not escaped, so untrusted text must pass through a filter."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=False,  # Markdown and Python
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "literal": repr, "prompt": _prompt}
    return environment


def _read_text(folder: Path) -> str | None:
    """Text of the card in a folder; None if there is none."""
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _read_metadata(text: str) -> dict[str, Any] | None:
    """Metadata of a card; None if the client cannot parse them."""
    try:
        data: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return None
    return data


def _read_picture(picture: Image.Image | str | os.PathLike[str]) -> Image.Image:
    try:
        source = picture if isinstance(picture, Image.Image) else Path(picture)
        image = read_image(source, called=f"The sample picture {picture!r}")
    except PictureError as error:
        raise ConfigurationError(f"{error}.") from error
    image.info = {}
    return image


def _metadata(
    contents: Contents, *, merged: bool, samples: Mapping[str, str], license_id: str | None
) -> ModelCardData:
    """Metadata for the Hub's search, filters and widget."""
    base_model = public_name(contents["base_model"])
    on_hub = REPO_ID.fullmatch(base_model) is not None
    return ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation=("finetune" if merged else "adapter") if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license_id or license_of(base_model) or None,
        tags=list(_TAGS if contents["concepts"] else _PLAIN_TAGS),
        instance_prompt=_first_prompt(contents) or None,
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in samples.items()] or None,
    )


def _join_metadata(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Merge metadata: ours replaces theirs, except that tags are united and their licence is kept."""
    known = theirs.get("tags")
    tags = [tag for tag in known if isinstance(tag, str)] if isinstance(known, list) else []
    joined = {**theirs, **ours, "tags": list(dict.fromkeys([*tags, *ours["tags"]]))}
    return joined | ({"license": theirs["license"]} if theirs.get("license") else {})


def _concept_table(concepts: Collection[Concept], training: Mapping[str, object]) -> tuple[str, list[str]]:
    """Table of the concepts with measurements, if there are any, and notes that explain the columns."""
    rows: list[tuple[str, ...]] = [("in prompts", "class", "kind", "example")]
    rows += [
        (f"`{_code(c.placeholder)}`", _text(c.class_word), _text(c.kind), f"`{_code(_prompt(c))}`") for c in concepts
    ]
    return _add_columns(rows, [concept.placeholder for concept in concepts], training)


def _add_columns(
    rows: list[tuple[str, ...]], names: Sequence[str], training: Mapping[str, object]
) -> tuple[str, list[str]]:
    """Add what was measured of concepts or plain LoRAs to a table with a row for each; returns it and its notes."""
    notes = []
    for columns, note in (_measured_columns(names, training), _residual_columns(names, training)):
        if columns:
            rows = [(*row, *more) for row, more in zip(rows, columns, strict=True)]
            notes.append(note)
    return _table(rows), notes


def _residual_columns(names: Iterable[str], training: Mapping[str, object]) -> tuple[list[tuple[str, ...]], str]:
    """Columns of fusion residuals with headings, and their note; concepts of one source share a value.

    Args:
        names: Placeholders of concepts, or names of plain LoRAs.
        training: The pack's record.
    """
    residuals = find_mean_residuals(record_of(training))
    known = {name: pair for name, pair in residuals.items() if None not in pair.values()}
    of_members = {place: pair for name, pair in known.items() for place in name.split("+")}
    pairs = [(of_members | known).get(name) for name in names]  # a plain LoRA's own name may have a +
    if not any(pairs):
        return [], ""
    lines = [("-", "-") if pair is None else (f"{pair['fused']:.3f}", f"{pair['average']:.3f}") for pair in pairs]
    note = (
        "What is lost is the relative error in a concept's layer outputs: 0 is the concept's own model, 1 the base "
        "without it. It says little about identity; compare it with that of a plain weighted average, in the next "
        "column."
    )
    return [("features lost, fused", "features lost, averaged"), *lines], note


_MEASURES = {
    "retention": ("retention", "alignment"),
    "looks kept": ("retention", "attributes"),
    "image-alignment": ("identity", "alignment"),
    "text-alignment": ("text_alignment",),
}
"""Column heading to the keys under which `mixofshow evaluate --save` stores the value for each concept."""


def _measured_columns(names: Sequence[str], training: Mapping[str, object]) -> tuple[list[tuple[str, ...]], str]:
    """Columns of `mixofshow evaluate --save` with headings, and their note; columns without values are left out."""
    evaluation = as_mapping(training.get("evaluation"))
    entries = as_mapping(evaluation.get("concepts"))
    numbers = {heading: [_look_up(entries.get(name), path) for name in names] for heading, path in _MEASURES.items()}
    filled = {heading: values for heading, values in numbers.items() if any(one is not None for one in values)}
    if not filled:
        return [], ""
    shown = [["-" if one is None else f"{one:.2f}" for one in values] for values in filled.values()]
    note = (
        f"`mixofshow evaluate` measured {_count(evaluation.get('pictures'))} pictures of each concept with "
        f"`{_code(str(evaluation.get('metric_model', '')))}`: image-alignment is the mean cosine with the concept's "
        "photos, text-alignment the CLIPScore of the prompt. A concept's own ED-LoRA has a higher image-alignment "
        "than the class word; retention is the share of this gain that the pack keeps"
        + ("; looks kept is the same for attributes read by a network." if "looks kept" in filled else ".")
    )
    return [tuple(filled), *zip(*shown, strict=True)], note


def _look_up(entry: object, path: Sequence[str]) -> float | None:
    """Number under nested keys of an untrusted record; None if there is none."""
    for key in path:
        entry = as_mapping(entry).get(key)
    return as_number(entry)


def _count(value: object) -> str:
    number = as_number(value)
    return "some" if number is None else f"{number:g}"


def _source_table(training: Mapping[str, object]) -> str:
    """Table of the fused sources with origin, revision, weight and digest; empty if the pack was not fused.

    Below a source that is a pack stands what that was fused from.
    """
    rows: list[tuple[str, ...]] = [("concepts", "from", "revision", "weight", "SHA-256")]
    for entry in list_entries(training):
        rows.append(_source_row(entry))
        for name, *rest in map(_source_row, find_members(entry)):
            rows.append((f"in it: {name}", *rest))
    return _table(rows) if len(rows) > 1 else ""


def _source_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    origin, commit = str(entry.get("origin", "")), str(entry.get("revision", ""))
    on_hub = REPO_ID.fullmatch(origin) is not None
    pinned = _COMMIT.fullmatch(commit) is not None
    weight = as_number(entry.get("weight"))
    names = entry.get("concepts")
    return (
        ", ".join(f"`{_code(str(name))}`" for name in names) if isinstance(names, list) else "-",
        f"[{_text(origin)}](https://huggingface.co/{origin})" if on_hub else "a private file",
        f"`{commit[:12]}`" if pinned else "-",
        "-" if weight is None else f"{weight:.3g}",
        f"`{_code(str(entry.get('digest', ''))[:12])}`",
    )


def _table(rows: Sequence[Iterable[str]]) -> str:
    cells = [" | ".join(cell.replace("|", "\\|").replace("\\\\|", "\\|") for cell in row) for row in rows]
    rule = "|".join("---" for _ in rows[0])
    return "\n".join([f"| {cells[0]} |", f"|{rule}|", *(f"| {cell} |" for cell in cells[1:])])


def _training_record(training: Mapping[str, object]) -> str:
    """Settings and measurements of a tuning as JSON; empty for a fused pack, or if too long for a card."""
    if not isinstance(training.get("settings"), Mapping) or "fusion" in training:
        return ""
    tuning = {key: value for key, value in training.items() if key != "evaluation"}
    settings = as_mapping(training["settings"])
    if isinstance(base := settings.get(_BASE_SETTING), str):
        tuning["settings"] = {**settings, _BASE_SETTING: public_name(base)}
    record = json.dumps(tuning, indent=1, sort_keys=True).replace("`", "'")
    return record if len(record) <= _LONGEST_RECORD else ""


def _list_prompts(prompts: Sequence[str]) -> str:
    shown = [f"`{_code(prompt)}`" for prompt in prompts[:_MOST_PROMPTS]]
    return ", ".join([*shown, "..."] if len(prompts) > _MOST_PROMPTS else shown) or "-"


def _first_prompt(contents: Contents) -> str:
    """A prompt that shows the first concept or plain LoRA; empty if none is known."""
    if contents["concepts"]:
        return _prompt(contents["concepts"][0])
    return next((prompt for prompts in find_prompts(contents["training"]).values() for prompt in prompts), "")


def _rank(contents: Contents) -> int:
    return max((update.rank for update in contents["lora"].values()), default=0)


def _prompt(concept: Concept) -> str:
    return concept.placeholder if concept.kind == "scene" else f"a {concept.placeholder}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _text(text: str) -> str:
    """Escape untrusted text for Markdown: no tags, links, pictures or table cells."""
    plain = _SPECIAL.sub(lambda match: f"\\{match.group()}", _code(text).replace("&", "&amp;"))
    return (
        plain.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("://", ":&#47;&#47;").replace("www.", "www&#46;")
    )


def _code(text: str) -> str:
    """Sanitise untrusted text for a code span: one line of printable characters without backticks."""
    line = " ".join(text.split()).replace("`", "'")
    return "".join(character for character in line if character.isprintable())
