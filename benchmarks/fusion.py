"""Fusing one layer: streaming Gram matrices and the closed form, against stored features with lstsq and LBFGS.

    python benchmarks/fusion.py                                  # 320 wide, 4 concepts, 16384 tokens each
    python benchmarks/fusion.py --width 1280 --concepts 14 --tokens 4096
    python benchmarks/fusion.py --scale                          # 2 to 64 concepts from published statistics

For layers of all sizes of SD 1.5 see `fusion_layers.py`, for whole models `fusion_files.py`. Writes one
JSON record to benchmarks/records/. The LBFGS row is the authors' setting for spatial layers: 50 iterations from the
base weights on all features.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.fusion import FusionSource, GradientFuser
from diffusers_mixofshow.fusion.gram import sum_grams
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.solvers import Factors, closed_form, target_rows
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


RECORDS = Path(__file__).parent / "records"
RANK = 4
BATCH = 2048
LBFGS_ITERATIONS = 50


class Problem:
    """Random updates of one layer, and features with a decaying spectrum, made batch by batch from a seed."""

    def __init__(self, width: int, concepts: int, tokens: int, device: str) -> None:
        self.width, self.concepts, self.tokens, self.device = width, concepts, tokens, device
        generator = torch.Generator().manual_seed(0)
        self.updates = [
            Factors(
                down=torch.randn(RANK, width, generator=generator).to(device),
                up=0.01 * torch.randn(width, RANK, generator=generator).to(device),
            )
            for _ in range(concepts)
        ]
        decay = torch.logspace(0, -2, width)
        self.mixing = [
            (decay[:, None] * torch.linalg.qr(torch.randn(width, width, generator=generator)).Q).to(device)
            for _ in range(concepts)
        ]

    def batches(self, concept: int) -> Iterator[torch.Tensor]:
        """Features of one concept, each batch (tokens, width)."""
        generator = torch.Generator(self.device).manual_seed(concept)
        for start in range(0, self.tokens, BATCH):
            rows = min(BATCH, self.tokens - start)
            yield torch.randn(rows, self.width, generator=generator, device=self.device) @ self.mixing[concept]

    def objective(self, delta: torch.Tensor) -> float:
        """Sum of squared output errors, relative to leaving the base weights as they are."""
        error = scale = 0.0
        for concept, update in enumerate(self.updates):
            target = update.delta.double()
            for rows in self.batches(concept):
                error += (rows.double() @ (target - delta.double().to(self.device)).T).square().sum().item()
                scale += (rows.double() @ target.T).square().sum().item()
        return error / scale


def solve_streaming(problem: Problem, ridge: float) -> tuple[torch.Tensor, dict[str, float]]:
    grams, seconds = [], 0.0
    for concept in range(problem.concepts):
        statistics = ConceptStatistics()
        for rows in problem.batches(concept):
            seconds += timed(lambda: statistics.add("layer", rows), problem.device)[1]  # noqa: B023
        grams.append(statistics.gram("layer"))
    updates = [Factors(down=one.down.cpu(), up=one.up.cpu()) for one in problem.updates]

    def solve() -> torch.Tensor:
        inverse = sum_grams((gram, 1.0) for gram in grams).inverse(ridge)
        return closed_form(updates, target_rows(updates, grams), inverse).delta

    delta, solving = timed(solve, "cpu")
    held = problem.concepts * problem.width**2 * 8
    return delta, {"recording_s": seconds, "solving_s": solving, "held_mib": held / 2**20}


def solve_lstsq(problem: Problem) -> tuple[torch.Tensor, dict[str, float]]:
    features, targets = stored(problem)
    delta, seconds = timed(lambda: torch.linalg.lstsq(features, targets).solution.T, problem.device)
    return delta, {"solving_s": seconds, "held_mib": held_mib(features, targets)}


def solve_lbfgs(problem: Problem) -> tuple[torch.Tensor, dict[str, float]]:
    features, targets = stored(problem)
    delta = torch.zeros(problem.width, problem.width, device=problem.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [delta], lr=1, max_iter=LBFGS_ITERATIONS, history_size=25, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (features @ delta.T - targets).square().mean()
        loss.backward()
        return loss

    _, seconds = timed(lambda: optimiser.step(closure), problem.device)
    return delta.detach(), {"solving_s": seconds, "held_mib": held_mib(features, targets)}


def stored(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """All features and target outputs, each (concepts * tokens, width)."""
    parts = [torch.cat(list(problem.batches(concept))) for concept in range(problem.concepts)]
    targets = [rows @ update.delta.T for rows, update in zip(parts, problem.updates, strict=True)]
    return torch.cat(parts), torch.cat(targets)


SCALES = (2, 4, 8, 16, 32, 64)
BLOCK = "unet.{place}.attentions.0.transformer_blocks.0.{layer}"
LAYERS = tuple(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
PLACES = {"down_blocks.0": 320, "down_blocks.1": 640, "mid_block": 1280}
TEXT_LAYERS = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))


def measure_scale() -> dict[str, dict[str, float]]:
    """Fuse 2 to 64 synthetic ED-LoRAs of one transformer block of each width of SD 1.5 and one text layer."""
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        statistics = synthetic_statistics(Path(folder, "x.statistics.safetensors"))
        concepts = [synthetic_edlora(number) for number in range(max(SCALES))]
        for count in SCALES:
            sources = [published(edlora, statistics) for edlora in concepts[:count]]
            before = time.process_time()
            GradientFuser().fuse(sources)
            seconds = time.process_time() - before  # of the processor: the machine may be shared
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            results[f"{count} concepts"] = {"cpu_s": seconds, "cpu_s_a_concept": seconds / count, "peak_rss_mib": peak}
            print(f"{count:3} concepts {seconds:6.2f} s  {seconds / count:.3f} s each  peak {peak:.0f} MiB")
    return results


def sizes() -> dict[str, tuple[int, int]]:
    """Site to (out_features, in_features)."""
    shapes = {f"text_encoder.text_model.encoder.layers.0.{layer}": (768, 768) for layer in TEXT_LAYERS}
    for place, width in PLACES.items():
        for layer in LAYERS:
            reads_text = layer in ("attn2.to_k", "attn2.to_v")
            shapes[BLOCK.format(place=place, layer=layer)] = (width, 768 if reads_text else width)
    return shapes


def synthetic_statistics(path: Path) -> SourceStatistics:
    """One concept's statistics, with a decaying spectrum; all synthetic concepts share them."""
    generator, concept = torch.Generator().manual_seed(0), ConceptStatistics()
    for name, width in {STABLE_DIFFUSION.input_of(site): shape[1] for site, shape in sizes().items()}.items():
        features = torch.randn(2048, width, generator=generator) * torch.logspace(0, -2, width)
        concept.add(name, features)
    statistics = SourceStatistics(digest="", base_model="synthetic", recording={}, concepts={"<c>": concept})
    return SourceStatistics.load(statistics.save(path, max_bytes=2_000_000, overwrite=True))


