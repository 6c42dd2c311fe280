"""The page and the settings, on pictures of one colour."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffusers_mixofshow.demo import DemoSettings
from diffusers_mixofshow.demo.measuring import Measures
from diffusers_mixofshow.demo.page import write_page
from diffusers_mixofshow.demo.sampling import METHODS, Pictures
from diffusers_mixofshow.demo.settings import DemoConcept
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.evaluation.identity import Identity


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def page(tmp_path: Path, *, command: str = "mixofshow demo", attributes: float | None = 0.5) -> str:
    names = ("bobo", "kiki")
    identity = Identity(alignment=0.75, attributes=attributes, nearest=1.0)
    pictures = Pictures(
        alone={method: {name: [picture("red")] for name in names} for method in METHODS},
        regional=[picture("blue")],
        unguided=[picture("green")],
        order=[names],
        layouts=[Image.new("L", (8, 8))],
    )
    measures = Measures(
        identity={method: dict.fromkeys(names, identity) for method in ("photos", *METHODS)},
        mean=dict.fromkeys(("photos", *METHODS), identity),
        retention={
            "average": {"alignment": 0.4, "attributes": None if attributes is None else 0.41},
            "fused": {"alignment": 0.93, "attributes": None if attributes is None else 0.92},
        },
        found={"regional": [["bobo", "kiki"]], "unguided": [["kiki", "kiki"]]},
        regions={
            "regional": {"regions": 1.0, "whole_pictures": 1.0, "looks": None if attributes is None else 0.77},
            "unguided": {"regions": 0.5, "whole_pictures": 0.0, "looks": None if attributes is None else 0.33},
        },
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
    assert sources == text.count("src='data:image/png;base64,") == 2 + 2 * len(METHODS) + 3
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


def test_text_is_escaped_and_tags_are_closed(tmp_path: Path) -> None:
    text = page(tmp_path, command="mixofshow demo --output '<script>alert(1)</script>'")
    assert "<script>" not in text
    assert "<i>" not in text
    _BalancedTags().check(text)


def test_shares_are_whole_percents_and_a_dash_where_they_are_not_defined(tmp_path: Path) -> None:
    assert "looks read right <b>90&nbsp;%</b>" in page(tmp_path, attributes=0.904)
    assert "<td>&ndash;</td><td>&ndash;</td>" in page(tmp_path, attributes=None)


def test_settings_list_everything_that_is_wrong() -> None:
    with pytest.raises(ConfigurationError) as caught:
        DemoSettings(photos=Path("x"), pictures=0, concepts=("bobo",))
    for part in ("--class-word", "pictures is 0", "two or more"):
        assert part in str(caught.value)


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
