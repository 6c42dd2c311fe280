"""The checks of ``mixofshow doctor``: each inspects one part of this machine and changes nothing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusers_mixofshow.versions import PACKAGE, installed_version


if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet


_LEAST_PEFT = {"transformers": "transformers.integrations.peft", "diffusers": "diffusers.utils.constants"}
"""Library to its module with ``MIN_PEFT_VERSION``, the oldest PEFT that it accepts; its metadata do not name it."""

_SERVES = {
    "8bit": "AdamW8bit, an optimizer that needs less memory of a GPU",
    "bases": "small bases of other architectures, to try the methods on (toyland-xl, toyland-sd3)",
    "controlnet": "condition images for ControlNets, made from photographs (--control openpose=photo.jpg)",
    "heic": "photos of iPhones (HEIC)",
    "prodigy": "Prodigy, an optimizer that finds its own rates",
    "tensorboard": "curves of a training in TensorBoard",
    "ui": "the page on which regions are drawn (mixofshow ui)",
    "wandb": "curves of a training at Weights & Biases",
}
"""What each extra is for; extras for development of this package are left out."""

_ABSENT = "not installed"
_GIGABYTE = 1e9
_SPARE_DISK = 10 * _GIGABYTE
_SPARE_MEMORY = 4 * _GIGABYTE


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        name: What was checked.
        state: ``problem`` if something that is needed does not work, ``note`` if something could be better,
            ``optional`` for an extra that is not installed.
        found: What was found.
        remedy: What the user can do; empty if nothing is wrong.
    """

    name: str
    state: Literal["ok", "note", "optional", "problem"]
    found: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Run all checks."""
    return [
        *_check_versions(),
        *_check_devices(),
        _check_memory(),
        *_check_caches(),
        _check_hub(),
        *_check_embedded_bases(),
        *_check_extras(),
        _check_completion(),
    ]


def check_base_model(name: str) -> Finding:
    """Tell what is known of a base model by its name, its folder or its file; nothing is loaded or downloaded."""
    from diffusers_mixofshow.base_models import (
        find_strange_class,
        known_family,
        location_of,
        normalise_name,
        usual_guidance,
    )
    from diffusers_mixofshow.errors import MissingExtraError, MixOfShowError
    from diffusers_mixofshow.families import CONCEPT_FAMILIES, FAMILIES
    from diffusers_mixofshow.interop.checkpoint import describe_making_folder, family_of_checkpoint, is_checkpoint

    what = "base model"
    if is_checkpoint(name):
        try:
            path = Path(name).expanduser()
            family, made = family_of_checkpoint(path), describe_making_folder(path)
        except MixOfShowError as error:
            return Finding(what, "problem", str(error), "name a Hub id or a folder, or convert the file")
        return Finding(what, "note", f"{name}: {family.name}, a checkpoint of one file", made)
    base = normalise_name(name)
    known = known_family(base)
    families = ", ".join(family.name for family in FAMILIES)
    if kind := find_strange_class(base):
        return Finding(
            what, "problem", f"{name}: a {kind}, of no family that is known here", f"take a base of {families}"
        )
    try:
        location_of(base)
    except MissingExtraError as error:
        return Finding(what, "problem", str(error), _spell_install(f"{PACKAGE}[bases]"))
    if known is None:
        remedy = f"its folder tells more: hf download {name} --local-dir FOLDER; mixofshow doctor FOLDER"
        return Finding(what, "note", f"{name}: neither an id that is known here nor a folder of a pipeline", remedy)
    able = "concepts, regions and tuning" if known in CONCEPT_FAMILIES else "plain LoRAs, no concepts"
    return Finding(what, "ok", f"{name}: {known.name}; {able}; guidance {usual_guidance(base, known):g}")


def _check_versions() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if version := installed_version(PACKAGE):
        yield Finding(PACKAGE, "ok", version)
    else:
        yield Finding(PACKAGE, "note", "not installed, run from its source tree", f"pip install {PACKAGE}")
    for requirement in _list_requirements(PACKAGE):
        if _applies(requirement, extra=""):
            finding = _check_version(requirement.name, requirement.specifier)
            yield finding if finding.state == "problem" else _check_needs(finding, requirement)


def _check_needs(finding: Finding, ours: Requirement) -> Finding:
    """Check the requirements of a library whose own version is supported."""
    needs = [*_list_requirements(ours.name), *_find_oldest_peft(ours.name)]
    others = [_check_version(one.name, one.specifier) for one in needs if _applies(one, extra="")]
    if not (missing := [other for other in others if other.state == "problem"]):
        return finding
    found = "; ".join(f"{other.name} {other.found}" for other in missing)
    remedy = f"{'; '.join(other.remedy for other in missing)}; or another {ours.name}: " + _spell_install(ours)
    return Finding(ours.name, "problem", f"{finding.found} does not work beside {found}", remedy)


def _find_oldest_peft(library: str) -> list[Requirement]:
    """The PEFT that a library demands when it loads, switches or saves an adapter."""
    from packaging.requirements import Requirement

    if library not in _LEAST_PEFT:
        return []
    try:
        return [Requirement(f"peft>={importlib.import_module(_LEAST_PEFT[library]).MIN_PEFT_VERSION}")]
    except Exception:  # a broken torch raises anything; `_check_devices` reports it
        return []


def _list_requirements(package: str) -> list[Requirement]:
    """The requirements of an installed package and its extras; none if the package runs from its source tree."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:
            continue
    return found


