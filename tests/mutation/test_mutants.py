"""The mistakes that `make mutants` makes."""

import ast
import importlib
from pathlib import Path

import pytest

from mutation.mutants import mutants_of


FOLDER = Path(__file__).parent  # whose scripts find each other as programs do


def _mutated(tmp_path, code):
    path = tmp_path / "module.py"
    path.write_text(code, encoding="utf-8")
    found = mutants_of(path, tmp_path)
    return [mutant.applied(path.read_bytes()).decode() for mutant in found], found


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("x = a - b", ["x = (a + b)"]),
        ("x = a @ b", ["x = (b @ a)"]),
        ("x = a <= b", ["x = (a < b)", "x = (a > b)"]),
        ("x = a is None", ["x = (a is not None)"]),
        ("x = a and b", ["x = (a or b)", "x = (b)", "x = (a)"]),
        ("x = not a", ["x = (a)"]),
        ("x = a if b else c", ["x = (c if b else a)"]),
        ("x = f(a, b)", ["x = (f(b, a))", "x = (f(a))"]),
        ("x = f(a, b=c)", ["x = (f(a))"]),
        ("x = f(*a, b)", []),
        ("x = zip(a, strict=True)", []),
        ("x = min(a)", ["x = (max(a))"]),
        ("x = min(a, b)", ["x = (max(a, b))", "x = (min(a))"]),
        ("x = f(encoding=a)", []),
        ("x = [a for a in b if a]", ["x = ([a for a in b])"]),
        ("x = 1", ["x = (2)"]),
        ("x = .5", ["x = (1.0)"]),
        ("x = True", ["x = (False)"]),
        ("x = 'key'", ["x = ('keyx')"]),
        ("x = 'a sentence'", []),
        ("x.y = a", ["pass"]),
        ("x += a", ["x -= a"]),
        ("f(a)", ["pass"]),
        ("raise ValueError(1)", ["pass"]),
        ("def f():\n    return a", ["def f():\n    return None"]),
        ("for a in b:\n    break", ["for a in b:\n    continue"]),
        ('"""Words."""', []),
        ("x: list[1] = a", []),
        ("__all__ = ['x']", []),
        ("x = f'{1 + 2}'", []),
        ("å = 'ä' or 1", ["å = ('ä' and 1)", "å = (1)", "å = ('ä')", "å = ('äx') or 1", "å = 'ä' or (2)"]),
    ],
)
def test_mistakes(tmp_path, code, wrong):
    mutated, found = _mutated(tmp_path, code + "\n")
    assert sorted(mutated) == sorted(each + "\n" for each in wrong)
    assert {mutant.path for mutant in found} <= {"module.py"}
    for each in mutated:
        ast.parse(each)


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ([], "run.py --sample 100 --seed 0 --seconds 240.0"),
        (["--seed", "7", "--seconds", "9"], "run.py --sample 100 --seed 7 --seconds 9.0"),
        (["--again", "old report.json", "--sample", "5"], "run.py --again 'old report.json' --seconds 240.0"),
        (
            ["src/diffusers_mixofshow/masks.py", "--changed-since", "main", "--processes", "3"],
            "run.py src/diffusers_mixofshow/masks.py --sample 100 --seed 0 --changed-since main --seconds 240.0",
        ),
    ],
)
def test_a_report_has_the_command_that_was_run(monkeypatch, given, command):
    monkeypatch.syspath_prepend(FOLDER)
    run = importlib.import_module("mutation.run")
    assert run.describe_command(run.parse(given)) == command


def test_lines_are_those_of_the_mistakes(tmp_path):
    _, found = _mutated(tmp_path, "x = a\n\n\ny = (\n    b +\n    c\n)\n")
    assert [(mutant.line, mutant.kind) for mutant in found] == [(5, "operator")]
    assert str(found[0]) == "module.py:5 [operator] b + c  ->  (b - c)"


def test_mistakes_know_their_function(tmp_path):
    lines = ["x = a + b", "@c", "def f(d=a + b):", "    y = a + b", "", "    def g():", "        return a + b"]
    lines += ["class C:", "    e = a + b", "    def m(self):", "        return a + b"]
    _, found = _mutated(tmp_path, "\n".join(lines) + "\n")
    functions = {mutant.line: mutant.function for mutant in found if mutant.kind == "operator"}
    assert functions == {1: "", 3: "", 4: "f", 7: "f.<locals>.g", 9: "", 11: "C.m"}
