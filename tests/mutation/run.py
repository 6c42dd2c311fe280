"""Measure which plausible mistakes the tests notice: `make mutants`.

Each mutant is one mistake in one file (see `mutants.py`). It is tried in a copy of the checkout, in a process forked
from one that has imported torch and diffusers already, with the tests that run the mistaken function: first those that
run few others. A test that fails is run once more without the mistake, and
only counts if it passes then. What no test notices is printed, to be read one by one.

    python tests/mutation/run.py --sample 300 --seed 0              # over all of src/
    python tests/mutation/run.py src/diffusers_mixofshow/masks.py   # a random sample of one file or folder
    python tests/mutation/run.py --changed-since main --sample 50   # of the lines that a branch changed
    python tests/mutation/run.py --again report.json --seconds 2000       # what got away, with more tests

The first run records which test runs which function (`.mutation/`, as long as the whole suite takes), later ones what
has been written since; `--map` does it again for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from mutants import Mutant, mutants_of


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "diffusers_mixofshow"
STORE = ROOT / ".mutation"
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "PIL.Image", "pytest", "typer.testing")
FIRST = 20.0
"""Seconds of tests, as recorded, that are tried first."""
_AT_IMPORT = ""
"""What `watching` notes in place of a test, of a function that runs while tests are collected."""


class TestMap:
    """Which tests run which function, and how many seconds each takes; see `watching`."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = {}
        self._functions: dict[str, set[str]] = defaultdict(set)
        self._of_file: dict[str, list[str]] = defaultdict(list)
        self._breadth: Counter[str] = Counter()  # how many functions a test runs
        for path in sorted(folder.glob("functions-*.json")):
            found = json.loads(path.read_text())
            self.seconds |= found["seconds"]
            for key, tests in found["functions"].items():
                self._functions[key] |= set(tests)
                self._breadth.update(tests)
        known = _collected()
        self.new_files = sorted({test.split("::")[0] for test in known - self.seconds.keys()})
        self.seconds = {test: seconds for test, seconds in self.seconds.items() if test in known}
        for test in self.seconds:
            self._of_file[test.split("::")[0]].append(test)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Tests that run a mutant's function or, where it runs at import, know its file: the most particular first."""
        marks = self._functions.get(f"{mutant.path}:{mutant.function}", {_AT_IMPORT})
        if _AT_IMPORT in marks:
            of_file = [tests for key, tests in self._functions.items() if key.startswith(f"{mutant.path}:")]
            marks = self._naming(mutant.path).union(self._beside(mutant.path), *of_file) - {_AT_IMPORT}
        tests = {mark for mark in marks if mark in self.seconds}
        tests |= {test for mark in marks for test in self._of_file.get(mark, ())}
        return sorted(tests, key=lambda test: (self._breadth[test], self.seconds[test], test))

    def _beside(self, path: str) -> set[str]:
        """Files of tests of the same part: they may look at constants of a module that they do not name."""
        part = path.split("/")[2].removesuffix(".py")
        return {file for file in self._of_file if file.startswith((f"tests/{part}/", f"tests/test_{part}.py"))}

    def _naming(self, path: str) -> set[str]:
        """Files of tests that name a module: they may look at its constants, and run none of its functions."""
        module = path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        package, _, name = module.rpartition(".")
        naming = re.compile(rf"\b{re.escape(module)}\b|from {re.escape(package)} import .*\b{name}\b")
        return {file for file in self._of_file if naming.search((ROOT / file).read_text(encoding="utf-8"))}


def _collected() -> set[str]:
    """The tests that there are, which a map may not know, without those that have this folder in their name."""
    listed = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    text = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line for line in text.splitlines() if "::" in line and str(ROOT) not in line}


