"""The page and the settings, on pictures of one colour."""

from __future__ import annotations

import base64
import html
import io
import re
import shlex
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from PIL import Image

from diffusers_mixofshow import cli
from diffusers_mixofshow.demo import DemoSettings
from diffusers_mixofshow.demo.intervals import FUSED_MINUS_AVERAGE, Intervals
from diffusers_mixofshow.demo.measuring import Measures
from diffusers_mixofshow.demo.page import write_page
from diffusers_mixofshow.demo.sampling import METHODS, Pictures
from diffusers_mixofshow.demo.settings import DemoConcept
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation.identity import Identity


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def pixel_of(source: str) -> list[int]:
    """The colour of a picture that lies in an address."""
    content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))[0, 0].tolist()


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "count": 2}


def intervals(attributes: bool, more: dict[str, float]) -> Intervals:
    """All alike, but for the difference between fused and average."""
    looks = interval(0.5, 0.17, 0.83) if attributes else None
    alike = interval(0.75, 0.701, 0.799)
    return Intervals(
        mean={key: {"alignment": alike, "attributes": looks, "nearest": alike} for key in ("photos", *METHODS)},
        retention={
            **{key: {"alignment": alike, "attributes": looks} for key in ("average", "fused")},
            FUSED_MINUS_AVERAGE: {"alignment": more, "attributes": more if attributes else None},
        },
        regions={key: {"regions": alike, "whole_pictures": alike, "looks": looks} for key in ("regional", "unguided")},
    )


def page(
    tmp_path: Path,
    *,
    command: str = "mixofshow demo",
    attributes: float | None = 0.5,
    found: Sequence[Sequence[str]] = (("bobo", "kiki"),),
    orders: Sequence[tuple[str, ...]] = (("bobo", "kiki"),),
    drawn: Sequence[str] = ("blue",),
    more: dict[str, float] | None = None,
) -> str:
    names = ("bobo", "kiki")
    identity = Identity(alignment=0.75, attributes=attributes, nearest=1.0)
    pictures = Pictures(
        alone={method: {name: [picture("red")] for name in names} for method in METHODS},
        regional=[picture(colour) for colour in drawn],
        unguided=[picture("green")],
        order=list(orders),
        layouts=[Image.new("L", (8, 8)) for _ in drawn],
    )
    measures = Measures(
        identity={method: dict.fromkeys(names, identity) for method in ("photos", *METHODS)},
        mean=dict.fromkeys(("photos", *METHODS), identity),
        retention={
            "average": {"alignment": 0.4, "attributes": None if attributes is None else 0.41},
            "fused": {"alignment": 0.93, "attributes": None if attributes is None else 0.92},
        },
        found={"regional": [list(names) for names in found], "unguided": [["kiki", "kiki"]]},
        regions={
            "regional": {"regions": 1.0, "whole_pictures": 1.0, "looks": None if attributes is None else 0.77},
            "unguided": {"regions": 0.5, "whole_pictures": 0.0, "looks": None if attributes is None else 0.33},
        },
        intervals=intervals(attributes is not None, more or interval(0.51, 0.4, 0.6)),
    )
    report = {
        "command": command,
        "settings": {"seed": 3},
        "seconds": {"tuning": 12.0},
        "versions": {"torch": "2.13.0"},
        "machine": "Linux",
    }
    concepts = [
        DemoConcept(name=name, kind="character", class_word="<i>critter</i>", folder=tmp_path) for name in names
    ]
    photos = {name: [picture("white")] for name in names}
    return write_page(tmp_path / "index.html", concepts, photos, pictures, measures, report).read_text("utf-8")


def test_the_page_needs_nothing_outside_itself(tmp_path: Path) -> None:
    text = page(tmp_path)
    sources = text.count("src='")
    together, alone, on_top = 3, 2 + 2 * len(METHODS), 3
    assert sources == text.count("src='data:image/png;base64,") == together + alone + on_top
    assert "http" not in text


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    text = page(tmp_path)
    for number in ("92&nbsp;%", "41&nbsp;%", "100&nbsp;%", "50&nbsp;%", "0.750", "77&nbsp;%", "33&nbsp;%"):
        assert number in text
    assert "asked: bobo" in text


def test_without_attributes_the_page_falls_back_to_image_alignment(tmp_path: Path) -> None:
    text = page(tmp_path, attributes=None)
    assert "<b>93&nbsp;%</b>" in text
    assert "of the looks" not in text


