"""Every code block of README and docs runs as it is pasted, save for fewer steps, or says what has to be had first.

A block with a ``title`` needs a download, files of one's own or much time: it is read, its options are parsed, and it
does not run. All others of a page run one after another, in a folder with what `mixofshow demo` leaves.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from glob import glob
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from PIL import Image
from typer.testing import CliRunner

import packs
from diffusers_mixofshow import cli, toyland
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.families import FAMILIES


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BESIDE = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/composlora/README.md")]
BESIDE += [*sorted((ROOT / "bases").rglob("README.md")), ROOT / "src/diffusers_mixofshow/toyland/weights/README.md"]
"""Pages whose code is not run, but whose links lead somewhere."""
RUN_ELSEWHERE = {("gradient_fusion.md", "python"): "tests/fusion/test_documentation.py"}
LANGUAGES = {"", "sh", "python", "toml", "html", "text"}

_ONE_STEP = "--max-train-steps 1 --embedding-phase-steps 1 --num-validation-images 0 --no-save-statistics"
FEWER = {
    "sample": ["--steps", "2"],
    "train": _ONE_STEP.split(),
    "fuse": ["--method", "average"],  # nothing is recorded; with recording it is run in tests/fusion
    "compare": ["--steps", "1", "--pictures", "1"],
    "evaluate": ["--steps", "1", "--pictures", "1"],
}
"""Options that are added to every command of a verb."""
GIVEN = {
    "regional_sampling.md": "pipe.load_edlora('mixofshow-demo/fused')\n"
    "left, regions = (0.0, 0.0, 0.5, 1.0), [Region('a <rex>', box=(0.0, 0.0, 0.5, 1.0))]",
}
"""What the text of a page has around its fragments, which are the blocks that import no pipeline of their own."""
NOT_RUN = ("demo", "doctor", "push", "--install-completion", "--help")
"""What would change the machine, or takes minutes and has tests of its own."""


SETS_VARIABLE = re.compile(r"[A-Z_]+=")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    title: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", content, re.MULTILINE | re.DOTALL):
        indent, language, more, text = match.groups()
        title = re.fullmatch(r'\s*(?:title="([^"]+)")?', more)
        assert title is not None, f"{page.name}: {more!r}"
        text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        yield Block(page, content[: match.start()].count("\n") + 1, language, title[1] or "", text)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = sorted({block.page for block in BLOCKS if block.language in ("sh", "python") and not block.title})


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block, without comments, pipes and variables in front."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    split = [shlex.split(line.partition(" | jq")[0], comments=True) for line in lines]
    return [[*dropwhile(SETS_VARIABLE.match, words)] for words in split if words]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.stem}-{block.line}")
def test_a_block_can_be_read_and_its_options_exist(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "sh":
        for words in commands_of(block.text):
            parse(words)


def parse(words: list[str]) -> None:
    """Let the command line read a command without doing it; of others look whether what they run is there."""
    if words[:2] == ["accelerate", "launch"]:
        launched = words.index("-m")
        assert words[2:launched:2] == ["--num_processes"]
        assert words[launched + 1] == "diffusers_mixofshow"
        words = ["mixofshow", *words[launched + 2 :]]
    named = [word for word in words if re.fullmatch(r"(benchmarks|tests)/[\w/]+\.py", word)]
    assert all((ROOT / name).is_file() for name in named), named
    if words[0] != "mixofshow":
        assert named or words[0] in ("pip", "make"), words
        return
    group: Any = typer.main.get_command(cli.app)
    verbs = [word for word in words if word in group.commands]
    if "--help" in words or "--install-completion" in words:
        assert verbs or len(words) == 2
        return
    verb = words.index(verbs[0])
    assert words[1:verb] in ([], ["--config", words[verb - 1]])
    group.commands[words[verb]].make_context(words[verb], words[verb + 1 :])


# --- what is run ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mixofshow demo` leaves, with concepts that were never tuned."""
    folder = tmp_path_factory.mktemp("world")
    demo = folder / "mixofshow-demo"
    components = toyland.load_pipeline().components
    for seed, name in enumerate(("bobo", "kiki", "rex", "ming")):
        toyland.write_photos(toyland.CONCEPTS[name], demo / "photos" / name, count=3)
        untuned(components, (name,), seed).save_pretrained(demo / "concepts" / name)
    for seed, name in enumerate(("fused", "average"), start=9):
        untuned(components, ("bobo", "kiki", "rex", "ming"), seed).save_pretrained(demo / name)
    boxes = [(0.0, 0.25, 0.333, 0.97), (0.333, 0.25, 0.667, 0.97), (0.667, 0.25, 1.0, 0.97)]
    places = toyland.stand_in(boxes, ["critter", "critter", "dog"], 96, 64)
    toyland.draw_places(places, 96, 64).save(folder / "places.png")
    return folder


