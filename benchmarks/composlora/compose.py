"""Draw and measure ComposLoRA: python -m benchmarks.composlora.compose --testbed CLONE --work DIR; see README.md."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.clip_judge import ClipJudge

from .methods import FUSED, METHODS, Recording, loaded, record_all
from .testbed import COUNTS, SEED, SETTINGS, STYLES, Element, Style, Testbed, read_testbed


REFERENCES = 4
"""Pictures of each LoRA alone, to which those of a set are compared."""
JUDGE = "openai/clip-vit-base-patch16"
"""What the authors measure CLIPScore with."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all pictures of a style share."""

    pipe: Any
    testbed: Testbed
    style: Style
    name: str
    work: Path

    @property
    def recording(self) -> Recording:
        """Of fusion: few steps of a small picture show what the layers see."""
        style = self.style
        return Recording(
            folder=self.work / f"statistics_{self.name}",
            steps=min(20, style.steps),
            height=min(512, style.height),
            width=min(512, style.width),
            guidance_scale=style.guidance_scale,
        )

    def place(self, elements: Sequence[Element], method: str) -> Path:
        """Where the authors' scripts look for a picture."""
        folder = self.work / f"output_{self.name}" / f"{len(elements)}_elements"
        return folder / f"{method}_{'_'.join(element.id for element in elements)}.png"

    def draw(self, elements: tuple[Element, ...], seed: int, place: Path, **arguments: Any) -> None:
        """Draw one picture of a set, whatever is loaded."""
        picture = self.pipe(
            prompt=self.testbed.prompt(elements),
            negative_prompt=self.testbed.negative,
            height=self.style.height,
            width=self.style.width,
            num_inference_steps=self.style.steps,
            guidance_scale=self.style.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            **arguments,
        ).images[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)


