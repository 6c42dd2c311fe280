"""Measure gradient fusion and regional sampling on Toyland: ``python benchmarks/toyland.py [--short]``.

Eight critters, the same class on purpose, are tuned (or taken from ``--concepts DIR``), fused into one pack by the
closed form and by weight averaging, and sampled with prompts that fusion never recorded. Three at a time, they are
sampled with and without regions and a layout, by the same prompts and seeds. One JSON record a run.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from diffusers_mixofshow import toyland
from diffusers_mixofshow.demo.photos import prepare_photos
from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.demo.tuning import tune_all
from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.identity import (
    Identity,
    Subject,
    concepts_in_regions,
    mean_identity,
    measure_identity,
    region_accuracy,
    retention,
)
from diffusers_mixofshow.evaluation.prompts import (
    HELD_OUT_PROMPTS,
    RECORDING_PROMPTS,
    TOGETHER_PLACES,
    called,
    column_boxes,
    prompt_together,
    regions_of,
)
from diffusers_mixofshow.evaluation.sampling import Sampling, fill_templates, sample_pictures
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge, subject_of
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.pipelines import MixOfShowAdapterPipeline, MixOfShowPipeline
from diffusers_mixofshow.regions import Isolation


CRITTERS = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "nono", "vivi")
CLASS_WORD = "critter"
METHODS = {"average": "average", "closed_form": "closed-form"}
TOGETHER: dict[str, tuple[str, ...]] = {
    "layout and isolated regions": ("layout", "regions", "isolation"),
    "layout and regions": ("layout", "regions"),
    "layout": ("layout",),
    "regions": ("regions",),
    "neither": (),
}
"""How three critters are sampled; a layout is a T2I-Adapter's that sees where things stand."""
LAYOUT_STRENGTH = 0.8
FRESH_PHOTOS = 99
WIDE = (64, 96)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is sampled."""

    critters: tuple[str, ...]
    pictures: int
    together: int
    steps: int
    guidance_scale: float
    ridge: float
    seed: int


@dataclass
class Bench:
    """Everything that the measurements share."""

    plan: Plan
    pipe: Any
    judge: ToylandJudge
    subjects: list[Subject]
    console: Console = field(default_factory=Console)

    def sampling(self, first_seed: int, size: tuple[int | None, int | None] = (None, None)) -> Sampling:
        plan = self.plan
        return Sampling(
            steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            batch_size=8,
            first_seed=first_seed + 100_000 * plan.seed,
            height=size[0],
            width=size[1],
        )


def single_packs(wanted: Sequence[str], seed: int, concepts: Path | None, work: Path) -> dict[str, Path]:
    """ED-LoRAs by name: from the given folder where they are there, else tuned in the work folder."""
    given = {} if concepts is None else {name: concepts / name for name in wanted}
    found = {name: folder for name, folder in given.items() if (folder / "edlora.safetensors").exists()}
    missing = tuple(name for name in wanted if name not in found)
    if missing:
        # DemoSettings asks for two concepts at least.
        names = missing if len(missing) > 1 else (*missing, next(name for name in CRITTERS if name not in missing))
        settings = DemoSettings(folder=work, concepts=names, seed=seed)

        def on_step(name: str, step: int, total: int, loss: float) -> None:
            if step % 50 == 0 or step == total:
                print(f"  {name} {step}/{total} loss {loss:.3f}", flush=True)

        found |= tune_all(prepare_photos(settings), settings, on_step)
    return {name: found[name] for name in wanted}


def fuse_all(bench: Bench, packs: dict[str, Path]) -> dict[str, Any]:
    """Average and closed form of all single packs."""
    fuser = GradientFuser(
        bench.pipe,
        prompts=RECORDING_PROMPTS,
        steps=bench.plan.steps,
        guidance_scale=bench.plan.guidance_scale,
        ridge=bench.plan.ridge,
        batch_size=8,
    )
    return {
        name: fuser.fuse([str(path) for path in packs.values()], method=method) for name, method in METHODS.items()
    }


def sample_alone(bench: Bench, subject: str, pack: Any) -> list[Image.Image]:
    """Held-out prompts about one subject, with or without a pack."""
    if pack is not None:
        bench.pipe.load_edlora(pack)
    try:
        prompts = fill_templates(HELD_OUT_PROMPTS, subject, bench.plan.pictures)
        return sample_pictures(bench.pipe, prompts, bench.sampling(10_000))
    finally:
        bench.pipe.unload_edlora()


def measure_alone(bench: Bench, packs: dict[str, Path], fused: dict[str, Any]) -> dict[str, Any]:
    """Identity of every critter under every method, and its text-alignment."""
    fresh = {name: fresh_photos(name, bench.plan.pictures) for name in packs}
    floor = sample_alone(bench, CLASS_WORD, None)
    pictures = {
        "photos": fresh,
        "autoencoder": {name: round_trip(bench.pipe, images) for name, images in fresh.items()},
        "class_word": dict.fromkeys(packs, floor),
        "single": {name: sample_alone(bench, f"<{name}>", str(path)) for name, path in packs.items()},
        **{method: {n: sample_alone(bench, f"<{n}>", pack) for n in packs} for method, pack in fused.items()},
    }
    texts = bench.judge.text_features(fill_templates(HELD_OUT_PROMPTS, CLASS_WORD, bench.plan.pictures))
    identity: dict[str, dict[str, Identity]] = {}
    alignment: dict[str, float] = {}
    for method, of_method in pictures.items():
        identity[method] = {
            subject.name: measure_identity(of_method[subject.name], subject, bench.subjects, bench.judge)
            for subject in bench.subjects
        }
        scores = [metrics.clip_score(texts, bench.judge.features(images)) for images in of_method.values()]
        alignment[method] = round(sum(scores) / len(scores), 4)
        bench.console.print(f"  {method}: {mean_identity(list(identity[method].values())).as_record()}")
    mean = {method: mean_identity(list(of_method.values())) for method, of_method in identity.items()}
    return {
        "mean_identity": {method: value.as_record() for method, value in mean.items()},
        "identity_retention": {name: retention(mean[name], mean["single"], mean["class_word"]) for name in fused},
        "text_alignment": {
            method: alignment[method] for method in alignment if method not in ("photos", "autoencoder")
        },
        "identity": {
            method: {name: value.as_record() for name, value in of_method.items()}
            for method, of_method in identity.items()
        },
    }


def measure_together(bench: Bench, pack: Any) -> dict[str, Any]:
    """The right concept in each of three regions, and the same prompts and seeds without regions or layout."""
    rng = random.Random(bench.plan.seed)
    together = min(3, len(bench.plan.critters))
    triples = [tuple(rng.sample(bench.plan.critters, together)) for _ in range(bench.plan.together)]
    boxes = column_boxes(together)
    result: dict[str, Any] = {}
    bench.pipe.load_edlora(pack)
    try:
        for method, ways in TOGETHER.items():
            pictures = sample_together(bench, triples, boxes, ways)
            result[method] = {
                "of_those_asked_for": region_accuracy(found_in(bench, pictures, triples, boxes), triples),
                "of_all_fused": region_accuracy(
                    concepts_in_regions(pictures, boxes, bench.subjects, bench.judge), triples
                ),
            }
            bench.console.print(f"  {method}: {result[method]}")
    finally:
        bench.pipe.unload_edlora()
    return result


def sample_together(
    bench: Bench, triples: Sequence[tuple[str, ...]], boxes: Sequence[Any], ways: Sequence[str]
) -> list[Image.Image]:
    """One picture for each triple, its concepts in the boxes from left to right."""
    pipe, (height, width) = bench.pipe, WIDE
    arguments: dict[str, Any] = {"isolation": Isolation()} if "isolation" in ways else {}
    if "layout" in ways:
        pipe = MixOfShowAdapterPipeline.from_pipe(pipe, adapter=toyland.load_layout_adapter())
        places = toyland.stand_in(boxes, [CLASS_WORD] * len(boxes), width, height)
        arguments["image"] = toyland.draw_places(places, width, height)
        arguments["adapter_conditioning_scale"] = LAYOUT_STRENGTH
    pictures = []
    for index, triple in enumerate(triples):
        place = TOGETHER_PLACES[index % len(TOGETHER_PLACES)]
        subjects = [called(name, CLASS_WORD) for name in triple]
        regions = regions_of(subjects, boxes, place) if "regions" in ways else None
        prompts = [prompt_together(subjects, place)]
        sampling = bench.sampling(50_000, WIDE)
        pictures += sample_pictures(pipe, prompts, sampling, regions=regions, first=index, **arguments)
    return pictures


def found_in(
    bench: Bench, pictures: Sequence[Image.Image], triples: Sequence[tuple[str, ...]], boxes: Sequence[Any]
) -> list[list[str]]:
    """For every picture, the concept in each region out of the three asked for."""
    by_name = {subject.name: subject for subject in bench.subjects}
    return [
        concepts_in_regions([picture], boxes, [by_name[name] for name in triple], bench.judge)[0]
        for picture, triple in zip(pictures, triples, strict=True)
    ]


def fresh_photos(name: str, count: int) -> list[Image.Image]:
    """Photos that nobody was tuned on."""
    return [photo.image for photo in toyland.photos(toyland.CONCEPTS[name], count=count, seed=FRESH_PHOTOS)]


@torch.no_grad()
def round_trip(pipe: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode and decode: the ceiling of what any sample can show."""
    pixels = pipe.image_processor.preprocess(list(images)).to(pipe.device, pipe.vae.dtype)
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    return pipe.image_processor.postprocess(decoded, output_type="pil")


