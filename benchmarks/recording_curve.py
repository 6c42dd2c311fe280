"""How much recording is enough: prompts x steps x seeds against what fused layers miss on prompts held out.

    python benchmarks/recording_curve.py --concepts DIR          # a folder of ED-LoRAs tuned on Toyland
    python benchmarks/recording_curve.py --concepts DIR --count 2 --prompts 1 2 --steps 1 5 --seeds 1

`benchmarks/retention.py --work WORK` leaves such a folder, WORK/concepts. Every concept is sampled with its own LoRA;
statistics are kept a prompt, number of steps and seed, and added up, as they are additive. Each sum is solved by the
closed form and judged by the relative residual |D X - dW X| / |dW X| on features X of held-out prompts, with other
seeds and in 20 steps: 0 keeps the concept's output, 1 is the base's. Means over layers and concepts, by group, with
their 95 % interval over concepts.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import markdown

from diffusers_mixofshow import toyland
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.intervals import Interval, mean_with_interval
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS, RECORDING_PROMPTS
from diffusers_mixofshow.fusion.collection import Recording, collect
from diffusers_mixofshow.fusion.gram import Gram, sum_grams
from diffusers_mixofshow.fusion.solvers import Factors, relative_residual
from diffusers_mixofshow.fusion.solving import Method, Settings, family_of_sources, sites_of, solve, updates_of
from diffusers_mixofshow.fusion.sources import Source, gather
from diffusers_mixofshow.fusion.statistics import ConceptStatistics, GramStatistics, Part
from diffusers_mixofshow.pipelines import MixOfShowPipeline


HELD_OUT_SEED = 5000


@dataclass(frozen=True)
class Added(GramStatistics):
    """Statistics of several recordings of one concept as one."""

    recorded: tuple[ConceptStatistics, ...]

    @property
    def counts(self) -> Counter[tuple[str, Part]]:
        """Tokens seen at each input in each part, in all recordings."""
        return sum((Counter(one.counts) for one in self.recorded), Counter())

    def read(self, name: str, parts: Sequence[Part]) -> Iterator[Gram]:
        """Gram matrices per token of an input, each recording weighted by its tokens."""
        for part in parts:
            every = self.tokens(name, part)
            yield sum_grams((one.gram(name, part), one.tokens(name, part) / every) for one in self.recorded)


class Recorder:
    """Samples a concept's prompts, and counts the time."""

    def __init__(self, pipe: Any, sites: Sequence[str]) -> None:
        self.seconds = 0.0
        self._pipe, self._sites = pipe, sites

    def __call__(self, source: Source, template: str, steps: int, seed: int) -> ConceptStatistics:
        """One prompt, as `GradientFuser` samples it."""
        start, (concept,) = time.perf_counter(), source.edlora.concepts
        prompt = template.replace("<TOK>", concept.placeholder)
        recording = Recording(steps=steps, seeds=(seed,)).resolve(self._pipe)
        found = collect(self._pipe, source.edlora, [prompt], self._sites, recording)
        self.seconds += time.perf_counter() - start
        return found


def residuals(
    sources: Sequence[Source], lora: Any, sites: Sequence[str], held_out: Sequence[GramStatistics]
) -> dict[str, Interval]:
    """Mean relative residual over layers and concepts, by group of layers, with its interval over concepts."""
    family, found = family_of_sources(sources), dict[str, list[list[float]]]()
    for name, group in family.by_input(sites).items():
        grams = [one.gram(name) for one in held_out]
        for site in group:
            fused = Factors.of(lora[site])
            pairs = zip(updates_of(sources, site), grams, strict=True)
            found.setdefault(family.group_of(site), []).append([relative_residual(fused, *pair) for pair in pairs])
    found["all"] = [of_site for of_group in found.values() for of_site in of_group]
    return {group: mean_of_concepts(of_sites) for group, of_sites in found.items()}


def mean_of_concepts(of_sites: Sequence[Sequence[float]]) -> Interval:
    """Mean over layers of every concept's values, (layers, concepts), and its interval over concepts."""
    return mean_with_interval([sum(of_concept) / len(of_concept) for of_concept in zip(*of_sites, strict=True)])


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Residuals of every setting, and of the average, which records nothing."""
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    folders = sorted(path.parent for path in options.concepts.glob("*/edlora.safetensors"))[: options.count]
    sources = gather([str(folder) for folder in folders], pipe.components, prompts=None)
    sites = sites_of(sources)
    recorder, parts = Recorder(pipe, sites), {}
    held_out = [
        Added(tuple(recorder(source, prompt, 20, HELD_OUT_SEED + k) for k, prompt in enumerate(HELD_OUT_PROMPTS)))
        for source in sources
    ]
    for steps in options.steps:
        before = recorder.seconds
        grid = itertools.product(range(len(sources)), range(max(options.prompts)), range(max(options.seeds)))
        for place, prompt, seed in grid:
            number = 100 * seed + prompt
            parts[place, prompt, steps, seed] = recorder(sources[place], RECORDING_PROMPTS[prompt], steps, number)
        print(f"  recorded in {steps} steps: {recorder.seconds - before:.0f} s", flush=True)

    def solved(method: Method, statistics: Sequence[Sequence[Added]]) -> dict[str, Interval]:
        solution = solve(sources, statistics, sites, Settings(method=method, ridge=options.ridge))
        return residuals(sources, solution.lora, sites, held_out)

    rows = []
    for prompts, steps, seeds in itertools.product(options.prompts, options.steps, options.seeds):
        chosen = list(itertools.product(range(prompts), (steps,), range(seeds)))
        statistics = [[Added(tuple(parts[place, *one] for one in chosen))] for place in range(len(sources))]
        row = {"prompts": prompts, "steps": steps, "seeds": seeds, "evaluations": prompts * steps * seeds}
        rows.append(row | {"residual": solved("closed-form", statistics)})
        print(f"  {rows[-1]}", flush=True)
    return {
        "concepts": [folder.name for folder in folders],
        "average": solved("average", []),
        "closed_form": rows,
        "recording_s": round(recorder.seconds, 1),
    }


def as_markdown(results: dict[str, Any]) -> str:
    told = {"average, nothing recorded": results["average"]}
    for row in results["closed_form"]:
        told[f"{row['prompts']} prompts x {row['steps']} steps x {row['seeds']} seeds"] = row["residual"]
    rows = {name: [f"{value['mean']:.3f}" for value in residual.values()] for name, residual in told.items()}
    return markdown(list(results["average"]), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=Path, required=True, help="folder of ED-LoRAs, one subfolder each")
    parser.add_argument("--count", type=int, default=8, help="how many of them")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 2, 4, 8], help=f"of {len(RECORDING_PROMPTS)}")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ridge", type=float, default=0.03)
    parser.add_argument("--record", type=Path, help="where to write the record")
    options = parser.parse_args(arguments)
    results = curve(options)
    print(as_markdown(results))
    settings = {key: value for key, value in vars(options).items() if key not in ("concepts", "record")}
    content = {"run_info": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    path = options.record or Path(__file__).parent / "records" / "recording-curve-toyland-cpu.json"
    print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