def synthetic_edlora(number: int) -> EDLoRA:
    generator = torch.Generator().manual_seed(number)
    concept = Concept.from_name(f"c{number:02}x", "dog")
    lora = {
        site: LowRank(
            down=torch.randn(RANK, narrow, generator=generator),
            up=0.01 * torch.randn(wide, RANK, generator=generator),
            alpha=RANK,
        )
        for site, (wide, narrow) in sizes().items()
    }
    embeddings = {token: torch.randn(1, 768, generator=generator) for token in concept.tokens}
    return EDLoRA(concepts=(concept,), embeddings=embeddings, lora=lora, base_model="synthetic", layers=("layer",))


def published(edlora: EDLoRA, statistics: SourceStatistics) -> FusionSource:
    """A source with the shared statistics under its own name and hash."""
    placeholder, shared = edlora.concepts[0].placeholder, statistics.concepts["<c>"]
    own = SourceStatistics(digest=edlora.digest, base_model="synthetic", recording={}, concepts={placeholder: shared})
    return FusionSource(edlora, statistics=own)


def held_mib(*tensors: torch.Tensor) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def surroundings() -> dict[str, Any]:
    """Versions, machine, commit and command of this run."""
    return {**record.run_info(Path(__file__).parent), "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="in and out features of the layer")
    parser.add_argument("--concepts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="recorded tokens per concept")
    parser.add_argument("--ridge", type=float, default=1e-6)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scale", action="store_true", help="time and memory of 2 to 64 concepts instead")
    parser.add_argument("--record", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    if arguments.scale:
        path = record.write(
            arguments.record or RECORDS / "fusion-scale-cpu.json",
            {
                "run": surroundings(),
                "settings": {"rank": RANK, "layers": len(sizes())},
                "results": measure_scale(),
            },
        )
        print(f"Record: {path}")
        return
    problem = Problem(arguments.width, arguments.concepts, arguments.tokens, arguments.device)
    timed(lambda: torch.randn(256, 256, device=arguments.device) @ torch.eye(256, device=arguments.device), "cpu")
    solvers = {
        "streaming Gram, closed form": lambda: solve_streaming(problem, arguments.ridge),
        "stored features, lstsq": lambda: solve_lstsq(problem),
        f"stored features, LBFGS {LBFGS_ITERATIONS}": lambda: solve_lbfgs(problem),
    }
    settings = {"width": arguments.width, "concepts": arguments.concepts, "tokens": arguments.tokens, "rank": RANK}
    results: dict[str, Any] = {}
    for name, solve in solvers.items():
        delta, measured = solve()
        measured["relative_objective"] = problem.objective(delta)
        results[name] = measured
        print(f"{name:32}", "  ".join(f"{key} {value:.4g}" for key, value in measured.items()))
    path = arguments.record or RECORDS / f"fusion-{arguments.width}x{arguments.concepts}-{arguments.device}.json"
    run = surroundings()
    print(f"Record: {record.write(path, {'run': run, 'settings': settings, 'results': results})}")


if __name__ == "__main__":
    main()