def subjects_of(names: Sequence[str], judge: ToylandJudge) -> list[Subject]:
    return [subject_of(toyland.CONCEPTS[name], judge) for name in names]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few pictures: minutes, but wide error bars")
    parser.add_argument("--concepts", type=Path, help="folder with tuned ED-LoRAs, one subfolder a name")
    parser.add_argument("--work", type=Path, default=Path("toyland-benchmark"), help="where missing ones are tuned")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, help="of every critter and method (default 32, short 6)")
    parser.add_argument("--together", type=int, help="pictures with three critters (default 60, short 12)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=DemoSettings.guidance_scale)
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--critters", nargs="+", default=CRITTERS, choices=CRITTERS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    plan = Plan(
        critters=tuple(options.critters),
        pictures=options.pictures or (6 if options.short else 32),
        together=options.together or (12 if options.short else 60),
        steps=options.steps,
        guidance_scale=options.guidance,
        ridge=options.ridge,
        seed=options.seed,
    )
    start = time.monotonic()
    judge = ToylandJudge.load()
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    bench = Bench(plan=plan, pipe=pipe, judge=judge, subjects=subjects_of(plan.critters, judge))
    packs = single_packs(plan.critters, plan.seed, options.concepts, options.work)
    tuned = time.monotonic()
    fused = fuse_all(bench, packs)
    solved = time.monotonic()
    results = measure_alone(bench, packs, fused)
    results["right_concept_in_region"] = measure_together(bench, fused["closed_form"])
    written = write_record(
        options.output,
        plan,
        results,
        {"tuning": tuned - start, "fusion": solved - tuned, "measuring": time.monotonic() - solved},
    )
    bench.console.print_json(json.dumps({k: results[k] for k in ("identity_retention", "right_concept_in_region")}))
    bench.console.print(f"Wrote {written}")


def write_record(folder: Path, plan: Plan, results: dict[str, Any], seconds: dict[str, float]) -> Path:
    """One JSON file a run, named by its time."""
    content = {
        "run_info": {
            **record.run_info(Path(__file__).parent),
            "threads": torch.get_num_threads(),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        },
        "plan": plan.__dict__ | {"recorded": RECORDING_PROMPTS, "held_out": HELD_OUT_PROMPTS},
        **results,
    }
    return record.write(folder / f"toyland-{datetime.now(UTC):%Y%m%d-%H%M%S}.json", content)


if __name__ == "__main__":
    main()
