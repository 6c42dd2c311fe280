"""What the page does, as functions of values: reading, drawing, fusing, telling. They know nothing of Gradio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow import Draft, GradientFuser, Isolation, Layout, Refinement
from diffusers_mixofshow.errors import ConfigurationError, RegionError
from diffusers_mixofshow.families.layers import own_size
from diffusers_mixofshow.fusion import FusionSource, LoRASource
from diffusers_mixofshow.fusion.report import MEANING
from diffusers_mixofshow.interop.summary import facts_of, format_norm, summary_of_foreign, summary_of_pack
from diffusers_mixofshow.regions.drawing import draw_regions
from diffusers_mixofshow.sampling.drawing import Drawing, draw
from diffusers_mixofshow.sampling.provenance import read_layout, settings_of, write_drawn
from diffusers_mixofshow.ui.canvas import MOST_PIXELS, colours_of, names_of, to_layout, to_value
from diffusers_mixofshow.ui.conditions import SCALE, has_layout_condition, layout_condition
from diffusers_mixofshow.ui.session import Session, Studio


if TYPE_CHECKING:
    from PIL import Image

    from diffusers_mixofshow.interop.opening import Opened

MOST_STEPS = 200
MOST_SOURCES = 16
METHODS = ("closed-form", "average", "sum", "ties", "svd")
"""Ways to fuse, gradient fusion first."""
_OVERLAY = 512
"""Pixels of the shorter side, at least, of a picture with its layout over it."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked for beside the canvas.

    Args:
        prompt: The global prompt.
        negative_prompt: What to avoid; may be empty.
        seed: Of the picture.
        steps: Denoising steps.
        guidance: Guidance scale.
        draft: Whether regions are first drawn alone.
        refine: Whether regions are drawn anew afterwards.
        isolation: Whether regions are kept apart in self-attention.
        condition: Whether a layout condition tells where things stand.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5
    draft: bool = True
    refine: bool = False
    isolation: bool = False
    condition: bool = False

    def __post_init__(self) -> None:
        """Check what a browser may send as well as our own page."""
        defects = [] if self.prompt.strip() else ["no prompt; write what the whole picture shows"]
        whole = isinstance(self.steps, int) and 1 <= self.steps <= MOST_STEPS
        defects += [] if whole else [f"{self.steps!r} steps; expected 1 to {MOST_STEPS}"]
        defects += [] if abs(self.seed) < 2**63 else [f"the seed {self.seed}; expected one of at most 63 bits"]
        defects += [] if 0 <= self.guidance <= 100 else [f"a guidance of {self.guidance!r}; expected 0 to 100"]
        if defects:
            raise ConfigurationError(f"Got {'; '.join(defects)}.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was drawn.

    Args:
        picture: PNG that tells how it was drawn.
        overlay: The picture with the layout over it.
        layout: The layout as a JSON file.
        condition: The condition image that was followed, if any.
    """

    picture: Path
    overlay: Image.Image
    layout: Path
    condition: Path | None


def load(studio: Studio, session: Session, source: str | Path) -> Session:
    """The session with one more pack, tried with the base model before it is said to be loaded.

    Raises:
        MixOfShowError: If it cannot be read, or does not fit the base model or what is loaded.
    """
    opened = studio.open(source)
    opened.tell()
    loaded = session.with_pack(Path(source).name if isinstance(source, Path) else source, opened.edlora)
    with studio.borrowed() as pipe:
        pipe.load_edlora(opened.edlora, 1.0, "tried")
        pipe.unload_edlora("tried")
    return loaded


def list_loaded(session: Session) -> list[list[str]]:
    """Rows of pack, concept, class word and base, for a table."""
    return [
        [name, concept.placeholder if concept else "(a plain LoRA)", concept.class_word if concept else "", told]
        for name, pack in session.packs.items()
        for told in [pack.base_model]
        for concept in (pack.concepts or (None,))
    ]


def own_pixels(studio: Studio) -> tuple[int, int]:
    """Width and height of the pictures that the base was made for."""
    (height, width), scale = own_size(studio.pipe.unet), studio.pipe.vae_scale_factor
    return width * scale, height * scale


def draw_picture(studio: Studio, session: Session, canvas: object, wishes: Wishes) -> Result:
    """Draw one picture of what is on the canvas.

    Raises:
        MixOfShowError: If anything of it cannot be used.
    """
    layout = to_layout(canvas, wishes.prompt, wishes.negative_prompt)
    drawing = _drawing(studio, session, layout, wishes)
    with studio.borrowed() as pipe:
        drawn = draw(drawing, pipe)
    folder = studio.new_folder()
    picture, described = folder / f"mixofshow-{wishes.seed}.png", folder / "layout.json"
    write_drawn([picture], drawing, drawn)
    layout.save(described)
    for given in drawing.followed:
        given.image.save(folder / given.path.name)
    return Result(
        picture=picture,
        overlay=_overlay(layout, drawn.images[0], canvas),
        layout=described,
        condition=folder / drawing.followed[0].path.name if drawing.followed else None,
    )


def _drawing(studio: Studio, session: Session, layout: Layout, wishes: Wishes) -> Drawing:
    """What decides about the picture; what needs regions is left out where there are none."""
    regions = bool(layout.regions)
    follows = [layout_condition(layout, session.concepts)] if _follows(studio, wishes) and regions else []
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
        adapters=tuple(control for control, _ in follows),
        followed=tuple(given for _, given in follows),
        control_scales=(SCALE,) * len(follows),
        device=studio.device,
        dtype=studio.dtype,
    )


def _follows(studio: Studio, wishes: Wishes) -> bool:
    return wishes.condition and has_layout_condition(studio.base_name)


def _overlay(layout: Layout, picture: Image.Image, canvas: object) -> Image.Image:
    """The picture, large enough that names can be read, with the regions in their colours and names."""
    scale = max(1, -(-_OVERLAY // min(picture.size)))
    large = picture.resize((picture.width * scale, picture.height * scale))
    return draw_regions(
        layout.regions,
        large,
        colours=colours_of(canvas) or ("#000000",),
        labels=names_of(canvas),
        label_size=large.height / 26,
    )


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a layout file or a picture with settings tells.

    Args:
        canvas: A value of the canvas.
        prompt: The global prompt.
        negative_prompt: The global negative prompt; may be empty.
        settings: What else a picture tells, by the names of `Wishes`.
        needs: Packs that it was drawn with.
    """

    canvas: dict[str, Any]
    prompt: str
    negative_prompt: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()


def read_layout_file(path: Path, width: int, height: int) -> Read:
    """Read a layout's JSON, or a picture that `mixofshow sample` or this page drew.

    Args:
        path: What was sent.
        width: Of the canvas where the layout has no size, in pixels.
        height: Likewise.

    Raises:
        MixOfShowError: If it is neither.
    """
    layout = read_layout(path)
    if any(side is not None and side > MOST_PIXELS for side in (layout.width, layout.height)):
        raise RegionError(
            f"{path.name} is of {layout.width} x {layout.height} pixels; expected at most {MOST_PIXELS}."
        )
    told = {} if path.suffix.lower() == ".json" else settings_of(path)
    needs = told.get("concepts", [])
    return Read(
        canvas=to_value(layout, width, height),
        prompt=layout.prompt or "",
        negative_prompt=layout.negative_prompt or "",
        settings=_settings(told),
        needs=tuple(needs if isinstance(needs, list) else [needs]),
    )


def _settings(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture tells of how it was drawn, by the names of `Wishes`; a switch that it does not tell was off."""
    if not told:
        return {}
    switches = {name: bool(told.get(name)) for name in ("draft", "refine", "isolation")}
    numbers = {name: told[name] for name in ("seed", "steps", "guidance") if name in told}
    return numbers | switches | {"condition": "adapter" in told}


def fuse(
    studio: Studio, sources: Sequence[str | Path], method: str, trigger_prompts: Sequence[str]
) -> tuple[list[Path], tuple[list[str], list[list[str]]], str]:
    """Fuse several files or repositories.

    Args:
        studio: Whose base model records what layers see.
        sources: See `Studio.open`.
        method: One of `METHODS`.
        trigger_prompts: Of each plain LoRA whose file does not tell its trigger words, in their order; ``|`` parts
            several.

    Returns:
        The pack's files, the table of its report, and what the numbers mean.

    Raises:
        MixOfShowError: If something cannot be read, or fits not.
    """
    if not 2 <= len(sources) <= MOST_SOURCES:
        raise ConfigurationError(f"Got {len(sources)} sources to fuse, expected 2 to {MOST_SOURCES}.")
    if method not in METHODS:
        raise ConfigurationError(f"Got the method {method!r}, expected one of {', '.join(METHODS)}.")
    opened = [(source, studio.open(source)) for source in sources]
    prompts = iter(trigger_prompts)
    taken = [_source(source, each, prompts) for source, each in opened]
    with studio.borrowed() as pipe:
        fused = GradientFuser(pipe).fuse(taken, method=method)  # type: ignore[arg-type]
    folder = studio.new_folder()
    fused.save_pretrained(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    report = fused.report
    if not report.residuals:
        names = [[name] for each in fused.sources for name in each.prompts]
        return files, (["concept"], names), "This method measures nothing."
    nearest = [f"{one} and {other} {value:.2f}" for one, other, value in report.conflicts[:3]]
    told = [MEANING, *([f"Nearest to a conflict (overlap, 0 to 1): {', '.join(nearest)}."] if nearest else [])]
    return files, report.table(), " ".join(told)


def _source(source: str | Path, opened: Opened, prompts: Any) -> FusionSource | LoRASource:
    if opened.edlora.concepts:
        return FusionSource(source, opened=opened)
    texts = [] if opened.trigger_words else [one.strip() for one in next(prompts, "").split("|") if one.strip()]
    if not texts and not opened.trigger_words:
        raise ConfigurationError(
            f"{Path(source).name} is a plain LoRA whose file tells no trigger words. Give a line of prompts for it, "
            "such as: photo of sks dog | sks dog on the beach."
        )
    return LoRASource(source, texts, opened=opened)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a file tells of itself; all of it texts of whoever wrote the file.

    Args:
        facts: Rows of name and value.
        concepts: Rows of concept, class word, kind and tokens.
        notes: Sentences about what is unusual, and problems.
        card: The model card as Markdown, in which the file's texts are escaped; empty where a file has none.
    """

    facts: list[list[str]]
    concepts: list[list[str]]
    notes: list[str]
    card: str


def tell(studio: Studio, source: str | Path) -> Told:
    """Tell what `mixofshow inspect` tells of a file, and its card.

    Raises:
        MixOfShowError: If it cannot be read.
    """
    opened = studio.open(source)
    pack, foreign = opened.edlora, opened.foreign
    summary = summary_of_pack(pack) if foreign is None else summary_of_foreign(foreign)
    summary |= {"source": Path(source).name, "bytes": opened.file.stat().st_size}
    concepts = [
        [
            each["placeholder"],
            each["class_word"] or "",
            each["kind"] or "",
            "  ".join(f"{token} {format_norm(norm)}" for token, norm in each["tokens"].items()),
        ]
        for each in summary["concepts"]
    ]
    return Told(
        facts=[[name, str(value)] for name, value in facts_of(summary).items()],
        concepts=concepts,
        notes=[*summary["notes"], *summary["problems"]],
        card=pack.card(Path(source).stem) if foreign is None else "",
    )
