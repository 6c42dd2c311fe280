"""What every way of merging misses of each concept's outputs, by group of layers, and how long it takes.

    python benchmarks/rivals.py --concepts DIR             # a folder of ED-LoRAs tuned on Toyland
    python benchmarks/rivals.py --concepts DIR --count 2 --steps 3 --ways average closed-form

`benchmarks/retention.py --work WORK` leaves such a folder, WORK/concepts. Every concept is recorded once, with its own
LoRA, and all ways that need statistics solve the same ones; then the relative residual |D X - dW X| / |dW X| is taken
on the recorded features and on those of prompts held out (places by night): 0 keeps a concept's output, 1 is the
base's. Two ways are not methods of the package: SSR-Merge as published records one prompt in one step, and "weights
alone" needs no features, as it takes each update's dW^T dW for their Gram matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import markdown
from recording_curve import HELD_OUT_SEED, Added, Recorder, residuals

from diffusers_mixofshow import toyland
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.intervals import Interval
from diffusers_mixofshow.evaluation.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.fusion.solving import (
    METHODS,
    Ridge,
    Settings,
    Statistics,
    family_of_sources,
    sites_of,
    solve,
)
from diffusers_mixofshow.fusion.sources import Source, gather
from diffusers_mixofshow.fusion.statistics import ConceptStatistics
from diffusers_mixofshow.pipelines import MixOfShowPipeline


UNSEEN_PROMPTS = (
    "a <TOK> on the beach at night",
    "a photo of a <TOK> in the desert at night",
    "there is a <TOK> in the snow at night",
    "a picture of a <TOK> in a meadow at night",
    "a <TOK> in a room at night",
)
"""Prompts for measuring whose content is new: neither a prompt that fusion records nor a photo's caption has places by
night."""
WITH_RIDGE: dict[str, Ridge] = {
    "closed-form:ridge=0.1": 0.1,
    "ssr:own recording": 1e-3,  # as published: of the mean diagonal, one prompt and one step
    "closed-form:weights alone": 1.0,  # the best of several for it
}
"""Ways that have a ridge of their own; the others take the method's default."""
WAYS = (*METHODS, *WITH_RIDGE)


@dataclass
class Recorded:
    """Statistics of every source, each a list as `solve` takes them."""

    by_default: Statistics
    one_step: Statistics
    weights_alone: Statistics
    held_out: list[Added]

    def needed_by(self, way: str) -> Statistics:
        """What a way solves."""
        if way.endswith("weights alone"):
            return self.weights_alone
        return self.one_step if way.endswith("own recording") else self.by_default


def record_sources(sources: Sequence[Source], sites: Sequence[str], recorder: Recorder, steps: int) -> Recorded:
    """Sample every source's prompts: those of the default, the first in one step, and those held out."""

    def recorded(prompts: Sequence[str], steps: int, first_seed: int) -> list[Added]:
        return [
            Added(tuple(recorder(source, prompt, steps, first_seed + k) for k, prompt in enumerate(prompts)))
            for source in sources
        ]

    return Recorded(
        by_default=[[one] for one in recorded(RECORDING_PROMPTS, steps, 0)],
        one_step=[[one] for one in recorded(RECORDING_PROMPTS[:1], 1, 0)],
        weights_alone=[[weights_as_features(source, sites)] for source in sources],
        held_out=recorded(UNSEEN_PROMPTS, steps, HELD_OUT_SEED),
    )


def weights_as_features(source: Source, sites: Sequence[str]) -> ConceptStatistics:
    """Statistics that need no features: the rows of every update in place of its layer's inputs."""
    statistics = ConceptStatistics()
    for name, group in family_of_sources([source]).by_input(sites).items():
        for site in group:
            update = source.edlora.lora[site]
            statistics.add(name, update.up.float() @ update.down.float() * (update.alpha / len(update.down)))
    return statistics


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Residuals and seconds of every way."""
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    folders = sorted(path.parent for path in options.concepts.glob("*/edlora.safetensors"))[: options.count]
    sources = gather([str(folder) for folder in folders], pipe.components, prompts=None)
    sites = sites_of(sources)
    recorder = Recorder(pipe, sites)
    recorded = record_sources(sources, sites, recorder, options.steps)
    print(f"  recorded: {recorder.seconds:.0f} s", flush=True)
    measured: dict[str, Callable[[Any], dict[str, Interval]]] = {
        "recorded": lambda lora: residuals(sources, lora, sites, [one for (one,) in recorded.by_default]),
        "held_out": lambda lora: residuals(sources, lora, sites, recorded.held_out),
    }
    rows: dict[str, Any] = {}
    for way in options.ways:
        start = time.process_time()
        settings = Settings(method=way.split(":")[0], ridge=WITH_RIDGE.get(way))
        lora = solve(sources, recorded.needed_by(way), sites, settings).lora
        row: dict[str, Any] = {"processor_s": round(time.process_time() - start, 2)}
        rows[way] = row | {name: measure(lora) for name, measure in measured.items()}
        print(f"  {way}: {rows[way]}", flush=True)
    return {"concepts": [folder.name for folder in folders], "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=Path, required=True, help="folder of ED-LoRAs, one subfolder each")
    parser.add_argument("--count", type=int, default=8, help="how many of them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "rivals-toyland.json")
    options = parser.parse_args()
    results = compare(options)
    groups = list(next(iter(results["ways"].values()))["held_out"])
    told = {way: [f"{row['held_out'][group]['mean']:.3f}" for group in groups] for way, row in results["ways"].items()}
    print(markdown(groups, told))
    settings = {"count": options.count, "steps": options.steps}
    content = {"run_info": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    print(f"Record: {record.write(options.record, content)}")


if __name__ == "__main__":
    main()
