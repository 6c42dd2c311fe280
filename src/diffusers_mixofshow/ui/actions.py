"""The page's actions as plain functions, without Gradio: load, draw, read layouts, fuse, describe files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_mixofshow import Draft, EDLoRA, GradientFuser, Isolation, Layout, Refinement
from diffusers_mixofshow.base_models import classes_of
from diffusers_mixofshow.concepts import split_prompt
from diffusers_mixofshow.conditioning.tokenize import list_bracketed_words
from diffusers_mixofshow.edlora import hub
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, MixOfShowError, RegionError
from diffusers_mixofshow.families.layers import default_size
from diffusers_mixofshow.fusion import FusionSource, LoRASource
from diffusers_mixofshow.fusion.solving import MEASURED
from diffusers_mixofshow.interop.summary import facts_of, format_norm, summary_of_foreign, summary_of_pack
from diffusers_mixofshow.regions.drawing import draw_regions
from diffusers_mixofshow.sampling.drawing import Drawing, draw
from diffusers_mixofshow.sampling.provenance import read_layout, read_options, write_drawn
from diffusers_mixofshow.ui.canvas import MOST_PIXELS, call_regions, read_colours, read_names, to_layout, to_value
from diffusers_mixofshow.ui.conditions import SCALE, draw_condition, has_layout_condition
from diffusers_mixofshow.ui.session import Session, Studio


MOST_STEPS = 200
MOST_SOURCES = 16
METHODS = ("closed-form", "average", "sum", "ties", "svd")
"""Ways to fuse that the page offers, gradient fusion first."""
_OVERLAY = 512
"""Least length in pixels of the shorter side of a picture with its layout over it."""


def word_for_page(message: object, folders: Sequence[str | Path]) -> str:
    """Word a message of the package for readers of the page, who know nothing of the machine's folders.

    Args:
        message: The error or warning.
        folders: Folders of this machine that hold uploads and results, of whose files only the names are kept.
    """
    text = str(message)
    for folder in folders:
        text = re.sub(rf"{re.escape(str(folder))}(?:[/\\][^/\\\s'\"]+)*[/\\]", "", text)
    return text


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The settings of a picture beside the canvas.

    Args:
        prompt: The global prompt.
        negative_prompt: What to avoid; may be empty.
        seed: Seed of the picture.
        steps: Denoising steps.
        guidance: Guidance scale.
        draft: Whether regions are first drawn alone.
        refine: Whether regions are redrawn afterwards.
        isolation: Whether regions are kept apart in self-attention.
        condition: Whether a condition image made from the layout guides the base, see `conditions`.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    draft: bool = True
    refine: bool = True
    isolation: bool = False
    condition: bool = False

    def __post_init__(self) -> None:
        """Check the values, which any program may have sent instead of the page."""
        is_told = isinstance(self.prompt, str) and self.prompt.strip()
        defects = [] if is_told else ["no prompt; write what the whole picture shows"]
        whole = isinstance(self.steps, int) and 1 <= self.steps <= MOST_STEPS
        defects += [] if whole else [f"{self.steps!r} steps; expected 1 to {MOST_STEPS}"]
        defects += [] if abs(self.seed) < 2**63 else [f"the seed {self.seed}; expected one of at most 63 bits"]
        defects += [] if 0 <= self.guidance <= 100 else [f"a guidance of {self.guidance!r}; expected 0 to 100"]
        if defects:
            raise ConfigurationError(f"Got {'; '.join(defects)}.")

    @classmethod
    def from_fields(cls, *, seed: Any, steps: Any, guidance: Any, **others: Any) -> Wishes:
        """Make wishes of what stands in the page's number fields.

        Args:
            seed: Content of the field Seed; None where it is empty.
            steps: Content of the field Steps.
            guidance: Content of the field Guidance.
            others: The other settings.

        Raises:
            ConfigurationError: If a field is empty or holds no such number; names every such field.
        """
        numbers = {"Seed": (seed, True), "Steps": (steps, True), "Guidance": (guidance, False)}
        defects = [
            f"{name} {'is empty' if value is None else f'is {value!r}'}; expected a {'whole ' if whole else ''}number"
            for name, (value, whole) in numbers.items()
            if not _is_number(value, whole)
        ]
        if defects:
            raise ConfigurationError(f"{'. '.join(defects)}.")
        return cls(seed=int(seed), steps=int(steps), guidance=float(guidance), **others)


def _is_number(value: object, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False
    return not whole or number.is_integer()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was drawn.

    Args:
        picture: PNG that stores its settings.
        overlay: The picture with the layout over it.
        condition: The condition image that was followed, if any.
    """

    picture: Path
    overlay: Image.Image
    condition: Path | None


