"""Random layouts of two, three and four concepts on Toyland: is the right one in its region, and what leaks?

    python benchmarks/regions.py --work DIR                  # 200 layouts
    python benchmarks/regions.py --work DIR --layouts 12     # fewer; the first of the 200

Half of the layouts have no class twice, half have at least two concepts of one class. Regions are columns of random
widths, in random order. The same prompts and seeds are sampled with a plain prompt, with isolated regions whose
prompts say what a user would write or repeat their subject for every place, with drafts, refined, so on a pack fused
by weight averaging, and with a T2I-Adapter that is told where things stand. In every region the judges name the
concept, out of those asked for, and the attribute reader tells which attributes are another region's; missing is a
concept that no region of its picture shows. Every figure has its 95 % interval over pictures.

Tuned concepts, among them those that `benchmarks/toyland.py --work DIR` left, fused packs and pictures lie in the work
folder, under the hash of the settings, the weights of the base and of the concepts, and are not made again when the
command is repeated; after a change of the sampler, delete its kept-* folder. Prints Markdown tables, writes one JSON
record to benchmarks/records/ and, into the work folder, a sheet of every way's ten worst pictures with their layouts.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from judging import regions_of
from kept import Kept, markdown
from PIL import Image

from diffusers_mixofshow import (
    Draft,
    Isolation,
    MixOfShowAdapterPipeline,
    MixOfShowPipeline,
    MixOfShowWarning,
    Refinement,
    Region,
)
from diffusers_mixofshow.atomic import write_picture
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.identity import Subject, crop_region, find_concepts_in_regions, measure_in_regions
from diffusers_mixofshow.evaluation.intervals import mean_with_interval
from diffusers_mixofshow.evaluation.prompts import (
    RECORDING_PROMPTS,
    TOGETHER_PLACES,
    name_with_class,
    prompt_together,
)
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.solving import Method
from diffusers_mixofshow.regions.drawing import draw_regions
from diffusers_mixofshow.sheets import draw_labelled_sheet
from diffusers_mixofshow.toyland import CONCEPTS, draw_places, load_layout_adapter, load_pipeline, stand_in
from toyland import single_packs, subjects_of


NAMES = ("bobo", "kiki", "nono", "rex", "pixel", "ming", "neon", "throne")
COLUMN = 32
"""Pixels of width a thing: with three, the widest picture that the base was trained on."""

LAYOUT = "layout"
"""In place of a setting: a T2I-Adapter is told where things stand."""
LAYOUT_STRENGTH = 0.8
REPEATED = "repeated"
"""In place of a setting: a region's prompt names its subject for every place; else it says what a user would write."""

