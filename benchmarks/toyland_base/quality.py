"""Measure the shipped base on fresh seeds: ``python -m benchmarks.toyland_base.quality``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter
from PIL import Image

from diffusers_mixofshow.evaluation.record import commit
from diffusers_mixofshow.toyland.base import (
    MetricModel,
    load_layout_adapter,
    load_metric_model,
    load_pipeline,
    load_reader,
    path,
)
from diffusers_mixofshow.toyland.concepts import CONCEPTS, photos
from diffusers_mixofshow.toyland.layout import draw_places, stand_in
from diffusers_mixofshow.toyland.reader import AttributeReader, to_pixels
from diffusers_mixofshow.toyland.scenes import add_article, place_phrase, random_scene, residents, word_caption
from diffusers_mixofshow.toyland.world import BACKGROUNDS, CLASSES, HEIGHT, MAIN_COLOURS, WIDE, Thing, draw

from .autoencoder import peak_signal_to_noise, reconstruct


FRESH_SEED = 950_000_000
"""First seed of the pictures measured on; training uses none from 900 million on."""

STEPS = 20

_PIPELINE_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")


@dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """Fractions of samples in which the reader finds what the prompt asked for."""

    guidance_scale: float
    samples: int
    class_right: float
    background_right: float
    colour_right: float
    colour_right_by_class: dict[str, float]
    class_right_by_class: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ConceptIdentity:
    """Mean fraction of a concept's attributes that the reader reads right, before and after one round trip."""

    renders: float
    round_trip: float


def from_pixels(pixels: torch.Tensor) -> list[Image.Image]:
    """Pictures of (n, 3, height, width) in [-1, 1]."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


def measure_autoencoder(vae: Any) -> float:
    """Mean PSNR in dB over 512 fresh scenes of one or two things."""
    pixels = to_pixels([draw(random_scene(FRESH_SEED + index)).image for index in range(512)])
    return peak_signal_to_noise(reconstruct(vae, pixels), pixels)


def identity_of(name: str) -> dict[str, str]:
    """The attributes that make up a concept's identity: its main colour and all hidden ones."""
    concept = CONCEPTS[name]
    return {"colour": concept.colour, **concept.attributes}


def measure_identity(vae: Any, reader: AttributeReader, count: int = 48) -> dict[str, ConceptIdentity]:
    """Reader accuracy on fresh photos of every concept but scenes, before and after encode and decode."""
    results: dict[str, ConceptIdentity] = {}
    for name, concept in CONCEPTS.items():
        if concept.kind == "scene":
            continue
        images = [photo.image for photo in photos(concept, count, seed=FRESH_SEED)]
        again = from_pixels(reconstruct(vae, to_pixels(images)))
        accuracy = [float(reader.agreement(each, identity_of(name)).mean()) for each in (images, again)]
        results[name] = ConceptIdentity(renders=accuracy[0], round_trip=accuracy[1])
    return results


def measure_zero_shot(metric: MetricModel) -> float:
    """Fraction of 600 fresh renders of one thing whose class the metric model names right."""
    scenes = [random_scene(FRESH_SEED + index, things=1) for index in range(600)]
    images = metric.image_features([draw(scene).image for scene in scenes])
    texts = metric.text_features([f"a photo of {add_article(name)}" for name in CLASSES])
    found = (images @ texts.T).argmax(dim=1).tolist()
    right = [CLASSES[index] == scene.things[0].class_word for index, scene in zip(found, scenes, strict=True)]
    return sum(right) / len(right)


def balanced_prompts(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts that go through classes, backgrounds and colours evenly, with what they ask for."""
    rng = random.Random(seed)
    wanted: list[dict[str, str]] = []
    for index in range(count):
        class_word = CLASSES[index % len(CLASSES)]
        background = BACKGROUNDS[(index // len(CLASSES)) % len(BACKGROUNDS)]
        colour = rng.choice(MAIN_COLOURS[class_word])
        words = f"{add_article(f'{colour} {class_word}')} {place_phrase(background, rng)}"
        wanted.append({"prompt": words, "class": class_word, "background": background, "colour": colour})
    return wanted


def sample(pipeline: Any, prompts: Sequence[str], guidance_scale: float, seed: int, **size: int) -> list[Image.Image]:
    """One picture for every prompt, picture i from seed + i, by default of the base's own size."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 36):
        part = list(prompts[start : start + 36])
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        settings = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "generator": generators}
        images += pipeline(part, **settings, **size).images
    return images


