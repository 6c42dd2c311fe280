"""The closed form against the paper's solver, on layer problems of Stable Diffusion 1.5's true sizes.

    python benchmarks/fusion_layers.py                       # 14 concepts, 1/16 of the rows that the reference stores
    python benchmarks/fusion_layers.py --rows 0.002 --steps 5 5 --concepts 3
    python benchmarks/fusion_layers.py --rows 0.25 --steps 0 0 --record RECORD.json   # ridges alone, on more rows

The baseline is the reference's method: LBFGS with strong Wolfe line search and a history of 25, in float32, on the
stacked raw features of all concepts, from the base weight, 50 steps for spatial layers and 500 for text layers and
text keys and values. The closed form gets the same features, one batch at a time. One layer of every shape is solved;
times are added up over all 176 layers of SD 1.5. LBFGS pays for every layer and every row, the Gram matrix is shared
by the layers of one input: with all rows of the reference the ratio would be larger still. Times are the processor's,
so that other work on the machine does not count; run it with OMP_NUM_THREADS=1.

Features are synthetic: a power-law spectrum that all concepts share, a mean and a subspace of its own for every
concept and every prompt, layer-normalised as a transformer's are; rows of text are the same tokens in every prompt,
moved by it. The last prompts of each concept are kept from all solvers; on these, with other seeds, the validation
objective is measured. Two of the recorded prompts choose the ridge.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.fusion.gram import Gram, sum_grams
from diffusers_mixofshow.fusion.ridge import choose_ridge
from diffusers_mixofshow.fusion.solvers import Factors, closed_form, target_rows
from diffusers_mixofshow.fusion.solving import Settings
from diffusers_mixofshow.fusion.statistics import ConceptStatistics, Part


RANK = 4
HISTORY = 25
BATCH = 2048
PROMPTS, HELD_OUT, UNSEEN = 8, 2, 4
"""Recorded prompts of a concept, how many of them choose the ridge, and prompts that no solver sees."""

_MOVED = 0.3
"""How far a prompt moves the features of its tokens, relative to how far they are from each other."""

RIDGES = {"ridge 0": 0.0, "ridge 1e-3": 1e-3, "ridge 1e-2": 1e-2, "ridge 3e-2": 3e-2, "ridge 1e-1": 1e-1}


def ridges_of(width: int) -> dict[str, float]:
    """The ridges that a layer is solved with: fixed ones, and the defaults for its width."""
    staged, own = (Settings(in_stages=in_stages).ridge_of(width) for in_stages in (True, False))
    return RIDGES | {"usual in stages": staged, "usual of own features": own}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers of SD 1.5 of one shape that see inputs of one kind.

    Args:
        name: What they are.
        width: in_features.
        out: out_features.
        inputs: How many different inputs there are of the kind.
        sharing: How many layers read each of them.
        rows: Rows that the reference stores of each concept.
        text: Whether the paper gives the layers 500 steps instead of 50, and no row is left out.
    """

    name: str
    width: int
    out: int
    inputs: int
    sharing: int
    rows: int
    text: bool = False


GROUPS = (
    # All tokens of two prompts, unpadded, in sixteen layers' wordings.
    Group(name="text q k v", width=768, out=768, inputs=12, sharing=3, rows=160, text=True),
    Group(name="text out", width=768, out=768, inputs=12, sharing=1, rows=160, text=True),
    # Two prompts' concept tokens and end token.
    Group(name="cross k v 320", width=768, out=320, inputs=5, sharing=2, rows=6, text=True),
    Group(name="cross k v 640", width=768, out=640, inputs=5, sharing=2, rows=6, text=True),
    Group(name="cross k v 1280", width=768, out=1280, inputs=6, sharing=2, rows=6, text=True),
    # One sample of 512 x 512, 20 steps. Beside q, k, v of the self-attention: out, and q and out of the other one.
    Group(name="self q k v 320", width=320, out=320, inputs=5, sharing=3, rows=20 * 64**2),
    Group(name="out, cross q 320", width=320, out=320, inputs=15, sharing=1, rows=20 * 64**2),
    Group(name="self q k v 640", width=640, out=640, inputs=5, sharing=3, rows=20 * 32**2),
    Group(name="out, cross q 640", width=640, out=640, inputs=15, sharing=1, rows=20 * 32**2),
    Group(name="self q k v 1280", width=1280, out=1280, inputs=6, sharing=3, rows=20 * 16**2),
    Group(name="out, cross q 1280", width=1280, out=1280, inputs=18, sharing=1, rows=20 * 16**2),
)


