"""`mixofshow doctor`: what each check makes of what it may find on a machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from diffusers_mixofshow import base_models, cli
from diffusers_mixofshow.cli import diagnosis
from families.pipelines import tiny_pipeline


SDXL_NAMES = ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x")


def test_it_tells_what_is_known_of_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, keys in (("xl", SDXL_NAMES), ("other", ("double_blocks.0.img_attn.qkv.weight",))):
        save_file({key: torch.zeros(1) for key in keys}, f"{name}.safetensors")
    for name, family in (("folder", "Stable Diffusion XL"), ("flux", "FLUX.1")):
        tiny_pipeline(family).save_pretrained(name)
    able = "concepts, regions and tuning"
    for name, state, found, remedy in [
        ("toyland", "ok", f"toyland: Stable Diffusion; {able}; guidance 3", ""),
        ("stabilityai/stable-diffusion-xl-base-1.0", "ok", f"Stable Diffusion XL; {able}; guidance 5", ""),
        ("folder", "ok", f"folder: Stable Diffusion XL; {able}; guidance 5", ""),
        ("flux", "ok", "flux: FLUX.1; plain LoRAs, no concepts; guidance 3.5", ""),
        (
            "xl.safetensors",
            "note",
            "Stable Diffusion XL, a checkpoint of one",
            "MixOfShowXLPipeline.from_single_file(",
        ),
        ("other.safetensors", "problem", "those of FLUX", "a Hub id or a folder"),
        ("someone/unknown", "note", "neither an id that is known", "hf download someone/unknown"),
    ]:
        told = diagnosis.check_base_model(name)
        assert (told.name, told.state) == ("base model", state), told
        assert found in told.found
        assert remedy in told.remedy
        assert bool(remedy) == bool(told.remedy)
    with monkeypatch.context() as without_extra:
        without_extra.setitem(sys.modules, "diffusers_mixofshow_bases", None)
        told = diagnosis.check_base_model("toyland-xl")
    assert (told.state, told.remedy) == ("problem", 'pip install "diffusers-mixofshow[bases]"')
    assert "which is not installed" in told.found
    monkeypatch.setattr(diagnosis, "diagnose", list)
    for name, code in (("xl.safetensors", 0), ("other.safetensors", 1)):
        result = CliRunner().invoke(cli.app, ["doctor", name, "--json"])
        assert (result.exit_code, len(json.loads(result.stdout))) == (code, 1)
        assert CliRunner().invoke(cli.app, ["doctor", "--base", name, "--json"]).stdout == result.stdout
    assert CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout == "[]\n"
    twice = CliRunner().invoke(cli.app, ["doctor", "flux", "--base", "toyland"])
    assert "Got two base models, flux and --base toyland" in str(twice.exception)


Patch = Callable[[pytest.MonkeyPatch, Path], None]
GIGABYTE = 10**9


def patched(*targets: tuple[Any, str, Any]) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        for target, name, value in targets:
            monkeypatch.setattr(target, name, value)

    return patch


def memory(total: float, free: float) -> Patch:
    pages = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": int(total * 10**6), "SC_AVPHYS_PAGES": int(free * 10**6)}
    return patched((os, "sysconf", pages.__getitem__))


def disk(free: int, *, writable: bool = True) -> Patch:
    usage = lambda place: SimpleNamespace(free=free)  # noqa: E731
    return patched((shutil, "disk_usage", usage), (os, "access", lambda place, mode: writable))


def hub(token: str | None, *, offline: bool = False) -> Patch:
    return patched(
        (huggingface_hub, "get_token", lambda: token),
        (constants, "HF_HUB_OFFLINE", offline),
        (constants, "ENDPOINT", "https://hub"),
    )


def gpus(*free: int) -> Patch:
    return patched(
        (torch.cuda, "is_available", lambda: bool(free)),
        (torch.cuda, "device_count", lambda: len(free)),
        (torch.cuda, "get_device_properties", lambda number: SimpleNamespace(name=f"Card {number}")),
        (torch.cuda, "mem_get_info", lambda number: (free[number] * GIGABYTE, 80 * GIGABYTE)),
    )


def installed(**versions: str) -> Patch:
    usual = diagnosis.metadata.version

    def version(name: str) -> str:
        if name in versions and not versions[name]:
            raise diagnosis.metadata.PackageNotFoundError
        return versions.get(name) or usual(name)

    return patched(
        (diagnosis.metadata, "version", version),
        (diagnosis.util, "find_spec", lambda name: "there" if name in versions else None),
    )


def apple() -> Patch:
    return patched(
        (torch.cuda, "is_available", lambda: False), (torch.backends.mps, "is_available", lambda: True)
    )  # fmt: skip


def unweighted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    bases = ("toyland", "toyland-sd3")
    monkeypatch.setattr(base_models, "find_embedded", lambda: {name: Path("/nowhere", name) for name in bases})


def no_torch(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)


def terminal(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(diagnosis, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))


def completing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    terminal(monkeypatch, folder)
    monkeypatch.setenv("_MIXOFSHOW_COMPLETE", "complete_bash")


def cores(count: int, load: float = 0) -> Patch:
    return patched(
        (os, "sched_getaffinity", lambda process: set(range(count))),
        (os, "getloadavg", lambda: (load, 99, 99)),
        (torch, "get_num_threads", lambda: 2),
    )


def unknown_load(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cores(2)(monkeypatch, folder)
    monkeypatch.delattr(os, "getloadavg")


def refused_load(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse() -> None:
        raise OSError("Load averages are unobtainable")

    cores(2)(monkeypatch, folder)
    monkeypatch.setattr(os, "getloadavg", refuse)


SMALL = "Stable Diffusion on the CPU needs some 8 GB; Toyland 1 GB"
ROOM = "a Stable Diffusion 1.5 takes 5 GB; `hf cache prune` makes room"
LOGIN = "`hf auth login`, for pushing and private repositories"
ONLINE = "unset HF_HUB_OFFLINE to download"
BUSY = "other programs keep it busy, so that everything may take {longer} times as long; wait or stop them"
MEDIAPIPE = 'pip install "mediapipe<1", or uninstall mediapipe'
VISION = "uninstall torchvision, which is not needed here, or install it from the index of torch"
FOUND: list[tuple[str, Patch, tuple[str, str, str]]] = [
    ("memory", memory(16, 3.5), ("ok", "3.5 of 16.0 GB free", "")),
    ("memory", memory(4, 3.5), ("ok", "3.5 of 4.0 GB free", "")),
    ("memory", memory(3.9, 3.5), ("note", "3.5 of 3.9 GB free", SMALL)),
    ("memory", patched((os, "sysconf", int)), ("note", "unknown on this system", "")),
    ("Hub cache", disk(10 * GIGABYTE), ("ok", "{folder}/cache, 10 GB free on its disk", "")),
    ("Hub cache", disk(9 * GIGABYTE), ("note", "{folder}/cache, 9 GB free on its disk", ROOM)),
    ("working folder", disk(9 * GIGABYTE), ("note", "{folder}, 9 GB free on its disk", ROOM)),
    (
        "Hub cache",
        disk(99 * GIGABYTE, writable=False),
        (
            "problem",
            "{folder}/cache, 99 GB free on its disk, not writable",
            "chmod u+w {folder}, or set HF_HOME elsewhere",
        ),
    ),
    ("Hub", hub("hf_x"), ("ok", "https://hub, logged in", "")),
    ("Hub", hub(None), ("note", "https://hub, not logged in", LOGIN)),
    ("Hub", hub(None, offline=True), ("note", "offline by HF_HUB_OFFLINE, not logged in", ONLINE)),
    ("Hub", hub("hf_x", offline=True), ("note", "offline by HF_HUB_OFFLINE, logged in", ONLINE)),
    ("CPU", cores(1), ("ok", "1 core, 2 threads for torch", "")),
    ("CPU", cores(3), ("ok", "3 cores, 2 threads for torch", "")),
    ("CPU", cores(2, load=2), ("ok", "2 cores, 2 threads for torch", "")),
    (
        "CPU",
        cores(2, load=8),
        ("note", "2 cores, 2 threads for torch, a load of 8.0 in the last minute", BUSY.format(longer="5.0")),
    ),
    (
        "CPU",
        cores(1, load=1.2),
        ("note", "1 core, 2 threads for torch, a load of 1.2 in the last minute", BUSY.format(longer="2.2")),
    ),
    ("CPU", unknown_load, ("ok", "2 cores, 2 threads for torch", "")),
    ("CPU", refused_load, ("ok", "2 cores, 2 threads for torch", "")),
    ("GPU 0", gpus(70, 60), ("ok", "Card 0, 70.0 of 80.0 GB free, used in float16", "")),
    ("GPU 1", gpus(70, 60), ("ok", "Card 1, 60.0 of 80.0 GB free, used in float16", "")),
    ("GPU", apple(), ("note", "Apple GPU; commands run on the CPU", "in Python: pipe.to('mps')")),
    (
        "GPU",
        gpus(),
        (
            "note",
            f"none that torch {torch.__version__} can use",
            "Toyland needs none; for Stable Diffusion install torch for your GPU: pytorch.org",
        ),
    ),
    ("devices", no_torch, ("problem", "torch cannot be imported: *", "install torch anew: pytorch.org")),
    ("embedded base", patched(), ("ok", "toyland; `mixofshow demo` runs on it", "")),
    (
        "embedded base",
        unweighted,
        ("problem", "no weights in /nowhere/toyland", "pip install --force-reinstall diffusers-mixofshow"),
    ),
    ("base toyland-sd3", patched(), ("ok", "needs no download", "")),
    (
        "base toyland-sd3",
        unweighted,
        ("problem", "no weights in /nowhere/toyland-sd3", "pip install --force-reinstall diffusers-mixofshow-bases"),
    ),
    (
        "diffusers-mixofshow",
        installed(**{"diffusers-mixofshow": ""}),
        ("note", "not installed, run from its source tree", "pip install diffusers-mixofshow"),
    ),
    ("diffusers-mixofshow", installed(**{"diffusers-mixofshow": "9.1"}), ("ok", "9.1", "")),
    ("controlnet_aux", installed(controlnet_aux="0.0.10", mediapipe=""), ("ok", "0.0.10", "")),
    ("controlnet_aux", installed(controlnet_aux="0.0.10", mediapipe="0.10.21"), ("ok", "0.0.10", "")),
    ("controlnet_aux", installed(controlnet_aux="", mediapipe=""), ("ok", "installed", "")),
    (
        "controlnet_aux",
        installed(controlnet_aux="0.0.10", mediapipe="1.2.0"),
        ("note", "installed, but mediapipe 1.2.0 makes its import fail", MEDIAPIPE),
    ),
    ("torchvision", installed(torch="2.9+cpu", torchvision="0.24"), ("note", "0.24 beside torch 2.9+cpu", VISION)),
    ("shell completion", patched(), ("ok", "available", "")),
    ("shell completion", terminal, ("ok", "available", "`mixofshow --install-completion`, once")),
    ("shell completion", completing, ("ok", "available", "")),
]


@pytest.mark.parametrize(
    ("name", "patch", "expected"), FOUND, ids=[f"{name} {expected[1][:30]}" for name, _, expected in FOUND]
)
def test_what_is_said_of_what_is_found(monkeypatch, tmp_path, name, patch, expected) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    patch(monkeypatch, tmp_path)
    (found,) = (each for each in diagnosis.diagnose() if each.name == name)
    state, text, remedy = (each.replace("{folder}", str(tmp_path)) for each in expected)
    assert (found.state, found.remedy) == (state, remedy)
    assert found.found.startswith(text[:-1]) if text.endswith("*") else found.found == text


def test_nothing_is_said_of_what_is_not_there(monkeypatch) -> None:
    installed(torch="2.9+cpu", torchvision="0.24+cpu")(monkeypatch, Path())
    names = [each.name for each in diagnosis.diagnose()]
    assert not {"controlnet_aux", "torchvision", "devices", "GPU 0"} & {*names}
    assert names[:2] == ["Python", "diffusers-mixofshow"]
    assert names.index("CPU") < names.index("memory") < names.index("Hub cache") < names.index("embedded base")


def test_a_problem_ends_with_1_and_a_note_does_not(monkeypatch) -> None:
    for state, code in (("ok", 0), ("note", 0), ("optional", 0), ("problem", 1)):
        findings = [diagnosis.Finding("Python", "ok", "3"), diagnosis.Finding("x", state, "y", "z")]
        monkeypatch.setattr(diagnosis, "diagnose", lambda found=findings: found)
        for more in ((), ("--json",)):
            assert CliRunner().invoke(cli.app, ["doctor", *more]).exit_code == code
    told = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout)
    assert told[1] == {"name": "x", "state": "problem", "found": "y", "remedy": "z"}


def test_states_have_colours_on_a_terminal_and_remedies_stand_below(monkeypatch) -> None:
    monkeypatch.setattr(
        diagnosis,
        "diagnose",
        lambda: [
            diagnosis.Finding("a", "ok", "[3]"),
            diagnosis.Finding("b", "note", "4", "pip install [x]"),
            diagnosis.Finding("c", "problem", "5", "y " * 99 + "z"),
            diagnosis.Finding("extra d", "optional", "d not installed", "for x: pip install [d]"),
        ],
    )
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    told = CliRunner().invoke(cli.app, ["doctor"]).stdout
    for state, colour in (("ok", 32), ("note", 33), ("problem", 31)):
        assert f"\x1b[{colour}m{state}\x1b[0m" in told
    plain = re.sub(r"\x1b\[[\d;]*m", "", told)
    assert "[3]" in plain
    assert "extra d" not in plain.partition("How to fix it:")[0]
    assert plain.endswith(
        f"How to fix it:\n  c: {'y ' * 99}z\nCould be better:\n  b: pip install [x]\n"
        "Not installed, and not needed for anything else:\n  extra d: for x: pip install [d]\n"
    )


def test_where_nothing_has_to_be_fixed_that_is_said(monkeypatch) -> None:
    for state, said in (("ok", True), ("note", True), ("optional", True), ("problem", False)):
        findings = [diagnosis.Finding("a", "ok", "3"), diagnosis.Finding("b", state, "y", "z")]
        monkeypatch.setattr(diagnosis, "diagnose", lambda found=findings: found)
        assert ("Nothing has to be fixed." in CliRunner().invoke(cli.app, ["doctor"]).stdout) == said


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [("", "optional", "pillow-heif not installed"), ("0.1", "note", "pillow-heif 0.1, needs >=0.16")],
)
def test_an_extra_that_is_not_installed_is_no_note_but_one_that_is_too_old_is(
    monkeypatch, version: str, state: str, found: str
) -> None:
    installed(**{"pillow-heif": version})(monkeypatch, Path())
    (told,) = (each for each in diagnosis.diagnose() if each.name == "extra heic")
    assert (told.state, told.found) == (state, found)


def test_every_extra_that_a_user_may_want_is_told_with_what_it_is_for_and_those_of_developers_are_not() -> None:
    extras = {*diagnosis.metadata.metadata("diffusers-mixofshow").get_all("Provides-Extra")}
    found = {each.name.removeprefix("extra "): each for each in diagnosis.diagnose() if each.name.startswith("extra ")}
    assert found.keys() == extras - {"browser", "dev", "docs"}
    for extra, finding in found.items():
        if finding.state != "ok":
            assert finding.remedy.startswith("for ")
            assert finding.remedy.endswith(f': pip install "diffusers-mixofshow[{extra}]"')
