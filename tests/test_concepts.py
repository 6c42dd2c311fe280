"""Names of concepts: which of them clash, and how that is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from diffusers_mixofshow.concepts import (
    KINDS,
    Concept,
    check_distinct,
    mentions_concept,
    replace_mention,
    split_prompt,
)
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


REX, KIT = named("rex", "kit")


def test_the_usual_spelling_of_a_name() -> None:
    for name in ("rex", "<rex>", " <rex> "):
        concept = Concept.from_name(name, "dog")
        assert (concept.placeholder, concept.tokens, concept.name) == ("<rex>", ("<rex1>", "<rex2>"), "rex")
        assert (concept.class_word, concept.kind) == ("dog", "object")
    assert [Concept.from_name("rex", "dog", kind=kind).kind for kind in KINDS] == list(KINDS)
    assert KINDS == ("character", "pet", "object", "scene")
    assert Concept.from_name("1_a.B-c", "dog").name == "1_a.B-c"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"placeholder": "rex"}, "'rex' is not of the form <name>"),
        ({"placeholder": "<rex"}, "'<rex' is not of the form"),
        ({"placeholder": "rex>"}, "'rex>' is not of the form"),
        ({"placeholder": "<>"}, "'<>' is not of the form"),
        ({"placeholder": "<a b>"}, "'<a b>' is not of the form"),
        ({"placeholder": "<-a>"}, "'<-a>' is not of the form"),
        ({"tokens": ("<rex1>", "rex2")}, "'rex2' is not of the form"),
        ({"tokens": ()}, "it has no tokens"),
        ({"tokens": ("<rex>",)}, "placeholder and tokens must differ"),
        ({"tokens": ("<a>", "<a>")}, "placeholder and tokens must differ"),
        ({"class_word": " "}, "its class word is empty"),
        ({"kind": "animal"}, "kind 'animal' is not one of character, pet, object, scene"),
    ],
)
def test_a_malformed_concept_is_refused(fields: dict[str, Any], told: str) -> None:
    sound = {"placeholder": "<rex>", "tokens": ("<rex1>",), "class_word": "dog"}
    assert Concept(**sound).kind == "object"
    with pytest.raises(ConceptError, match=re.escape(told)) as caught:
        Concept(**sound | fields)
    others = ("is not of the form", "it has no tokens", "must differ", "class word is empty", "is not one of")
    assert sum(other in str(caught.value) for other in others) == 1  # nothing else is said to be wrong


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a <rex> at school", ["a ", "<rex1>", "<rex2>", " at school"]),
        ("<rex>", ["<rex1>", "<rex2>"]),
        ("<rex2><kit>", ["<rex2>", "<kit1>", "<kit2>"]),
        ("a <rex1> and <cat>", ["a ", "<rex1>", " and <cat>"]),
        ("<cat> and <rex1>!", ["<cat> and ", "<rex1>", "!"]),
        ("a < b > <3 c", ["a < b > <3 c"]),
        ("", []),
    ],
)
def test_prompts_are_cut_at_concepts_alone(prompt: str, pieces: list[str]) -> None:
    assert split_prompt(prompt, [REX, KIT], also_known={"<cat>"}) == pieces
    assert mentions_concept(prompt, [REX, KIT]) == any(piece[:-2] in ("<rex", "<kit") for piece in pieces)


def test_unknown_words_are_told_with_the_nearest_and_all_that_is_loaded() -> None:
    with pytest.raises(ConceptError) as caught:
        split_prompt("<rox> <zebra> <rox>", [REX, KIT])
    assert str(caught.value).startswith(
        "Unknown in the prompt: <rox> (did you mean <rex>?), <zebra>. Loaded concepts: <kit>, <rex>. "
    )
    with pytest.raises(ConceptError, match=r"^Unknown in the prompt: <cat>\. No concept is loaded\. "):
        split_prompt("a <cat>", [])


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a <rex> in a meadow", "[a|rex] in a meadow"),
        ("an <rex> dog, wet", "[an|rex], wet"),
        ("The <REX> Dog", "[The|rex]"),
        ("one <rex> dogs", "[one|rex] dogs"),
        ("panda <rex>", "panda [|rex]"),
        ("<rex>dog", "[|rex]dog"),
        ("a <kit> and a <rex>", "[a|kit] and a <rex>"),
        ("two <rex1>", "two <rex1>"),
        ("", ""),
    ],
)
def test_the_first_mention_is_replaced_with_article_and_class_word(text: str, written: str) -> None:
    assert replace_mention(text, [REX, KIT], lambda article, concept: f"[{article.strip()}|{concept.name}]") == written


def test_a_name_in_capitals_may_be_another_concept():
    concepts = [Concept.from_name("rex", "dog"), Concept.from_name("Rex", "man")]
    for order in (concepts, concepts[::-1]):
        for text in ("a <rex>", "a <Rex>"):
            assert replace_mention(text, order, lambda _article, concept: concept.placeholder) == text[2:]
