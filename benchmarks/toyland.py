"""Measure gradient fusion and regional sampling on Toyland: ``python benchmarks/toyland.py [--short]``.

Eight critters, the same class on purpose, are tuned (or taken from ``--concepts DIR``), fused into one pack by the
closed form and by weight averaging, and sampled with prompts that fusion never recorded. Three at a time, they are
sampled in several ways by the same prompts and seeds; beside them stand the same three as the world draws them, seen
through the autoencoder. Then five at a time, in a picture wider than any that the base has seen, with who was found
where whom was asked for; and two whose regions overlap by 10 to 40 %, the right one in front. Every figure of places
has its 95 % interval over pictures. One JSON record a run, and into the work folder a sheet of every way's first
pictures and the confusion as a picture.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from judging import confusion, regions_of, subject_of, summarise_regions
from PIL import Image, ImageDraw
from rich.console import Console

from diffusers_mixofshow import toyland
from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.base_models import TOYLAND, TOYLAND_XL, embedded_base
from diffusers_mixofshow.demo.photos import prepare_photos
from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.demo.tuning import tune_all
from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.identity import (
    NOBODY,
    Box,
    Identity,
    Subject,
    find_concepts_in_regions,
    mean_identity,
    measure_identity,
    measure_in_regions,
    retention,
)
from diffusers_mixofshow.evaluation.intervals import mean_with_interval
from diffusers_mixofshow.evaluation.prompts import (
    HELD_OUT_PROMPTS,
    RECORDING_PROMPTS,
    TOGETHER_PLACES,
    column_boxes,
    name_with_class,
    prompt_together,
)
from diffusers_mixofshow.evaluation.sampling import Sampling, fill_templates, sample_pictures
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.solving import Method
from diffusers_mixofshow.pipelines import MixOfShowAdapterPipeline
from diffusers_mixofshow.regions import Draft, Isolation, Refinement, Region
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.sheets import draw_labelled_sheet
from diffusers_mixofshow.toyland.concepts import as_thing
from diffusers_mixofshow.toyland.scenes import place_thing
from diffusers_mixofshow.toyland.world import BACKGROUNDS, HEIGHT, Scene, draw


CRITTERS = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "nono", "vivi")
CLASS_WORD = "critter"
METHODS: dict[str, Method] = {"average": "average", "closed_form": "closed-form"}
REPEATED, NATURAL = "repeated", "natural"
"""What a region's prompt says: its subject once for every place, or what a user would write."""
TOGETHER: dict[str, dict[str, Any]] = {
    "one prompt": {},
    "natural": {"wording": NATURAL},
    "repeated": {"wording": REPEATED},
    "natural, drafts": {"wording": NATURAL, "draft": Draft()},
    "natural, drafts, refined": {"wording": NATURAL, "draft": Draft(), "refine": Refinement()},
    "natural, each alone": {"wording": NATURAL, "refine": Refinement(strength=1.0, steps=20)},
    "layout": {"layout": True},
    "layout, natural": {"layout": True, "wording": NATURAL},
    "layout, repeated": {"layout": True, "wording": REPEATED},
    "layout, natural, drafts, refined": {"layout": True, "wording": NATURAL, "draft": Draft(), "refine": Refinement()},
}
"""How critters are sampled together; with a wording in isolated regions. A layout is a T2I-Adapter's that sees where
things stand. Each alone: nothing of the picture is left in its regions, each is drawn from noise at the size that the
model knows, and pasted, so that no company can disturb it."""
UNDRAWN = "nono"
"""The critter whose lime the base was never shown; places are summed up without it as well."""
LAYOUT_STRENGTH = 0.8
FRESH_PHOTOS = 99
COLUMN = 0.5
"""Width a thing, in heights of the picture."""
OVERLAPS = (0.1, 0.2, 0.3, 0.4)
"""Of two regions, as fractions of the width of one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is sampled."""

    critters: tuple[str, ...]
    pictures: int
    together: int
    five: int
    contact: int
    steps: int
    guidance_scale: float
    ridge: float | None
    seed: int
    base: str


