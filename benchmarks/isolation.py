"""What keeps attributes in their regions on Toyland's base, without any concept.

Isolation in self-attention, and, where regions leave a part to the global prompt (half weights, or half of the steps),
a second region below each, whose prompt is the global one without the other things.

    python benchmarks/isolation.py --work DIR                # 20 layouts of two things each, about a minute on a CPU
    python benchmarks/isolation.py --work DIR --layouts 200 --things 3

Every layout has things of different classes and colours in columns, one region each ("a red chair"). The attribute
reader looks at each region: is the class the right one, and the colour; and is the colour another region's, so that it
has leaked. The same prompts and seeds are sampled each way. Finished layouts lie in the work folder, under the hash of
the settings and the base's weights, and are not sampled again; after a change of the sampler, delete its kept-*
folder. Shares of regions have their 95 % interval over layouts. Prints a Markdown table and writes one JSON record to
benchmarks/records/.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from kept import Kept, markdown
from PIL import Image
from rich.progress import track

from diffusers_mixofshow import Isolation, MixOfShowPipeline, MixOfShowWarning, Region
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.identity import crop_region
from diffusers_mixofshow.evaluation.intervals import mean_with_interval
from diffusers_mixofshow.evaluation.prompts import TOGETHER_PLACES, column_boxes
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.toyland import load_pipeline
from diffusers_mixofshow.toyland.world import CLASSES, MAIN_COLOURS


RECORDS = Path(__file__).parent / "records"
WAYS: dict[str, dict[str, Any]] = {
    "no regions": {"regions": None},
    "regions": {},
    "isolation, all steps": {"isolation": Isolation()},
    "isolation, first half": {"isolation": Isolation(end=0.5)},
    "isolation, largest maps": {"isolation": Isolation(scales=(2,))},
}
# What a region leaves to whatever is below it, and what the region below it has then.
PARTIAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "half weight": ({"weight": 0.5}, {"weight": 0.5}),
    "first half of the steps": ({"end": 0.5}, {"start": 0.5}),
}
MEASURES = ("class", "colour", "leaked")
Thing = tuple[str, str]


def random_things(count: int, chance: random.Random) -> list[Thing]:
    """Class and colour of different things, no class and no colour twice."""
    while True:
        classes = chance.sample(sorted(CLASSES), count)
        colours = [chance.choice(MAIN_COLOURS[name]) for name in classes]
        if len(set(colours)) == count:
            return list(zip(classes, colours, strict=True))


def sample_scene(pipe: Any, number: int, things: list[Thing], options: argparse.Namespace) -> dict[str, Image.Image]:
    """One layout sampled each way; its number is the seed and says the place."""
    names = [f"a {colour} {name}" for name, colour in things]
    place = TOGETHER_PLACES[number % len(TOGETHER_PLACES)]
    prompt = f"{', '.join(names[:-1])} and {names[-1]} {place}"
    boxes = column_boxes(len(things))
    call: dict[str, Any] = {"height": 64, "width": 64 * (2 + (len(things) > 2))}
    call |= {"guidance_scale": options.guidance, "num_inference_steps": options.steps}
    call["regions"] = [Region(name, box=box) for name, box in zip(names, boxes, strict=True)]
    return {
        way: pipe(prompt, **call | settings, generator=torch.Generator().manual_seed(number)).images[0]
        for way, settings in (WAYS | partial_ways(names, boxes, place)).items()
    }


def partial_ways(names: list[str], boxes: list[Any], place: str) -> dict[str, dict[str, Any]]:
    """Regions that leave a part to the global prompt, alone and each with its own version of that prompt below."""
    ways: dict[str, dict[str, Any]] = {}
    for what, (own, below) in PARTIAL.items():
        above = [Region(name, box=box, **own) for name, box in zip(names, boxes, strict=True)]
        under = [Region(f"{name} {place}", box=box, **below) for name, box in zip(names, boxes, strict=True)]
        ways |= {
            f"regions, {what}": {"regions": above},
            f"regions, {what}, others left out below": {"regions": above + under},
        }
    return ways


def read_scene(
    things: list[Thing], pictures: dict[str, Image.Image], judge: ToylandJudge
) -> dict[str, dict[str, int]]:
    """For each way, how many regions have the right class, the right colour, and another region's colour."""
    boxes, counts = column_boxes(len(things)), {}
    for way, picture in pictures.items():
        counts[way] = dict.fromkeys(MEASURES, 0)
        for (right_class, right_colour), seen in zip(
            things, judge.read([crop_region(picture, box) for box in boxes]), strict=True
        ):
            others = {colour for _, colour in things if colour != right_colour}
            counts[way]["class"] += seen["class"] == right_class
            counts[way]["colour"] += seen["colour"] == right_colour
            counts[way]["leaked"] += seen["colour"] in others
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("toyland-benchmark"), help="holds whatever is finished")
    parser.add_argument("--layouts", type=int, default=20)
    parser.add_argument("--things", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--record", type=Path, help="where to write the record")
    options = parser.parse_args()
    warnings.simplefilter("ignore", MixOfShowWarning)
    pipe = load_pipeline(MixOfShowPipeline)
    pipe.set_progress_bar_config(disable=True)
    judge, chance = ToylandJudge.load(), random.Random(0)
    settings = {name: getattr(options, name) for name in ("things", "steps", "guidance")}
    kept = Kept(options.work, settings | {"ways": repr((WAYS, PARTIAL))})
    scenes = [random_things(options.things, chance) for _ in range(options.layouts)]
    counts = [
        kept.result(
            f"isolation {number:04}",
            lambda: read_scene(things, sample_scene(pipe, number, things, options), judge),  # noqa: B023
        )
        for number, things in enumerate(track(scenes, description="layouts"))
    ]
    results = {
        way: {name: mean_with_interval([count[way][name] / options.things for count in counts]) for name in MEASURES}
        for way in counts[0]
    }
    print(
        markdown(
            ["right class", "right colour", "another region's colour"],
            {way: [f"{100 * share['mean']:.0f} %" for share in row.values()] for way, row in results.items()},
        )
    )
    settings["layouts"] = options.layouts
    content = {"run": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    path = options.record or RECORDS / f"isolation-{options.things}-things.json"
    print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
