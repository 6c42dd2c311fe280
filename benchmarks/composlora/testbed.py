"""ComposLoRA as its authors publish it: LoRAs, trigger words, prompts and settings, and which sets are drawn."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


COUNTS = (2, 3, 4, 5)
STYLES = ("anime", "reality")
LORA_SCALE, SWITCH_EVERY, SEED = 0.8, 5, 111


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the pictures of one style are drawn, as in section 4.1 of the paper and its published scripts."""

    base: str
    vae: str
    steps: int
    guidance_scale: float
    height: int
    width: int


SETTINGS = {
    "anime": Style(base="gsdf/Counterfeit-V2.5", vae="", steps=200, guidance_scale=10, height=512, width=512),
    "reality": Style(
        base="SG161222/Realistic_Vision_V5.1_noVAE",
        vae="stabilityai/sd-vae-ft-mse",
        steps=100,
        guidance_scale=7,
        height=1024,
        width=768,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Element:
    """A LoRA: a character, clothing, a style, a background or an object."""

    id: str
    file: Path
    triggers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """All elements of a style by category, and what stands before and against every prompt."""

    categories: dict[str, tuple[Element, ...]]
    prefix: str
    negative: str

    @property
    def elements(self) -> list[Element]:
        return [element for category in self.categories.values() for element in category]

    def sets(self, count: int) -> Iterator[tuple[Element, ...]]:
        """A character with one element each of `count` - 1 other categories: all choices."""
        others = [name for name in self.categories if name != "character"]
        for chosen in itertools.combinations(others, count - 1):
            yield from itertools.product(*(self.categories[name] for name in ("character", *chosen)))

    def prompt(self, elements: tuple[Element, ...]) -> str:
        return ", ".join([self.prefix, *(word for element in elements for word in element.triggers)])


def read_testbed(folder: Path, style: str) -> Testbed:
    """Read a clone of the authors' repository with the LoRAs unpacked in its `models` folder.

    Raises:
        SystemExit: Names all that is missing.
    """
    info, prompts = folder / f"{style}_lora_info.json", folder / "utils.py"
    if missing := [str(path) for path in (info, prompts) if not path.is_file()]:
        raise SystemExit(f"{folder} is no clone of maszhongming/Multi-LoRA-Composition: no {', '.join(missing)}.")
    told: dict[str, list[dict[str, Any]]] = json.loads(info.read_text("utf-8"))
    files = folder / "models" / "lora" / style
    categories = {
        name: tuple(
            Element(id=one["id"], file=files / f"{one['id']}.safetensors", triggers=tuple(one["trigger"]))
            for one in elements
        )
        for name, elements in told.items()
    }
    absent = [element.file.name for each in categories.values() for element in each if not element.file.is_file()]
    if absent:
        raise SystemExit(
            f"{files} lacks {', '.join(absent)}. Unpack the authors' ComposLoRA.zip in {folder / 'models'}."
        )
    prefix, negative = _prompts(prompts, style)
    return Testbed(categories=categories, prefix=prefix, negative=negative)


def _prompts(path: Path, style: str) -> tuple[str, str]:
    """The two texts of a style, read from the authors' `get_prompt` without running it."""
    functions = [one for one in ast.parse(path.read_text("utf-8")).body if isinstance(one, ast.FunctionDef)]
    branches = [one for each in functions if each.name == "get_prompt" for one in each.body if isinstance(one, ast.If)]
    if not branches:
        raise SystemExit(f"{path} has no get_prompt() that tells styles apart; expected the authors' file.")
    anime = branches[0].body, branches[0].orelse
    found = {
        name.id: str(one.value.value)
        for one in anime[0 if style == "anime" else 1]
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant)
        for name in one.targets
        if isinstance(name, ast.Name)
    }
    return found["prompt"], found["negative_prompt"]
