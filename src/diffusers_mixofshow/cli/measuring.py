"""Shared by ``mixofshow evaluate`` and ``mixofshow compare``: options, reference photos, the run and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusers_mixofshow import notes
from diffusers_mixofshow.atomic import check_outputs
from diffusers_mixofshow.base_models import TOYLAND, embedded_base, public_name
from diffusers_mixofshow.cli import plans
from diffusers_mixofshow.cli.base_model import (
    GUIDANCE_HELP,
    LARGEST_SEED,
    MOST_STEPS,
    choose_guidance,
    find_common_base,
    normalise_base,
    refuse_strange_base,
)
from diffusers_mixofshow.cli.sources import open_packs
from diffusers_mixofshow.cli.timing import estimate_time
from diffusers_mixofshow.concepts import KINDS
from diffusers_mixofshow.errors import ConfigurationError, suggest, warn
from diffusers_mixofshow.progress import progress
from diffusers_mixofshow.sampling.loading import load_base


if TYPE_CHECKING:
    from PIL import Image

    from diffusers_mixofshow.evaluation.identity import Judge
    from diffusers_mixofshow.evaluation.packs import Evaluation, Reference, Row
    from diffusers_mixofshow.evaluation.plain import Measurable, MeasuredPack
    from diffusers_mixofshow.toyland import ToyConcept


def _check_finite(value: float | None) -> float | None:
    """Refuse a guidance scale that is no number; typer's callback."""
    if value is not None and not math.isfinite(value):
        raise ConfigurationError(f"Got --guidance {value}; expected a number such as 7.5.")
    return value


Photos = Annotated[
    list[str] | None,
    typer.Option(
        help="'potter=FOLDER': photos of a concept, for image-alignment. May be repeated. (default for Toyland's own "
        "concepts: drawn)"
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="Prompt with <TOK> for the concept. May be repeated. (default: six for each kind of concept)"),
]
ClassWord = Annotated[
    list[str] | None,
    typer.Option(
        help="'potter=man': class word of a concept, instead of that in the packs. May be repeated. (default: its "
        "own ED-LoRA's)"
    ),
]
Kind = Annotated[
    list[str] | None,
    typer.Option(
        help=f"'potter=character': kind of a concept ({', '.join(KINDS)}), which determines the prompts. May be "
        "repeated. (default: its own ED-LoRA's)"
    ),
]
TriggerWords = Annotated[
    list[str] | None,
    typer.Option(
        "--trigger",
        help="'dog=sks dog': what prompts say to get a plain LoRA. May be repeated. (default: what its file tells, or "
        "what the prompts share that it was fused with)",
    ),
]
MetricModel = Annotated[
    str | None,
    typer.Option(
        help="CLIP model that measures the pictures: Hub id or folder. (default: openai/clip-vit-base-patch32; "
        "toyland: its own)",
        callback=normalise_base,
    ),
]
Count = Annotated[int, typer.Option(min=1, help="Number of pictures of each concept in each pack.")]
Steps = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help=GUIDANCE_HELP, callback=_check_finite)]
Seed = Annotated[
    int,
    typer.Option(
        min=-LARGEST_SEED,
        max=LARGEST_SEED,
        help="Seed of the first picture; the next has the next seed, in every pack.",
    ),
]
Sheet = Annotated[Path | None, typer.Option(help="PNG of the measured pictures, a row for each concept and pack.")]
Record = Annotated[Path | None, typer.Option(help="JSON file for numbers, settings, versions and machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print numbers and settings as JSON instead of a table.")]

_PHOTOS = "photos"
"""In place of a pack's name in rows of what photos score."""

_MEANINGS = {
    "text": "how well pictures follow their prompts, 2.5 at most; compare it with the row 'class word'",
    "image": "how much pictures look like the photos; the nearer to the row 'photos' the better, 1 would be a copy; "
    "it hardly sees small parts, so look at pictures as well (--sheet)",
    "looks": "share of the concept's hidden looks that a network finds in pictures; 1 is all of them",
    "nearest": "share of pictures more like the concept's photos than like any other concept's; 1 is all of them",
    "kept": "share of what the own ED-LoRA gains over 'class word' in 'image' that this pack keeps; 1 is all of it, "
    "- stands where it gains nothing: look whether its pictures show the concept at all",
    "looks kept": "the same of 'looks'",
    "drift": "how far pictures without the concept change; 0 is not at all, and less is better",
    "class word": "a row of the base alone, prompted with the class word: what there is without the concept",
    "photos": "a row of the photos, each compared with the others: what a perfect concept would reach",
}
"""Columns of the table in their order, then rows, and what they mean."""

