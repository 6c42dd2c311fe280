"""The benchmark of retention: what its options decide."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from benchmarks import __file__ as benchmarks_file


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
