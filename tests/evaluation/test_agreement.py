"""Which class word and kind a concept is measured with, where packs tell them differently or not at all."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.evaluation.agreement import find_own_packs, unify_concepts, warn_of_concepts_spelt_alike
from diffusers_mixofshow.interop.concept_names import UNKNOWN_CLASS


def pack(**told: str) -> EDLoRA:
    """A pack of concepts by name, each with what it tells: ``word`` or ``word kind``."""
    concepts = []
    for name, text in told.items():
        word, _, kind = text.partition(" ")
        concepts.append(Concept.from_name(name, word, kind=kind or "object"))
    embeddings = {token: torch.zeros(1, 2) for concept in concepts for token in concept.tokens}
    return EDLoRA(concepts=tuple(concepts), embeddings=embeddings, lora={}, base_model="x", layers=("a",))


def told(packs: dict[str, EDLoRA]) -> dict[str, list[tuple[str, str]]]:
    return {name: [(concept.class_word, concept.kind) for concept in each.concepts] for name, each in packs.items()}


MAN, DOG, NONE = "man character", "dog pet", UNKNOWN_CLASS


@pytest.mark.parametrize(
    ("packs", "options", "expected", "warned"),
    [
        pytest.param({"a": pack(rex=DOG)}, {}, ["dog", "pet"], None, id="one"),
        pytest.param({"a": pack(rex=DOG), "b": pack(rex=DOG)}, {}, ["dog", "pet"], None, id="equal"),
        pytest.param(
            {"own": pack(rex=DOG), "fused": pack(rex=NONE, tom=MAN)},
            {},
            ["dog", "pet"],
            "<rex> is measured as 'dog', kind pet, as in own; fused has no class word",
            id="own knows",
        ),
        pytest.param(
            {"fused": pack(rex=MAN, tom=MAN), "own": pack(rex=DOG)},
            {},
            ["dog", "pet"],
            "<rex> is measured as 'dog', kind pet, as in own; fused has 'man', kind character",
            id="own wins where it comes last",
        ),
        pytest.param(
            {"own": pack(rex=NONE), "fused": pack(rex=DOG, tom=MAN)},
            {},
            ["dog", "pet"],
            "<rex> is measured as 'dog', kind pet, as in fused; own has no class word",
            id="own does not know",
        ),
        pytest.param(
            {"own": pack(rex=NONE), "again": pack(rex=DOG)},
            {},
            ["dog", "pet"],
            "<rex> is measured as 'dog', kind pet, as in again;",
            id="two alone, the second knows",
        ),
        pytest.param(
            {"a": pack(rex=DOG, tom=MAN), "b": pack(rex=MAN, tom=MAN)},
            {},
            ["dog", "pet"],
            "<rex> is measured as 'dog', kind pet, as in a; b has 'man', kind character",
            id="no own",
        ),
        pytest.param(
            {"own": pack(rex="dog"), "fused": pack(rex=DOG, tom=MAN)},
            {},
            ["dog", "object"],
            "fused has 'dog', kind pet",
            id="kinds differ",
        ),
        pytest.param(
            {"own": pack(rex=DOG), "fused": pack(rex=NONE, tom=MAN)},
            {"class_words": {"<rex>": "puppy"}},
            ["puppy", "pet"],
            None,
            id="class word given, the other tells nothing",
        ),
        pytest.param(
            {"own": pack(rex=DOG), "fused": pack(rex=MAN, tom=MAN)},
            {"class_words": {"<rex>": "puppy"}},
            ["puppy", "pet"],
            "<rex> is measured as kind pet, as in own; fused has kind character.",
            id="class word given, kinds differ",
        ),
        pytest.param(
            {"own": pack(rex=DOG), "fused": pack(rex="cat pet", tom=MAN)},
            {"class_words": {"<rex>": "puppy"}},
            ["puppy", "pet"],
            None,
            id="class word given, which alone differs",
        ),
        pytest.param(
            {"own": pack(rex=DOG), "fused": pack(rex=MAN, tom=MAN)},
            {"kinds": {"<rex>": "object"}},
            ["dog", "object"],
            "<rex> is measured as 'dog', as in own; fused has 'man'.",
            id="kind given, class words differ",
        ),
        pytest.param(
            {"own": pack(rex=NONE), "fused": pack(rex=NONE, tom=MAN)},
            {"class_words": {"<rex>": "puppy"}},
            ["puppy", "object"],
            None,
            id="class word given, nobody tells",
        ),
        pytest.param(
            {"own": pack(rex=DOG), "fused": pack(rex=MAN, tom=MAN)},
            {"class_words": {"<rex>": "toy"}, "kinds": {"<rex>": "object"}},
            ["toy", "object"],
            None,
            id="both given",
        ),
        pytest.param(
            {"own": pack(rex=NONE)}, {"class_words": {"<rex>": "toy"}}, ["toy", "object"], None, id="only given"
        ),
        pytest.param(
            {"own": pack(rex=DOG)}, {"class_words": {"<rex>": NONE}}, [NONE, "pet"], None, id="thing is a word, too"
        ),
    ],
)
def test_every_concept_is_measured_with_one_class_word(packs, options, expected, warned) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MixOfShowWarning)
        result = unify_concepts(packs, **options)
    of_rex = [
        [concept.class_word, concept.kind]
        for each in result.values()
        for concept in each.concepts
        if concept.placeholder == "<rex>"
    ]
    assert of_rex == [expected] * len(of_rex)
    assert [each.category for each in caught] == ([] if warned is None else [MixOfShowWarning])
    assert warned is None or warned in str(caught[0].message)
    assert list(result) == list(packs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told(unify_concepts(result, **options)) == told(result)  # and nothing is said twice


def test_what_else_a_pack_holds_stays_as_it_is() -> None:
    spelt = dataclasses.replace(Concept.from_name("rex", NONE), tokens=("<r1>", "<r2>", "<r3>"))
    other = dataclasses.replace(
        pack(rex=NONE), concepts=(spelt,), embeddings={token: torch.ones(1, 2) for token in spelt.tokens}
    )
    given = {"own": pack(rex=DOG), "other": other}
    with pytest.warns(MixOfShowWarning):
        result = unify_concepts(given)
    assert result["own"] is given["own"]
    assert result["other"].concepts[0] == dataclasses.replace(spelt, class_word="dog", kind="pet")
    assert result["other"].embeddings == other.embeddings
    assert other.concepts[0].class_word == NONE


def test_all_unknown_class_words_are_one_error() -> None:
    packs = {"a": pack(rex=NONE), "b": pack(rex=NONE, tom=NONE, kit=DOG)}
    with pytest.raises(ConfigurationError, match=r"<rex> \(a, b\), <tom> \(b\).*--class-word rex=WORD") as error:
        unify_concepts(packs)
    assert "kit" not in str(error.value)


def test_the_first_that_holds_a_concept_alone_is_its_own() -> None:
    packs = {"both": pack(rex=DOG, tom=MAN), "one": pack(rex=DOG), "two": pack(rex=DOG)}
    assert find_own_packs(packs) == {"<rex>": "one"}


def test_concepts_that_differ_in_case_are_told_of() -> None:
    with pytest.warns(MixOfShowWarning, match="<rex> and <Rex> are measured as different concepts"):
        warn_of_concepts_spelt_alike({"own": pack(rex=DOG), "fused": pack(Rex=DOG, tom=MAN)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_concepts_spelt_alike({"own": pack(rex=DOG), "fused": pack(rex=DOG, tom=MAN)})