def _applies(requirement: Requirement, *, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _spell_install(wanted: object) -> str:
    """The command that installs something; in double quotes, which every shell knows, Windows' too."""
    return f'pip install "{wanted}"'


def _check_version(name: str, wanted: SpecifierSet) -> Finding:
    remedy = _spell_install(f"{name}{wanted}")
    found = installed_version(name)
    if not found:
        return Finding(name, "problem", _ABSENT, remedy)
    if not wanted.contains(found, prereleases=True):
        return Finding(name, "problem", f"{found}, needs {wanted}", remedy)
    return Finding(name, "ok", found)


def _check_devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything, from OSError to RuntimeError
        yield Finding("devices", "problem", f"torch cannot be imported: {error}", "install torch anew: pytorch.org")
        return
    yield _check_processor(torch.get_num_threads())
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            memory = f"{free / _GIGABYTE:.1f} of {total / _GIGABYTE:.1f} GB free"
            yield Finding(f"GPU {number}", "ok", f"{properties.name}, {memory}, used in float16")
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "note", "Apple GPU; commands run on the CPU", "in Python: pipe.to('mps')")
    else:
        remedy = "Toyland needs none; for Stable Diffusion install torch for your GPU: pytorch.org"
        yield Finding("GPU", "note", f"none that torch {torch.__version__} can use", remedy)


def _check_processor(threads: int) -> Finding:
    """Tell the cores and the threads of torch, and whether other programs keep the cores busy."""
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    found = f"{_format_count(cores, 'core')}, {_format_count(threads, 'thread')} for torch"
    load = _read_load()
    if load <= cores:
        return Finding("CPU", "ok", found)
    longer = 1 + load / cores  # a thread of ours on each core takes turns with so many of others
    remedy = f"other programs keep it busy, so that everything may take {longer:.1f} times as long; wait or stop them"
    return Finding("CPU", "note", f"{found}, a load of {load:.1f} in the last minute", remedy)