def load(studio: Studio, session: Session, source: str | Path) -> Session:
    """Return the session with one more pack, after loading it into the base model and unloading it, as a check.

    Raises:
        MixOfShowError: If it cannot be read, or does not fit the base model or what is loaded.
    """
    opened = studio.open(source)
    opened.tell()
    name = source if isinstance(source, str) else _name_upload(source, opened.edlora, session)
    loaded = session.with_pack(name, opened.edlora)
    with studio.borrow() as pipe:
        pipe.load_edlora(opened.edlora, 1.0, "tried")
        pipe.unload_edlora("tried")
    return loaded


def _name_upload(file: Path, pack: EDLoRA, session: Session) -> str:
    """Name an uploaded pack by its concepts, as all packs' files are called the same; a plain LoRA by its file.

    A pack takes the place of one with the same concepts; a plain LoRA is counted where its file's name is taken.
    """
    if pack.concepts:
        return ", ".join(concept.name for concept in pack.concepts)
    numbered = (f"{file.name} ({number})" for number in itertools.count(2))
    return next(name for name in itertools.chain([file.name], numbered) if name not in session.packs)


def load_fused(studio: Studio, session: Session, files: Sequence[Path]) -> Session:
    """Load a pack that `fuse` wrote, in place of a file of the same name and of packs with one of its concepts.

    Args:
        studio: Its base model has to fit the pack.
        session: What is loaded.
        files: The pack's files.

    Raises:
        MixOfShowError: See `load`.
    """
    packs = [file for file in files if file.suffix == ".safetensors"]
    if not packs:
        raise ConfigurationError("Nothing is fused yet. Press Fuse first.")
    concepts = studio.open(packs[0]).edlora.concepts
    return load(studio, session.without_pack(packs[0].name).without_concepts(concepts), packs[0])


def load_files(studio: Studio, session: Session, files: Sequence[Path]) -> tuple[Session, list[str]]:
    """Load each of several files that fits; returns the session, and a message for each file that was refused.

    Raises:
        ConfigurationError: If every file was refused; says why of each.
    """
    refused = []
    for file in files:
        try:
            session = load(studio, session, file)
        except MixOfShowError as error:
            refused.append(str(error) if file.name in str(error) else f"{file.name}: {error}")
    if refused and len(refused) == len(files):
        raise ConfigurationError("\n".join(refused))
    return session, refused


def list_loaded(session: Session) -> list[list[str]]:
    """Rows of pack, concept, class word and base, for a table."""
    rows = []
    for name, pack in session.packs.items():
        concepts = [(concept.placeholder, concept.class_word) for concept in pack.concepts]
        rows += [[name, *words, pack.base_model] for words in concepts or [("(a plain LoRA)", "")]]
    return rows


def list_fusable(session: Session) -> list[str]:
    """List the names of loaded packs with concepts; a plain LoRA is fused by its file, which tells its triggers."""
    return [name for name, pack in session.packs.items() if pack.concepts]


def take_loaded(session: Session, names: Sequence[str]) -> list[str | EDLoRA]:
    """Take loaded packs as sources for `fuse`; one of the Hub by its id, which the fused pack then names.

    Args:
        session: What is loaded.
        names: Names of loaded packs.

    Raises:
        ConfigurationError: If one of them is not loaded any more.
    """
    if gone := [name for name in names if name not in session.packs]:
        raise ConfigurationError(f"{', '.join(gone)} is not loaded any more. Choose again what to fuse.")
    return [name if hub.is_repo_id(name) else session.packs[name] for name in names]


def tell_contents(studio: Studio, files: Sequence[Path]) -> str:
    """Tell the concepts in each of the uploaded files, a line each, as the files of all packs are called the same."""
    lines = []
    for file in files:
        try:
            concepts = studio.open(file).edlora.concepts
            held = ", ".join(concept.placeholder for concept in concepts) or "a plain LoRA"
        except MixOfShowError:  # which is told in full when the file is used
            held = "cannot be read"
        lines.append(f"{file.name}: {held}")
    return "\n".join(lines)


def tell_base(studio: Studio) -> str:
    """Tell which base is loaded, and what it can draw where that is little."""
    name, classes = studio.base_name, classes_of(studio.base_name)
    return f"The base `{name}` is loaded" + (f"; it can draw {', '.join(classes)}." if classes else ".")


def own_pixels(studio: Studio) -> tuple[int, int]:
    """Width and height of the pictures that the base was made for."""
    (height, width), scale = default_size(studio.pipe.unet), studio.pipe.vae_scale_factor
    return width * scale, height * scale