class Problem:
    """Random updates of one layer for several concepts, and features made prompt by prompt from seeds."""

    def __init__(self, group: Group, concepts: int, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        width, self.concepts, self.seed, self.text = group.width, concepts, seed, group.text
        self.rows_a_prompt = max(1, rows // PROMPTS)
        self.weight = normal(group.out, width) / width**0.5
        self.updates = [
            Factors(down=normal(RANK, width) / width**0.5, up=0.1 * normal(group.out, RANK)) for _ in range(concepts)
        ]
        self.spectrum = torch.logspace(0, -2, width)[:, None] * torch.linalg.qr(normal(width, width)).Q
        self.gain, self.bias = 1 + 0.3 * normal(width), 0.3 * normal(width)
        self.means = 0.1 * normal(concepts, width)
        self.own = 0.1 * normal(concepts, RANK, width)

    def features(self, concept: int, prompt: int) -> Iterator[torch.Tensor]:
        """Inputs of the layer for one prompt, each batch (rows, width)."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1_009 * concept + prompt)
        width, tokens = len(self.gain), torch.Generator().manual_seed(1_000_003 * self.seed + concept)
        mean = 0.1 * torch.randn(width, generator=generator)
        subspace = 0.1 * torch.randn(RANK, width, generator=generator)
        for start in range(0, self.rows_a_prompt, BATCH):
            rows = min(BATCH, self.rows_a_prompt - start)
            noise = torch.randn(rows, width, generator=generator)
            if self.text:
                noise = torch.randn(rows, width, generator=tokens) + _MOVED * noise
            noise = noise @ self.spectrum
            near = torch.randn(rows, RANK, generator=generator) @ (subspace + self.own[concept])
            yield F.layer_norm(noise + near + mean + self.means[concept], (width,)) * self.gain + self.bias

    def objective(self, delta: torch.Tensor, prompts: range) -> float:
        """Sum of squared output errors over all concepts, relative to leaving the base weight as it is."""
        error = scale = 0.0
        for concept, update in enumerate(self.updates):
            target = update.delta.double()
            for prompt in prompts:
                for rows in self.features(concept, prompt):
                    error += (rows.double() @ (target - delta.double()).T).square().sum().item()
                    scale += (rows.double() @ target.T).square().sum().item()
        return error / scale


RECORDED = range(PROMPTS)
NEW = range(PROMPTS, PROMPTS + UNSEEN)


def solve_lbfgs(problem: Problem, steps: int) -> tuple[torch.Tensor, float]:
    """The reference's way; the time without making the features."""
    parts = [
        torch.cat([rows for prompt in RECORDED for rows in problem.features(concept, prompt)])
        for concept in range(problem.concepts)
    ]
    pairs = zip(parts, problem.updates, strict=True)
    outputs = torch.cat([rows @ (problem.weight + update.delta).T for rows, update in pairs])
    features = torch.cat(parts)
    weight = problem.weight.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight],
        lr=1,
        max_iter=steps,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-16,
        tolerance_change=1e-16,
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.mse_loss(features @ weight.T, outputs)
        loss.backward()
        return loss

    start = time.process_time()
    optimiser.step(closure)
    return weight.detach().double() - problem.weight.double(), time.process_time() - start


@dataclass
class Gathered:
    """Gram matrices of all concepts, of both parts, and how long the sums took."""

    statistics: list[ConceptStatistics]
    seconds: float

    def grams(self, part: Part | None = None) -> list[Gram]:
        return [one.gram("input", part) for one in self.statistics]


def gather(problem: Problem) -> Gathered:
    gathered = Gathered([], 0.0)
    for concept in range(problem.concepts):
        statistics = ConceptStatistics()
        for prompt in RECORDED:
            part: Part = "held_out" if prompt % (PROMPTS // HELD_OUT) == PROMPTS // HELD_OUT - 1 else "fit"
            for rows in problem.features(concept, prompt):
                start = time.process_time()
                statistics.add("input", rows, part)
                gathered.seconds += time.process_time() - start
        gathered.statistics.append(statistics)
    return gathered


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def measure(group: Group, concepts: int, share: float, steps: tuple[int, int], seed: int) -> dict[str, Any]:
    """One layer of a group under every solver."""
    problem = Problem(group, concepts, group.rows if group.text else int(group.rows * share), seed)
    deltas: dict[str, torch.Tensor] = {}
    lbfgs_s, most = 0.0, steps[0] if group.text else steps[1]
    if most:
        deltas["LBFGS"], lbfgs_s = solve_lbfgs(problem, most)
    gathered = gather(problem)
    updates, (grams, read_s) = problem.updates, timed(gathered.grams)
    inverse, inverting_s = timed(lambda: added_up(grams).inverse(RIDGES["ridge 1e-2"]))
    deltas["ridge 1e-2"], solving_s = timed(lambda: closed_form(updates, target_rows(updates, grams), inverse).delta)
    for name, ridge in ridges_of(group.width).items():
        if name not in deltas:
            deltas[name] = closed_form(updates, target_rows(updates, grams), added_up(grams).inverse(ridge)).delta
    fitted = gathered.grams("fit")
    total = added_up(fitted)
    _, spectrum_s = timed(lambda: list(total.solve(target_rows(updates, fitted), [1.0])))  # decomposed, and kept
    (deltas["ridge chosen"], ridge), choosing_s = timed(
        lambda: solved_with_chosen_ridge(updates, fitted, gathered.grams("held_out"), grams, total)
    )
    return {
        "rows": concepts * PROMPTS * problem.rows_a_prompt,
        "chosen_ridge": ridge,
        "seconds": {
            "LBFGS a layer": lbfgs_s,
            "gram an input": gathered.seconds,
            "inverse an input": read_s + inverting_s,
            "closed form a layer": solving_s,
            "spectrum an input": spectrum_s,
            "choosing a ridge and solving, a layer": choosing_s,
        },
        "training": {name: problem.objective(delta, RECORDED) for name, delta in deltas.items()},
        "validation": {name: problem.objective(delta, NEW) for name, delta in deltas.items()},
    }


def of_group(group: Group, measured: dict[str, Any]) -> dict[str, Any]:
    """What one layer's times make for all layers of a group."""
    seconds = measured["seconds"]
    closed = seconds["gram an input"] + seconds["inverse an input"]
    closed += group.sharing * seconds["closed form a layer"]
    chosen = seconds["gram an input"] + seconds["inverse an input"] + seconds["spectrum an input"]
    chosen += group.sharing * seconds["choosing a ridge and solving, a layer"]
    lbfgs = group.sharing * seconds["LBFGS a layer"]
    return {
        "layers": group.inputs * group.sharing,
        "seconds_of_group": {
            "LBFGS": group.inputs * lbfgs,
            "closed form": group.inputs * closed,
            "closed form, ridge chosen": group.inputs * chosen,
        },
        "time_ratio": lbfgs / closed,
        **measured,
    }


def added_up(grams: Sequence[Gram]) -> Gram:
    return sum_grams((gram, 1.0) for gram in grams)


def solved_with_chosen_ridge(
    updates: list[Factors], fitted: list[Gram], held_out: list[Gram], grams: list[Gram], total: Gram
) -> tuple[torch.Tensor, float]:
    """The ridge that two recorded prompts prefer, and the solution on all of them with it."""
    targets, asked = target_rows(updates, fitted), target_rows(updates, held_out)
    ridge, _ = choose_ridge(updates, targets, asked, added_up(held_out), total)
    return closed_form(updates, target_rows(updates, grams), added_up(grams).inverse(ridge)).delta, ridge


def totals(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Times over all 176 layers."""
    names = ("LBFGS", "closed form", "closed form, ridge chosen")
    summed = {name: sum(row["seconds_of_group"][name] for row in results.values()) for name in names}
    return {
        **summed,
        "time ratio": summed["LBFGS"] / summed["closed form"],
        "time ratio, ridge chosen": summed["LBFGS"] / summed["closed form, ridge chosen"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=14)
    parser.add_argument(
        "--rows", type=float, default=1 / 16, help="share of the spatial rows that the reference stores"
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(500, 50), help="of LBFGS, for text and spatial layers; 0: none"
    )
    parser.add_argument("--groups", nargs="+", default=[group.name for group in GROUPS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "fusion-layers-cpu.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    alike: dict[tuple[int, ...], dict[str, Any]] = {}
    for group in (group for group in GROUPS if group.name in options.groups):
        shape = (group.width, group.out, group.rows)
        if shape not in alike:
            alike[shape] = measure(group, options.concepts, options.rows, tuple(options.steps), options.seed)
        results[group.name] = of_group(group, alike[shape])
        row = results[group.name]
        told = "  ".join(
            f"{name} {row['training'][name]:.3f}/{row['validation'][name]:.3f}" for name in row["training"]
        )
        print(f"{group.name:18} {row['time_ratio']:7.0f}x  training/validation: {told}")
        content = {
            "run_info": {**record.run_info(Path(__file__).parent), "threads": torch.get_num_threads()},
            "settings": {"concepts": options.concepts, "rank": RANK, "rows": options.rows, "steps": options.steps},
            "totals": totals(results),
            "results": results,
        }
        record.write(options.record, content)
    print("Over these layers:", "  ".join(f"{name} {value:.4g}" for name, value in totals(results).items()))
    print(f"Record: {options.record}")


if __name__ == "__main__":
    main()