@dataclass
class Bench:
    """Everything that the measurements share."""

    plan: Plan
    pipe: Any
    judge: ToylandJudge
    subjects: list[Subject]
    console: Console = field(default_factory=Console)

    @property
    def height(self) -> int:
        """Pixels of the base's pictures."""
        base = embedded_base(self.plan.base)
        return HEIGHT if base is None else base.least_resolution

    def width(self, things: int) -> int:
        """Pixels of a picture of so many things."""
        return round(COLUMN * self.height * things)

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


def single_packs(
    names: Sequence[str], seed: int, concepts: Path | None, work: Path, base: str = TOYLAND
) -> dict[str, Path]:
    """ED-LoRAs by name: from the given folder where they are there, else tuned in the work folder."""
    given = {} if concepts is None else {name: concepts / name for name in names}
    found = {name: folder for name, folder in given.items() if (folder / "edlora.safetensors").exists()}
    missing = tuple(name for name in names if name not in found)
    if missing and base != TOYLAND:
        raise SystemExit(
            f"No ED-LoRAs of {base} for {', '.join(missing)}. Tune them by benchmarks/retention.py --base "
            f"{base} --work WORK, and give --concepts WORK/concepts."
        )
    if missing:
        # DemoSettings asks for two concepts at least.
        tuned = missing if len(missing) > 1 else (*missing, next(name for name in CRITTERS if name not in missing))
        settings = DemoSettings(folder=work, concepts=tuned, seed=seed)

        def on_step(name: str, step: int, total: int, loss: float) -> None:
            if step % 50 == 0 or step == total:
                print(f"  {name} {step}/{total} loss {loss:.3f}", flush=True)

        found |= tune_all(prepare_photos(settings), settings, on_step)
    return {name: found[name] for name in names}


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
    fresh = {name: fresh_photos(bench, name) for name in packs}
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


def measure_together(bench: Bench, pack: Any, work: Path, ways: Sequence[str]) -> dict[str, Any]:
    """Several concepts in one picture, by some of the ways, and as the world draws them."""
    rng = random.Random(bench.plan.seed)
    groups = {
        count: [tuple(rng.sample(bench.plan.critters, count)) for _ in range(pictures)]
        for count, pictures in ((3, bench.plan.together), (5, bench.plan.five))
        if count <= len(bench.plan.critters)
    }
    result: dict[str, Any] = {}
    bench.pipe.load_edlora(pack)
    try:
        for count, names in groups.items():
            shown = {"drawn": [drawn_together(bench, each, index) for index, each in enumerate(names)]}
            for way in ways:
                if count == 3 or way == "natural, drafts, refined":
                    shown[way] = sample_together(bench, names, TOGETHER[way])
                    result[f"{count}, {way}"] = judge_together(bench, f"{count}, {way}", shown[way], names, work)
            result[f"{count}, drawn"] = judge_together(bench, f"{count}, drawn", shown["drawn"], names, work)
    finally:
        bench.pipe.unload_edlora()
    return result


def measure_contact(bench: Bench, pack: Any, work: Path) -> dict[str, Any]:
    """Two concepts whose regions overlap, the right one in front, with drafts and without, and as the world draws."""
    rng = random.Random(bench.plan.seed)
    pairs = [tuple(rng.sample(bench.plan.critters, 2)) for _ in range(bench.plan.contact)]
    result: dict[str, Any] = {}
    bench.pipe.load_edlora(pack)
    try:
        for overlap in OVERLAPS:
            boxes = overlapping_boxes(overlap)
            ways = {
                "natural": {"wording": NATURAL},
                "natural, drafts, refined": TOGETHER["natural, drafts, refined"],
            }
            shown = {way: sample_together(bench, pairs, settings, boxes) for way, settings in ways.items()}
            shown["drawn"] = [drawn_together(bench, each, index, boxes) for index, each in enumerate(pairs)]
            for way, pictures in shown.items():
                called_so = f"overlap {overlap:.0%}, {way}"
                result[called_so] = judge_together(bench, called_so, pictures, pairs, work, boxes)
    finally:
        bench.pipe.unload_edlora()
    return result


def overlapping_boxes(overlap: float) -> list[Box]:
    """Two columns as wide as the picture together, which share so much of their width."""
    width, (_, top, _, bottom) = 1 / (2 - overlap), column_boxes(1)[0]
    return [(0.0, top, width, bottom), (1 - width, top, 1.0, bottom)]


