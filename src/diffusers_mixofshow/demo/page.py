"""Write the demo's page: one HTML file that contains its pictures and opens without a network."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffusers_mixofshow.atomic import encode_picture, write_whole
from diffusers_mixofshow.demo.intervals import FUSED_MINUS_AVERAGE
from diffusers_mixofshow.demo.measuring import Measures
from diffusers_mixofshow.demo.sampling import METHODS, Pictures
from diffusers_mixofshow.demo.settings import DemoConcept
from diffusers_mixofshow.evaluation.prompts import column_boxes, prompt_together


_ENLARGED = 3


def write_page(
    path: Path,
    concepts: Sequence[DemoConcept],
    photos: Mapping[str, Sequence[Image.Image]],
    pictures: Pictures,
    measures: Measures,
    report: Mapping[str, Any],
) -> Path:
    """Fill in the template ``page.html.jinja``, write the page and return its path.

    Args:
        path: The HTML file.
        concepts: The demo's concepts.
        photos: Concept name to its photos.
        pictures: All sampled pictures.
        measures: All measures.
        report: Content of ``report.json``: command, versions, seconds.
    """
    best = _choose_best(pictures, measures)
    class_words = {concept.name: concept.class_word for concept in concepts}
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined)
    environment.filters["data_uri"] = data_uri
    text = environment.get_template("page.html.jinja").render(
        concepts=concepts,
        class_words=class_words,
        photos=photos,
        pictures=pictures,
        best=best,
        measures=measures,
        report=report,
        methods=METHODS,
        difference=FUSED_MINUS_AVERAGE,
        commands=_commands(path.parent, class_words, pictures.order[best], pictures.regional[best].size),
    )
    write_whole(path, text.encode())
    return path


def data_uri(image: Image.Image, scale: int = _ENLARGED) -> str:
    """Encode the enlarged picture as a PNG in a data URI."""
    enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    return "data:image/png;base64," + base64.b64encode(encode_picture(enlarged)).decode()


def _choose_best(pictures: Pictures, measures: Measures) -> int:
    """Number of the first picture with regions that has the most concepts in their places."""
    right = [
        sum(found == wanted for found, wanted in zip(of_picture, order, strict=True))
        for of_picture, order in zip(measures.found["regional"], pictures.order, strict=True)
    ]
    return right.index(max(right))


def _commands(
    folder: Path, class_words: Mapping[str, str], names: Sequence[str], size: tuple[int, int]
) -> dict[str, str]:
    """What a reader can go on with, as lines for a shell.

    Args:
        folder: The demo's.
        class_words: Concept name to what it is.
        names: The concepts of the picture on top, from left to right.
        size: Its width and height.
    """
    fused = shlex.quote(str(folder / "fused"))
    prompt = prompt_together([f"a {class_words[name]}" for name in names], "in a meadow")
    boxes = [",".join(f"{edge:.3g}" for edge in box) for box in column_boxes(len(names))]
    together = [
        f"mixofshow sample --concepts {fused} --prompt {shlex.quote(prompt)}",
        f"--width {size[0]} --height {size[1]} --refine --output together.png",
        *(f'--region "{box}:a <{name}>, in a meadow"' for box, name in zip(boxes, names, strict=True)),
    ]
    return {
        "alone": f'mixofshow sample --concepts {fused} --prompt "a <{names[0]}> on the beach" --output beach.png',
        "together": " \\\n  ".join(together),
        "own": "mixofshow demo --photos my-photos --class-word dog --output my-demo",
        "photographs": "mixofshow train my-photos --concept waldi --class-word dog --output waldi\n"
        'mixofshow sample --concepts waldi --prompt "a <waldi> in front of the Eiffel tower" --output paris.png',
        "page": 'pip install "diffusers-mixofshow[ui]"\nmixofshow ui',
    }
