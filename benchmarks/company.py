"""Which company in training keeps a concept's looks beside others: ``python benchmarks/company.py --work DIR``.

Critters are tuned as the package does, on photos and on pictures composed of themselves at two places, and again with
every second composed picture changed: the concept beside a cut-out of another critter's photo, or beside a critter
that the base drew. So many steps and composed pictures each time. Then looks are read: alone, twice in a picture,
behind a stranger, and in regions (drafts, refined) of a pack with the other critters, which are tuned as the package
does. Figures have their 95 % interval over pictures.

What is tuned stays in the work folder, beside what `benchmarks/toyland.py --work DIR` left. Prints a Markdown table
and writes one JSON record.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_mixofshow import EDLoRATrainer, MixOfShowPipeline, TrainingConfig, toyland
from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.concepts import replace_mention
from diffusers_mixofshow.demo.photos import prepare_photos
from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.identity import Box, crop_region
from diffusers_mixofshow.evaluation.intervals import mean_with_interval
from diffusers_mixofshow.evaluation.prompts import TOGETHER_PLACES, column_boxes, name_with_class, prompt_together
from diffusers_mixofshow.evaluation.sampling import sample_pictures
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.training import company, trainer
from diffusers_mixofshow.training.data import read_photos
from diffusers_mixofshow.training.pictures import Photo
from toyland import (
    CLASS_WORD,
    CRITTERS,
    TOGETHER,
    Bench,
    Plan,
    fuse_all,
    sample_together,
    single_packs,
    subjects_of,
)


ITSELF, ANOTHER, DRAWN = "itself", "itself, another's photos", "itself, the base's pictures"
REGIONS = TOGETHER["natural, drafts, refined"]


def beside_another(ground: Photo, masked: Sequence[Photo], others: Sequence[Photo], chance: random.Random) -> Any:
    """The concept and a cut-out of another photo in front of the ground; picture, mask, what is known, own place."""
    image, known = company._remove_subject(ground)
    mask, own = Image.new("L", image.size), chance.randrange(2)
    for place in range(2):
        cutout = company._cut_out(chance.choice(masked if place == own else others))
        paste(image, mask if place == own else None, known, cutout, place, chance)
    return image, mask, known, own


def beside_drawn(drawn: Image.Image, masked: Sequence[Photo], chance: random.Random) -> Any:
    """The concept in one half of a picture of the base, whose own subject moves into the other half."""
    own, side = chance.randrange(2), drawn.width
    shift = side // 4 if own == 0 else -(side // 4)
    image = Image.new("RGB", drawn.size)
    edge = drawn.crop((0, 0, 1, side) if own == 0 else (side - 1, 0, side, side)).resize(drawn.size)
    image.paste(edge)
    image.paste(drawn, (shift, 0))
    mask, known = Image.new("L", drawn.size), Image.new("L", drawn.size, 255)
    paste(image, mask, known, company._cut_out(chance.choice(masked)), own, chance)
    return image, mask, known, own


def paste(image: Any, mask: Any, known: Any, cutout: Any, place: int, chance: random.Random) -> None:
    left, top, size = company._place_cutout(cutout, image.width, place, chance)
    shape = cutout.mask.resize(size, Image.Resampling.BOX)
    image.paste(cutout.image.resize(size, Image.Resampling.LANCZOS), (left, top), shape)
    known.paste(255, (left, top, left + size[0], top + size[1]), shape)
    if mask is not None:
        mask.paste(shape, (left, top), shape)


def composer(variant: str, others: Sequence[Photo], drawn: Sequence[Image.Image]) -> Callable[..., list[Photo]]:
    """What stands for `compose_company`: every second picture shows other company."""

    def compose(photos: Sequence[Photo], config: TrainingConfig) -> list[Photo]:
        concept, chance = config.concept_to_learn, random.Random(config.seed + 1)
        masked = [photo for photo in photos if photo.mask is not None]
        result = company.compose_company(photos, config)
        for number in range(0, len(result), 2):
            ground = chance.choice(masked)
            if variant == ANOTHER:
                made = beside_another(ground, masked, others, chance)
            else:
                made = beside_drawn(drawn[number // 2 % len(drawn)].resize((64, 64)), masked, chance)
            image, mask, known, own = made
            names = [f"a {concept.placeholder}", f"a {CLASS_WORD}"]
            together = "{} and {}".format(*(names if own == 0 else names[::-1]))
            captions = (
                ground.captions
                if variant == ANOTHER
                else (f"a {concept.placeholder} {TOGETHER_PLACES[number // 2 % len(TOGETHER_PLACES)]}",)
            )
            told = tuple(replace_mention(text, [concept], lambda *_, so=together: so) for text in captions)
            result[number] = Photo(path=ground.path, image=image, captions=told, mask=mask, known=known)
        return result

    return compose


def tuned(bench: Bench, name: str, variant: str, work: Path) -> Path:
    """The ED-LoRA of a critter tuned in other company, in the work folder."""
    output = work / f"company-{variant.replace(' ', '-').replace(',', '').replace(chr(39), '')}" / name
    if (output / "edlora.safetensors").exists():
        return output
    other = next(each for each in CRITTERS if each != name)
    settings = DemoSettings(folder=work, concepts=(name, other), seed=bench.plan.seed)
    folders = {each.name: each for each in prepare_photos(settings)}
    config = TrainingConfig.toyland(
        instance_data_dir=str(folders[name].folder), concept=name, class_word=CLASS_WORD, kind=folders[name].kind,
        output_dir=str(output), seed=bench.plan.seed, num_validation_images=0,
    )  # fmt: skip
    others = read_photos(folders[other].folder, config.concept_to_learn, caption_column=None)
    prompts = [f"a {CLASS_WORD} {place}" for place in TOGETHER_PLACES]
    drawn = sample_pictures(bench.pipe, prompts, bench.sampling(80_000)) if variant == DRAWN else []
    usual, trainer.compose_company = trainer.compose_company, composer(variant, others, drawn)
    try:
        EDLoRATrainer(config).train()
    finally:
        trainer.compose_company = usual
    return output


def looks(bench: Bench, pictures: Sequence[Image.Image], name: str, box: Box | None = None) -> list[float]:
    """Share of the critter's attributes read right in every picture, or in one box of it."""
    (subject,) = (each for each in bench.subjects if each.name == name)
    seen = [picture if box is None else crop_region(picture, box) for picture in pictures]
    return [metrics.attribute_accuracy([read], subject.attributes) for read in bench.judge.read(seen)]


