"""Recording prompts: spelt with the placeholder, and none of the paper's evaluation."""

import re
from itertools import chain

import pytest

from diffusers_mixofshow.concepts import KINDS, Concept
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.fusion.prompts import RECORDING_PROMPTS, prior_prompts, recording_prompts


EVALUATION = """A photo of <TOK> on the beach, small waves, detailed symmetric face, beautiful composition
A <TOK>, in front of Eiffel tower|A <TOK>, near the mount fuji|A <TOK>, in the forest|A <TOK>, walking on the street
A <TOK>, cyberpunk 2077, 4K, 3d render in unreal engine|A watercolor painting of a <TOK>
A painting of a <TOK> in the style of Vincent Van Gogh|A painting of a <TOK> in the style of Claude Monet
A <TOK> in the style of Pixel Art|A <TOK> sit on the chair|A <TOK> ride a horse|A <TOK>, wearing a headphone
A <TOK>, wearing a sunglass|A <TOK>, wearing a Santa hat|A smiling <TOK>|An angry <TOK>|A running <TOK>
A jumping <TOK>|A <TOK> is lying down|A <TOK>, in the swimming pool|A <TOK> on the boat
A <TOK> playing with a ball|A sad <TOK>|A <TOK>, in the snow|A <TOK>, at night|A <TOK>, in autumn
A <TOK>, in a sunny day|A <TOK>, in thunder and lightning|A girl near the <TOK>|A boy near the <TOK>
A dog near the <TOK>|A cat near the <TOK>|Many people near the <TOK>|A <TOK> in rainbow colors
A <TOK> made of metal|A close view of <TOK>|A top view of <TOK>|A bottom view of <TOK>"""
"""Figure 8 of arXiv:2305.18292."""


def _plain(prompt: str) -> str:
    return re.sub(r"\b(an?|the)\b|[^a-z<>]+", " ", prompt.lower().replace(" a ", " ")).strip()


def test_defaults_cover_every_kind_and_no_evaluation_prompt() -> None:
    assert set(RECORDING_PROMPTS) == set(KINDS)
    evaluated = {_plain(prompt) for prompt in re.split(r"[|\n]", EVALUATION)}
    assert len(evaluated) == 39
    assert not evaluated & {_plain(prompt) for prompt in chain(*RECORDING_PROMPTS.values())}


def test_the_placeholder_goes_in() -> None:
    concept = Concept.from_name("rex", "dog", kind="pet")
    assert recording_prompts(concept, ["a <TOK>, a big <TOK>"]) == ("a <rex>, a big <rex>",)
    assert recording_prompts(concept, {"pet": ["the <TOK>"]}) == ("the <rex>",)
    assert all("<rex>" in prompt for prompt in recording_prompts(concept))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a dog"], "without the concept: \\['a dog'\\]"),
        ([], "none given"),
        ({"object": ["<TOK>"]}, "need 'pet'"),
        ({"pet": ["<TOK>"], "plant": ["<TOK>"]}, "The kinds are character"),
        ({}, "got none, need 'pet'"),
        (["a <TOK>", "a dog", "<TOK>"], "without the concept: \\['a dog'\\]"),
    ],
)
def test_prompts_that_record_nothing_of_the_concept_are_refused(prompts: object, message: str) -> None:
    with pytest.raises(FusionError, match=message):
        recording_prompts(Concept.from_name("rex", "dog", kind="pet"), prompts)  # type: ignore[arg-type]


def test_one_text_is_one_prompt_of_the_prior() -> None:
    assert prior_prompts([], "a dog") == prior_prompts([], ["a dog"]) == ("a dog",)
