"""``mixofshow ui``: open the page for regions in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.cli import sample_options as options
from diffusers_mixofshow.cli.base_model import BASE_HELP, normalise_base


def ui(
    base: Annotated[str, typer.Option(help=BASE_HELP, callback=normalise_base)] = TOYLAND,
    device: options.Device = None,
    dtype: options.WeightType = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port on this machine. (default: the first free one from 7860 on)"),
    ] = None,
    share: Annotated[
        bool,
        typer.Option("--share", help="Let Gradio make a public link to the page; whoever has it uses this machine."),
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page to draw regions by hand, sample, fuse, and look into files.

    Only this machine can reach it, unless --share is given. Needs Gradio: pip install "diffusers-mixofshow\\[ui]".

    \b
    Example:
      mixofshow ui
    """
    from diffusers_mixofshow.ui.page import build_page, launch
    from diffusers_mixofshow.ui.session import Studio

    page = build_page(Studio(base, device, dtype, local=not share))
    launch(page, port=port, share=share, browser=browser)
