"""The demo's page: one HTML file with its pictures inside, which opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffusers_mixofshow.atomic import encode_picture, write_whole
from diffusers_mixofshow.demo.measuring import Measures
from diffusers_mixofshow.demo.sampling import METHODS, Pictures
from diffusers_mixofshow.demo.settings import DemoConcept


_ENLARGED = 3


def write_page(
    path: Path,
    concepts: Sequence[DemoConcept],
    photos: Mapping[str, Sequence[Image.Image]],
    pictures: Pictures,
    measures: Measures,
    report: Mapping[str, Any],
) -> Path:
    """Write the page, which is ``page.html.jinja`` filled in, and return its path.

    Args:
        path: The HTML file.
        concepts: The demo's concepts.
        photos: Concept name to its photos.
        pictures: Everything sampled.
        measures: Everything measured.
        report: The record beside the page: command, versions, seconds.
    """
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined)
    environment.filters["data_uri"] = data_uri
    text = environment.get_template("page.html.jinja").render(
        concepts=concepts, photos=photos, pictures=pictures, measures=measures, report=report, methods=METHODS
    )
    write_whole(path, text.encode())
    return path


def data_uri(image: Image.Image) -> str:
    """The enlarged picture as a PNG inside an address."""
    enlarged = image.resize((image.width * _ENLARGED, image.height * _ENLARGED), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(encode_picture(enlarged)).decode()