def _read_load() -> float:
    """How many threads ran or waited for a core, as a mean over the last minute; 0 where that is not known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has no such function, and a system may refuse
        return 0.0


def _format_count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _check_memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "note", "unknown on this system")
    found = f"{free / _GIGABYTE:.1f} of {total / _GIGABYTE:.1f} GB free"
    if total < _SPARE_MEMORY:
        return Finding("memory", "note", found, "Stable Diffusion on the CPU needs some 8 GB; Toyland 1 GB")
    return Finding("memory", "ok", found)


def _check_caches() -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, folder in (("Hub cache", Path(constants.HF_HUB_CACHE)), ("working folder", Path.cwd())):
        there = next((one for one in (folder, *folder.parents) if one.exists()), Path("/"))
        free = shutil.disk_usage(there).free
        found = f"{folder}, {free / _GIGABYTE:.0f} GB free on its disk"
        if not os.access(there, os.W_OK):
            yield Finding(name, "problem", f"{found}, not writable", f"chmod u+w {there}, or set HF_HOME elsewhere")
        elif free < _SPARE_DISK:
            yield Finding(name, "note", found, "a Stable Diffusion 1.5 takes 5 GB; `hf cache prune` makes room")
        else:
            yield Finding(name, "ok", found)


def _check_hub() -> Finding:
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "not logged in"
    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "note", f"offline by HF_HUB_OFFLINE, {login}", "unset HF_HUB_OFFLINE to download")
    remedy = "" if get_token() else "`hf auth login`, for pushing and private repositories"
    return Finding("Hub", "ok" if get_token() else "note", f"{constants.ENDPOINT}, {login}", remedy)


def _check_embedded_bases() -> Iterator[Finding]:
    """Check the weights of each base that needs no download, if its package is installed."""
    from diffusers_mixofshow.base_models import TOYLAND, find_embedded

    for name, folder in find_embedded().items():
        called, package, found = f"base {name}", f"{PACKAGE}-bases", "needs no download"
        if name == TOYLAND:
            called, package, found = "embedded base", PACKAGE, "toyland; `mixofshow demo` runs on it"
        if (folder / "model_index.json").is_file():
            yield Finding(called, "ok", found)
        else:
            remedy = f"pip install --force-reinstall {package}"
            yield Finding(called, "problem", f"no weights in {folder}", remedy)


def _check_extras() -> Iterator[Finding]:
    """Check each extra, and optional packages that break others."""
    requirements = _list_requirements(PACKAGE)
    for extra in _list_extras():
        only = [one for one in requirements if _applies(one, extra=extra) and not _applies(one, extra="")]
        found = {one.name: _check_version(one.name, one.specifier) for one in only}
        missing = {name: finding.found for name, finding in found.items() if finding.state == "problem"}
        if missing:
            remedy = f"for {_SERVES[extra]}: " + _spell_install(f"{PACKAGE}[{extra}]")
            told = ", ".join(f"{name} {what}" for name, what in missing.items())
            is_absent = set(missing.values()) == {_ABSENT}
            yield Finding(f"extra {extra}", "optional" if is_absent else "note", told, remedy)
        elif found:
            there = ", ".join(f"{name} {finding.found}" for name, finding in found.items())
            yield Finding(f"extra {extra}", "ok", there)
    if util.find_spec("controlnet_aux") is not None:
        yield _check_controlnet_aux()
    torch, vision = installed_version("torch"), installed_version("torchvision")
    if vision and torch.endswith("+cpu") != vision.endswith("+cpu"):
        remedy = "uninstall torchvision, which is not needed here, or install it from the index of torch"
        yield Finding("torchvision", "note", f"{vision} beside torch {torch}", remedy)


def _list_extras() -> list[str]:
    try:
        return [extra for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or [] if extra in _SERVES]
    except metadata.PackageNotFoundError:
        return []


def _check_controlnet_aux() -> Finding:
    mediapipe = installed_version("mediapipe")
    if mediapipe and int(mediapipe.partition(".")[0]) >= 1:
        found = f"installed, but mediapipe {mediapipe} makes its import fail"
        return Finding("controlnet_aux", "note", found, _spell_install("mediapipe<1") + ", or uninstall mediapipe")
    return Finding("controlnet_aux", "ok", installed_version("controlnet_aux") or "installed")


def _check_completion() -> Finding:
    if sys.stdout.isatty() and not os.environ.get("_MIXOFSHOW_COMPLETE"):
        return Finding("shell completion", "ok", "available", "`mixofshow --install-completion`, once")
    return Finding("shell completion", "ok", "available")