_THUMBNAIL = 128
"""Longest side of a picture on the sheet, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of both verbs, under their names there; see their help."""

    photos: Sequence[str] | None
    prompt: Sequence[str] | None
    class_word: Sequence[str] | None
    kind: Sequence[str] | None
    trigger: Sequence[str] | None
    base: str | None
    metric_model: str | None
    pictures: int
    steps: int
    guidance: float | None
    seed: int

    @classmethod
    def pick(cls, options: Mapping[str, Any]) -> Asked:
        """Pick these options from all options of a verb."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A checked measurement that can be run.

    Args:
        packs: Name to pack.
        base: The base model.
        draws_concepts: Whether the base is loaded as a pipeline of this package; else as that of diffusers.
        photos: Placeholder to files of photos that the user gave.
        toys: Placeholder to Toyland's own concepts in the packs; empty on a base that does not draw them.
        settings: The settings as JSON values, for records.
        asked: The options.
    """

    packs: Mapping[str, MeasuredPack]
    base: str
    draws_concepts: bool
    photos: Mapping[str, Sequence[Path]]
    toys: Mapping[str, ToyConcept]
    settings: Mapping[str, Any]
    asked: Asked

    def plan(self, writes: Sequence[Path], *, overwrite: bool, noted_in: Path | None = None) -> dict[str, Any]:
        """Describe the measurement for ``--dry-run``."""
        from diffusers_mixofshow.evaluation.packs import picture_count

        pictures, steps = picture_count(self.packs, self.asked.pictures), self.asked.steps
        references = [f"{len(files)} of {name}" for name, files in self.photos.items()]
        if drawn := [name for name in self.toys if name not in self.photos]:
            references.append(f"drawn of {', '.join(drawn)}")
        model = plans.name_denoiser(self.base, [each.pack for each in self.packs.values()])
        halves = plans.count_halves(self.base, self.settings["guidance"])
        places = [*([] if noted_in is None else [noted_in]), *writes]
        return {
            "base model": plans.describe_base(self.base),
            "packs": "; ".join(f"{name}: {', '.join(_names_in([pack]))}" for name, pack in self.packs.items()),
            "prompts say": ", ".join(f"{name}: {words}" for name, words in self._list_words().items()),
            "metric model": plans.describe_model(self.settings["metric_model"]),
            "photos": ", ".join(references) or "none given",
            "pictures": pictures,
            f"{model} runs": f"{pictures * steps} for single pictures"
            + (", each with and without guidance" if halves > 1 else ""),
            "time": estimate_time(self.base, pictures * steps, halves, model=model),
            "writes": ", ".join(map(str, places)) or "nothing",
            **plans.plan_replacing(*writes, overwrite=overwrite),
        }

    def _list_words(self) -> dict[str, str]:
        """What prompts say for each concept or plain LoRA, and the class word that it is compared with."""
        from diffusers_mixofshow.evaluation.plain import has_class_word, mention_of

        concepts = {one.placeholder: one for pack in self.packs.values() for one in pack.concepts}
        return {
            name: mention_of(one) + (f" (class word {one.class_word})" if has_class_word(one) else "")
            for name, one in concepts.items()
        }

    def public_settings(self) -> dict[str, Any]:
        """The settings without private paths: of a model on this disk only the last part of its path."""
        models = {name: public_name(self.settings[name]) for name in ("base_model", "metric_model")}
        return {**self.settings, **models}

    def run(self) -> Evaluation:
        """Load the models, sample and measure."""
        from diffusers_mixofshow.evaluation.packs import evaluate_packs, picture_count
        from diffusers_mixofshow.evaluation.sampling import Sampling

        references = self._make_references()
        judge = _load_judge(self.settings["metric_model"])
        pipe = load_base(self.base, concepts=self.draws_concepts)
        sampling = Sampling(
            steps=self.asked.steps, guidance_scale=self.settings["guidance"], first_seed=self.asked.seed
        )
        with progress("Pictures", picture_count(self.packs, self.asked.pictures)) as bar:
            return evaluate_packs(
                pipe,
                self.packs,
                judge,
                references,
                templates=lambda concept: _choose_templates(self.asked, self.base, concept),
                sampling=sampling,
                count=self.asked.pictures,
                advance=bar.update,
            )

    def _make_references(self) -> dict[str, Reference]:
        from diffusers_mixofshow.evaluation.packs import Reference
        from diffusers_mixofshow.pictures import read_image

        has_reader = self.settings["metric_model"] == TOYLAND
        drawn = {
            name: _draw_reference(toy, with_attributes=has_reader)
            for name, toy in self.toys.items()
            if name not in self.photos
        }
        given = {
            name: Reference(photos=[read_image(file, called=str(file)) for file in files])
            for name, files in self.photos.items()
        }
        return drawn | given


