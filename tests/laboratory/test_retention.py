"""The benchmark of retention: what its options decide."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from benchmarks import __file__ as benchmarks_file
from diffusers_mixofshow import toyland
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS, RECORDING_PROMPTS
from diffusers_mixofshow.sampling.vocabulary import warn_of_unknown_words


@pytest.fixture
def retention(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/retention.py`, whose own imports are those of a script in that folder."""
    monkeypatch.syspath_prepend(str(Path(benchmarks_file).parent))
    return importlib.import_module("retention")


@pytest.mark.parametrize("base", ["toyland", "toyland-xl"])
def test_concepts_are_tuned_drawn_and_kept_on_the_base_that_is_asked_for(
    retention: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str
) -> None:
    """Toyland needs no setting for it, so that its finished results stay those of earlier plans."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(retention, "load_base", lambda name, *more, **others: seen.update(drawn=name))
    monkeypatch.setattr(retention, "tuned", lambda concepts, plan, *more: seen.update(tuned=dict(plan.tuning)))
    monkeypatch.setattr(retention, "Kept", lambda *more, base: seen.update(kept=base))
    monkeypatch.setattr(retention, "subject_of", lambda concept, judge: concept.name)
    monkeypatch.setattr(retention.ToylandJudge, "load", lambda: None)
    given = ["--base", base] if base != "toyland" else []
    asked = ["retention.py", "--work", str(tmp_path), *given, "--tuning", '{"steps": 1}']
    monkeypatch.setattr(sys, "argv", asked)
    retention.study_of(retention.parse_arguments(), 0.0, Console(quiet=True))
    told = {"pretrained_model_name_or_path": base} if given else {}
    assert seen == {"drawn": base, "kept": base, "tuned": {"steps": 1} | told}


def test_a_method_is_told_with_its_settings(retention: ModuleType) -> None:
    assert retention.parsed("closed-form:ridge=auto,prior=0.1") == ("closed-form", {"ridge": "auto", "prior": 0.1})
    with pytest.raises(SystemExit, match="Unknown method 'median' in 'median:ridge=1'; expected closed-form, average"):
        retention.parsed("median:ridge=1")


def test_unseen_prompts_differ_in_content_from_all_that_is_recorded_or_learnt(retention: ModuleType) -> None:
    """They name other places and times together, whatever words stand between."""
    words = {"meadow", "beach", "desert", "snow", "night", "room"}
    things = [concept for concept in toyland.CONCEPTS.values() if concept.kind != "scene"]
    of_each = [{photo.caption for photo in toyland.photos(concept)} for concept in things]
    # Of the held-out prompts of fourteen concepts; the page of fusion's benchmarks tells this.
    assert sum(len(captions & set(HELD_OUT_PROMPTS)) for captions in of_each[:14]) == 15
    captions = set().union(*of_each)
    seen = [words & {*re.findall(r"\w+", text)} for text in (*RECORDING_PROMPTS, *captions)]
    assert {len(each) for each in seen} == {1}
    new = [words & {*re.findall(r"\w+", text)} for text in retention.UNSEEN_PROMPTS]
    assert [each for each in new if each in seen] == []
    assert len({frozenset(each) for each in new}) == len(retention.UNSEEN_PROMPTS)


def test_no_unseen_prompt_has_a_strange_word(retention: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown_words("toyland", retention.UNSEEN_PROMPTS)