def record_map(folder: Path, files: Sequence[str] = ()) -> None:
    """Run some files of tests, or the whole suite, and keep which test runs which function."""
    if not files:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    options = ["--numprocesses", "auto", "--dist", "loadfile", "-p", "mutation.watching"]
    environment = os.environ | {"MUTATION_MAP": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    subprocess.run([sys.executable, "-m", "pytest", "-q", *options, *files], cwd=ROOT, env=environment, check=False)


class Bench:
    """A copy of the checkout in which one mutant at a time is tried."""

    def __init__(self, folder: Path, tests: TestMap, most: float) -> None:
        self._folder = folder / "checkout"
        self._map, self._most = tests, most
        self._sound: dict[str, bool] = {}
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
            if (ROOT / name).is_file():
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)

    def verdict(self, mutant: Mutant) -> tuple[str, str]:
        """Whether a mutant is 'killed', by which test, or 'survived' or is 'untested'."""
        tests = self._map.tests_of(mutant)
        if not tests:
            return "untested", ""
        file = self._folder / mutant.path
        source = file.read_bytes()
        try:
            for chosen in self._portions(tests):
                while chosen:
                    file.write_bytes(mutant.applied(source))
                    failed = self._first_failure(chosen)
                    file.write_bytes(source)
                    if failed is None:
                        break
                    if self._passes(failed, chosen):
                        return "killed", failed or "none can be imported"
                    if failed == "":
                        raise RuntimeError(f"Tests of the map are gone: {chosen}. Is something else changing them?.")
                    chosen = [test for test in chosen if test != failed and self._sound.get(test, True)]
            return "survived", f"{len(tests)} tests run its function"
        finally:
            file.write_bytes(source)

    def _portions(self, tests: Sequence[str]) -> Iterable[list[str]]:
        """First the most particular tests, then the quickest, as many as there is time for."""
        first = list(self._within(tests, FIRST)) or list(tests[:1])
        left = self._most - sum(self._seconds(test) for test in first)
        rest = list(self._within(sorted((test for test in tests if test not in first), key=self._seconds), left))
        # Tests of one file, which share models, stay together.
        return [sorted(portion, key=lambda test: test.split("::")[0]) for portion in (first, rest) if portion]

    def _within(self, tests: Sequence[str], seconds: float) -> Iterable[str]:
        """Tests, as they come, that together take no longer."""
        for test in tests:
            if (seconds := seconds - self._seconds(test)) < 0:
                return
            yield test

    def _seconds(self, test: str) -> float:
        return self._map.seconds.get(test, 1.0)

    def _passes(self, test: str, tests: Sequence[str]) -> bool:
        """Whether, without the mistake, a test passes; where none could run, whether all can be imported."""
        if test == "":
            return self._first_failure(tests, "--collect-only") is None
        if test not in self._sound:
            self._sound[test] = test == "timeout" or self._first_failure([test]) is None
        return self._sound[test]

    def _first_failure(self, tests: Sequence[str], *options: str) -> str | None:
        """The first test that fails, '' if none can run; None if all pass, 'timeout' if they do not end."""
        expected = sum(map(self._seconds, tests))
        with tempfile.NamedTemporaryFile(mode="r") as failure:
            child = os.fork()
            if child == 0:
                _run_pytest(self._folder, [*options, *tests], failure.name)
            status = _wait(child, 90 + 5 * expected)
            text = failure.read()
        if status is None:
            return "timeout"
        return None if status == 0 else text.split("\n")[0]


def _run_pytest(folder: Path, arguments: Sequence[str], failure: str) -> None:
    """In a forked process: run tests in a copy until one fails, and write its name down."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        os.environ |= {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [str(folder / "src"), *(each for each in sys.path if not each.startswith(str(ROOT / "tests")))]
        pytest = importlib.import_module("pytest")

        class Notes:
            def pytest_runtest_logreport(self, report: object) -> None:
                if report.failed:
                    Path(failure).write_text(report.nodeid)

        plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(folder)]
        plain += ["--basetemp", str(folder.parent / "files")]  # those of other runs are not cleared away
        code = pytest.main([*plain, *arguments], plugins=[Notes()])
    finally:
        os._exit(int(code))


def _wait(child: int, seconds: float) -> int | None:
    """The exit status of a process, or None where it had to be stopped."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what its tests started
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def draw(paths: Sequence[Path], sample: int, seed: int, changed: dict[str, set[int]] | None) -> list[Mutant]:
    """A random sample; each folder has its share, and where it has as many at least six."""
    groups: dict[str, list[Mutant]] = defaultdict(list)
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for mutant in mutants_of(file, ROOT):
                if changed is None or mutant.line in changed.get(mutant.path, ()):
                    groups[mutant.path.split("/")[2]].append(mutant)
    dice = random.Random(seed)
    total = sum(map(len, groups.values()))
    chosen = []
    for _, group in sorted(groups.items()):
        count = max(min(6, sample), round(sample * len(group) / total))
        chosen += dice.sample(group, min(count, len(group)))
    dice.shuffle(chosen)
    return chosen


