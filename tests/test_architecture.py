"""The shape of the source tree, read with ``ast``: who imports whom, how long functions are, what is not allowed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import diffusers_mixofshow


PACKAGE = "diffusers_mixofshow"
SOURCE = Path(diffusers_mixofshow.__file__).parent
ROOT = Path(__file__).parents[1]

# A part is a module or a folder at the top of the package, or the laboratory that made the embedded base, which is not
# in the wheel. It imports from lower ranks and from itself.
RANK_OF = {
    "errors": 0,
    "atomic": 0,
    "base_models": 0,
    "lazy": 0,
    "versions": 0,
    "concepts": 0,
    "texts": 0,
    "pictures": 0,
    "masks": 0,
    "progress": 0,
    "regions": 0,
    "sharing": 0,
    "offloading": 0,
    "families": 0,
    "edlora": 1,
    "interop": 1,
    "sheets": 1,
    "notes": 1,
    "lora": 2,
    "conditioning": 2,
    "fusion": 3,
    "pipelines": 3,
    "toyland": 3,
    "evaluation": 3,
    "training": 4,
    "exporting": 4,
    "demo": 5,
    "sampling": 5,
    "ui": 6,
    "cli": 7,
    "__main__": 8,
    "benchmarks": 9,
}
# Imports between parts of one rank. Everybody may import errors; a mask is a picture first, and regions are read from
# masks and texts, and written whole; interop translates other files to and from an EDLoRA; Toyland's judge is one
# of those that evaluate; names of base models are their
# families', and what diffusers calls an argument hangs on its version.
SIDEWAYS = {(part, "errors") for part in RANK_OF} | {("interop", "edlora"), ("evaluation", "toyland")}
SIDEWAYS |= {
    ("base_models", "families"),
    ("base_models", "versions"),
    ("masks", "pictures"),
    ("regions", "pictures"),
    ("regions", "masks"),
    ("regions", "texts"),
    ("regions", "atomic"),
}
# The library finds the embedded base as it finds any other, by its name; its package is known here alone.
KNOW_TOYLAND = (
    "toyland",
    "evaluation.toyland_judge",
    "demo",
    "sampling.control",
    "sampling.vocabulary",
    "ui.conditions",
    "cli",
    "benchmarks",
)
# Parts that use the package as its users do, by `from diffusers_mixofshow import ...`.
USERS = {"demo", "sampling", "ui", "cli"}
LONGEST_FUNCTION = 60

FILES = [*sorted(SOURCE.rglob("*.py")), *sorted((ROOT / "benchmarks" / "toyland_base").rglob("*.py"))]


def where(path: Path, node: ast.stmt | None = None) -> str:
    """The file, with the line of the statement, in the form that editors and terminals make a link of."""
    name = path.relative_to(ROOT).as_posix()
    return name if node is None else f"{name}:{node.lineno}"


def every_node() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every file of the package and the laboratory."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def full_path(path: Path) -> tuple[str, ...]:
    """The names by which a file is imported, of its folders and its own."""
    return path.relative_to(SOURCE.parent if path.is_relative_to(SOURCE) else ROOT).with_suffix("").parts


def module_name(path: Path) -> str:
    """Dotted name of the module, counted from the top of the package; the package itself is the empty string."""
    parts = full_path(path)
    return from_the_top(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


def from_the_top(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".")


MODULES = {module_name(path) for path in FILES}


def part_of(module: str) -> str:
    return module.split(".")[0]


def absolute_base(node: ast.ImportFrom, path: Path) -> str:
    """The module that a ``from ... import`` names, with the dots of a relative import resolved."""
    if node.level == 0:
        return node.module or ""
    package = full_path(path)[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def imported_names(tree: ast.AST, path: Path) -> Iterator[str]:
    """Full dotted names that are imported anywhere in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, path)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of_ours(path: Path, source: str | None = None) -> set[str]:
    """What a file imports from this package, counted from its top: ``fusion.fuser.GradientFuser``, say."""
    tree = ast.parse(path.read_text() if source is None else source)
    return {from_the_top(name) for name in imported_names(tree, path) if part_of(name) in (PACKAGE, "benchmarks")}


