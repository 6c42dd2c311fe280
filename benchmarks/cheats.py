"""What pictures score that cheat: ``python benchmarks/cheats.py``, in a minute, as nothing is sampled.

A metric of identity is only worth what it says of pictures that nobody wants. The eight critters of
`benchmarks/toyland.py` are shown in five ways, by the held-out prompts: as the world draws what the prompt says; as
one training photo, whatever the prompt says; with their colours on random shapes; with their shapes in random colours;
and as any critter. Identity, its colours and its shapes apart, and text-alignment are measured as of samples. Figures
have their 95 % interval over concepts. Prints a Markdown table and writes one JSON record.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from judging import is_colour, share_of_looks, subject_of
from kept import markdown
from PIL import Image

from diffusers_mixofshow import toyland
from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.identity import measure_identity
from diffusers_mixofshow.evaluation.intervals import mean_with_interval
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS
from diffusers_mixofshow.evaluation.sampling import fill_templates
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.toyland.concepts import ToyConcept, as_thing
from diffusers_mixofshow.toyland.scenes import place_thing, random_scene
from diffusers_mixofshow.toyland.world import BACKGROUNDS, Scene, Thing, draw
from toyland import CRITTERS


def drawn(thing: Thing, prompt: str, rng: random.Random) -> Image.Image:
    """A thing where a prompt says that it is."""
    background = next(name for name in BACKGROUNDS if name in prompt)
    return draw(Scene(background=background, things=(place_thing(thing, rng),))).image


def any_critter(rng: random.Random) -> Thing:
    """A critter as the world draws them at random."""
    while True:
        (thing,) = random_scene(rng.randrange(2**31), things=1).things
        if thing.class_word == "critter":
            return replace(thing, name="")


def exchanged(concept: ToyConcept, rng: random.Random, kept: str) -> Thing:
    """A random critter with the colours or with the shapes of a concept."""
    own, other = as_thing(concept), any_critter(rng)
    looks = {name: value for name, value in other.attributes.items() if is_colour(name) != (kept == "colours")}
    looks |= {name: value for name, value in own.attributes.items() if is_colour(name) == (kept == "colours")}
    return replace(own, colour=own.colour if kept == "colours" else other.colour, attributes=looks)


WAYS: Mapping[str, Callable[[ToyConcept, str, random.Random], Image.Image]] = {
    "drawn by the world as the prompt says": lambda concept, prompt, rng: drawn(as_thing(concept), prompt, rng),
    "one training photo, whatever the prompt": lambda concept, prompt, rng: toyland.photos(concept)[0].image,
    "its colours on random shapes": lambda concept, prompt, rng: drawn(
        exchanged(concept, rng, "colours"), prompt, rng
    ),
    "its shapes in random colours": lambda concept, prompt, rng: drawn(exchanged(concept, rng, "shapes"), prompt, rng),
    "any critter": lambda concept, prompt, rng: drawn(any_critter(rng), prompt, rng),
}


def measured(way: str, concepts: Sequence[ToyConcept], pictures: int, judge: ToylandJudge) -> dict[str, Any]:
    """Every measure of one way, with its interval over concepts."""
    subjects = [subject_of(concept, judge) for concept in concepts]
    values: dict[str, list[float]] = {}
    for concept, subject in zip(concepts, subjects, strict=True):
        rng = random.Random(f"{way}/{concept.name}")
        prompts = fill_templates(HELD_OUT_PROMPTS, concept.class_word, pictures)
        shown = [WAYS[way](concept, prompt, rng) for prompt in prompts]
        identity, read = measure_identity(shown, subject, subjects, judge), judge.read(shown)
        row = {
            "looks": metrics.attribute_accuracy(read, subject.attributes),
            "colours": share_of_looks(read, subject, is_colour),
            "shapes": share_of_looks(read, subject, lambda name: not is_colour(name)),
            "likeness": identity.alignment,
            "text_alignment": metrics.clip_score(judge.text_features(prompts), judge.features(shown)),
        }
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: mean_with_interval(each) for name, each in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16, help="of every critter and way")
    parser.add_argument("--critters", nargs="+", default=CRITTERS, choices=CRITTERS)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "cheats.json")
    options = parser.parse_args()
    judge, concepts = ToylandJudge.load(), [toyland.CONCEPTS[name] for name in options.critters]
    results = {way: measured(way, concepts, options.pictures, judge) for way in WAYS}
    rows = {
        way: [f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})" for value in row.values()]
        for way, row in results.items()
    }
    print(markdown([*next(iter(results.values()))], rows))
    content = {
        "run_info": record.run_info(Path(__file__).parent),
        "plan": {"critters": list(options.critters), "pictures": options.pictures, "held_out": HELD_OUT_PROMPTS},
        "results": results,
    }
    print(f"Record: {record.write(options.record, content)}")


if __name__ == "__main__":
    main()