def changed_lines(since: str) -> dict[str, set[int]]:
    """The lines of each file that differ from a commit."""
    command = ["git", "diff", "--unified=0", since, "--", "src"]
    lines: dict[str, set[int]] = defaultdict(set)
    file = ""
    for line in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first = int(match[1])
            lines[file] |= set(range(first, first + int(match[2] or 1)))
    return lines


def try_all(chosen: Sequence[Mutant], processes: int, most: float) -> list[tuple[Mutant, str, str]]:
    """The verdict on each mutant, printed as it falls; several are tried at once, each in a copy of its own."""
    results = []
    tests = TestMap(STORE)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        get_context("fork").Pool(processes, _open_bench, [Path(folder), tests, most]) as pool,
    ):
        for result in pool.imap_unordered(_attempt, chosen):
            results.append(result)
            print(f"{len(results)}/{len(chosen)} {result[1]:9} {result[0]}  ({result[2]})", flush=True)
    return results


def _open_bench(folder: Path, tests: TestMap, most: float) -> None:
    """In each process: its copy of the checkout."""
    global _bench
    _bench = Bench(folder / str(os.getpid()), tests, most)


def _attempt(mutant: Mutant) -> tuple[Mutant, str, str]:
    return mutant, *_bench.verdict(mutant)


def describe_command(arguments: argparse.Namespace) -> str:
    """The command that tries the same mutants: those of an earlier report, or a sample."""
    chosen = ["again"] if arguments.again else ["sample", "seed"]
    options = {name: getattr(arguments, name) for name in (*chosen, "changed_since", "seconds")}
    given = {f"--{name.replace('_', '-')}": str(value) for name, value in options.items() if value is not None}
    paths = [str(path) for path in arguments.paths if path != PACKAGE]
    return shlex.join(["run.py", *paths, *(part for pair in given.items() for part in pair)])


def report(results: Sequence[tuple[Mutant, str, str]], arguments: argparse.Namespace) -> dict[str, object]:
    """How many of each folder are noticed, and which are not."""
    folders: dict[str, list[str]] = defaultdict(list)
    for mutant, verdict, _ in results:
        folders[mutant.path.split("/")[2]].append(verdict)
    table = {name: {"mutants": len(all_), "killed": all_.count("killed")} for name, all_ in sorted(folders.items())}
    killed = sum(row["killed"] for row in table.values())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "command": describe_command(arguments),
        "commit": commit,
        "mutants": len(results),
        "killed": killed,
        "share": round(killed / max(len(results), 1), 3),
        "folders": table,
        "unnoticed": [f"{mutant} ({verdict})" for mutant, verdict, _ in results if verdict != "killed"],
    }


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[PACKAGE], help="files or folders of src/")
    parser.add_argument("--sample", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--changed-since", help="only lines that differ from this commit")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many are tried at once")
    parser.add_argument("--seconds", type=float, default=240.0, help="of tests, at most, for each mutant")
    parser.add_argument("--map", action="store_true", help="record anew which test runs which function")
    parser.add_argument("--again", type=Path, help="only those that this report lists as unnoticed, without a sample")
    parser.add_argument("--report", type=Path, help="a JSON file for the result")
    return parser.parse_args(given)


def main() -> None:
    """Draw, try, report."""
    arguments = parse()
    if arguments.map or not list(STORE.glob("functions-*.json")):
        record_map(STORE)
    if new_files := TestMap(STORE).new_files:
        record_map(STORE, new_files)
    for name in HEAVY:
        importlib.import_module(name)
    changed = changed_lines(arguments.changed_since) if arguments.changed_since else None
    sample = sys.maxsize if arguments.again else arguments.sample
    chosen = draw([path.resolve() for path in arguments.paths], sample, arguments.seed, changed)
    if arguments.again:
        unnoticed = json.loads(arguments.again.read_text())["unnoticed"]
        chosen = [mutant for mutant in chosen if any(line.startswith(f"{mutant} (") for line in unnoticed)]
    result = report(try_all(chosen, arguments.processes, arguments.seconds), arguments)
    print(json.dumps(result, indent=2))
    if arguments.report:
        arguments.report.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