def plan_measurement(packs: Mapping[str, MeasuredPack], asked: Asked) -> Measurement:
    """Check packs and options.

    Raises:
        ConfigurationError: If bases differ or cannot be sampled, no class word or trigger words are known, or a prompt
            or a folder cannot be used.
    """
    from diffusers_mixofshow.evaluation.agreement import unify_concepts, warn_of_concepts_spelt_alike
    from diffusers_mixofshow.evaluation.plain import settle_words
    from diffusers_mixofshow.evaluation.sampling import fill_templates
    from diffusers_mixofshow.interop.checkpoint import refuse_single_file

    draws_concepts = _find_way_to_draw(packs)
    base = asked.base or find_common_base([each.pack for each in packs.values()])
    refuse_single_file(base)
    refuse_strange_base({name: each.pack for name, each in packs.items()}, base)
    if asked.prompt:
        fill_templates(asked.prompt, "x", 1)
    known = _names_in(packs.values())
    warn_of_concepts_spelt_alike(packs)
    packs = settle_words(packs, _read_trigger_words(asked, known))
    packs = unify_concepts(packs, **_read_words_and_kinds(asked, known))
    _warn_of_missing_class_words(packs)
    settings = _list_settings(packs, asked, base)
    photos = _find_photos(asked.photos, known)
    toys = _find_toyland_concepts(packs.values()) if embedded_base(base) else {}
    if settings["metric_model"] == TOYLAND:
        _warn_of_unread_looks(toys, photos)
    return Measurement(
        packs=packs,
        base=base,
        draws_concepts=draws_concepts,
        photos=photos,
        toys=toys,
        settings=settings,
        asked=asked,
    )


def _list_settings(packs: Mapping[str, MeasuredPack], asked: Asked, base: str) -> dict[str, Any]:
    """All settings as JSON values."""
    from diffusers_mixofshow.evaluation.clip_judge import DEFAULT_CLIP
    from diffusers_mixofshow.evaluation.plain import Trigger, has_class_word

    concepts = [concept for pack in packs.values() for concept in pack.concepts]
    words = {concept.placeholder: concept.words for concept in concepts if isinstance(concept, Trigger)}
    loras = [each.pack for each in packs.values()]
    return {
        "base_model": base,
        "metric_model": asked.metric_model or (TOYLAND if embedded_base(base) else DEFAULT_CLIP),
        "prompts": list(dict.fromkeys(text for one in concepts for text in _choose_templates(asked, base, one))),
        "class_words": {one.placeholder: one.class_word for one in concepts if has_class_word(one)},
        **({"trigger_words": words} if words else {}),
        "pictures": asked.pictures,
        "steps": asked.steps,
        "guidance": choose_guidance(base, loras) if asked.guidance is None else asked.guidance,
        "seed": asked.seed,
    }


def _find_way_to_draw(packs: Mapping[str, MeasuredPack]) -> bool:
    """Find out whether the packs are loaded into a pipeline of this package, or into that of diffusers.

    Raises:
        ConfigurationError: If one is for a family that has no pipeline at all.
    """
    from diffusers_mixofshow.edlora.low_rank import input_widths
    from diffusers_mixofshow.families.recognition import family_of_updates

    families = {name: family_of_updates(input_widths(each.pack.lora)) for name, each in packs.items()}
    for name, family in families.items():
        if not packs[name].pack.concepts and not family.pipeline:
            raise ConfigurationError(
                f"{name} is for {family.name}, of which diffusers has no pipeline that draws from a prompt alone, so "
                "that it cannot be measured here. Expected a LoRA of another base."
            )
    return any(each.pack.concepts or families[name].concept_pipeline for name, each in packs.items())