def measure(bench: Bench, packs: dict[str, Path], names: Sequence[str]) -> dict[str, list[float]]:
    """Looks of the critters under every prompt, and in regions of the pack that all of them make."""
    found: dict[str, list[float]] = {}
    left, right = column_boxes(2)
    count, places = bench.plan.pictures, TOGETHER_PLACES
    for name in names:
        subject = name_with_class(name, CLASS_WORD)
        asked: list[tuple[list[str], dict[str, Box | None]]] = [
            ([subject], {"alone": None}),
            ([subject] * 2, {"twice, left": left, "twice, right": right}),
            (["a red critter", subject], {"behind a stranger": right}),
        ]
        for together, boxes in asked:
            prompts = [prompt_together(together, places[index % len(places)]) for index in range(count)]
            bench.pipe.load_edlora(str(packs[name]))
            pictures = sample_pictures(bench.pipe, prompts, bench.sampling(10_000))
            bench.pipe.unload_edlora()
            for told, box in boxes.items():
                found.setdefault(told, []).extend(looks(bench, pictures, name, box))
    if bench.plan.together:
        found["in regions, fused"] = looks_in_regions(bench, packs, names)
    return found


def looks_in_regions(bench: Bench, packs: dict[str, Path], names: Sequence[str]) -> list[float]:
    """Looks of the critters, in the mean of each picture, where they stand among others of the pack that all make."""
    rng = random.Random(bench.plan.seed)
    groups: list[tuple[str, ...]] = []
    while len(groups) < bench.plan.together:
        group = tuple(rng.sample(CRITTERS, 3))
        groups += [group] if set(group) & set(names) else []
    bench.pipe.load_edlora(fuse_all(bench, packs)["closed_form"])
    pictures = sample_together(bench, groups, REGIONS)
    bench.pipe.unload_edlora()
    shown = []
    for picture, group in zip(pictures, groups, strict=True):
        own = [
            looks(bench, [picture], name, box)[0]
            for name, box in zip(group, column_boxes(3), strict=True)
            if name in names
        ]
        shown.append(sum(own) / len(own))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("toyland-benchmark"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "records")
    parser.add_argument("--critters", nargs="+", default=("kiki", "bobo"), choices=CRITTERS)
    parser.add_argument("--beside", nargs="+", default=(ANOTHER, DRAWN), choices=(ANOTHER, DRAWN))
    parser.add_argument("--pictures", type=int, default=24, help="of every critter and prompt")
    parser.add_argument("--together", type=int, default=24, help="pictures in regions; 0 fuses nothing")
    options = parser.parse_args()
    plan = Plan(
        critters=CRITTERS, pictures=options.pictures, together=options.together, five=0, contact=0, steps=20,
        guidance_scale=DemoSettings.guidance_scale, ridge=None, seed=0, base=TOYLAND,
    )  # fmt: skip
    judge = ToylandJudge.load()
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    bench = Bench(plan=plan, pipe=pipe, judge=judge, subjects=subjects_of(CRITTERS, judge))
    usual = single_packs(CRITTERS, plan.seed, options.work / "concepts", options.work)
    ways = {ITSELF: usual}
    for variant in options.beside:
        ways[variant] = usual | {name: tuned(bench, name, variant, options.work) for name in options.critters}
    results: dict[str, Any] = {}
    for variant, packs in ways.items():
        found = measure(bench, packs, options.critters)
        results[variant] = {way: mean_with_interval(values) for way, values in found.items()}
        cells = [f"{each['mean']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for each in results[variant].values()]
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)
    print("| tuned beside |", " | ".join(results[ITSELF]), "|")
    content = {
        "run_info": record.run_info(Path(__file__).parent),
        "critters": list(options.critters),
        "looks": results,
    }
    print(record.write(options.output / f"company-{datetime.now(UTC):%Y%m%d-%H%M%S}.json", content))


if __name__ == "__main__":
    main()
