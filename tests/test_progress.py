"""Progress shows in terminals, notebooks and logs, stops where it is switched off, and says nothing twice."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from diffusers.utils import logging as of_diffusers
from nbclient import NotebookClient
from transformers.utils import logging as of_transformers

import packs
import tiny
from diffusers_mixofshow import progress as module
from diffusers_mixofshow.edlora.models import silence_libraries
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.progress import (
    announce,
    bar_settings,
    disable_foreign_bars,
    hide_bars,
    is_off,
    listen,
    progress,
    tell,
)
from diffusers_mixofshow.toyland import CONCEPTS, write_photos
from diffusers_mixofshow.training import EDLoRATrainer, TrainingConfig


CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f]")
COUNT = "from diffusers_mixofshow.progress import progress\nwith progress('Counting', 3) as bar:\n    bar.update(3)\n"


@pytest.fixture(autouse=True)
def nobody_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TQDM_DISABLE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pipe() -> MixOfShowPipeline:
    return MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)


@pytest.mark.parametrize("shown", [True, False])
def test_a_listener_is_told_of_every_step_also_where_bars_are_off(shown: bool) -> None:
    told: list[tuple[str, int, int]] = []
    with listen(lambda *step: told.append(step)), progress("Counting", 3, done=1, shown=shown) as bar:
        bar.update()
        bar.set_postfix_str("more")
        bar.update()
    with progress("Unheard", 1) as bar:
        bar.update()
    assert told == [("Counting", 1, 3), ("Counting", 2, 3), ("Counting", 3, 3)]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | more


def count(pipe: object = None, *, shown: bool = True) -> None:
    with progress("Counting", 3, pipe=pipe, shown=shown) as bar:
        for number in range(3):
            bar.set_postfix_str(f"number {number}", refresh=False)
            bar.update()


def test_a_log_gets_lines_without_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    announce("Loading toyland ...")
    count()
    told = capsys.readouterr()
    assert told.out == ""
    assert CONTROLS.search(told.err) is None
    lines = told.err.splitlines()
    assert lines[:2] == ["Loading toyland ...", "Counting: 0/3 [00:00<?]"]
    assert [re.sub(r" \[.*, ", " [", line) for line in lines[2:]] == [
        f"Counting: {n + 1}/3 [number {n}]" for n in range(3)
    ]


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Counting", 5000) as bar:
        for _ in range(5000):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" [")[0] for line in lines] == ["Counting: 0/5000", "Counting: 5000/5000"]


def test_what_goes_on_from_somewhere_begins_there(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Tuning", 10, done=7) as bar:
        bar.update(3)
    assert [line.partition(" [")[0] for line in capsys.readouterr().err.splitlines()] == [
        "Tuning: 7/10",
        "Tuning: 10/10",
    ]


def _nothing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {}


def _of_tqdm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return {}


def _of_diffusers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(of_diffusers, "_tqdm_active", True)  # put back afterwards
    of_diffusers.disable_progress_bar()
    return {}


def _of_transformers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(of_transformers, "_tqdm_active", False)
    return {}


def _of_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return {"pipe": pipe}


def _of_another_process(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("RANK", "1")
    return {}


def _not_the_main_process(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"shown": False}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("switch", "shows"),
    [
        (_nothing, True),
        (_of_tqdm, False),
        (_of_diffusers, False),
        (_of_transformers, False),
        (_of_a_pipeline, False),
        (_of_another_process, False),
        (_not_the_main_process, False),
    ],
)
def test_every_switch_is_heard(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, switch: Any, shows: bool, terminal: bool
) -> None:
    arguments = switch(monkeypatch)
    monkeypatch.setattr(module, "_can_redraw", lambda: terminal)
    capsys.readouterr()
    count(**arguments)
    announce("Loading ...", **arguments)
    assert bool(capsys.readouterr().err) is shows
    tell("Stopped.")  # no progress, but news
    assert capsys.readouterr().err == "Stopped.\n"


OTHERS = """
from diffusers_mixofshow.progress import bar_settings, disable_foreign_bars
disable_foreign_bars()  # before tqdm is imported, as the command line does
import tiny
from diffusers.utils import logging
from diffusers_mixofshow.pipelines import MixOfShowPipeline
pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
for _ in logging.tqdm(range(3)):
    pass
