"""``mixofshow convert``: from and to other programs' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffusers_mixofshow.cli.plans import Overwrite
from diffusers_mixofshow.interop.formats import Format


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="ED-LoRA or fused pack (Hub id, folder or file), LoRA, textual inversion, the authors' .pth, or a "
            "folder with a LoRA and its embeddings."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder, or file where the format is one file.")],
    to: Annotated[
        Format,
        typer.Option(
            help="edlora: this package's own. diffusers: LoRA in PEFT's names. kohya: LoRA for A1111 and ComfyUI. "
            "textual-inversion: embeddings alone. mix-of-show: the authors' .pth."
        ),
    ],
    name: Annotated[
        str, typer.Option(help="What prompts shall call the concept. (default: the file's own word)")
    ] = "",
    class_word: Annotated[str, typer.Option(help="Plain word for what it is, e.g. man; files do not tell.")] = "",
    kind: Annotated[str, typer.Option(help="character, pet, object or scene.")] = "object",
    base: Annotated[
        str, typer.Option(help="Base model it was tuned on. (default: Stable Diffusion 1.5 for files of 1.x)")
    ] = "",
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print files and losses as JSON.")] = False,
) -> None:
    """Convert an ED-LoRA, a fused pack or another program's file to another format.

    What the new format cannot say is told on standard error, and in a text beside the files.

    \b
    Examples:
      mixofshow convert edlora_model-latest.pth edlora-potter --to edlora \\
        --class-word man
      mixofshow convert hogwarts for-comfyui --to kohya
    """
    from diffusers_mixofshow import interop
    from diffusers_mixofshow.cli.base_model import layers_of
    from diffusers_mixofshow.cli.sources import read_source

    converted = interop.convert(
        read_source(source),
        output,
        to,
        name=name,
        class_word=class_word,
        kind=kind,
        base_model=base,
        layers=layers_of(base),
        overwrite=overwrite,
    )
    if as_json:
        typer.echo(json.dumps({"files": [str(file) for file in converted.files], "lost": list(converted.lost)}))
        return
    for sentence in converted.lost:
        typer.echo(f"Lost: {sentence}", err=True)
    for file in converted.files:
        typer.echo(f"Wrote {file}")
