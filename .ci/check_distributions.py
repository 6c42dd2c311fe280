"""Check what is inside a freshly built sdist and wheel: ``check_distributions.py DIST``."""

import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath


PACKAGE = PurePosixPath("diffusers_mixofshow")
BASES = ("toyland/weights", "toyland/sd3_weights")
REQUIRED = ("py.typed", "__init__.py", "cli/__init__.py", *(f"{base}/README.md" for base in BASES))
SOURCE_ALONE = ("benchmarks/toyland_base/train.py", "benchmarks/toyland_base/quality.py")
SDIST_TOP_LEVEL = {
    *("src", "tests", "examples", "docs", "benchmarks", "constraints"),
    *(".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile"),
    *("PKG-INFO", "README.md", "mkdocs.yml", "pyproject.toml"),
}
KEPT = "tests/compatibility/files/"  # small files of other programs, which tests read
JUNK = (".pyc", ".pt", ".pth", ".ckpt", ".log", ".orig", ".rej", ".swp")


def problems_of(names: list[str], package: PurePosixPath) -> list[str]:
    """What is missing under `package` and what does not belong among `names`."""
    held = set(names)
    missing = [f"missing: {package / name}" for name in REQUIRED if str(package / name) not in held]
    missing += [
        f"missing: {package}/{base}/**/*{end}"
        for base in BASES
        for end in (".safetensors", ".json")
        if not any(name.endswith(end) and PurePosixPath(name).is_relative_to(package / base) for name in names)
    ]
    junk = [f"junk: {name}" for name in names if (name.endswith(JUNK) and KEPT not in name) or "__pycache__" in name]
    return missing + junk


def main() -> None:
    """Print the sizes, exit with 1 and the list of problems if there is one."""
    dist = Path(sys.argv[1])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    in_wheel = zipfile.ZipFile(wheel).namelist()
    in_sdist = [name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name]
    problems = [f"{wheel.name}: {problem}" for problem in problems_of(in_wheel, PACKAGE)]
    problems += [f"{sdist.name}: {problem}" for problem in problems_of(in_sdist, "src" / PACKAGE)]
    problems += [f"{sdist.name}: missing: {name}" for name in SOURCE_ALONE if name not in in_sdist]
    top_of_wheel = {name.split("/")[0] for name in in_wheel}
    problems += [
        f"{wheel.name}: unexpected: {name}"
        for name in sorted(top_of_wheel - {str(PACKAGE)})
        if not name.endswith(".dist-info")
    ]
    top_of_sdist = {name.split("/")[0] for name in in_sdist}
    problems += [f"{sdist.name}: unexpected: {name}" for name in sorted(top_of_sdist - SDIST_TOP_LEVEL)]
    for path, names in ((wheel, in_wheel), (sdist, in_sdist)):
        print(f"{path.name}: {len(names)} files, {path.stat().st_size / 1e6:.1f} MB")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
