"""``mixofshow demo``: the whole method on the embedded base, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusers_mixofshow.cli.base_model import LARGEST_SEED
from diffusers_mixofshow.cli.plans import Overwrite


def demo(
    output: Annotated[Path, typer.Option(help="Folder for photos, ED-LoRAs, pictures and the page.")] = Path(
        "mixofshow-demo"
    ),
    photos: Annotated[
        Path | None, typer.Option(help="Your own pictures of one concept, in place of a drawn one.")
    ] = None,
    class_word: Annotated[str | None, typer.Option(help="What your pictures show, e.g. dog.")] = None,
    seed: Annotated[int, typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Seed of tuning and sampling.")] = 0,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the demo's report.json.")] = False,
) -> None:
    """Tune four concepts, fuse them, sample them alone and together, and write a page that shows and measures it.

    Takes some minutes on two CPU cores. It may be interrupted: started again, it continues.

    \b
    Example:
      mixofshow demo
    """
    from rich.console import Console

    from diffusers_mixofshow.demo import DemoSettings, run_demo

    page = run_demo(
        DemoSettings(folder=output, photos=photos, class_word=class_word, seed=seed, overwrite=overwrite),
        console=Console(stderr=True),
    )
    typer.echo((page.parent / "report.json").read_text(encoding="utf-8") if as_json else f"Open {page.resolve()}")
