"""The demo's page: one HTML file with its pictures inside, which opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_mixofshow.demo.measuring import Measures
from diffusers_mixofshow.demo.sampling import METHODS, Pictures
from diffusers_mixofshow.demo.settings import DemoConcept
from diffusers_mixofshow.evaluation.identity import Identity


_SHOWN_ALONE = 4
_SHOWN_TOGETHER = 8
_ENLARGED = 3

_STYLE = """
:root { --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --paper: #ffffff; --back: #f5f6fa;
        --good: #12805c; --bad: #c4320a; --accent: #4f46e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --soft: #98a2b3; --line: #2c3342; --paper: #171c28;
        --back: #0e121b; --good: #3ccb98; --bad: #ff8a5c; --accent: #8b8cff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 2.3rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 8px; }
h2 { font-size: 1.35rem; margin: 48px 0 4px; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0 0 14px; }
p { max-width: 46em; margin: 4px 0 16px; } .soft, figcaption, th small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 16px; margin: 28px 0 8px; }
.tile, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px; }
.tile b { display: block; font-size: 2.1rem; line-height: 1.2; letter-spacing: -.03em; color: var(--accent); }
.tile span { color: var(--soft); font-size: .92rem; }
.card { margin: 16px 0; overflow-x: auto; }
img { display: block; border-radius: 7px; }
.strip { display: grid; grid-template-columns: repeat(2, 1fr); gap: 5px; width: max-content; }
.strip img { width: 84px; height: 84px; }
table { border-collapse: collapse; } .grid td, .grid th { padding: 10px 14px 10px 0; vertical-align: top; }
th { text-align: left; font-weight: 600; } .grid th { font-size: .93rem; }
th small { display: block; font-weight: 400; }
.numbers td, .numbers th { padding: 7px 26px 7px 0; border-bottom: 1px solid var(--line); }
.numbers td { font-variant-numeric: tabular-nums; } .best td { font-weight: 700; }
.caption { font-size: .82rem; color: var(--soft); margin-top: 6px; line-height: 1.4; }
.caption b { color: var(--ink); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px; }
figure { margin: 0; } figure img { width: 100%; height: auto; } figcaption { font-size: .82rem; padding-top: 4px; }
.right { color: var(--good); } .wrong { color: var(--bad); }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; background: var(--back); padding: 1px 5px;
       border-radius: 4px; }
