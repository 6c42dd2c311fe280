"""Check what is inside freshly built sdists and wheels: ``check_distributions.py DIST``."""

import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath


REQUIRED = {
    "diffusers_mixofshow": ("py.typed", "__init__.py", "cli/__init__.py"),
    "diffusers_mixofshow_bases": ("__init__.py",),
}
BASES = {
    "diffusers_mixofshow": ("toyland/weights",),
    "diffusers_mixofshow_bases": ("toyland_sd3", "toyland_xl"),
}
"""Folders with weights in each package."""
SOURCE_ALONE = {
    "diffusers_mixofshow": ("benchmarks/toyland_base/train.py", "benchmarks/toyland_base/quality.py"),
    "diffusers_mixofshow_bases": ("LICENSE",),
}
SDIST_TOP_LEVEL = {
    *("src", "bases", "tests", "examples", "docs", "benchmarks", "constraints"),
    *(".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile"),
    *("PKG-INFO", "README.md", "mkdocs.yml", "pyproject.toml"),
}
KEPT = "tests/compatibility/files/"  # small files of other programs, which tests read
JUNK = (".pyc", ".pt", ".pth", ".ckpt", ".log", ".orig", ".rej", ".swp")


def list_problems(names: list[str], package: str, root: PurePosixPath) -> list[str]:
    """What is missing of `package`, which lies under `root`, and what does not belong among `names`."""
    held = set(names)
    required = [*REQUIRED[package], *(f"{base}/README.md" for base in BASES[package])]
    missing = [f"missing: {root / name}" for name in required if str(root / name) not in held]
    missing += [
        f"missing: {root}/{base}/**/*{end}"
        for base in BASES[package]
        for end in (".safetensors", ".json")
        if not any(name.endswith(end) and PurePosixPath(name).is_relative_to(root / base) for name in names)
    ]
    junk = [f"junk: {name}" for name in names if (name.endswith(JUNK) and KEPT not in name) or "__pycache__" in name]
    return missing + junk


def check(package: str, wheel: Path, sdist: Path) -> list[str]:
    """Print the sizes of a package's two files, and return what is wrong with them."""
    in_wheel = zipfile.ZipFile(wheel).namelist()
    in_sdist = [name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name]
    problems = [f"{wheel.name}: {problem}" for problem in list_problems(in_wheel, package, PurePosixPath(package))]
    problems += [f"{sdist.name}: {it}" for it in list_problems(in_sdist, package, PurePosixPath("src", package))]
    problems += [f"{sdist.name}: missing: {name}" for name in SOURCE_ALONE[package] if name not in in_sdist]
    top_of_wheel = {name.split("/")[0] for name in in_wheel}
    problems += [
        f"{wheel.name}: unexpected: {name}"
        for name in sorted(top_of_wheel - {package})
        if not name.endswith(".dist-info")
    ]
    top_of_sdist = {name.split("/")[0] for name in in_sdist}
    problems += [f"{sdist.name}: unexpected: {name}" for name in sorted(top_of_sdist - SDIST_TOP_LEVEL)]
    for path, names in ((wheel, in_wheel), (sdist, in_sdist)):
        print(f"{path.name}: {len(names)} files, {path.stat().st_size / 1e6:.1f} MB")
    return problems


def main() -> None:
    """Check both packages; exit with 1 and the list of problems if there is one."""
    dist = Path(sys.argv[1])
    problems: list[str] = []
    for package in REQUIRED:
        (wheel,), (sdist,) = dist.glob(f"{package}-*.whl"), dist.glob(f"{package}-*.tar.gz")
        problems += check(package, wheel, sdist)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