def measure_samples(
    pipeline: Any, reader: AttributeReader, count: int, guidance_scale: float, seed: int = FRESH_SEED
) -> tuple[SampleQuality, list[Image.Image]]:
    """Sample balanced prompts and read class, background and main colour off the pictures."""
    wanted = balanced_prompts(count, seed)
    images = sample(pipeline, [each["prompt"] for each in wanted], guidance_scale, seed)
    found = reader.read(images)
    right: dict[str, list[bool]] = {}
    for name in ("class", "background", "colour"):
        words = [reader.vocabulary[name][index] for index in found[name].argmax(dim=1).tolist()]
        right[name] = [word == each[name] for word, each in zip(words, wanted, strict=True)]

    def by_class(name: str) -> dict[str, float]:
        rows: dict[str, list[bool]] = {word: [] for word in CLASSES}
        for ok, each in zip(right[name], wanted, strict=True):
            rows[each["class"]].append(ok)
        return {word: round(sum(values) / len(values), 3) for word, values in rows.items() if values}

    quality = SampleQuality(
        guidance_scale=guidance_scale,
        samples=count,
        class_right=sum(right["class"]) / count,
        background_right=sum(right["background"]) / count,
        colour_right=sum(right["colour"]) / count,
        colour_right_by_class=by_class("colour"),
        class_right_by_class=by_class("class"),
    )
    return quality, images