def _warn_of_missing_class_words(packs: Mapping[str, MeasuredPack]) -> None:
    """Warn of plain LoRAs of which less is measured, as nobody has told what they draw."""
    from diffusers_mixofshow.evaluation.plain import has_class_word

    concepts = [concept for pack in packs.values() for concept in pack.concepts]
    if lacking := list(dict.fromkeys(one.placeholder for one in concepts if not has_class_word(one))):
        warn(
            f"{', '.join(lacking)}: without a class word neither drift nor what is kept is measured; "
            f"--class-word {lacking[0]}=WORD tells what it draws."
        )


def _names_in(packs: Iterable[MeasuredPack]) -> list[str]:
    """Placeholders of concepts and names of plain LoRAs, of each pack in turn."""
    return [concept.placeholder for pack in packs for concept in pack.concepts]


def read_packs(sources: Sequence[str], base: str | None) -> dict[str, MeasuredPack]:
    """Read ED-LoRAs and packs, each under the last part of its name, or the whole name if several share that part.

    Args:
        sources: Files, folders or Hub ids.
        base: The base that the user named, if any.

    Raises:
        ConfigurationError: If one is given twice.
    """
    from diffusers_mixofshow.evaluation.plain import MeasuredPack, name_by_records
    from diffusers_mixofshow.fusion import LoRASource

    places = [Path(source).resolve() if Path(source).exists() else source for source in sources]
    twice = sorted({source for source, place in zip(sources, places, strict=True) if places.count(place) > 1})
    if twice:
        raise ConfigurationError(f"Given twice: {', '.join(twice)}. Name each ED-LoRA or pack once.")
    last = [Path(source).name or source for source in sources]
    names = [name if last.count(name) == 1 else source for name, source in zip(last, sources, strict=True)]
    packs = {
        name: MeasuredPack.of(pack, LoRASource(source).label)
        for name, source, pack in zip(names, sources, open_packs(sources, base), strict=True)
    }
    return name_by_records(packs)


def check_writable(*paths: Path | None, overwrite: bool) -> list[Path]:
    """Check that files can be written, and return those that are not None.

    Raises:
        MixOfShowError: If one cannot be written, or may not be replaced, see `check_outputs`.
    """
    given = [path for path in paths if path is not None]
    check_outputs(*given, overwrite=overwrite)
    return given


def tell_results(
    measurement: Measurement, evaluation: Evaluation, *, sheet: Path | None, record: Path | None, as_json: bool
) -> None:
    """Write the files that were asked for, and print the table or JSON."""
    from diffusers_mixofshow.evaluation import record as records

    told: dict[str, Any] = {
        "settings": dict(measurement.settings),
        "rows": [row.as_record() for row in evaluation.rows],
        "photos": {
            name: {key: None if value is None else round(value, 4) for key, value in scores.items()}
            for name, scores in evaluation.photos.items()
        },
    }
    if record is not None:
        info = records.run_info(Path(__file__).parent)
        records.write(record, told | {"run": info})
    if sheet is not None:
        notes.write_with_note(sheet, _make_sheet(evaluation), "PNG", _make_note(measurement, evaluation))
    if as_json:
        typer.echo(json.dumps(told))
        return
    shown = _print_table(evaluation.rows, evaluation.photos)
    typer.echo("What the numbers mean, of pictures that show one concept each:")
    for name, meaning in _MEANINGS.items():
        if name in shown:
            typer.echo(f"  {name}: {meaning}")
    for path in (record, sheet):
        if path is not None:
            typer.echo(f"Wrote {path}")


def _choose_templates(asked: Asked, base: str, concept: Measurable) -> Sequence[str]:
    from diffusers_mixofshow.evaluation.prompts import evaluation_prompts

    return asked.prompt or evaluation_prompts(base, concept.kind)


def _load_judge(metric_model: str) -> Judge:
    if metric_model == TOYLAND:
        from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge

        return ToylandJudge.load()
    from diffusers_mixofshow.evaluation.clip_judge import ClipJudge

    return ClipJudge.load(metric_model)


def _read_trigger_words(asked: Asked, known: Sequence[str]) -> dict[str, str]:
    """Read the trigger words that the user gives; an error names all defects."""
    words = _parse_by_concept("trigger", asked.trigger, known, example="dog=sks dog", form="WORDS")
    if concepts := [name for name in words if name.startswith("<")]:
        raise ConfigurationError(
            f"--trigger: {concepts[0]} is a concept, which prompts call {concepts[0]}. Trigger words are for plain "
            "LoRAs."
        )
    return words


