"""Names of concepts: which of them clash, and how that is told."""

from __future__ import annotations

import pytest

from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.errors import ConceptError


def named(*names: str) -> list[Concept]:
    return [Concept.from_name(name, "dog") for name in names]


def spelt(placeholder: str, *tokens: str) -> Concept:
    return Concept(placeholder=placeholder, tokens=tokens, class_word="dog")


@pytest.mark.parametrize(
    ("concepts", "told"),
    [
        (named("rex", "rex"), "<rex>"),
        (named("rex", "rex", "rex"), "<rex>"),
        (named("rex", "kit", "kit", "rex"), "<kit>, <rex>"),
        (named("rex", "rex1"), "<rex1> (of <rex> and <rex1>)"),
        (named("rex1", "rex"), "<rex1> (of <rex1> and <rex>)"),
        (named("rex", "rex", "rex1"), "<rex>, <rex1> (of <rex> and <rex1>)"),
        ([spelt("<a>", "<x>", "<y>"), spelt("<b>", "<y>", "<x>")], "<y> (of <a> and <b>), <x> (of <a> and <b>)"),
        ([spelt("<a>", "<x>"), spelt("<a>", "<y>"), spelt("<b>", "<y>")], "<a>, <y> (of <a> and <b>)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_used_twice_are_told_once_each(concepts: list[Concept], told: str) -> None:
    with pytest.raises(ConceptError) as caught:
        check_distinct(concepts)
    assert str(caught.value) == f"Names used twice: {told}. Give each concept once, or rename one of them."


def test_names_of_their_own_pass() -> None:
    check_distinct(named("rex", "kit", "Rex", "rex-1"))
    check_distinct([])