_BEST: dict[str, Any] = {"isolation": Isolation(), "draft": Draft(), "refine": Refinement()}
WAYS: dict[str, tuple[Method, dict[str, Any]]] = {
    "plain prompt": ("closed-form", {"regions": None}),
    "regions": ("closed-form", {"isolation": Isolation()}),
    "regions, subjects repeated": ("closed-form", {"isolation": Isolation(), REPEATED: True}),
    "regions, drafts": ("closed-form", {"isolation": Isolation(), "draft": Draft()}),
    "regions, drafts, refined": ("closed-form", _BEST),
    "the same, averaged weights": ("average", _BEST),
    "layout": ("closed-form", {"regions": None, LAYOUT: True}),
    "layout, regions, drafts, refined": ("closed-form", {LAYOUT: True} | _BEST),
}
KINDS = ("all", "every class once", "two of one class", "2 concepts", "3 concepts", "4 concepts")
"""Of layouts, each with means of its own."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One layout: the concepts from left to right, their boxes, and the words for the place."""

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    place: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of `KINDS` that it is of."""
        count = len(self.names)
        one_class = len({CONCEPTS[name].class_word for name in self.names}) < count
        return "all", "two of one class" if one_class else "every class once", f"{count} concepts"

    @property
    def prompt(self) -> str:
        """The global prompt."""
        return prompt_together(self.subjects, self.place)

    @property
    def subjects(self) -> list[str]:
        """The concepts as prompts call them."""
        return [name_with_class(name, CONCEPTS[name].class_word) for name in self.names]

    @property
    def regions(self) -> list[Region]:
        """One for each concept, which says what a user would write."""
        return [Region(f"a <{name}>, {self.place}", box=box) for name, box in zip(self.names, self.boxes, strict=True)]

    @property
    def repeated_regions(self) -> list[Region]:
        """One for each concept, which names it for every place."""
        return regions_of(self.subjects, self.boxes, self.place)

    def places(self, width: int, height: int) -> list[Box]:
        """Where its things stand, in a picture of so many pixels."""
        return stand_in(self.boxes, [CONCEPTS[name].class_word for name in self.names], width, height)


def random_names(count: int, one_class: bool, chance: random.Random) -> tuple[str, ...]:
    """Different concepts, with or without two of one class."""
    while True:
        names = tuple(chance.sample(NAMES, count))
        if (len({CONCEPTS[name].class_word for name in names}) < count) == one_class:
            return names


def random_boxes(count: int, chance: random.Random) -> tuple[Box, ...]:
    """Columns from left to right, each up to a quarter wider or narrower than an even share."""
    widths = [chance.uniform(0.75, 1.25) for _ in range(count)]
    edges = [sum(widths[:index]) / sum(widths) for index in range(count + 1)]
    return tuple((left, chance.uniform(0.15, 0.3), right, 0.97) for left, right in pairwise(edges))


def random_scenes(count: int) -> list[Scene]:
    """Scenes of two, three and four concepts in turn, half of them with two of one class."""
    chance = random.Random(0)
    return [
        Scene(
            names=random_names(2 + index % 3, index // 3 % 2 == 1, chance),
            boxes=random_boxes(2 + index % 3, chance),
            place=TOGETHER_PLACES[index % len(TOGETHER_PLACES)],
        )
        for index in range(count)
    ]


def batches(scenes: Sequence[Scene], size: int) -> Iterator[list[int]]:
    """Numbers of scenes with equally many concepts, which make pictures of one width."""
    for count in (2, 3, 4):
        alike = [index for index, scene in enumerate(scenes) if len(scene.names) == count]
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def sample_scenes(
    pipe: Any,
    scenes: Sequence[Scene],
    numbers: Sequence[int],
    settings: Mapping[str, Any],
    options: argparse.Namespace,
) -> list[Image.Image]:
    """One picture for each of some scenes with equally many concepts; the scene's number is its seed."""
    batch = [scenes[number] for number in numbers]
    height, width = 2 * COLUMN, COLUMN * len(batch[0].names)
    arguments = {"regions": [scene.regions for scene in batch]} | dict(settings)
    if arguments.pop(REPEATED, False):
        arguments["regions"] = [scene.repeated_regions for scene in batch]
    if arguments.pop(LAYOUT, False):
        pipe = MixOfShowAdapterPipeline.from_pipe(pipe, adapter=load_layout_adapter())
        pipe.set_progress_bar_config(disable=True)
        arguments["image"] = [draw_places(scene.places(width, height), width, height) for scene in batch]
        arguments["adapter_conditioning_scale"] = LAYOUT_STRENGTH
    return pipe(
        [scene.prompt for scene in batch],
        **arguments,
        negative_prompt=[""] * len(batch),
        height=height,
        width=width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=[torch.Generator().manual_seed(number) for number in numbers],
    ).images


def fused_pack(fuser: GradientFuser, packs: Sequence[Path], method: Method, kept: Kept) -> Path:
    """All concepts in one pack, which is kept."""
    folder = kept.folder / f"fused-{method}"
    if not (folder / "edlora.safetensors").exists():
        print(f"Fusing {len(packs)} concepts, {method}", flush=True)
        fuser.fuse([str(pack) for pack in packs], method=method).save_pretrained(folder)
    return folder


def judge_picture(
    picture: Image.Image, scene: Scene, subjects: Mapping[str, Subject], judge: ToylandJudge
) -> dict[str, float]:
    """Shares of right regions, missing concepts, right attributes and leaked ones, of one picture."""
    asked = [subjects[name] for name in scene.names]
    (found,) = find_concepts_in_regions([picture], scene.boxes, asked, judge)
    read = judge.read([crop_region(picture, box) for box in scene.boxes])
    right = leaked = attributes = others_differ = 0
    for own, seen in zip(asked, read, strict=True):
        for name, value in own.attributes.items():
            foreign = {other.attributes[name] for other in asked if name in other.attributes} - {value}
            right += seen[name] == value
            attributes += 1
            leaked += seen[name] in foreign
            others_differ += bool(foreign)
    return {
        "right": sum(map(str.__eq__, found, scene.names)) / len(asked),
        "missing": len(set(scene.names) - set(found)) / len(asked),
        "likeness": measure_in_regions(picture, scene.boxes, asked, judge).likeness,
        "attributes": right / attributes,
        "leaked": leaked / max(1, others_differ),
    }