def resident_prompts(count: int, seed: int) -> list[tuple[str, Thing]]:
    """Prompts that call residents of all classes by name, with the resident that should appear."""
    rng = random.Random(seed)
    of_class = [[thing for thing in residents().values() if thing.class_word == word] for word in CLASSES]
    chosen = [rng.choice(of_class[index % len(CLASSES)]) for index in range(count)]
    places = [place_phrase(BACKGROUNDS[index // len(CLASSES) % len(BACKGROUNDS)], rng) for index in range(count)]
    return [(f"a {thing.name} {thing.class_word} {place}", thing) for thing, place in zip(chosen, places, strict=True)]


def measure_residents(pipeline: Any, reader: AttributeReader, count: int, guidance_scale: float) -> dict[str, float]:
    """Mean fraction of a resident's attributes, main colour included, found in samples of its name; by class."""
    wanted = resident_prompts(count, FRESH_SEED)
    images = sample(pipeline, [prompt for prompt, _ in wanted], guidance_scale, FRESH_SEED)
    rows: dict[str, list[float]] = {word: [] for word in CLASSES}
    for image, (_, thing) in zip(images, wanted, strict=True):
        looks = {"colour": thing.colour, **thing.attributes}
        rows[thing.class_word].append(float(reader.agreement([image], looks)[0]))
    return {word: round(sum(values) / len(values), 3) for word, values in rows.items() if values}


def measure_threes(
    pipeline: Any, reader: AttributeReader, count: int, guidance_scale: float, height: int, seed: int = FRESH_SEED
) -> dict[str, float]:
    """How often each of three things that one prompt asks for, from left to right, has its class and main colour.

    Args:
        pipeline: The base.
        reader: Reads class and colour off each third of a picture.
        count: Number of pictures.
        guidance_scale: Guidance scale.
        height: Of the pictures in pixels; they are half as wide again.
        seed: Of the first picture.

    Returns:
        Fractions of things and of whole pictures.
    """
    prompts, wanted = [], []
    for index in range(count):
        rng = random.Random(seed + index)
        things = [(rng.choice(MAIN_COLOURS[word]), word) for word in rng.choices(CLASSES, k=3)]
        names = [add_article(" ".join(thing)) for thing in things]
        prompts.append(word_caption(names, place_phrase(rng.choice(BACKGROUNDS), rng), rng))
        wanted.append(things)
    images = sample(pipeline, prompts, guidance_scale, seed, height=height, width=height * WIDE // HEIGHT)
    thirds = [_third_of(image.resize((WIDE, HEIGHT)), index) for image in images for index in range(3)]
    found = {name: values.argmax(dim=1).tolist() for name, values in reader.read(thirds).items()}
    colours, classes = ([reader.vocabulary[name][index] for index in found[name]] for name in ("colour", "class"))
    asked = [thing for things in wanted for thing in things]
    right = [read == thing for read, thing in zip(zip(colours, classes, strict=True), asked, strict=True)]
    whole = [all(right[3 * index : 3 * index + 3]) for index in range(count)]
    return {"things": sum(right) / len(right), "pictures": sum(whole) / count}


def measure_layout(
    pipeline: Any, adapter: T2IAdapter, reader: AttributeReader, count: int, guidance_scale: float
) -> dict[str, float]:
    """How often the one thing of a wide picture stands in the third that a layout asks for, with and without it."""
    wanted = balanced_prompts(count, FRESH_SEED)
    thirds = [(index % 3 / 3, 0.25, (index % 3 + 1) / 3, 0.97) for index in range(count)]
    layouts = [
        draw_places(stand_in([third], [each["class"]], WIDE), WIDE) for third, each in zip(thirds, wanted, strict=True)
    ]
    parts = {name: pipeline.components[name] for name in _PIPELINE_PARTS}
    placing = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    placing.set_progress_bar_config(disable=True)
    right = {}
    for strength, way in ((0.0, "without"), (1.0, "with")):
        images = [
            placing(
                each["prompt"],
                image=layout,
                adapter_conditioning_scale=strength,
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(FRESH_SEED + index),
            ).images[0]
            for index, (each, layout) in enumerate(zip(wanted, layouts, strict=True))
        ]
        found = reader.read([_third_of(image, index % 3) for index, image in enumerate(images)])["class"]
        words = [reader.vocabulary["class"][index] for index in found.argmax(dim=1).tolist()]
        right[way] = sum(word == each["class"] for word, each in zip(words, wanted, strict=True)) / count
    return right


def _third_of(image: Image.Image, index: int) -> Image.Image:
    """A square around where things stand in a third of a wide picture, as large as a picture of one thing."""
    middle, half = (2 * index + 1) * WIDE / 6, 0.3 * HEIGHT
    box = (middle - half, 0.97 * HEIGHT - 2 * half, middle + half, 0.97 * HEIGHT)
    left = min(max(box[0], 0), WIDE - 2 * half)
    return image.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC, box=(left, box[1], left + 2 * half, box[3]))


def save_sheet(images: Sequence[Image.Image], target: Path) -> None:
    """Write pictures of one size side by side, 18 in a row, at twice their size."""
    columns = 18
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(target)


def list_training(record_file: Path) -> list[str]:
    """How every stage was trained, as a table; a stage that went on from earlier weights has a row for each part."""
    record: dict[str, Any] = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {}
    lines = [
        "## Training",
        "| stage | minutes | processes | batch a process | seed | learning rate | hardware | torch | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    stopped = ""
    for name, last in record.items():
        parts = [last]
        while "continues" in parts[0]:
            parts.insert(0, parts[0]["continues"])
        for index, stage in enumerate(parts):
            title = name if index == 0 else f"{name}, continued"
            settings = stage["settings"]
            cells = [title, stage["minutes"], stage["processes"], stage["batch_size"], settings["seed"]]
            cells += [f"{settings['learning_rate']:g}", stage["hardware"], stage["torch"], stage["commit"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            if "stopped_after_steps" in stage:
                stopped += f" The stage {title} was stopped after {stage['stopped_after_steps']} steps."
    return [*lines, "", f"All settings: `training.json`.{stopped}"]


def introduction(weights: Path) -> list[str]:
    """How the README beside the weights begins: what they are, and how they were trained."""
    return [
        "# Toyland's base",
        "",
        "Written by `python -m benchmarks.toyland_base.quality --write-readme` in a checkout; do not edit.",
        "A Stable Diffusion in diffusers' layout for 64x64 pictures of a drawn world, with its metric model, "
        "attribute reader and layout adapter. Trained from nothing by `python -m "
        "benchmarks.toyland_base.train --output DIR --weights WEIGHTS` (add `torchrun --nproc_per_node 2 -m` "
        "to average gradients over processes).",
        "",
        *list_training(weights / "training.json"),
    ]


def readme(report: dict[str, Any], weights: Path) -> str:
    """The text of the README beside the weights: training, sizes and measured quality."""
    lines = [*introduction(weights), "", "## Size"]
    lines += [f"- `{name}`: {size / 1e6:.2f} MB" for name, size in report["sizes"].items()]
    lines += [f"- together {sum(report['sizes'].values()) / 1e6:.2f} MB", "", "## Measured quality"]
    samples = report["samples"]
    identity: dict[str, dict[str, float]] = report["identity"]
    worst = min(values["round_trip"] - values["renders"] for values in identity.values())
    lines += [
        f"Commit {report['commit']}, on {report['hardware']}, {report['seconds']:.0f} s, seeds from {FRESH_SEED} on "
        "(never trained on).",
        "",
        "| what | measured | goal |",
        "|---|---|---|",
        f"| autoencoder, PSNR on held-out pictures | {report['psnr']:.1f} dB | 28 dB |",
        f"| identity after one encode and decode, worst concept against its renders | {100 * worst:+.1f} points | "
        "-3 points |",
        f"| metric model, zero-shot class on renders | {100 * report['zero_shot']:.1f} % | 97 % |",
        f"| samples, class right | {100 * samples['class_right']:.1f} % | 90 % |",
        f"| samples, background right | {100 * samples['background_right']:.1f} % | 90 % |",
        f"| samples, main colour right | {100 * samples['colour_right']:.1f} % | 80 % |",
        "",
        f"{samples['samples']} samples, {STEPS} DPM-Solver steps, guidance {samples['guidance_scale']:g}, "
        "read by the attribute reader. By class (class right, colour right): "
        + ", ".join(
            f"{name} {100 * value:.0f} %, {100 * samples['colour_right_by_class'][name]:.0f} %"
            for name, value in samples["class_right_by_class"].items()
        )
        + ".",
        "",
        "Attributes right in samples of residents, called by name (no goal; chance is about a quarter): "
        + ", ".join(f"{name} {100 * value:.0f} %" for name, value in report["residents"].items())
        + ".",
        "",
        "The layout adapter, a T2I-Adapter that sees an ellipse where a thing shall stand: the thing asked for is "
        f"found in the third of a wide picture that the layout names in {100 * report['layout']['with']:.0f} % of "
        f"{samples['samples'] // 2} samples, without the adapter in {100 * report['layout']['without']:.0f} %.",
        "",
        "| concept | reader on renders | after a round trip |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {100 * values['renders']:.1f} % | {100 * values['round_trip']:.1f} % |"
        for name, values in identity.items()
    ]
    return "\n".join(lines) + "\n"


def measure(weights: Path, count: int, guidance_scales: Sequence[float], sheet: Path | None = None) -> dict[str, Any]:
    """Everything that the README states; of several guidance scales the best, tried on other seeds, is reported."""
    started = time.monotonic()
    pipeline = load_pipeline(folder=weights)
    pipeline.set_progress_bar_config(disable=True)
    reader, metric = load_reader(weights), load_metric_model(weights)
    best = guidance_scales[0]
    if len(guidance_scales) > 1:
        tried = {
            scale: measure_samples(pipeline, reader, 72, scale, seed=FRESH_SEED + 1_000_000)[0]
            for scale in guidance_scales
        }
        best = max(tried, key=lambda scale: tried[scale].class_right + tried[scale].colour_right)
    samples, images = measure_samples(pipeline, reader, count, best)
    if sheet is not None:
        save_sheet(images, sheet)
    files = [file for file in sorted(weights.rglob("*")) if file.is_file() and file.suffix != ".md"]
    sizes: dict[str, int] = {}
    for file in files:
        part = file.relative_to(weights).parts[0]
        sizes[part] = sizes.get(part, 0) + file.stat().st_size
    return {
        "commit": commit(Path(__file__).parent) or "unknown",
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "psnr": measure_autoencoder(pipeline.vae),
        "identity": {name: asdict(value) for name, value in measure_identity(pipeline.vae, reader).items()},
        "zero_shot": measure_zero_shot(metric),
        "samples": asdict(samples),
        "layout": measure_layout(pipeline, load_layout_adapter(folder=weights), reader, count // 2, best),
        "residents": measure_residents(pipeline, reader, count, best),
        "sizes": sizes,
        "seconds": time.monotonic() - started,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the report as JSON and, if asked to, write the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyland_base.quality", description=__doc__)
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0], help="several: the best one is reported")
    parser.add_argument("--weights", type=Path, help="other weights than the shipped ones")
    parser.add_argument("--sheet", type=Path, help="write the samples as one PNG")
    parser.add_argument("--write-readme", action="store_true", help="write README.md beside the weights")
    options = parser.parse_args(arguments)
    weights: Path = options.weights or path()
    report = measure(weights, options.samples, options.guidance, options.sheet)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.write_readme:
        (weights / "README.md").write_text(readme(report, weights), encoding="utf-8")


if __name__ == "__main__":
    main()
