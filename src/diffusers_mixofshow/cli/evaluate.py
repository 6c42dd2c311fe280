"""``mixofshow evaluate``: measure how well a pack draws its concepts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusers_mixofshow.cli import measuring, plans
from diffusers_mixofshow.cli.base_model import Base
from diffusers_mixofshow.errors import ConfigurationError, suggest


if TYPE_CHECKING:
    from diffusers_mixofshow.edlora import EDLoRA
    from diffusers_mixofshow.evaluation.plain import MeasuredPack


Own = Annotated[
    list[str] | None,
    typer.Option(
        help="A concept's own ED-LoRA, to measure what fusion kept of it. May be repeated. (default: those in the "
        "pack's folder)"
    ),
]
Save = Annotated[
    bool, typer.Option("--save", help="Write the numbers into the pack's own file, and update its model card.")
]


def evaluate(
    source: Annotated[str, typer.Argument(help="ED-LoRA, plain LoRA or fused pack: Hub id, folder or file.")],
    own: Own = None,
    photos: measuring.Photos = None,
    prompt: measuring.Prompt = None,
    class_word: measuring.ClassWord = None,
    kind: measuring.Kind = None,
    trigger: measuring.TriggerWords = None,
    base: Base = None,
    metric_model: measuring.MetricModel = None,
    pictures: measuring.Count = 12,
    steps: measuring.Steps = 20,
    guidance: measuring.Guidance = None,
    seed: measuring.Seed = 1,
    save: Save = False,
    sheet: measuring.Sheet = None,
    record: measuring.Record = None,
    overwrite: plans.Overwrite = False,
    dry_run: plans.DryRun = False,
    as_json: measuring.AsJson = False,
) -> None:
    """Sample every concept of a pack and measure how well the pictures follow text and photos.

    A pack of plain LoRAs has no concepts: each LoRA is prompted by its trigger words.

    text: CLIPScore with the prompt. image: mean cosine with the photos.
    kept: share of the own ED-LoRA's gain over the class word that is left.
    drift: change of pictures without the concept. On Toyland also looks:
    share of the concept's attributes that a classifier reads right.

    \b
    With what 'mixofshow demo' leaves:
      mixofshow evaluate mixofshow-demo/concepts/rex

    \b
    With concepts of your own:
      mixofshow evaluate hogwarts --own edlora-potter --own edlora-thanos \\
        --photos potter=photos/potter --photos thanos=photos/thanos --save
    """
    folder = _find_folder(source) if save else None
    writes = measuring.check_writable(sheet, record, overwrite=overwrite or dry_run)
    name, packs = _read_packs(source, own or [], base)
    measurement = measuring.plan_measurement(packs, measuring.Asked.pick(locals()))
    if dry_run:
        plans.tell(measurement.plan(writes, noted_in=folder, overwrite=overwrite), as_json=as_json)
        return
    evaluation = measurement.run()
    if folder is not None:
        from diffusers_mixofshow.evaluation.packs import record_rows

        _save(record_rows(packs[name].pack, name, evaluation, measurement.public_settings()), folder)
    measuring.tell_results(measurement, evaluation, sheet=sheet, record=record, as_json=as_json)


def _read_packs(source: str, own: list[str], base: str | None) -> tuple[str, dict[str, MeasuredPack]]:
    """Name of the pack, and all packs: first the concepts' own ED-LoRAs, from `own` or the pack's folder.

    Raises:
        ConfigurationError: If an ED-LoRA of `own` holds several concepts, or one that is not in the pack; names all.
    """
    (name, pack), *others = measuring.read_packs([source, *own], base).items()
    held = [concept.placeholder for concept in pack.concepts]
    defects = []
    for other, edlora in others:
        names = [concept.placeholder for concept in edlora.concepts]
        if len(names) > 1:
            defects.append(f"{other} holds {len(names)} concepts, expected one alone")
        elif names[0] not in held:
            hint = suggest(names[0], held)
            defects.append(f"{other} holds {names[0]}, but the pack holds {', '.join(held)}.{hint}".rstrip("."))
    if defects:
        raise ConfigurationError(f"--own: {'; '.join(defects)}. To measure other packs beside it, use compare.")
    return name, {**(dict(others) if own else _read_carried(source, pack)), name: pack}


def _find_folder(source: str) -> Path:
    """Find the folder of a pack into whose file numbers are written.

    Raises:
        ConfigurationError: If it is on the Hub, a file of another name, or a LoRA that was not fused.
    """
    from diffusers_mixofshow.edlora.file import FILE_NAME
    from diffusers_mixofshow.fusion.pack import read_plain_pack

    folder = _resolve_folder(source)
    if not (folder / FILE_NAME).is_file() and read_plain_pack(folder) is None:
        raise ConfigurationError(
            f"--save writes the numbers into {FILE_NAME}, but {source} is no folder with one, nor with a pack of "
            "plain LoRAs. Download or rename it first, or write the numbers to a file of their own with --record."
        )
    return folder


def _resolve_folder(source: str) -> Path:
    """The folder that a pack is, or that its file lies in."""
    from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME

    path = Path(source)
    return path.parent if path.name in (FILE_NAME, PLAIN_NAME) else path


def _read_carried(source: str, pack: MeasuredPack) -> dict[str, MeasuredPack]:
    """Read the ED-LoRAs and plain LoRAs inside a pack's folder, see `FusedPack.save_pretrained`; none without one."""
    from diffusers_mixofshow.edlora.file import FILE_NAME, PLAIN_NAME
    from diffusers_mixofshow.edlora.folder import SOURCES
    from diffusers_mixofshow.evaluation.plain import MeasuredPack, name_by_records
    from diffusers_mixofshow.interop.opening import open_edlora

    folder = _resolve_folder(source)
    inside = folder / SOURCES
    there = sorted(inside.iterdir()) if inside.is_dir() else []
    names = [path.name for path in there if any((path / name).is_file() for name in (FILE_NAME, PLAIN_NAME))]
    opened = {f"{SOURCES}/{name}": open_edlora(folder, subfolder=f"{SOURCES}/{name}") for name in names}
    carried = {name: MeasuredPack.of(each.edlora, Path(name).name) for name, each in opened.items()}
    named = name_by_records({**carried, source: pack})
    return {name: named[name] for name in carried}


def _save(pack: EDLoRA, folder: Path) -> None:
    """Write a pack, with its numbers, over the one in a folder."""
    from diffusers_mixofshow.fusion.pack import read_plain_pack

    plain = None if pack.concepts else read_plain_pack(folder)
    (replace(plain, training=pack.training) if plain else pack).save_pretrained(folder, overwrite=True)