def judge_together(
    bench: Bench,
    way: str,
    pictures: Sequence[Image.Image],
    names: Sequence[tuple[str, ...]],
    work: Path,
    boxes: Sequence[Box] | None = None,
) -> dict[str, Any]:
    """Every measure of places, and who was found where whom was asked for."""
    by_name = {subject.name: subject for subject in bench.subjects}
    boxes = boxes or column_boxes(len(names[0]))
    judged = [
        measure_in_regions(picture, boxes, [by_name[name] for name in asked], bench.judge)
        for picture, asked in zip(pictures, names, strict=True)
    ]
    summary = summarise_regions(judged)
    bench.console.print(f"  {way:36}", "  ".join(told(name, each) for name, each in summary.items()))
    rows = {f"{first + 1} to {first + 4}": list(pictures[first : first + 4]) for first in (0, 4, 8)}
    write_picture(work / f"together-{way.replace(', ', '-').replace(' ', '-')}.png", draw_labelled_sheet(rows))
    of_all = [find_concepts_in_regions([picture], boxes, bench.subjects, bench.judge)[0] for picture in pictures]
    everyone = [replace(each, found=tuple(found)) for each, found in zip(judged, of_all, strict=True)]
    counts = confusion(everyone, names)
    shares = [sum(map(str.__eq__, found, asked)) / len(asked) for found, asked in zip(of_all, names, strict=True)]
    right = mean_with_interval(shares)
    bench.console.print(f"  {'  of all fused':36}", told("right", right))
    others = [each for each, asked in zip(judged, names, strict=True) if UNDRAWN not in asked]
    without = summarise_regions(others) if others else {}
    bench.console.print(
        f"  {f'  without {UNDRAWN} ({len(others)})':36}", "  ".join(told(*each) for each in without.items())
    )
    write_picture(work / f"confusion-{way.replace(', ', '-').replace(' ', '-')}.png", draw_confusion(counts))
    return summary | {"right_of_all_fused": right, "found_of_all_fused": counts, f"without_{UNDRAWN}": without}


