"""What the package itself must never do, read in its source: unpickle, evaluate, trust remote code, start a shell.

Nor read or write a text in whatever encoding a machine prefers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffusers_mixofshow


SOURCE = Path(diffusers_mixofshow.__file__).parent
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
TEXTS = {"read_text", "write_text"}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "shell", "allow_pickle"}


def broken_rules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            yield f"imports {node.module}"
        elif isinstance(node, ast.Call):
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in FORBIDDEN_CALLS:
        yield f"calls {called}"
    if called == "torch.load" and keywords.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    if called == "yaml.load" and keywords.get("Loader") not in ("yaml.BaseLoader", "yaml.SafeLoader"):
        yield "calls yaml.load with a loader that makes objects"
    if called.endswith("np.load") and keywords.get("allow_pickle", "False") != "False":
        yield "calls np.load with pickles"
    if isinstance(node.func, ast.Attribute) and node.func.attr in TEXTS and "encoding" not in keywords:
        yield f"calls {called} without an encoding"
    yield from (f"gives {name}=True" for name in FORBIDDEN_KEYWORDS if keywords.get(str(name)) == "True")


def test_no_file_of_the_package_breaks_a_rule() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    found = [
        f"{path.relative_to(SOURCE)} {rule}" for path in files for rule in broken_rules(ast.parse(path.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "eval(x)",
        "yaml.load(x)",
        "yaml.load(x, Loader=yaml.FullLoader)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "A.from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
        "path.read_text()",
        "path.write_text(x)",
    ],
)
def test_the_check_itself(source: str) -> None:
    assert list(broken_rules(ast.parse(source)))