def test_the_page_says_how_sure_its_numbers_are(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert text.count("<small>(70 to 80&nbsp;%)</small>") == 2 + len(METHODS) + 1 + 2  # tiles, nearest, alignment kept
    assert text.count("<small>(17 to 83&nbsp;%)</small>") == 2 + len(METHODS) + 1 + 2  # tiles, looks, looks kept
    assert text.count("<small>(0.701 to 0.799)</small>") == len(METHODS) + 1
    assert "Likely ranges: 70 to 80&nbsp;% of the places, 70 to 80&nbsp;% of the pictures, 17 to 83&nbsp;% of" in text
    assert "Fusing keeps 51 points more than averaging (40 to 60)." in text


def test_a_difference_that_may_be_none_is_called_chance(tmp_path: Path) -> None:
    text = " ".join(page(tmp_path, more=interval(0.05, -0.02, 0.11)).split())
    assert "Fusing keeps 5 points more than averaging (-2 to 11: 0 lies in it, so this may be chance)." in text
    for low in (0.002, -0.002):
        near = " ".join(page(tmp_path, more=interval(0.05, low, 0.11)).split())
        assert "(0 to 11: 0 lies in it, so this may be chance)" in near
    assert "may be chance" not in page(tmp_path, more=interval(0.05, 0.01, 0.11))


def test_without_attributes_the_ranges_are_those_of_image_alignment(tmp_path: Path) -> None:
    text = page(tmp_path, attributes=None)
    assert "17 to 83" not in text
    assert "70 to 80&nbsp;% of the pictures.</p>" in text
    assert "<small>(70 to 80&nbsp;%)</small></div>" in text


def test_text_is_escaped_and_tags_are_closed(tmp_path: Path) -> None:
    text = page(tmp_path, command="mixofshow demo --output '<script>alert(1)</script>'")
    assert "<script>" not in text
    assert "<i>" not in text
    _BalancedTags().check(text)


def test_shares_are_whole_percents_and_a_dash_where_they_are_not_defined(tmp_path: Path) -> None:
    assert "looks read right <b>90&nbsp;%</b>" in page(tmp_path, attributes=0.904)
    assert "<td>&ndash;</td><td>&ndash;</td>" in page(tmp_path, attributes=None)


def test_the_page_begins_with_the_best_picture_beside_photos_of_what_it_shows(tmp_path: Path) -> None:
    found = [["kiki", "kiki"], ["kiki", "bobo"], ["bobo", "kiki"]]
    orders = [("bobo", "kiki"), ("kiki", "bobo"), ("bobo", "kiki")]
    text = page(tmp_path, found=found, orders=orders, drawn=("red", "blue", "green"))
    images = _Elements(text, "img")
    assert [image["alt"].split(",")[0] for image in images[:3]] == [
        "A picture of <kiki>",
        "A picture of <bobo>",
        "One picture with kiki",
    ]
    assert pixel_of(images[2]["src"]) == [0, 0, 255]
    top, _, _ = text.partition("id='world'")
    assert "All of them are in their places." in top
    assert "Not all of them" in page(tmp_path, found=[["kiki", "kiki"]])


def test_every_picture_is_told_in_words_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    text = page(tmp_path)
    images, links = _Elements(text, "img"), [link["href"] for link in _Elements(text, "a")]
    assert images
    assert all(image["alt"].strip() for image in images)
    for anchor in (link[1:] for link in links if link.startswith("#")):
        assert f"id='{anchor}'" in text
    files = {link for link in links if not link.startswith("#")}
    sheets = {f"sheets/{name}.png" for name in ("together", "bobo", "kiki")}
    assert files == {*sheets, "fused/README.md", "report.json"}


def test_the_commands_of_the_page_can_be_pasted(tmp_path: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    verbs = []
    for block in re.findall(r"<pre><code>(.*?)</code></pre>", page(tmp_path), re.DOTALL):
        for line in html.unescape(block).replace("\\\n", "").splitlines():
            program, verb, *arguments = shlex.split(line)
            if program == "mixofshow":
                group.commands[verb].make_context(verb, [*arguments])
                verbs.append((verb, arguments))
            else:
                assert (program, verb) == ("pip", "install")
    assert [verb for verb, _ in verbs] == ["sample", "sample", "demo", "train", "sample", "ui"]
    (_, alone), (_, together) = verbs[:2]
    assert alone[:4] == ["--concepts", str(tmp_path / "fused"), "--prompt", "a <bobo> on the beach"]
    regions = [together[place + 1] for place, word in enumerate(together) if word == "--region"]
    assert regions == ["0,0.25,0.5,0.97:a <bobo>, in a meadow", "0.5,0.25,1,0.97:a <kiki>, in a meadow"]
    assert together[together.index("--width") + 1] == together[together.index("--height") + 1] == "8"


def test_settings_list_everything_that_is_wrong() -> None:
    with pytest.raises(ConfigurationError) as caught:
        DemoSettings(photos=Path("x"), pictures=0, concepts=("bobo",))
    for part in ("--class-word", "pictures is 0", "two or more"):
        assert part in str(caught.value)


class _Elements(HTMLParser, list[dict[str, str]]):
    """The attributes of all elements of a kind, in the order of the page."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == self.kind:
            self.append({name: value or "" for name, value in attrs})


class _BalancedTags(HTMLParser):
    """Fails on a tag that is closed but not open, or left open."""

    _EMPTY = ("img", "meta", "br")

    def check(self, text: str) -> None:
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self._EMPTY:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