def draw_picture(studio: Studio, session: Session, canvas: object, wishes: Wishes) -> Result:
    """Draw one picture of what is on the canvas.

    Raises:
        MixOfShowError: If anything of it cannot be used.
    """
    layout = to_layout(canvas, wishes.prompt, wishes.negative_prompt)
    drawing = _make_drawing(studio, session, layout, wishes)
    with studio.borrow() as pipe:
        _refuse_unknown_concepts(pipe, session, layout, call_regions(canvas))
        drawn = draw(drawing, pipe)
    folder = studio.new_folder()
    picture = folder / f"mixofshow-{wishes.seed}.png"
    write_drawn([picture], drawing, drawn)
    for given in drawing.followed:
        given.image.save(folder / given.path.name)
    return Result(
        picture=picture,
        overlay=_draw_overlay(layout, drawn.images[0], canvas),
        condition=folder / drawing.followed[0].path.name if drawing.followed else None,
    )


def _refuse_unknown_concepts(pipe: Any, session: Session, layout: Layout, called: Sequence[str]) -> None:
    """Refuse regions that name a concept which is not loaded, with what each of these regions is called."""
    tokenizers = [words for name in ("tokenizer", "tokenizer_2") if (words := pipe.components.get(name)) is not None]
    also_known = frozenset().union(*map(list_bracketed_words, tokenizers))
    concepts = [*pipe.concepts.values(), *session.concepts]
    defects = []
    for region, name in zip(layout.regions, called, strict=True):
        try:
            split_prompt(f"{region.prompt} {region.negative_prompt or ''}", concepts, also_known=also_known)
        except ConceptError as error:
            defects.append(f"{name[0].upper()}{name[1:]}: {error}")
    if defects:
        raise ConceptError("\n".join(defects))


def save_layout(studio: Studio, canvas: object, prompt: str, negative_prompt: str) -> Path:
    """Write what is on the canvas as a layout file, whether or not it was drawn.

    Args:
        studio: Keeps the file.
        canvas: The canvas's value.
        prompt: The global prompt; may be empty.
        negative_prompt: The global negative prompt; may be empty.

    Raises:
        RegionError: If a region has no prompt, or the value is no canvas.
    """
    return to_layout(canvas, prompt, negative_prompt).save(studio.new_folder() / "layout.json")


def _make_drawing(studio: Studio, session: Session, layout: Layout, wishes: Wishes) -> Drawing:
    """All settings of the picture; those that need regions are off where there are none."""
    regions = bool(layout.regions)
    follows_layout = wishes.condition and regions and has_layout_condition(studio.base_name)
    conditions = [draw_condition(layout, session.concepts)] if follows_layout else []
    return Drawing(
        base=studio.base_name,
        packs=session.packs,
        lora_scales=(1.0,) * len(session.packs),
        plan=layout,
        seeds=range(wishes.seed, wishes.seed + 1),
        steps=wishes.steps,
        guidance=wishes.guidance,
        isolation=Isolation() if wishes.isolation and regions else None,
        draft=Draft() if wishes.draft and regions else None,
        refine=Refinement() if wishes.refine and regions else None,
        image=None,
        mask=None,
        strength=1.0,
        controls=(),
        adapters=tuple(control for control, _ in conditions),
        followed=tuple(given for _, given in conditions),
        control_scales=(SCALE,) * len(conditions),
        device=studio.device,
        dtype=studio.dtype,
    )


