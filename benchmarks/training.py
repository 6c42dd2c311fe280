"""Measure on Toyland what tuning puts where: ``python benchmarks/training.py [--short]``.

Concepts inside and outside of what the base has seen are tuned by ED-LoRA, textual inversion, P+, LoRA and Custom
Diffusion, and by ED-LoRA with one thing changed. Each is then sampled with its weight updates at scale 0 (the
embeddings alone) and 1, with prompts and seeds that are the same for all. Identity is the metric model's
image-alignment with the photos, and the share of hidden attributes that the reader finds.

Every tuning is written to the record as soon as it is measured. An interrupted benchmark goes on where it stopped if
it is called again with the same options, on the same base. Between two calls, code must not change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffusers_mixofshow import toyland
from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.training import TrainingConfig


METHODS: dict[str, dict[str, Any]] = {
    "ed-lora": {},
    "textual-inversion": {"method": "textual-inversion"},
    "p-plus": {"method": "p-plus"},
    "lora": {"method": "lora"},
    # Whole matrices need smaller steps than the factors of a LoRA.
    "custom-diffusion": {"method": "custom-diffusion", "text_kv_lr": 1.5e-3},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "without noise offset": {"noise_offset": 0.0},
    "without layer-wise embeddings": {"method": "ed-lora-shared-layers"},
    "without the class token": {"method": "ed-lora-without-class"},
    "without the embeddings' own phase": {"embedding_phase_steps": 0},
    "with masks": {"masked_loss": True},
    "with the attention regulariser": {"attn_reg_weight": 0.01},
    "with masks and the regulariser": {"masked_loss": True, "attn_reg_weight": 0.01},
}
IN_DOMAIN = ("bobo", "rex", "ming")
OUT_OF_DOMAIN = ("nono", "pixel", "neon")
SCALES = (0.0, 1.0)
SHORT = {"max_train_steps": 40, "embedding_phase_steps": 10}
MEASURES = ("alignment", "attributes", "nearest")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One tuning: what, how and with which seed."""

    variant: str
    concept: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.variant} | {self.concept} | {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all runs share; two records of one plan can be joined."""

    concepts: tuple[str, ...]
    seeds: int
    other_seeds: int
    pictures: int
    sampling_steps: int
    guidance_scale: float
    tuning: Mapping[str, Any]
    base: str

    def runs(self) -> Iterator[Run]:
        """ED-LoRA with all seeds, everything else with some of them; seed by seed, so that all have something soon."""
        for seed in range(self.seeds):
            for variant in (*METHODS, *ABLATIONS):
                if variant == "ed-lora" or seed < self.other_seeds:
                    for concept in self.concepts:
                        yield Run(variant=variant, concept=concept, seed=seed)


class Bench:
    """A pipeline and judges, loaded once a process."""

    def __init__(self, plan: Plan) -> None:
        import torch

        from diffusers_mixofshow import MixOfShowPipeline
        from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge

        torch.set_num_threads(1)
        self.plan = plan
        self.pipe: Any = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
        self.judge = ToylandJudge.load()
        self.subjects = {name: self._subject(name) for name in plan.concepts}

    def measured(self, run: Run) -> dict[str, Any]:
        """Tune, sample at every scale, and judge."""
        from diffusers_mixofshow import EDLoRATrainer

        concept = toyland.CONCEPTS[run.concept]
        with tempfile.TemporaryDirectory() as folder:
            config = TrainingConfig.toyland(
                instance_data_dir=toyland.write_photos(concept, folder),
                concept=run.concept,
                class_word=concept.class_word,
                kind=concept.kind,
                seed=run.seed,
                **{**self.plan.tuning, **(METHODS | ABLATIONS)[run.variant]},
            )
            edlora = EDLoRATrainer(config, self.pipe).train()
        scales = {}
        for scale in SCALES if edlora.lora else (1.0,):
            self.pipe.load_edlora(edlora, scale=scale)
            try:
                scales[f"{scale:g}"] = self.judged(f"<{run.concept}>", run.concept)
            finally:
                self.pipe.unload_edlora()
        final_loss, seconds = (edlora.training[name] for name in ("final_loss", "seconds"))
        # Without updates, scale 0 and 1 are the same pictures.
        return {**asdict(run), "scales": {"0": scales["1"]} | scales, "final_loss": final_loss, "seconds": seconds}

    def judged(self, subject: str, concept: str) -> dict[str, float | None]:
        """Identity of a concept in pictures of a subject, a placeholder or the class word."""
        from diffusers_mixofshow.evaluation.identity import measure_identity
        from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS
        from diffusers_mixofshow.evaluation.sampling import Sampling, fill_templates, sample_pictures

        plan = self.plan
        sampling = Sampling(
            steps=plan.sampling_steps, guidance_scale=plan.guidance_scale, batch_size=8, first_seed=10_000
        )
        pictures = sample_pictures(self.pipe, fill_templates(HELD_OUT_PROMPTS, subject, plan.pictures), sampling)
        return measure_identity(pictures, self.subjects[concept], list(self.subjects.values()), self.judge).as_record()

    def _subject(self, name: str) -> Any:
        from diffusers_mixofshow.evaluation.identity import Subject
        from diffusers_mixofshow.evaluation.toyland_judge import hidden_attributes

        concept = toyland.CONCEPTS[name]
        photos = self.judge.features([photo.image for photo in toyland.photos(concept)])
        return Subject(name=name, photos=photos, attributes=hidden_attributes(concept))


@cache
def bench_of(plan_as_json: str) -> Bench:
    """The process's own bench."""
    return Bench(plan_from(json.loads(plan_as_json)))


def plan_from(values: Mapping[str, Any]) -> Plan:
    return Plan(**{**values, "concepts": tuple(values["concepts"])})


def measure_run(plan_as_json: str, run: Run) -> dict[str, Any]:
    return bench_of(plan_as_json).measured(run)


def measure_class_word(plan_as_json: str, concept: str) -> dict[str, float | None]:
    """The floor: the class word on the base model."""
    return bench_of(plan_as_json).judged(toyland.CONCEPTS[concept].class_word, concept)


def base_digest() -> str:
    """What tells one embedded base from another."""
    digest = hashlib.sha256()
    for part in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        digest.update((toyland.path() / part).read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The record on disk, written after every run."""

    def __init__(self, path: Path, plan: Plan, *, anew: bool) -> None:
        self.path, self.plan = path, plan
        self.runs: dict[str, Any] = {}
        self.class_word: dict[str, Any] = {}
        if path.exists() and not anew:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["plan"] != json.loads(json.dumps(asdict(plan))):
                raise SystemExit(f"{path} is the record of other options or another base. Choose --record or --anew.")
            self.runs, self.class_word = before["runs"], before["class_word"]
        self.since = time.monotonic()

    def write(self) -> None:
        """Everything known so far, summaries first."""
        content = {
            "run_info": record.run_info(Path(__file__).parent),
            "plan": asdict(self.plan),
            "summary": summary(self.plan, self.runs, self.class_word),
            "seeds": seed_variance(self.plan, self.runs, self.class_word),
            "class_word": self.class_word,
            "runs": dict(sorted(self.runs.items())),
        }
        temporary = record.write(self.path.with_suffix(".tmp"), content)
        temporary.replace(self.path)


def summary(plan: Plan, runs: Mapping[str, Any], class_word: Mapping[str, Any]) -> dict[str, Any]:
    """Mean identity of every variant by domain and scale, over concepts and seeds."""
    lines: dict[str, Any] = {}
    domains = {"in": IN_DOMAIN, "out": OUT_OF_DOMAIN}
    floor = {
        domain: _means([class_word[name] for name in names if name in class_word]) for domain, names in domains.items()
    }
    lines["class word"] = {domain: means for domain, means in floor.items() if means}
    for variant in (*METHODS, *ABLATIONS):
        for domain, names in domains.items():
            of_domain = [run for run in runs.values() if run["variant"] == variant and run["concept"] in names]
            for scale in ("0", "1") if of_domain else ():
                means = _means([run["scales"][scale] for run in of_domain])
                lines.setdefault(variant, {}).setdefault(domain, {})[f"scale {scale}"] = means
    return lines


def seed_variance(plan: Plan, runs: Mapping[str, Any], class_word: Mapping[str, Any]) -> dict[str, Any]:
    """Of ED-LoRA: what every seed gains over the class word, and the seeds that gain less than half of the mean."""
    found = {}
    for concept in plan.concepts:
        of_concept = {
            run["seed"]: run["scales"]["1"]["alignment"] - class_word[concept]["alignment"]
            for run in runs.values()
            if run["variant"] == "ed-lora" and run["concept"] == concept and concept in class_word
        }
        if of_concept:
            gains = list(of_concept.values())
            mean = statistics.fmean(gains)
            found[concept] = {
                "gain": round(mean, 4),
                "deviation": round(statistics.stdev(gains), 4) if len(gains) > 1 else None,
                "lost": sorted(seed for seed, gain in of_concept.items() if gain < mean / 2),
            }
    return found


def _means(identities: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    known = {name: [row[name] for row in identities if row[name] is not None] for name in MEASURES}
    return {name: round(statistics.fmean(values), 4) for name, values in known.items() if values}


def markdown(lines: Mapping[str, Any]) -> str:
    """The table of the documentation: image-alignment and attributes, in and out of domain, at scale 0 and 1."""
    head = "| | in-domain, 0 | in-domain, 1 | out-of-domain, 0 | out-of-domain, 1 |\n|---|---|---|---|---|"
    rows = [head]
    for variant, domains in lines.items():
        cells = []
        for domain in ("in", "out"):
            found = domains.get(domain, {})
            for scale in ("scale 0", "scale 1"):
                means = found.get(scale, found if "alignment" in found and scale == "scale 1" else {})
                cells.append(f"{means['alignment']:.3f}, {means['attributes']:.0%}" if means else "")
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two concepts, few steps and pictures: does it run?")
    parser.add_argument("--seeds", type=int, help="seeds of ED-LoRA (default 5, short 2)")
    parser.add_argument("--other-seeds", type=int, default=1, help="seeds of everything else")
    parser.add_argument("--concepts", nargs="+", choices=(*IN_DOMAIN, *OUT_OF_DOMAIN))
    parser.add_argument("--pictures", type=int, help="of every concept, variant and scale (default 24, short 2)")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=DemoSettings.guidance_scale)
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--record", type=Path, help="default: benchmarks/records/training[-short].json")
    parser.add_argument("--anew", action="store_true", help="do not go on with the record")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    plan = Plan(
        concepts=tuple(options.concepts or (("bobo", "nono") if options.short else (*IN_DOMAIN, *OUT_OF_DOMAIN))),
        seeds=options.seeds or (2 if options.short else 5),
        other_seeds=options.other_seeds,
        pictures=options.pictures or (2 if options.short else 24),
        sampling_steps=options.sampling_steps,
        guidance_scale=options.guidance,
        tuning=SHORT if options.short else {},
        base=base_digest(),
    )
    name = "training-short.json" if options.short else "training.json"
    results = Results(options.record or Path(__file__).parent / "records" / name, plan, anew=options.anew)
    text = json.dumps(asdict(plan))
    open_runs = [run for run in plan.runs() if run.key not in results.runs]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        floors = {
            pool.submit(measure_class_word, text, concept): concept
            for concept in plan.concepts
            if concept not in results.class_word
        }
        tunings = {pool.submit(measure_run, text, run): run for run in open_runs}
        for future in as_completed([*floors, *tunings]):
            if future in floors:
                results.class_word[floors[future]] = future.result()
            else:
                run = tunings[future]
                results.runs[run.key] = future.result()
                print(f"{len(results.runs)}/{len(list(plan.runs()))} {run.key}: {results.runs[run.key]['scales']}")
            results.write()
    print(markdown(summary(plan, results.runs, results.class_word)))
    print(f"Record: {results.path}")


if __name__ == "__main__":
    main()
