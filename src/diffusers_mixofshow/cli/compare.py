"""``mixofshow compare``: measure several packs side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from diffusers_mixofshow.cli import measuring, plans
from diffusers_mixofshow.cli.base_model import Base


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="ED-LoRAs, plain LoRAs and fused packs: Hub ids, folders or files. For each concept, the first that "
            "holds it alone is the one to which the others are compared."
        ),
    ],
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
    sheet: measuring.Sheet = None,
    record: measuring.Record = None,
    overwrite: plans.Overwrite = False,
    dry_run: plans.DryRun = False,
    as_json: measuring.AsJson = False,
) -> None:
    """Measure several packs with the same prompts and seeds, and show them side by side.

    `mixofshow evaluate --help` explains the columns.

    \b
    With what 'mixofshow demo' leaves:
      mixofshow compare mixofshow-demo/concepts/rex mixofshow-demo/average \\
        mixofshow-demo/fused

    \b
    With concepts of your own:
      mixofshow compare edlora-potter edlora-thanos averaged hogwarts \\
        --photos potter=photos/potter --photos thanos=photos/thanos
    """
    writes = measuring.check_writable(sheet, record, overwrite=overwrite or dry_run)
    measurement = measuring.plan_measurement(measuring.read_packs(sources, base), measuring.Asked.pick(locals()))
    if dry_run:
        plans.tell(measurement.plan(writes, overwrite=overwrite), as_json=as_json)
        return
    measuring.tell_results(measurement, measurement.run(), sheet=sheet, record=record, as_json=as_json)