def forbidden_imports(path: Path, source: str | None = None) -> list[str]:
    """The imports of a file that go against the ranks, each with the reason."""
    module, found = module_name(path), []
    part = part_of(module)
    for name in sorted(imports_of_ours(path, source) - {"__version__"}):
        target = part_of(name)
        if target not in RANK_OF:
            if part not in USERS:
                found.append(f"{where(path)} imports {PACKAGE}.{name}: from the top level, instead of from its module")
        elif target != part and RANK_OF[target] >= RANK_OF[part] and (part, target) not in SIDEWAYS:
            found.append(f"{where(path)} (rank {RANK_OF[part]}) imports {name} (rank {RANK_OF[target]})")
        elif target == "toyland" and not any(f"{module}.".startswith(f"{known}.") for known in KNOW_TOYLAND):
            found.append(f"{where(path)} imports {name}: the library knows no base model better than others")
    return found


def import_graph() -> dict[str, set[str]]:
    """Module to the modules it imports. A package's ``__init__`` does not count as imported by its own modules."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        importer = module_name(path)
        for name in imports_of_ours(path) if importer else ():
            module = name if name in MODULES else name.rpartition(".")[0]
            if module and module != importer:
                graph.setdefault(importer, set()).add(module)
    return graph


def test_every_part_has_a_rank() -> None:
    parts = {part_of(name) for name in MODULES} - {""}
    assert parts <= RANK_OF.keys(), "give the new part a rank in this file, and say what its job is in docs/"


def test_imports_go_to_lower_ranks() -> None:
    assert [problem for path in FILES if path != SOURCE / "__init__.py" for problem in forbidden_imports(path)] == []


def test_no_import_cycle() -> None:
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_no_module_is_called_utils() -> None:
    vague = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [where(path) for path in FILES if path.stem in vague] == []


def test_functions_are_short() -> None:
    lengths = {
        f"{where(path, node)} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, node in every_node()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lengths) > len(FILES)
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_no_assert_statement() -> None:
    asserts = [where(path, node) for path, node in every_node() if isinstance(node, ast.Assert)]
    assert asserts == [], "raise an error of errors.py, or RuntimeError for an invariant of our own"


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("fusion/fuser.py", "from diffusers_mixofshow.lora import merged", True),
        ("fusion/fuser.py", "from diffusers_mixofshow import lora, __version__", True),
        ("fusion/fuser.py", "from . import solvers", True),
        ("fusion/fuser.py", "from ..lora import merged", True),
        ("fusion/fuser.py", "from ..training import config", False),
        ("fusion/fuser.py", "import diffusers_mixofshow", False),
        ("fusion/fuser.py", "def f():\n    from diffusers_mixofshow.pipelines.loader import EDLoRALoader", False),
        ("fusion/fuser.py", "from diffusers_mixofshow import EDLoRA", False),
        ("cli/fuse.py", "from diffusers_mixofshow import GradientFuser", True),
        ("lora.py", "from diffusers_mixofshow.conditioning.attention import x", False),
        ("lora.py", "import diffusers_mixofshow.edlora", True),
        ("concepts.py", "from diffusers_mixofshow.errors import ConceptError", True),
        ("errors.py", "from diffusers_mixofshow.concepts import Concept", False),
        ("interop/kohya.py", "from diffusers_mixofshow.edlora import EDLoRA", True),
        ("edlora/file.py", "from diffusers_mixofshow.interop import kohya", False),
        ("demo/stages.py", "from diffusers_mixofshow import toyland", True),
        ("sampling/control.py", "def f():\n    from diffusers_mixofshow import toyland", True),
        ("evaluation/toyland_judge.py", "from diffusers_mixofshow.toyland.world import CLASSES", True),
        ("evaluation/clip_judge.py", "from diffusers_mixofshow.toyland.world import CLASSES", False),
        ("evaluation/clip_judge.py", "from .. import toyland", False),
        ("training/base.py", "def f():\n    from diffusers_mixofshow import toyland", False),
        ("pipelines/loader.py", "import diffusers_mixofshow.toyland.base", False),
        ("exporting/shared.py", "from diffusers_mixofshow.toyland import path", False),
        ("toyland/base.py", "from benchmarks.toyland_base.loop import LoopConfig", False),
        ("demo/stages.py", "def f():\n    from benchmarks import toyland_base", False),
        ("cli/demo.py", "import benchmarks", False),
        ("__main__.py", "import benchmarks.toyland_base.train", False),
        ("../../benchmarks/toyland_base/train.py", "from diffusers_mixofshow.toyland.base import path", True),
        ("../../benchmarks/toyland_base/train.py", "from . import loop", True),
        ("../../benchmarks/toyland_base/train.py", "from diffusers_mixofshow import EDLoRA", False),
    ],
)
def test_the_check_itself(importer: str, source: str, allowed: bool) -> None:
    assert (forbidden_imports((SOURCE / importer).resolve(), source) == []) is allowed