def _draw_overlay(layout: Layout, picture: Image.Image, canvas: object) -> Image.Image:
    """Draw the regions with their colours and names over the picture, enlarged so that names can be read.

    The picture keeps its colours and pixels, since people look for both here.
    """
    scale = max(1, -(-_OVERLAY // min(picture.size)))
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return draw_regions(
        layout.regions,
        large,
        colours=read_colours(canvas) or ("#000000",),
        labels=read_names(canvas),
        label_size=max(large.size) / 26,  # the page shows wide pictures smaller
        tinted=False,
    )


@dataclass(frozen=True, kw_only=True)
class Read:
    """Content of a layout file, or of a picture with its settings.

    Args:
        canvas: The canvas's value.
        prompt: The global prompt.
        negative_prompt: The global negative prompt; may be empty.
        settings: A picture's other settings, by the names of `Wishes`.
        needs: Packs with which the picture was drawn.
    """

    canvas: dict[str, Any]
    prompt: str
    negative_prompt: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()


def read_layout_file(path: Path, width: int, height: int) -> Read:
    """Read a layout's JSON, or a picture that `mixofshow sample` or this page drew.

    Args:
        path: The file.
        width: Width of the canvas in pixels, if the layout has none.
        height: Height of the canvas in pixels, if the layout has none.

    Raises:
        MixOfShowError: If it is neither.
    """
    layout = read_layout(path)
    if any(side is not None and side > MOST_PIXELS for side in (layout.width, layout.height)):
        raise RegionError(
            f"{path.name} is of {layout.width} x {layout.height} pixels; expected at most {MOST_PIXELS}."
        )
    options = {} if path.suffix.lower() == ".json" else read_options(path)
    needs = options.get("concepts", [])
    return Read(
        canvas=to_value(layout, width, height),
        prompt=layout.prompt or "",
        negative_prompt=layout.negative_prompt or "",
        settings=_select_settings(options),
        needs=tuple(needs if isinstance(needs, list) else [needs]),
    )


def _select_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """A picture's options by the names of `Wishes`; a switch that is not among them was off."""
    if not options:
        return {}
    switches = {name: bool(options.get(name)) for name in ("draft", "refine", "isolation")}
    numbers = {name: options[name] for name in ("seed", "steps", "guidance") if name in options}
    return numbers | switches | {"condition": "adapter" in options}


def fuse(
    studio: Studio, sources: Sequence[str | Path | EDLoRA], method: str, trigger_prompts: Sequence[str]
) -> tuple[list[Path], tuple[list[str], list[list[str]]], str]:
    """Fuse several files, repositories or loaded packs.

    Args:
        studio: Its base model records the features.
        sources: Loaded packs, or what `Studio.open` reads.
        method: One of `METHODS`.
        trigger_prompts: Prompts of each plain LoRA whose file does not name its trigger words, in the order of the
            sources, separated by ``|``; methods that use the updates alone need none.

    Returns:
        The pack's files, the table of its report, and what the numbers mean.

    Raises:
        MixOfShowError: If a source cannot be read, or does not fit the base or the others.
    """
    if not 2 <= len(sources) <= MOST_SOURCES:
        counted = f"{len(sources)} source{'' if len(sources) == 1 else 's'}"
        raise ConfigurationError(
            f"Got {counted} to fuse, expected 2 to {MOST_SOURCES}: files, what is loaded in the tab Draw, and names "
            "that are typed on a line each."
        )
    if method not in METHODS:
        raise ConfigurationError(f"Got the method {method!r}, expected one of {', '.join(METHODS)}.")
    prompts = iter(trigger_prompts)
    to_fuse = [_make_source(studio, source, prompts, recorded=method in MEASURED) for source in sources]
    with studio.borrow() as pipe:
        fused = GradientFuser(pipe).fuse(to_fuse, method=method)  # type: ignore[arg-type]
    folder = studio.new_folder()
    fused.save_pretrained(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    report = fused.report
    if not report.residuals:
        names = [[name] for each in fused.sources for name in each.prompts]
        return files, (["concept"], names), "This method measures nothing."
    conflicts = f"{' '.join(report.told_overlaps)}." if report.told_overlaps else ""
    return files, report.table(), f"{report.meaning} {conflicts}".rstrip()


def _make_source(
    studio: Studio, source: str | Path | EDLoRA, prompts: Iterator[str], *, recorded: bool
) -> FusionSource | LoRASource:
    if isinstance(source, EDLoRA):
        return FusionSource(source)
    opened = studio.open(source)
    if opened.edlora.concepts:
        return FusionSource(source, opened=opened)
    texts = [] if opened.tells_prompts else [one.strip() for one in next(prompts, "").split("|") if one.strip()]
    if recorded and not texts and not opened.tells_prompts:
        raise ConfigurationError(
            f"{Path(source).name} is a plain LoRA whose file tells no trigger words. Give a line of prompts for it, "
            "such as: photo of sks dog | sks dog on the beach."
        )
    return LoRASource(source, texts, opened=opened)


@dataclass(frozen=True, kw_only=True)
class Description:
    """The description of a file, which quotes texts of whoever wrote it.

    Args:
        facts: Rows of name and value.
        concepts: Rows of concept, class word, kind and tokens.
        notes: Remarks and problems.
        card: The model card as Markdown, in which the file's texts are escaped; empty where a file has none.
    """

    facts: list[list[str]]
    concepts: list[list[str]]
    notes: list[str]
    card: str


def describe(studio: Studio, source: str | Path) -> Description:
    """Describe a file as `mixofshow inspect` does, with its model card.

    Raises:
        MixOfShowError: If it cannot be read.
    """
    opened = studio.open(source)
    pack, foreign = opened.edlora, opened.foreign
    summary = summary_of_pack(pack) if foreign is None else summary_of_foreign(foreign)
    summary["bytes"] = opened.file.stat().st_size
    concepts = [
        [
            each["placeholder"],
            each["class_word"] or "",
            each["kind"] or "",
            "  ".join(f"{token} {format_norm(norm)}" for token, norm in each["tokens"].items()),
        ]
        for each in summary["concepts"]
    ]
    return Description(
        facts=[["file", Path(source).name], *([name, str(value)] for name, value in facts_of(summary).items())],
        concepts=concepts,
        notes=[*summary["notes"], *summary["problems"]],
        card=pack.card(Path(source).stem) if foreign is None else "",
    )
