"""Check an installed package: every public name can be imported, and the package itself is light to import."""

import importlib.metadata
import subprocess
import sys
import time


LIGHT = """
import sys
import diffusers_mixofshow
sys.exit(", ".join({"torch", "numpy", "diffusers", "transformers"} & sys.modules.keys()) or None)
"""
ALLOWED_SECONDS = 0.3


def seconds_to_import() -> float:
    """Wall-clock time of ``python -c "import diffusers_mixofshow"``, the best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import diffusers_mixofshow"], check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print what was found; an exception or exit status 1 says what is wrong."""
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
    seconds = seconds_to_import()
    if seconds >= ALLOWED_SECONDS:
        sys.exit(f"import diffusers_mixofshow takes {seconds:.2f} s, allowed are {ALLOWED_SECONDS} s")

    import diffusers_mixofshow

    names = {name: getattr(diffusers_mixofshow, name) for name in diffusers_mixofshow.__all__}
    version = importlib.metadata.version("diffusers-mixofshow")
    if version != diffusers_mixofshow.__version__:
        sys.exit(f"installed version {version}, but __version__ is {diffusers_mixofshow.__version__}")
    print(f"diffusers-mixofshow {version} from {diffusers_mixofshow.__file__}, imported in {seconds:.3f} s")
    print("public names:", ", ".join(names))


if __name__ == "__main__":
    main()