def load_pipeline(style: Style, device: str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(
        style.base, torch_dtype=torch.float16 if device == "cuda" else torch.float32, safety_checker=None
    )
    if style.vae:
        pipe.vae = AutoencoderKL.from_pretrained(style.vae, torch_dtype=pipe.dtype)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def used_elements(testbed: Testbed, counts: Sequence[int], limit: int | None) -> list[Element]:
    """The elements of the sets that are drawn."""
    sets = (one for count in counts for one in itertools.islice(testbed.sets(count), limit))
    return list(dict.fromkeys(element for elements in sets for element in elements))


def draw_references(study: Study, elements: Sequence[Element]) -> None:
    """Every LoRA alone, as strong as in the sets."""
    for element in elements:
        places = [reference(study, element, number) for number in range(REFERENCES)]
        if all(place.exists() for place in places):
            continue
        with loaded(study.pipe, study.testbed, (element,), "merge", study.recording, study.work) as arguments:
            for number, place in enumerate(places):
                study.draw((element,), SEED + number, place, **arguments)


def reference(study: Study, element: Element, number: int) -> Path:
    return study.work / f"alone_{study.name}" / f"{element.id}_{number}.png"


def draw_sets(study: Study, count: int, methods: Sequence[str], limit: int | None) -> dict[str, list[float]]:
    """Draw every set by every method, unless its picture is there; returns the seconds of each picture drawn now."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for number, elements in enumerate(itertools.islice(study.testbed.sets(count), limit)):
        for method in methods:
            place = study.place(elements, method)
            if place.exists():
                continue
            folder = study.work / "fused"
            with loaded(study.pipe, study.testbed, elements, method, study.recording, folder) as arguments:
                start = time.perf_counter()
                study.draw(elements, SEED + number, place, **arguments)
                seconds[method].append(time.perf_counter() - start)
        print(f"  {study.name}, {count} elements: set {number + 1} is drawn", flush=True)
    return seconds


def measure(study: Study, judge: ClipJudge, count: int, method: str, limit: int | None) -> dict[str, float]:
    """CLIPScore of the pictures of one method, and how like they are to pictures of each LoRA alone."""
    sets = list(itertools.islice(study.testbed.sets(count), limit))
    features = judge.features([_opened(study.place(elements, method)) for elements in sets])
    texts = judge.text_features([", ".join(word for one in elements for word in one.triggers) for elements in sets])
    alone = {
        element.id: judge.features([_opened(reference(study, element, number)) for number in range(REFERENCES)])
        for element in dict.fromkeys(itertools.chain(*sets))
    }
    likeness = [
        metrics.image_alignment(features[row : row + 1], alone[element.id])
        for row, elements in enumerate(sets)
        for element in elements
    ]
    return {
        "pictures": len(sets),
        "clip_score": round(metrics.clip_score(texts, features), 4),
        "image_alignment": round(sum(likeness) / len(likeness), 4),
    }


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def write_pairs(study: Study, count: int, methods: Sequence[str], limit: int | None) -> None:
    """Pairs for the authors' evaluation, which knows `merge` and `composite` alone: ours stands for the latter."""
    for ours, theirs in itertools.product(set(methods) & set(FUSED), set(methods) - set(FUSED)):
        folder = study.work / "pairs" / f"{theirs}-vs-{ours}_{study.name}" / f"{count}_elements"
        folder.mkdir(parents=True, exist_ok=True)
        for elements in itertools.islice(study.testbed.sets(count), limit):
            ids = "_".join(element.id for element in elements)
            shutil.copyfile(study.place(elements, theirs), folder / f"merge_{ids}.png")
            shutil.copyfile(study.place(elements, ours), folder / f"composite_{ids}.png")


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row for each method, a column for each number of elements."""
    counts = list(results)
    methods = list(next(iter(results.values())))
    rows = [f"| CLIPScore, image-alignment | {' | '.join(counts)} |", "|---" * (len(counts) + 1) + "|"]
    for method in methods:
        cells = (
            f"{results[n][method]['clip_score']:.3f}, {results[n][method]['image_alignment']:.3f}" for n in counts
        )
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def keep_plan(path: Path, plan: dict[str, Any]) -> None:
    """Note how pictures are drawn, and refuse a folder with pictures that were drawn otherwise."""
    if path.exists() and json.loads(path.read_text("utf-8")) != plan:
        raise SystemExit(f"Pictures of other settings are here, see {path}. Give another --work, or the same options.")
    record.write(path, plan)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--testbed", type=Path, required=True, help="clone of the authors' repository, LoRAs unpacked")
    parser.add_argument("--work", type=Path, required=True, help="where pictures are drawn; goes on where it stopped")
    parser.add_argument("--style", choices=STYLES, default="reality")
    parser.add_argument("--counts", type=int, nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--limit", type=int, help="of the sets of each count, the first so many; default: all")
    parser.add_argument("--base", help="another base model; default: the authors'")
    parser.add_argument("--vae", help="another autoencoder; default: the authors', with --base the base's own")
    parser.add_argument("--judge", default=JUDGE, help="the CLIP that measures")
    parser.add_argument("--steps", type=int, help="default: the authors' 200 (anime) and 100 (reality)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the authors'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", type=Path, help="where to write the record")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = options(arguments)
    testbed, style = read_testbed(given.testbed, given.style), SETTINGS[given.style]
    if given.base:
        style = replace(style, base=given.base, vae="")
    height, width = given.size or (style.height, style.width)
    vae = style.vae if given.vae is None else given.vae
    style = replace(style, steps=given.steps or style.steps, height=height, width=width, vae=vae)
    keep_plan(given.work / f"plan_{given.style}.json", asdict(style))
    pipe = load_pipeline(style, given.device)
    study = Study(pipe=pipe, testbed=testbed, style=style, name=given.style, work=given.work)
    elements = used_elements(testbed, given.counts, given.limit)
    draw_references(study, elements)
    if set(given.methods) & set(FUSED) - {"average"}:
        record_all(pipe, testbed, elements, study.recording)
    judge, results = ClipJudge.load(given.judge), {}
    for count in given.counts:
        seconds = draw_sets(study, count, given.methods, given.limit)
        results[str(count)] = {
            method: measure(study, judge, count, method, given.limit)
            | ({"seconds_a_picture": round(sum(taken) / len(taken), 2)} if (taken := seconds[method]) else {})
            for method in given.methods
        }
        write_pairs(study, count, given.methods, given.limit)
    print(table(results))
    path = given.record or Path(__file__).parents[1] / "records" / f"composlora-{given.style}.json"
    settings = {key: value for key, value in vars(given).items() if key not in ("work", "record", "testbed")}
    content = {"run_info": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
