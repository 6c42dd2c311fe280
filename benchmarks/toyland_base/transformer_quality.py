"""Measure the second base on fresh seeds: ``python -m benchmarks.toyland_base.transformer_quality``."""

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
from diffusers import StableDiffusion3Pipeline

from benchmarks.toyland_base.quality import (
    FRESH_SEED,
    STEPS,
    list_training,
    measure_residents,
    measure_samples,
    save_sheet,
)
from diffusers_mixofshow.base_models import TOYLAND_SD3
from diffusers_mixofshow.evaluation.record import commit
from diffusers_mixofshow.toyland.base import load_reader, path


def measure(weights: Path, count: int, guidance_scale: float, sheet: Path | None = None) -> dict[str, Any]:
    """Everything that the README states."""
    started = time.monotonic()
    pipeline = StableDiffusion3Pipeline.from_pretrained(weights, text_encoder_3=None, tokenizer_3=None)
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    reader = load_reader()
    samples, images = measure_samples(pipeline, reader, count, guidance_scale)
    if sheet is not None:
        save_sheet(images, sheet)
    files = [file for file in weights.rglob("*") if file.is_file() and file.suffix != ".md"]
    return {
        "commit": commit(Path(__file__).parent) or "unknown",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "samples": asdict(samples),
        "residents": measure_residents(pipeline, reader, count, guidance_scale),
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
        "seconds": time.monotonic() - started,
    }


def readme(report: dict[str, Any], weights: Path) -> str:
    """The text of the README beside the weights: training, size and measured quality."""
    samples = report["samples"]
    note = json.loads((weights / "training.json").read_text(encoding="utf-8"))["transformer"].get("note", "")
    by_class = ", ".join(
        f"{name} {100 * value:.0f} %, {100 * samples['colour_right_by_class'][name]:.0f} %, "
        f"{100 * report['residents'][name]:.0f} %"
        for name, value in samples["class_right_by_class"].items()
    )
    lines = [
        "# Toyland's transformer",
        "",
        "Written by `python -m benchmarks.toyland_base.transformer_quality --write-readme` in a checkout; do not "
        "edit.",
        "A Stable Diffusion 3 in diffusers' layout for 64x64 pictures of a drawn world, to fuse plain LoRAs of a "
        "transformer on. Autoencoder and first text encoder are those of Toyland's base; the second text encoder is "
        "small and random, as the class demands one, and there is no T5. Trained from nothing by `torchrun "
        "--nproc_per_node 2 -m benchmarks.toyland_base.train --output DIR --start-from "
        "src/diffusers_mixofshow/toyland/weights --stage transformer --transformer-weights "
        "bases/src/diffusers_mixofshow_bases/toyland_sd3`.",
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
        f"{samples['samples']} samples, {STEPS} Euler steps, guidance {samples['guidance_scale']:g}, read by the "
        f"attribute reader. By class (class right, colour right, attributes right of residents called by name): "
        f"{by_class}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the report as JSON and, if asked to, write the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyland_base.transformer_quality", description=__doc__)
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--weights", type=Path, help="other weights than the shipped ones")
    parser.add_argument("--sheet", type=Path, help="write the samples as one PNG")
    parser.add_argument("--write-readme", action="store_true", help="write README.md beside the weights")
    options = parser.parse_args(arguments)
    weights: Path = options.weights or path(TOYLAND_SD3)
    report = measure(weights, options.samples, options.guidance, options.sheet)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.write_readme:
        (weights / "README.md").write_text(readme(report, weights), encoding="utf-8")


if __name__ == "__main__":
    main()
