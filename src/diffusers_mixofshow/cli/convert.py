"""``mixofshow convert``: convert from and to other programs' files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_mixofshow.cli.base_model import normalise_base
from diffusers_mixofshow.cli.plans import Overwrite
from diffusers_mixofshow.errors import suggest
from diffusers_mixofshow.interop.formats import Format


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.interop.concept_names import Naming
    from diffusers_mixofshow.interop.conversion import Conversion
    from diffusers_mixofshow.interop.foreign import Foreign

_BASE = (
    "Base model it was tuned on (default: Stable Diffusion 1.5 for files of 1.x). For kohya and diffusers it is "
    "loaded, so that the LoRA can reproduce the effect of layer-wise embeddings."
)


_PROGRAMS = {
    "comfyui": Format.KOHYA,
    "a1111": Format.KOHYA,
    "automatic1111": Format.KOHYA,
    "forge": Format.KOHYA,
    "peft": Format.DIFFUSERS,
}
"""Names of programs to the format that they load."""


def _parse_format(text: str) -> Format:
    """Read ``--to``; for a program's name, the error names the format that it loads."""
    try:
        return Format(text)
    except ValueError as error:
        program = _PROGRAMS.get(text.lower())
        near = f"; did you mean {program.value}, which {text} loads?" if program else f".{suggest(text, Format)}"
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, map(str, Format)))}{near}") from error


To = Annotated[
    Format,
    typer.Option(
        parser=_parse_format,
        metavar="|".join(Format),
        help="edlora: this package's own. diffusers: LoRA in PEFT's names. kohya: LoRA for A1111 and ComfyUI. "
        "textual-inversion: embeddings alone. mix-of-show: the authors' .pth.",
    ),
]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="ED-LoRA or fused pack (Hub id, folder or file), LoRA, textual inversion, the authors' .pth, or a "
            "folder with a LoRA and its embeddings."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder, or file where the format is one file.")],
    to: To,
    name: Annotated[str, typer.Option(help="Name of the concept in prompts. (default: the file's own word)")] = "",
    class_word: Annotated[
        str, typer.Option(help="Plain word for what it is, e.g. man. (default: the file's own, if any)")
    ] = "",
    kind: Annotated[
        str, typer.Option(help="character, pet, object, scene. (default: the file's own, or object)")
    ] = "",
    base: Annotated[str, typer.Option(help=_BASE, callback=normalise_base)] = "",
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print files and losses as JSON.")] = False,
) -> None:
    """Convert an ED-LoRA, a fused pack or another program's file to another format.

    What the new format cannot hold is listed on standard error before anything is written, and in a text beside the
    files. Without --base, concepts with layer-wise embeddings lose most of their identity in kohya and diffusers.

    \b
    With what 'mixofshow demo' leaves:
      mixofshow convert mixofshow-demo/concepts/rex for-comfyui --to kohya \\
        --base toyland

    \b
    With files of your own:
      mixofshow convert edlora_model-latest.pth edlora-potter --to edlora \\
        --class-word man
      mixofshow convert hogwarts for-comfyui --to kohya \\
        --base stable-diffusion-v1-5/stable-diffusion-v1-5
    """
    from diffusers_mixofshow import interop
    from diffusers_mixofshow.cli.base_model import read_layers
    from diffusers_mixofshow.cli.sources import read_source
    from diffusers_mixofshow.interop.concept_names import Naming
    from diffusers_mixofshow.interop.conversion import plan_conversion

    content, layers = read_source(source), read_layers(base)
    naming = Naming(name=name, class_word=class_word, kind=kind, base_model=base)
    if base and to in (Format.KOHYA, Format.DIFFUSERS):
        plan_conversion(content, output, to, naming, layers, overwrite=overwrite)  # raises before the base is loaded
        shared = _share_layers(content, naming, layers)
        if shared is not content:  # an ED-LoRA that has the name, class word and kind already
            content, naming = shared, Naming(base_model=base)
    given = asdict(naming) | {"layers": layers, "overwrite": overwrite}
    converted = interop.convert(content, output, to, **given, before_writing=_tell)
    _show(converted, as_json)


def _show(converted: Conversion, as_json: bool) -> None:
    for sentence in converted.notes:
        typer.echo(f"Note: {sentence}", err=True)
    if as_json:
        told = {"files": [str(file) for file in converted.files], "lost": converted.lost, "notes": converted.notes}
        typer.echo(json.dumps(told))
        return
    for file in converted.files:
        typer.echo(f"Wrote {file}")


def _tell(lost: Sequence[str]) -> None:
    for sentence in lost:
        typer.echo(f"Lost: {sentence}", err=True)


def _share_layers(content: EDLoRA | Foreign, naming: Naming, layers: tuple[str, ...]) -> EDLoRA | Foreign:
    """Turn layer-wise embeddings into one for all layers, for which the base is loaded; returns others unchanged."""
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.exporting import share_layers
    from diffusers_mixofshow.interop.foreign import to_edlora
    from diffusers_mixofshow.interop.textual_inversion import is_layerwise
    from diffusers_mixofshow.sampling.loading import load_base

    if not isinstance(content, EDLoRA):
        if not content.tokens:
            return content
        content = to_edlora(content, naming, layers)
    return share_layers(load_base(naming.base_model), content) if is_layerwise(content) else content