def _read_words_and_kinds(asked: Asked, known: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read the class words and kinds that the user gives; an error names all defects of one option."""

    def check_kind(kind: str) -> str | None:
        return None if kind in KINDS else f"{kind!r} is not one of {', '.join(KINDS)}"

    words = _parse_by_concept("class-word", asked.class_word, known, example="potter=man")
    kinds = _parse_by_concept("kind", asked.kind, known, example="potter=character", check=check_kind)
    return {"class_words": words, "kinds": kinds}


def _find_photos(given: Sequence[str] | None, known: Sequence[str]) -> dict[str, list[Path]]:
    """Read ``name=FOLDER`` of every concept, and list the folders; an error names all defects."""
    from diffusers_mixofshow.training.folders import join_remarks, list_folder

    def check_folder(folder: str) -> str | None:
        if not Path(folder).is_dir():
            return f"{folder} is no folder"
        return None if list_folder(Path(folder)).photos else f"{folder} holds no pictures"

    folders = _parse_by_concept(
        "photos", given, known, example="potter=photos/potter", form="FOLDER", check=check_folder
    )
    listings = {placeholder: list_folder(Path(folder)) for placeholder, folder in folders.items()}
    for listing in listings.values():
        if listing.remarks:
            warn(join_remarks(f"Photos in {listing.folder}", listing.remarks))
    return {placeholder: list(listing.photos) for placeholder, listing in listings.items()}


def _parse_by_concept(
    option: str,
    given: Sequence[str] | None,
    known: Sequence[str],
    *,
    example: str,
    form: str = "WORD",
    check: Callable[[str], str | None] = lambda value: None,
) -> dict[str, str]:
    """Read ``name=value`` of every concept.

    Args:
        option: Name of the option without dashes.
        given: Its values.
        known: Placeholders of the packs' concepts.
        example: A correct value.
        form: Word for what follows the equals sign, in errors.
        check: Returns what is wrong with the part after the equals sign, or None.

    Returns:
        Placeholder to value.

    Raises:
        ConfigurationError: Names all that is wrong at once.
    """
    defects, hints, found = [], [], {}
    for text in given or ():
        name, _, value = text.partition("=")
        placeholder, value = _find_name(name.strip(), known), value.strip()
        if not value:
            defects.append(f"{text!r} is not of the form 'concept={form}', e.g. {example!r}")
        elif placeholder not in known:
            defects.append(f"no pack holds {placeholder} (they hold {', '.join(dict.fromkeys(known))})")
            hints.append(suggest(placeholder, known))
        elif placeholder in found:
            defects.append(f"{placeholder} has {option} twice")
        elif defect := check(value):
            defects.append(defect)
        else:
            found[placeholder] = value
    if defects:
        raise ConfigurationError(f"--{option}: " + "; ".join(defects) + "." + "".join(hints))
    return found


def _find_name(text: str, known: Sequence[str]) -> str:
    """The concept or plain LoRA that a text means, with or without angle brackets; else a placeholder of that name."""
    bare = text.strip("<>")
    return next((name for name in known if name.strip("<>") == bare), f"<{bare}>")


def _draw_reference(toy: ToyConcept, *, with_attributes: bool) -> Reference:
    from diffusers_mixofshow import toyland
    from diffusers_mixofshow.evaluation.packs import Reference
    from diffusers_mixofshow.evaluation.toyland_judge import hidden_attributes

    attributes = hidden_attributes(toy) if with_attributes and toy.kind != "scene" else {}
    return Reference(photos=[photo.image for photo in toyland.photos(toy)], attributes=attributes)


def _warn_of_unread_looks(toys: Mapping[str, ToyConcept], photos: Collection[str]) -> None:
    """Warn that attributes are not measured where the user's photos replace Toyland's own pictures."""
    if unread := [name for name in photos if name in toys and toys[name].kind != "scene"]:
        warn(
            f"the looks of {', '.join(unread)} are not read: what they should be is known only of the pictures that "
            "Toyland draws, and --photos gives others; without --photos they are read."
        )


def _find_toyland_concepts(packs: Iterable[MeasuredPack]) -> dict[str, ToyConcept]:
    """Toyland's own concepts in the packs, by placeholder."""
    from diffusers_mixofshow import toyland

    concepts = [concept for pack in packs for concept in pack.concepts]
    own = {one.placeholder: (one, toyland.CONCEPTS.get(one.name)) for one in concepts}
    return {name: toy for name, (one, toy) in own.items() if toy is not None and toy.class_word == one.class_word}


def _make_sheet(evaluation: Evaluation) -> Image.Image:
    from diffusers_mixofshow.sheets import draw_labelled_sheet

    rows = {" ".join(each): evaluation.pictures[each] for each in _list_rows(evaluation)}
    return draw_labelled_sheet({label: [_shrink(picture) for picture in row] for label, row in rows.items()})


def _list_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Concept and pack of each row of the sheet."""
    drawn = [(row.concept, row.pack) for row in evaluation.rows]
    return [each for each in drawn if each in evaluation.pictures]


def _make_note(measurement: Measurement, evaluation: Evaluation) -> dict[str, Any]:
    """List prompt and seed of every picture on the sheet."""
    from diffusers_mixofshow.evaluation.packs import CLASS_WORD
    from diffusers_mixofshow.evaluation.plain import mention_of
    from diffusers_mixofshow.evaluation.sampling import fill_templates

    asked, settings = measurement.asked, measurement.settings
    concepts = {concept.placeholder: concept for pack in measurement.packs.values() for concept in pack.concepts}
    rows = {}
    for name, pack in _list_rows(evaluation):
        concept = concepts[name]
        subject = concept.class_word if pack == CLASS_WORD else mention_of(concept)
        prompts = fill_templates(_choose_templates(asked, measurement.base, concept), subject, asked.pictures)
        rows[f"{name} {pack}"] = [(prompt, asked.seed + number) for number, prompt in enumerate(prompts)]
    return notes.make_sheet_note(rows, base_model=measurement.base, steps=asked.steps, guidance=settings["guidance"])


def _shrink(picture: Image.Image) -> Image.Image:
    """Scale a picture so that its longest side is `_THUMBNAIL` pixels."""
    scale = _THUMBNAIL / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


def _print_table(rows: Sequence[Row], photos: Mapping[str, Mapping[str, float | None]]) -> set[str]:
    """Print the rows, and what photos score below those of their concept, without columns that are empty in all.

    Returns:
        The names of columns and rows that `_MEANINGS` explains.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    several = len({row.concept for row in rows if row.identity is not None}) > 1
    names = _shorten_names({row.pack for row in rows})
    lines = []
    for concept, own in groupby(rows, key=lambda row: row.concept):
        lines += [(concept, names[row.pack], _list_measures(row, several=several)) for row in own]
        scores = photos.get(concept, {})
        if any(value is not None for value in scores.values()):
            lines.append((concept, _PHOTOS, {"image": scores["alignment"], "looks": scores["attributes"]}))
    filled = [name for name in _MEANINGS if any(numbers.get(name) is not None for *_, numbers in lines)]
    heads = (name.replace(" ", "\n") for name in filled)  # so that the names of packs find room in 80 columns
    table = Table("concept", Column("pack", overflow="fold"), *heads, collapse_padding=True)
    last = None
    for concept, pack, numbers in lines:
        cells = ("-" if (value := numbers.get(name)) is None else f"{value:.3f}" for name in filled)
        table.add_row("" if concept == last else escape(concept), escape(pack), *cells)
        last = concept
    Console().print(table)
    return {*filled, *(pack for _, pack, _ in lines)}


def _list_measures(row: Row, *, several: bool) -> dict[str, float | None]:
    """The numbers of a row by column; `several` says whether there are several concepts to be nearest to."""
    numbers: dict[str, float | None] = {"text": row.text_alignment, "drift": row.drift}
    if (identity := row.identity) is not None:
        nearest = identity.nearest if several else None
        numbers |= {"image": identity.alignment, "looks": identity.attributes, "nearest": nearest}
    kept = row.retention or {}
    return numbers | {"kept": kept.get("alignment"), "looks kept": kept.get("attributes")}


def _shorten_names(names: Collection[str]) -> dict[str, str]:
    """Names of packs without the ending of a file, which makes columns wide, unless another one has that name."""
    short = {name: name.removesuffix(".safetensors") for name in names}
    taken = list(short.values())
    return {name: one if taken.count(one) == 1 else name for name, one in short.items()}