def mean_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean of every measure over pictures, with its interval."""
    values = {name: [row[name] for row in rows] for name in rows[0]}
    values |= {"whole_pictures": [float(row["right"] == 1) for row in rows]}
    return {name: mean_with_interval(each) for name, each in values.items()}


def summarise(scenes: Sequence[Scene], rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """All pictures, and those with and without two concepts of one class, and by number of concepts."""
    chosen = {kind: [row for row, scene in zip(rows, scenes, strict=True) if kind in scene.kinds] for kind in KINDS}
    return {kind: mean_rows(of_kind) for kind, of_kind in chosen.items() if of_kind}


def worst_sheet(
    pictures: Sequence[Image.Image], scenes: Sequence[Scene], rows: Sequence[Mapping[str, float]]
) -> Image.Image:
    """The ten worst pictures, each beside itself under its layout, with what was asked for and what was found."""
    order = sorted(range(len(rows)), key=lambda number: (rows[number]["right"], rows[number]["attributes"]))[:10]
    lines = {}
    for number in order:
        scene, row = scenes[number], rows[number]
        label = "\n".join(
            [
                f"layout {number}: {', '.join(scene.names)}",
                f"{scene.place}",
                f"right regions {row['right']:.0%}",
                f"right attributes {row['attributes']:.0%}",
                f"leaked {row['leaked']:.0%}",
            ]
        )
        large = pictures[number].resize((3 * pictures[number].width, 3 * pictures[number].height))
        named = [replace(each, prompt=name) for each, name in zip(scene.regions, scene.names, strict=True)]
        lines[label] = [large, draw_regions(named, large)]
    return draw_labelled_sheet(lines)


def tables(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The results as Markdown: a table of all ways, and one of right concepts by kind of layout."""
    measures = {
        "right concept in its region": "right",
        "all right in a picture": "whole_pictures",
        "missing": "missing",
        "right attributes": "attributes",
        "likeness": "likeness",
        "attributes of another region": "leaked",
    }
    every = {way: [told(rows["all"][key]) for key in measures.values()] for way, rows in results.items()}
    groups = list(next(iter(results.values())))[1:]
    cells = {way: [told(rows[group]["right"]) for group in groups] for way, rows in results.items()}
    return f"{markdown(list(measures), every)}\n\nRight concept:\n\n{markdown(groups, cells)}"


def told(value: Mapping[str, float]) -> str:
    """Per cent, with the interval."""
    return f"{100 * value['mean']:.0f} % ({100 * value['low']:.0f} to {100 * value['high']:.0f})"


def measure(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Every way on every layout; what is finished is not done again."""
    scenes, judge = random_scenes(options.layouts), ToylandJudge.load()
    subjects = {subject.name: subject for subject in subjects_of(NAMES, judge)}
    packs = list(single_packs(NAMES, 0, options.concepts, options.work).values())
    plan = {"steps": options.steps, "guidance": options.guidance, "recorded": RECORDING_PROMPTS}
    plan |= {"ways": repr(WAYS), "scenes": [repr(scene) for scene in scenes[:1]]}
    kept = Kept(options.work, plan, [folder / "edlora.safetensors" for folder in packs])
    fuser = GradientFuser(pipe, prompts=RECORDING_PROMPTS, guidance_scale=options.guidance, batch_size=8)
    results = {}
    for way in options.ways:
        method, settings = WAYS[way]
        pipe.load_edlora(fused_pack(fuser, packs, method, kept))
        pictures = kept.pictures(
            way,
            list(batches(scenes, 8)),
            lambda numbers: sample_scenes(pipe, scenes, numbers, settings, options),  # noqa: B023
        )
        pipe.unload_edlora()
        pairs = zip(pictures, scenes, strict=True)
        rows = [judge_picture(picture, scene, subjects, judge) for picture, scene in pairs]
        results[way] = summarise(scenes, rows)
        write_picture(kept.picture_path(way, 0).parent.with_suffix(".png"), worst_sheet(pictures, scenes, rows))
        print(f"{way:34}", "  ".join(f"{name} {told(each)}" for name, each in results[way]["all"].items()), flush=True)
    print(f"Pictures and sheets of each way's ten worst: {kept.folder}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("toyland-benchmark"), help="holds whatever is finished")
    parser.add_argument("--concepts", type=Path, help="folder with tuned ED-LoRAs, one subfolder a name")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "regions.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", MixOfShowWarning)
    pipe = load_pipeline(MixOfShowPipeline)
    pipe.set_progress_bar_config(disable=True)
    results = measure(pipe, options)
    plan = {"layouts": options.layouts, "steps": options.steps, "guidance": options.guidance, "concepts": NAMES}
    content = {"run": record.run_info(Path(__file__).parent), "settings": plan, "results": results}
    print(tables(results))
    print(f"Record: {record.write(options.record, content)}")


if __name__ == "__main__":
    main()
