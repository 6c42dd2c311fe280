"""Measure a base of the extra ``bases`` on fresh seeds: ``python -m benchmarks.toyland_base.bases_quality``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.base_models import TOYLAND_SD3, TOYLAND_XL
from diffusers_mixofshow.evaluation.record import commit
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.base import load_reader, path

from .quality import (
    FRESH_SEED,
    STEPS,
    list_training,
    measure_residents,
    measure_samples,
    measure_threes,
    save_sheet,
)


FOLDER = "bases/src/diffusers_mixofshow_bases"
TITLES = {TOYLAND_SD3: "Toyland's transformer", TOYLAND_XL: "Toyland's Stable Diffusion XL"}
STAGES = {TOYLAND_SD3: "transformer", TOYLAND_XL: "xl"}
"""Base to the stage of training that makes it."""
DESCRIPTIONS = {
    TOYLAND_SD3: "A Stable Diffusion 3 in diffusers' layout for 64x64 pictures of a drawn world, to fuse plain LoRAs "
    "of a transformer on. Autoencoder and first text encoder are those of Toyland's base; the second text encoder is "
    "small and random, as the class demands one, and there is no T5. Trained from nothing by",
    TOYLAND_XL: "A Stable Diffusion XL in diffusers' layout for 96x96 pictures of a drawn world, to tune, fuse and "
    "draw concepts of that architecture on. The autoencoder is that of Toyland's base; its U-Net and second text "
    "encoder grew from that base's U-Net and text encoder, the first text encoder is small and new. Trained by",
}


def measure(base: str, weights: Path, count: int, guidance_scale: float, sheet: Path | None = None) -> dict[str, Any]:
    """Everything that the README states."""
    started = time.monotonic()
    pipeline = load_base(str(weights), "cpu", "float32", concepts=False)
    pipeline.set_progress_bar_config(disable=True)
    reader = load_reader()
    samples, images = measure_samples(pipeline, reader, count, guidance_scale)
    if sheet is not None:
        save_sheet(images, sheet)
    files = [file for file in weights.rglob("*") if file.is_file() and file.suffix != ".md"]
    return {
        "base": base,
        "commit": commit(Path(__file__).parent) or "unknown",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "samples": asdict(samples),
        "residents": measure_residents(pipeline, reader, count, guidance_scale),
        "threes": measure_threes(pipeline, reader, count // 3, guidance_scale, images[0].height),
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
        "seconds": time.monotonic() - started,
    }


def readme(report: dict[str, Any], weights: Path) -> str:
    """The text of the README beside the weights: training, size and measured quality."""
    base, samples, threes = report["base"], report["samples"], report["threes"]
    stage, folder = STAGES[base], f"{FOLDER}/{base.replace('-', '_')}"
    trained = json.loads((weights / "training.json").read_text(encoding="utf-8"))
    note = trained[stage].get("note", "")
    later = "".join(f", then with `--stage {name}`" for name in trained if name != stage)
    by_class = ", ".join(
        f"{name} {100 * value:.0f} %, {100 * samples['colour_right_by_class'][name]:.0f} %, "
        f"{100 * report['residents'][name]:.0f} %"
        for name, value in samples["class_right_by_class"].items()
    )
    lines = [
        f"# {TITLES[base]}",
        "",
        f"Written by `python -m benchmarks.toyland_base.bases_quality --base {base} --write-readme` in a checkout; do "
        "not edit.",
        f"{DESCRIPTIONS[base]} `torchrun --nproc_per_node 2 -m benchmarks.toyland_base.train --output DIR "
        f"--start-from src/diffusers_mixofshow/toyland/weights --stage {stage} --{stage}-weights {folder}`{later}.",
        "",
        *list_training(weights / "training.json"),
        *([note] if note else []),
        "",
        "## Measured quality",
        f"Commit {report['commit']}, on {report['hardware']}, {report['seconds']:.0f} s, seeds from {FRESH_SEED} on "
        f"(never trained on). {report['megabytes']:.2f} MB.",
        "",
        "| samples | right |",
        "|---|---|",
        f"| class | {100 * samples['class_right']:.1f} % |",
        f"| background | {100 * samples['background_right']:.1f} % |",
        f"| main colour | {100 * samples['colour_right']:.1f} % |",
        "",
        f"{samples['samples']} samples, {STEPS} steps, guidance {samples['guidance_scale']:g}, read by the attribute "
        f"reader. By class (class right, colour right, attributes right of residents called by name): {by_class}.",
        "",
        f"Three things that one prompt asks for, in a picture half as wide again: {100 * threes['things']:.0f} % of "
        "the things have their class and colour where they belong, all three in "
        f"{100 * threes['pictures']:.0f} % of {samples['samples'] // 3} pictures.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the report as JSON and, if asked to, write the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyland_base.bases_quality", description=__doc__)
    parser.add_argument("--base", choices=tuple(STAGES), default=TOYLAND_XL)
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--weights", type=Path, help="other weights than the shipped ones")
    parser.add_argument("--sheet", type=Path, help="write the samples as one PNG")
    parser.add_argument("--write-readme", action="store_true", help="write README.md beside the weights")
    options = parser.parse_args(arguments)
    weights: Path = options.weights or path(options.base)
    report = measure(options.base, weights, options.samples, options.guidance, options.sheet)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.write_readme:
        (weights / "README.md").write_text(readme(report, weights), encoding="utf-8")


if __name__ == "__main__":
    main()