pipe.set_progress_bar_config(desc="Sampling", **bar_settings())
pipe("a dog", num_inference_steps=2, output_type="latent")
"""


def test_bars_in_a_log_are_lines_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_can_redraw", lambda: False)
    settings = bar_settings()
    file = settings.pop("file")
    assert settings == {
        "disable": False,
        "mininterval": 10.0,
        "maxinterval": 10.0,
        "miniters": 1,
        "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    }
    log = io.StringIO()
    monkeypatch.setattr(file, "_log", log)
    for text in ("\r one ", "\x1b[A", "\r one", "\n", "two\x1b[31m\n", " one"):
        file.write(text)
    file.flush()
    assert log.getvalue() == " one\ntwo\n one\n"
    monkeypatch.setattr(module, "_can_redraw", lambda: True)
    assert (bar_settings(), bar_settings(shown=False)) == ({}, {"disable": True})


@pytest.mark.parametrize("value", ["", "others"])
def test_values_of_tqdms_switch_that_mean_no_to_us(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    monkeypatch.setenv("RANK", "0")
    assert not is_off()
    assert is_off(shown=False)


def test_libraries_that_nobody_imported_switch_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in module._SWITCHES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not is_off()


@pytest.mark.parametrize(
    ("terminal", "shell", "redraws"),
    [
        (False, None, False),
        (True, None, True),
        (False, {"IPKernelApp": {}}, True),
        (False, {"TerminalIPythonApp": {}}, False),
    ],
)
def test_where_a_line_can_be_drawn_over(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, shell: dict[str, object] | None, redraws: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: terminal))
    running = None if shell is None else types.SimpleNamespace(config=shell)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: running))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert bool(bar_settings()) is not redraws
    disable_foreign_bars()
    assert os.environ.get("TQDM_DISABLE") == (None if redraws else "others")
    monkeypatch.setenv("TQDM_DISABLE", "")  # so that what was set is gone afterwards


def test_in_a_log_the_command_line_switches_off_the_bars_of_others_alone() -> None:
    command = [sys.executable, "-W", "ignore", "-c", OTHERS]
    told = subprocess.run(
        command, capture_output=True, text=True, env=environment(TRANSFORMERS_VERBOSITY="error"), check=True
    ).stderr
    assert [line.partition(" [")[0] for line in told.splitlines()] == ["Sampling: 0/2", "Sampling: 2/2"]
    assert CONTROLS.search(told) is None


def test_what_users_said_of_tqdm_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    disable_foreign_bars()
    assert os.environ["TQDM_DISABLE"] == "1"


def test_a_pipeline_gets_its_settings_back(pipe: MixOfShowPipeline) -> None:
    pipe.set_progress_bar_config(desc="mine")
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with hide_bars(pipe):
            assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
            raise KeyboardInterrupt
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_training_and_fusing_tell_how_far_they_are(
    capsys: pytest.CaptureFixture[str], pipe: MixOfShowPipeline, tmp_path: Path
) -> None:
    write_photos(CONCEPTS["rex"], tmp_path / "photos", count=2)
    settings: dict[str, Any] = {"max_train_steps": 1, "embedding_phase_steps": 1, "num_validation_images": 0}
    config = TrainingConfig(
        instance_data_dir=tmp_path / "photos",
        concept="tom",
        class_word="dog",
        resolution=32,
        pretrained_model_name_or_path="someone/tiny",
        **settings,
    )
    edlora = EDLoRATrainer(config, pipe).train()
    told = capsys.readouterr().err
    assert re.search(r"^Tuning <tom>: 0/2 \[", told, re.MULTILINE)
    assert re.search(r"^Tuning <tom>: 2/2 \[.*joint loss \d\.\d{4}\]$", told, re.MULTILINE)

    other = packs.random_pack(pipe.components, "kit", ranks=(2,))
    few = {"steps": 2, "prompts": ("a <TOK>", "two <TOK>")}
    GradientFuser(pipe, **few).fuse([edlora, other])
    told = capsys.readouterr().err
    for stage, count in enumerate((4, 4, 8), 1):
        assert f"Recording, stage {stage} of 3: 0/{count} [" in told
        assert f"Recording, stage {stage} of 3: {count}/{count} [" in told
        assert re.search(rf"Solving, stage {stage} of 3: (\d+)/\1 \[", told)
    GradientFuser(pipe, **few, sequential=False).fuse([edlora, other])
    told = capsys.readouterr().err
    assert "Recording: 8/8 [" in told
    assert re.search(r"Solving: (\d+)/\1 \[", told)
    pipe.set_progress_bar_config(disable=True)
    GradientFuser(pipe, **few).fuse([edlora, other])
    GradientFuser(pipe, **few, sequential=False).fuse([edlora, other])
    EDLoRATrainer(config, pipe).train()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    subprocess.run([sys.executable, "-c", COUNT], stderr=follower, env=environment(), check=True)
    drawn = os.read(leader, 10_000).decode()
    assert "Counting:   0%|" in drawn
    assert "\rCounting: 100%|" in drawn


def test_a_notebook_gets_a_bar() -> None:
    """Without ipywidgets tqdm says so once, and draws with characters."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(COUNT)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(env=environment())
    outputs = notebook.cells[0].outputs
    text = "".join(str(output.get("text", output.get("data"))) for output in outputs)
    assert "Counting" in text
    assert "100%" in text or "FloatProgress" in text or "HBox" in text


@pytest.mark.parametrize("shown", [(True, False), (False, True), (True, True), (False, False)])
def test_libraries_that_were_silenced_are_as_loud_as_before(shown: tuple[bool, bool]) -> None:
    libraries = (of_diffusers, of_transformers)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    try:
        for each, bars, level in zip(libraries, shown, (10, 20), strict=True):
            (each.enable_progress_bar if bars else each.disable_progress_bar)()
            each.set_verbosity(level)
        with suppress(KeyError), silence_libraries():
            assert [each.is_progress_bar_enabled() for each in libraries] == [False, False]
            assert [each.get_verbosity() for each in libraries] == [40, 40]
            raise KeyError
        assert [each.is_progress_bar_enabled() for each in libraries] == [*shown]
        assert [each.get_verbosity() for each in libraries] == [10, 20]
    finally:
        for each, (level, bars) in zip(libraries, before, strict=True):
            each.set_verbosity(level)
            (each.enable_progress_bar if bars else each.disable_progress_bar)()


def test_a_program_without_a_console_has_no_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress("some steps", 2) as bar:
        bar.update(1)
    announce("nothing")
    tell("nothing")