def untuned(components: Any, names: tuple[str, ...], seed: int) -> EDLoRA:
    concepts = (Concept.from_name(name, toyland.CONCEPTS[name].class_word) for name in names)
    return packs.random_pack(components, *concepts, seed=seed, scale=0.01, base_model="toyland")


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_top_to_bottom(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.title or (page.name, block.language) in RUN_ELSEWHERE:
            continue
        if block.language == "python":
            if "from_pretrained" not in block.text and "regions" not in namespace:
                exec(GIVEN.get(page.name, ""), namespace)
            exec(compile(shortened(block.text), f"{page.name}:{block.line}", "exec"), namespace)
        elif block.language == "sh":
            run_commands(block.text)
    for picture in folder.glob("*.png"):
        Image.open(picture).load()


def shortened(text: str) -> str:
    text = re.sub(r"num_inference_steps\W{1,3}20", lambda found: found[0][:-2] + "2", text)
    if "num_inference_steps" not in text:
        text = text.replace("draft=Draft()", "draft=Draft(), num_inference_steps=2")
    text = text.replace("width=768, height=512", "width=96, height=64").replace("steps=4", "steps=1")
    text = re.sub(r"\(0, 96, 384, 512\)|\(384, 96, 768, 512\)", "(0, 12, 48, 64)", text)
    return text.replace("<potter>", "<kiki>").replace("<hermione>", "<rex>")


def run_commands(text: str) -> None:
    for words in commands_of(text):
        if words[0] != "mixofshow" or {*words} & {*NOT_RUN}:
            continue
        verb = next(word for word in words[1:] if word in FEWER or word in ("convert", "inspect", "masks"))
        # As a shell does: a pattern becomes the files that it matches.
        given = [found for word in words[1:] for found in sorted(glob(word)) or [word]]
        result = CliRunner().invoke(cli.app, [*given, *FEWER.get(verb, [])])
        assert result.exit_code == 0, (words, result.output, result.exception)


VERBS: dict[str, Any] = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def examples_of(verb: str) -> str:
    """The commands in a verb's help, as a shell block."""
    text = re.sub(r"\\\n\s*", " ", VERBS[verb].help or "")
    return "\n".join(line.strip() for line in text.splitlines() if line.strip().startswith("mixofshow "))


def test_every_verb_has_examples_whose_options_exist() -> None:
    for verb in VERBS:
        commands = commands_of(examples_of(verb))
        assert commands
        for words in commands:
            parse(words)


def test_examples_that_need_nothing_of_ones_own_run_as_they_are_pasted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    ran = set()
    for verb in VERBS:
        own = [line for line in examples_of(verb).splitlines() if "mixofshow-demo" in line or "toyland" in line]
        run_commands("\n".join(own))
        ran |= {verb} if own else set()
    assert ran == VERBS.keys() - {"masks", "demo", "ui"}


def test_what_is_run_elsewhere_is_run_there() -> None:
    for (page, _), test in RUN_ELSEWHERE.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")


def test_few_pages_have_nothing_to_run() -> None:
    assert {page.stem for page in RUN} >= {
        *("README", "tutorial_first_concept", "tutorial_three_concepts", "tutorial_found_loras", "tutorial_layouts"),
        *("howto_photos", "howto_evaluating", "howto_exporting", "regional_sampling", "command_line"),
    }


# --- what the pages say of each other and of the package ---


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them, and those that it sets itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | {*re.findall(r'<a id="([\w-]+)">', text)}


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if page.parent == ROOT / "docs" and ROOT / "docs" not in (file, *file.parents):
            missing.append(f"{target} is outside of docs, where mkdocs finds nothing")
        elif not file.is_file() or (anchor and anchor not in anchors_of(file)):
            missing.append(target)
    assert missing == []


def test_links_of_the_pages_beside_are_looked_at() -> None:
    assert len(BESIDE) == 7
    assert all(page.is_file() for page in BESIDE)


def test_pictures_of_the_documentation_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert len(sizes) >= 4
    assert {name: size for name, size in sizes.items() if size > 300_000} == {}


def test_the_readme_says_of_every_family_what_it_can_do() -> None:
    section = PAGES[0].read_text(encoding="utf-8").partition("| family |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()[2:]]
    told = {family: (fuse, draw, tune) for family, fuse, draw, tune, _ in rows}
    assert [*told] == [family.name for family in FAMILIES]
    for family in FAMILIES:
        fuse, draw, tune = told[family.name]
        assert (fuse == "yes") == bool(family.pipeline)
        assert (draw == "yes") == bool(family.concept_pipeline)
        assert draw == "yes" or tune == "no"
    for *_, evidence in rows:
        files = re.findall(r"`([^`]+)`", evidence)
        assert files
        assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_costs_of_the_readme_are_those_that_the_command_computes() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "costs.py"], check=True, capture_output=True, text=True
    ).stdout
    assert printed.count("\n") > 4
    assert printed in PAGES[0].read_text(encoding="utf-8")