footer { margin-top: 48px; color: var(--soft); font-size: .88rem; }
"""


def write_page(
    path: Path,
    concepts: Sequence[DemoConcept],
    photos: Mapping[str, Sequence[Image.Image]],
    pictures: Pictures,
    measures: Measures,
    report: Mapping[str, Any],
) -> Path:
    """Write the page and return its path.

    Args:
        path: The HTML file.
        concepts: The demo's concepts.
        photos: Concept name to its photos.
        pictures: Everything sampled.
        measures: Everything measured.
        report: The record beside the page: command, versions, seconds.
    """
    parts = [
        _opening(measures),
        _alone(concepts, photos, pictures, measures),
        _numbers(measures),
        _together(pictures, measures),
        _closing(report),
    ]
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Mix-of-Show: several concepts in one model</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n",
        encoding="utf-8",
    )
    return path


def percent(value: float | None) -> str:
    """A share for people; a dash where it is not defined."""
    return "&ndash;" if value is None else f"{value:.0%}".replace("%", "&nbsp;%")


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG inside an address."""
    buffer = io.BytesIO()
    image.resize((image.width * _ENLARGED, image.height * _ENLARGED), Image.Resampling.LANCZOS).save(
        buffer, format="PNG"
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _opening(measures: Measures) -> str:
    kept = measures.retention
    measure = "attributes" if kept["fused"]["attributes"] is not None else "alignment"
    tiles = [
        (percent(kept["fused"][measure]), "of the identity is kept by gradient fusion"),
        (percent(kept["average"][measure]), "is kept by averaging the same weights"),
        (percent(measures.regions["regional"]["regions"]), "of regions show the right concept"),
        (
            percent(measures.regions["unguided"]["regions"]),
            "stand right by the same layout without regions",
        ),
    ]
    boxes = "".join(f"<div class='tile'><b>{value}</b><span>{text}</span></div>" for value, text in tiles)
    return (
        "<h1>Several concepts, one model</h1>"
        "<p class='soft'>Each concept was tuned on its own from a few photos. The tuned files were fused without any "
        "photo, and the fused model draws every concept, alone and together. Everything below was made and measured "
        f"on this machine by one command.</p><div class='tiles'>{boxes}</div>"
    )


def _alone(
    concepts: Sequence[DemoConcept],
    photos: Mapping[str, Sequence[Image.Image]],
    pictures: Pictures,
    measures: Measures,
) -> str:
    heads = [("Photos", "what it was tuned on"), *((name.capitalize(), text) for name, text in METHODS.items())]
    header = "".join(f"<th>{escape(name)}<small>{escape(text)}</small></th>" for name, text in heads)
    rows = []
    for concept in concepts:
        columns = {"photos": photos[concept.name]} | {
            method: of_method[concept.name] for method, of_method in pictures.alone.items()
        }
        cells = "".join(
            f"<td>{_strip(images)}{_caption(measures.identity[method][concept.name])}</td>"
            for method, images in columns.items()
        )
        name = f"<th>{escape(concept.placeholder)}<small>a {escape(concept.class_word)}</small></th>"
        rows.append(f"<tr>{name}{cells}</tr>")
    return (
        "<h2>Every concept alone</h2><p class='soft'>The same held-out prompts and seeds in every column but the "
        "photos. Numbers are means over all pictures sampled, not only those shown.</p>"
        f"<div class='card'><table class='grid'><tr><th></th>{header}</tr>{''.join(rows)}</table></div>"
    )


def _strip(images: Sequence[Image.Image]) -> str:
    tags = "".join(f"<img alt='' src='{data_uri(image)}'>" for image in images[:_SHOWN_ALONE])
    return f"<div class='strip'>{tags}</div>"


def _caption(identity: Identity) -> str:
    read = "" if identity.attributes is None else f"looks read right <b>{percent(identity.attributes)}</b><br>"
    return (
        f"<div class='caption'>{read}like the photos <b>{identity.alignment:.3f}</b><br>"
        f"nearest photos its own <b>{percent(identity.nearest)}</b></div>"
    )


def _numbers(measures: Measures) -> str:
    rows = []
    for method, identity in measures.mean.items():
        kept = measures.retention.get(method, {})
        values = (
            percent(identity.attributes),
            percent(kept.get("attributes")),
            f"{identity.alignment:.3f}",
            percent(kept.get("alignment")),
            percent(identity.nearest),
        )
        cells = "".join(f"<td>{value}</td>" for value in values)
        mark = " class='best'" if method == "fused" else ""
        rows.append(f"<tr{mark}><th>{escape(method)}</th>{cells}</tr>")
    return (
        "<h2>Identity, mean over concepts</h2><p class='soft'>Kept = (method &minus; class word) / (single &minus; "
        "class word): 0 is no better than the class word, 100&nbsp;% as good as the concept's own ED-LoRA. "
        "An attribute reader reads the looks that no prompt names; a metric model compares with the photos.</p>"
        "<div class='card'><table class='numbers'><tr><th></th><th>looks read right</th><th>kept</th>"
        "<th>like the photos</th><th>kept</th><th>nearest photos its own</th></tr>"
        f"{''.join(rows)}</table></div>"
    )


def _together(pictures: Pictures, measures: Measures) -> str:
    sections = []
    titles = {
        "regional": "With one region for each concept, drafted alone first and refined in the end",
        "unguided": "The same layout, prompts and seeds without regions",
    }
    images = {"regional": pictures.regional, "unguided": pictures.unguided}
    for method, title in titles.items():
        figures = "".join(
            _figure(image, found, right)
            for image, found, right in list(zip(images[method], measures.found[method], pictures.order, strict=True))[
                :_SHOWN_TOGETHER
            ]
        )
        rates = measures.regions[method]
        looks = (
            "" if rates["looks"] is None else f"; {percent(rates['looks'])} of the looks read right in their places"
        )
        sections.append(
            f"<div class='card'><h3>{title}: right concept in {percent(rates['regions'])} of the places, in all "
            f"places of {percent(rates['whole_pictures'])} of the pictures{looks}</h3>"
            f"<div class='pairs'>{figures}</div></div>"
        )
    places = ", ".join(escape(name) for name in pictures.order[0])
    return (
        "<h2>Together</h2><p class='soft'>One fused model, concepts side by side in equal columns. A T2I-Adapter that "
        "sees no more than such a layout says where things stand, in all pictures. Under every picture: the concept "
        "found in each column, out of those asked for.</p>"
        f"<figure><img alt='' style='width: auto' src='{data_uri(pictures.layouts[0])}'><figcaption>The layout of the "
        f"first picture: {places}</figcaption></figure>" + "".join(sections)
    )


def _figure(image: Image.Image, found: Sequence[str], right: Sequence[str]) -> str:
    names = " · ".join(
        f"<span class='{'right' if name == wanted else 'wrong'}'>{escape(name or 'none of them')} "
        f"{'✓' if name == wanted else f'✗ (asked: {escape(wanted)})'}</span>"
        for name, wanted in zip(found, right, strict=True)
    )
    return f"<figure><img alt='' src='{data_uri(image)}'><figcaption>{names}</figcaption></figure>"


def _closing(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in report["versions"].items())
    seconds = ", ".join(f"{escape(name)} {value:.0f} s" for name, value in report["seconds"].items())
    return (
        f"<footer><p>Made by <code>{escape(report['command'])}</code>, seed {int(report['settings']['seed'])}, on "
        f"{escape(report['machine'])}: {versions}.</p><p>{seconds}. A stage that "
        "was finished before counts only the time to find that out.</p><p>Method: Mix-of-Show, arXiv:2305.18292. "
        "All numbers are in <code>report.json</code>.</p></footer>"
    )
