"""What isolating regions in self-attention does to attributes on Toyland's base, without any concept.

    python benchmarks/isolation.py                       # 20 layouts of two things each, about a minute on a CPU
    python benchmarks/isolation.py --layouts 200 --things 3

Every layout has things of different classes and colours in columns, one region each ("a red chair"). The attribute
reader looks at each region: is the class the right one, and the colour; and is the colour another region's, so that it
has leaked. The same prompts and seeds are sampled each way. Writes one JSON record to benchmarks/records/.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow import Isolation, MixOfShowPipeline, MixOfShowWarning, Region
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.identity import crop_region
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
Thing = tuple[str, str]


def random_things(count: int, chance: random.Random) -> list[Thing]:
    """Class and colour of different things, no class and no colour twice."""
    while True:
        classes = chance.sample(sorted(CLASSES), count)
        colours = [chance.choice(MAIN_COLOURS[name]) for name in classes]
        if len(set(colours)) == count:
            return list(zip(classes, colours, strict=True))


def count_hits(things: list[Thing], read: list[dict[str, str]], counts: dict[str, int]) -> None:
    """Add what the reader says of one picture's regions."""
    for (right_class, right_colour), seen in zip(things, read, strict=True):
        others = {colour for _, colour in things if colour != right_colour}
        counts["class"] += seen["class"] == right_class
        counts["colour"] += seen["colour"] == right_colour
        counts["leaked"] += seen["colour"] in others
        counts["regions"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=20)
    parser.add_argument("--things", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--record", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", MixOfShowWarning)
    pipe = load_pipeline(MixOfShowPipeline)
    pipe.set_progress_bar_config(disable=True)
    judge = ToylandJudge.load()
    chance = random.Random(0)
    boxes = column_boxes(arguments.things)
    counts = {way: dict.fromkeys(("class", "colour", "leaked", "regions"), 0) for way in WAYS}
    for number in range(arguments.layouts):
        things = random_things(arguments.things, chance)
        names = [f"a {colour} {name}" for name, colour in things]
        prompt = f"{', '.join(names[:-1])} and {names[-1]} {TOGETHER_PLACES[number % len(TOGETHER_PLACES)]}"
        regions = [Region(name, box=box) for name, box in zip(names, boxes, strict=True)]
        for way, settings in WAYS.items():
            call = {"height": 64, "width": 64 * (2 + (arguments.things > 2)), "guidance_scale": arguments.guidance}
            call |= {"num_inference_steps": arguments.steps, "generator": torch.Generator().manual_seed(number)}
            (picture,) = pipe(prompt, **{"regions": regions, **settings, **call}).images
            count_hits(things, judge.read([crop_region(picture, box) for box in boxes]), counts[way])
    results = {
        way: {name: round(found[name] / found["regions"], 4) for name in ("class", "colour", "leaked")}
        for way, found in counts.items()
    }
    run = record.run_info(Path(__file__).parent)
    settings = {name: getattr(arguments, name) for name in ("layouts", "things", "steps", "guidance")}
    for way, row in results.items():
        print(f"{way:28}", "  ".join(f"{name} {share:.1%}" for name, share in row.items()))
    path = arguments.record or RECORDS / f"isolation-{arguments.things}-things.json"
    print(f"Record: {record.write(path, {'run': run, 'settings': settings, 'results': results})}")


if __name__ == "__main__":
    main()