def told(name: str, value: dict[str, float]) -> str:
    return f"{name} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def draw_confusion(counts: dict[str, dict[str, int]]) -> Image.Image:
    """Rows: asked for; columns: found; the darker, the more often; the last column is no concept's class."""
    names, cell = sorted(counts), 44
    columns = [*names, NOBODY]
    image = Image.new("RGB", (cell * (len(columns) + 2), cell * (len(names) + 1)), "white")
    pen = ImageDraw.Draw(image)
    for number, name in enumerate(columns):
        pen.text((cell * (number + 2) + cell // 2, cell // 2), name or "none", "black", anchor="mm")
    for row, name in enumerate(names):
        pen.text((cell, cell * (row + 1) + cell // 2), name, "black", anchor="mm")
        total = sum(counts[name].values())
        for number, found in enumerate(columns):
            share = counts[name].get(found, 0) / total
            left, top = cell * (number + 2), cell * (row + 1)
            pen.rectangle((left, top, left + cell - 2, top + cell - 2), tuple([round(255 * (1 - share))] * 3))
            colour = "white" if share > 0.5 else "black"
            pen.text((left + cell // 2, top + cell // 2), f"{100 * share:.0f}", colour, anchor="mm")
    return image


def sample_together(
    bench: Bench,
    groups: Sequence[tuple[str, ...]],
    settings: dict[str, Any],
    boxes: Sequence[Box] | None = None,
) -> list[Image.Image]:
    """One picture for each group of concepts, in columns from left to right or in other boxes, the last in front."""
    pipe, settings = bench.pipe, dict(settings)
    boxes = boxes or column_boxes(len(groups[0]))
    height, width = bench.height, bench.width(len(boxes))
    wording = settings.pop("wording", None)
    if settings.pop("layout", False):
        pipe = MixOfShowAdapterPipeline.from_pipe(pipe, adapter=toyland.load_layout_adapter())
        places = toyland.stand_in(boxes, [CLASS_WORD] * len(boxes), width, height)
        settings |= {"image": toyland.draw_places(places, width, height)}
        settings |= {"adapter_conditioning_scale": LAYOUT_STRENGTH}
    if wording:
        settings["isolation"] = Isolation()
    pictures = []
    for index, names in enumerate(groups):
        place = TOGETHER_PLACES[index % len(TOGETHER_PLACES)]
        subjects = [name_with_class(name, CLASS_WORD) for name in names]
        natural = [
            Region(f"a <{name}>, {place}", box=box, order=order)
            for order, (name, box) in enumerate(zip(names, boxes, strict=True))
        ]
        regions = {NATURAL: natural, REPEATED: regions_of(subjects, boxes, place), None: None}[wording]
        prompts = [prompt_together(subjects, place)]
        sampling = bench.sampling(50_000, (height, width))
        pictures += sample_pictures(pipe, prompts, sampling, regions=regions, first=index, **settings)
    return pictures


def drawn_together(bench: Bench, names: Sequence[str], seed: int, boxes: Sequence[Box] | None = None) -> Image.Image:
    """The concepts side by side as the world draws them, seen through the autoencoder: no sample can be better."""
    rng, width = random.Random(seed), round(COLUMN * HEIGHT * len(names))
    things = [
        place_thing(as_thing(toyland.CONCEPTS[name]), rng, slot=slot, slots=len(names), width=width)
        for slot, name in enumerate(names)
    ]
    if boxes:
        things = [
            replace(thing, centre=(left + right) / 2) for thing, (left, _, right, _) in zip(things, boxes, strict=True)
        ]
    scene = Scene(background=rng.choice(BACKGROUNDS), things=tuple(things), width=width)
    return round_trip(bench.pipe, [draw(scene, bench.height).image])[0]


def fresh_photos(bench: Bench, name: str) -> list[Image.Image]:
    """Photos that nobody was tuned on."""
    concept, count = toyland.CONCEPTS[name], bench.plan.pictures
    return [photo.image for photo in toyland.photos(concept, count=count, seed=FRESH_PHOTOS, height=bench.height)]


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
    parser.add_argument("--five", type=int, help="pictures with five critters (default 30, short 6)")
    parser.add_argument("--contact", type=int, help="pictures of each overlap (default 20, short 6)")
    parser.add_argument("--only", choices=("alone", "together", "contact"), nargs="+", help="leave out the rest")
    parser.add_argument(
        "--ways", choices=tuple(TOGETHER), nargs="+", help="of several critters (default all that the base can do)"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=DemoSettings.guidance_scale)
    parser.add_argument("--ridge", type=float, help="the package's default by default")
    parser.add_argument("--critters", nargs="+", default=CRITTERS, choices=CRITTERS)
    parser.add_argument("--base", choices=(TOYLAND, TOYLAND_XL), default=TOYLAND)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    plan = Plan(
        critters=tuple(options.critters),
        pictures=options.pictures or (6 if options.short else 32),
        together=options.together or (12 if options.short else 60),
        five=options.five or (6 if options.short else 30),
        contact=options.contact or (6 if options.short else 20),
        steps=options.steps,
        guidance_scale=options.guidance,
        ridge=options.ridge,
        seed=options.seed,
        base=options.base,
    )
    ways = options.ways or [way for way in TOGETHER if plan.base == TOYLAND or "layout" not in TOGETHER[way]]
    if plan.base != TOYLAND and any("layout" in TOGETHER[way] for way in ways):
        raise SystemExit(f"There is no layout adapter for {plan.base}: choose --ways without a layout.")
    start = time.monotonic()
    judge = ToylandJudge.load()
    pipe = load_base(plan.base, "cpu", "float32", concepts=True)
    bench = Bench(plan=plan, pipe=pipe, judge=judge, subjects=subjects_of(plan.critters, judge))
    packs = single_packs(plan.critters, plan.seed, options.concepts, options.work, plan.base)
    tuned = time.monotonic()
    fused = fuse_all(bench, packs)
    solved = time.monotonic()
    wanted, results = options.only or ("alone", "together", "contact"), dict[str, Any]()
    if "alone" in wanted:
        results |= measure_alone(bench, packs, fused)
    if "together" in wanted:
        results["together"] = measure_together(bench, fused["closed_form"], options.work, ways)
    if "contact" in wanted:
        results["contact"] = measure_contact(bench, fused["closed_form"], options.work)
    written = write_record(
        options.output,
        plan,
        results,
        {"tuning": tuned - start, "fusion": solved - tuned, "measuring": time.monotonic() - solved},
    )
    bench.console.print_json(json.dumps(results.get("identity_retention", {})))
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
