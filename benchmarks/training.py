"""Measure on Toyland what tuning puts where: ``python benchmarks/training.py --work DIR [--short] [--minutes 35]``.

    python benchmarks/training.py --work DIR --base toyland-xl --concepts bobo nono --only ED-LoRA \
        "without layer-wise embeddings" "with embeddings of each layer"   # Stable Diffusion XL's groups of layers

Concepts inside and outside of what the base has seen are tuned by textual inversion, P+, LoRA, ED-LoRA and Custom
Diffusion, ED-LoRA by five seeds, and by ED-LoRA with one thing changed. Each is then sampled with its weight updates
at scale 0 (the embeddings alone) and 1, with prompts and seeds that are the same for all. Identity is the metric
model's image-alignment with the photos, and the share of hidden attributes that the reader finds.

Every run's numbers are kept in ``--work`` under what they depend on (settings, seed, pictures, base; not the code), so
that an interrupted benchmark goes on where it stopped, and one with more concepts, seeds or pictures measures only
what is new. With ``--minutes`` no run is begun that would probably not end in time; the runs that most depends on come
first, and the tables show what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffusers_mixofshow import toyland
from diffusers_mixofshow.base_models import TOYLAND, TOYLAND_XL, embedded_base
from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.training import TrainingConfig


CLASS_WORD = "class word"
"""The floor: nothing is tuned, the prompts say the class word."""
ALL_AT_ONCE = "all at once"
"""In place of settings: as many steps as with the embeddings' own phase, but all of them of everything."""
# As published: what it learns at the start token, it learns.
PLAIN_LORA: dict[str, Any] = {"method": "lora", "keep_start_token": False}
METHODS: dict[str, dict[str, Any]] = {
    "textual inversion": {"method": "textual-inversion"},
    "P+": {"method": "p-plus"},
    "LoRA": {**PLAIN_LORA, ALL_AT_ONCE: True},
    "ED-LoRA": {},
}
# What the embeddings' own phase does to both, so that LoRA and ED-LoRA can also be compared with the same steps.
SCHEDULES: dict[str, dict[str, Any]] = {
    "LoRA, embeddings first": PLAIN_LORA,
    "ED-LoRA, all at once": {ALL_AT_ONCE: True},
}
EACH_LAYER = "with embeddings of each layer"
"""Every cross-attention layer has its own embeddings, where the family's layers share them in groups."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "with updates at the start token": {"keep_start_token": False},
    "without noise offset": {"noise_offset": 0.0},
    "without layer-wise embeddings": {"method": "ed-lora-shared-layers"},
    "without the class token": {"method": "ed-lora-without-class"},
    "with masks": {"masked_loss": True},
    "with the attention regulariser": {"attn_reg_weight": 0.01},
    "with masks and the regulariser": {"masked_loss": True, "attn_reg_weight": 0.01},
}
# Whole matrices need smaller steps than the factors of a LoRA.
LAST: dict[str, dict[str, Any]] = {
    "Custom Diffusion": {"method": "custom-diffusion", "text_kv_learning_rate": 1.5e-3, "keep_start_token": False}
}
VARIANTS = METHODS | SCHEDULES | ABLATIONS | LAST | {EACH_LAYER: {}}
IN_DOMAIN = ("bobo", "rex", "ming")
OUT_OF_DOMAIN = ("nono", "pixel", "neon")
DOMAINS = {"in": IN_DOMAIN, "out": OUT_OF_DOMAIN}
SCALES = ("0", "1")
MEASURES = ("alignment", "attributes", "nearest")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement: what, of which concept and with which seed."""

    variant: str
    concept: str
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured; the fields below `seeds` decide numbers, those above which of them there are."""

    concepts: tuple[str, ...]
    few: tuple[str, ...]
    seeds: int
    pictures: int
    sampling_steps: int
    guidance_scale: float
    embedding_steps: int
    joint_steps: int
    base: str
    """Digest of the base's weights."""
    base_model: str = TOYLAND
    only: tuple[str, ...] = ()
    """Variants that are measured; all by default."""

    def runs(self) -> Iterator[Run]:
        """What other numbers are compared with comes first."""
        if self.only:
            variants = (CLASS_WORD, *self.only)
            yield from (Run(variant=variant, concept=concept) for concept in self.concepts for variant in variants)
            return
        yield from (Run(variant=CLASS_WORD, concept=concept) for concept in self.concepts)
        yield from (
            Run(variant=variant, concept=concept) for variant in reversed(METHODS) for concept in self.concepts
        )
        for concept in self.few:
            yield from (Run(variant="ED-LoRA", concept=concept, seed=seed) for seed in range(1, self.seeds))
            yield from (Run(variant=variant, concept=concept) for variant in ABLATIONS)
        yield from (Run(variant=variant, concept=concept) for variant in SCHEDULES | LAST for concept in self.concepts)

    def settings(self, run: Run) -> dict[str, Any]:
        """`TrainingConfig`'s settings of a run, the photos' folder left out."""
        concept = toyland.CONCEPTS[run.concept]
        changed = dict(VARIANTS[run.variant])
        steps = {"embedding_phase_steps": self.embedding_steps, "max_train_steps": self.joint_steps}
        if changed.pop(ALL_AT_ONCE, False):
            steps = {"embedding_phase_steps": 0, "max_train_steps": self.embedding_steps + self.joint_steps}
        named = {"concept": run.concept, "class_word": concept.class_word, "kind": concept.kind}
        base = {
            "pretrained_model_name_or_path": self.base_model,
            "resolution": resolution_of(self.base_model),
        }
        # Company 0 is photos alone, as the paper's study.
        return {**named, **base, "seed": run.seed, "company": 0.0, **steps, **changed}

    def file_of(self, run: Run) -> str:
        """A name that is another one where the numbers may be others."""
        choices = ("concepts", "few", "seeds", "only", "base_model")
        shared = {name: value for name, value in asdict(self).items() if name not in choices}
        if run.variant == CLASS_WORD:
            settings: dict[str, Any] = {}
            shared = {name: value for name, value in shared.items() if not name.endswith("_steps")} | {
                "sampling_steps": self.sampling_steps
            }
        else:
            config = TrainingConfig.toyland(instance_data_dir="photos", **self.settings(run))
            settings = config.as_identity() | ({EACH_LAYER: True} if run.variant == EACH_LAYER else {})
        digest = hashlib.sha256(json.dumps([shared, settings], sort_keys=True).encode()).hexdigest()
        words = "-".join(run.variant.lower().replace(",", "").split())
        return f"{words}-{run.concept}-{run.seed}-{digest[:12]}.json"


class Bench:
    """A pipeline and judges, loaded once a process."""

    def __init__(self, plan: Plan) -> None:
        import torch
        from judging import subject_of

        from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
        from diffusers_mixofshow.sampling.loading import load_base

        torch.set_num_threads(1)
        self.plan = plan
        self.pipe: Any = load_base(plan.base_model, "cpu", "float32", concepts=True)
        self.judge = ToylandJudge.load()
        # All of them, so that what is nearest does not depend on which are measured.
        self.subjects = {name: subject_of(toyland.CONCEPTS[name], self.judge) for name in (*IN_DOMAIN, *OUT_OF_DOMAIN)}

    def measured(self, run: Run) -> dict[str, Any]:
        """A run's numbers."""
        if run.variant == CLASS_WORD:
            floor = self.judged(toyland.CONCEPTS[run.concept].class_word, run.concept)
            return {**asdict(run), "scales": dict.fromkeys(SCALES, floor)}
        with embeddings_of_each_layer() if run.variant == EACH_LAYER else nullcontext():
            return self.tuned(run)

    def tuned(self, run: Run) -> dict[str, Any]:
        """Tune a concept, sample it at every scale, and judge."""
        from diffusers_mixofshow import EDLoRATrainer

        with tempfile.TemporaryDirectory() as folder:
            concept, height = toyland.CONCEPTS[run.concept], resolution_of(self.plan.base_model)
            photos = toyland.write_photos(concept, folder, height=height)
            config = TrainingConfig.toyland(instance_data_dir=photos, **self.plan.settings(run))
            start = time.process_time()
            edlora = EDLoRATrainer(config, self.pipe).train()
            seconds = round(time.process_time() - start, 1)
            edlora.save_pretrained(Path(folder, "saved"))
            size = Path(folder, "saved", "edlora.safetensors").stat().st_size
        scales = {}
        for scale in SCALES if edlora.lora else ("1",):
            self.pipe.load_edlora(edlora, scale=float(scale))
            try:
                scales[scale] = self.judged(f"<{run.concept}>", run.concept)
            finally:
                self.pipe.unload_edlora()
        # Without updates, scale 0 and 1 are the same pictures.
        scales = {"0": scales["1"]} | scales
        loss: Any = edlora.training["final_loss"]
        numbers = {"final_loss": round(loss, 5), "tuning_cpu_seconds": seconds, "bytes": size}
        return {**asdict(run), "scales": scales, **numbers}

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


@cache
def bench_of(plan: Plan) -> Bench:
    """The process's own bench."""
    return Bench(plan)


def measure(plan: Plan, run: Run) -> tuple[dict[str, Any], float]:
    """A run's numbers, and how long they took."""
    start = time.monotonic()
    return bench_of(plan).measured(run), time.monotonic() - start


def resolution_of(base_model: str) -> int:
    """Pixels of an embedded base's pictures."""
    base = embedded_base(base_model)
    if base is None:
        raise SystemExit(f"The base is {base_model}, expected an embedded one: {TOYLAND} or {TOYLAND_XL}.")
    return base.least_resolution


@contextmanager
def embeddings_of_each_layer() -> Iterator[None]:
    """Stable Diffusion XL as if its cross-attention layers shared no embeddings; the frozen family is changed."""
    from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL

    groups = STABLE_DIFFUSION_XL.embedding_groups
    object.__setattr__(STABLE_DIFFUSION_XL, "embedding_groups", None)
    try:
        yield
    finally:
        object.__setattr__(STABLE_DIFFUSION_XL, "embedding_groups", groups)


def base_digest(base_model: str) -> str:
    """What tells one embedded base from another."""
    digest = hashlib.sha256()
    for part in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        digest.update((toyland.path(base_model) / part).read_bytes())
    return digest.hexdigest()[:16]


def measure_all(plan: Plan, work: Path, workers: int, minutes: float | None) -> list[dict[str, Any]]:
    """Measure what is not in `work` yet, as far as the time allows; everything that is known of the plan."""
    runs = list(plan.runs())
    known = {run: json.loads(path.read_text("utf-8")) for run in runs if (path := work / plan.file_of(run)).is_file()}
    print(f"{len(known)} of {len(runs)} runs are in {work} already")
    waiting = [run for run in runs if run not in known]
    start, longest = time.monotonic(), 0.0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[tuple[dict[str, Any], float]], Run] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                if minutes is not None and time.monotonic() - start + longest > 60 * minutes:
                    print(f"No time for {len(waiting)} more runs; call it again to go on")
                    waiting = []
                    break
                run = waiting.pop(0)
                running[pool.submit(measure, plan, run)] = run
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                known[run], seconds = future.result()
                longest = max(longest, seconds)
                record.write(work / plan.file_of(run), known[run])
                left = seconds * (len(waiting) + len(running)) / workers / 60
                print(f"{len(known)}/{len(runs)}, {left:.0f} min left: {_line(known[run])}", flush=True)
    return [known[run] for run in runs if run in known]


def _line(run: Mapping[str, Any]) -> str:
    values = ", ".join(f"at {scale} {cell(run['scales'][scale])}" for scale in SCALES)
    return f"{run['variant']} {run['concept']} {run['seed']}: {values}"


def summary(runs: Sequence[Mapping[str, Any]], variants: Sequence[str], concepts: Sequence[str]) -> dict[str, Any]:
    """Mean identity of every variant with seed 0 by domain and scale, over the concepts."""
    lines: dict[str, Any] = {}
    for variant in variants:
        for domain, names in DOMAINS.items():
            chosen = [
                run
                for run in runs
                if run["variant"] == variant and run["seed"] == 0 and run["concept"] in {*names} & {*concepts}
            ]
            for scale in SCALES if chosen else ():
                means = _means([run["scales"][scale] for run in chosen]) | {"concepts": len(chosen)}
                lines.setdefault(variant, {}).setdefault(domain, {})[scale] = means
    return lines


def seed_variance(runs: Sequence[Mapping[str, Any]], concepts: Sequence[str]) -> dict[str, Any]:
    """Of ED-LoRA: identity by every seed, and the seeds that lose the concept.

    A seed loses it if its gain over the class word is less than half of the mean gain, which asks for more than half
    of the mean identity.
    """
    found = {}
    for concept in concepts:
        of_concept = [run for run in runs if run["concept"] == concept]
        floor = [run["scales"]["1"]["alignment"] for run in of_concept if run["variant"] == CLASS_WORD]
        seeds = {run["seed"]: run["scales"]["1"] for run in of_concept if run["variant"] == "ED-LoRA"}
        if not floor or not seeds:
            continue
        alignment = {seed: values["alignment"] for seed, values in sorted(seeds.items())}
        gain = statistics.fmean(alignment.values()) - floor[0]
        found[concept] = {
            "class_word": floor[0],
            "alignment": alignment,
            "attributes": {seed: values["attributes"] for seed, values in sorted(seeds.items())},
            "mean": round(statistics.fmean(alignment.values()), 4),
            "deviation": round(statistics.stdev(alignment.values()), 4) if len(alignment) > 1 else None,
            "lost": [seed for seed, value in alignment.items() if value - floor[0] < gain / 2],
        }
    return found


def _means(identities: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    known = {name: [value for row in identities if (value := row[name]) is not None] for name in MEASURES}
    return {name: round(statistics.fmean(values), 4) for name, values in known.items() if values}


def cell(means: Mapping[str, float] | None) -> str:
    """Image-alignment, and the share of attributes in percent."""
    return f"{means['alignment']:.3f}, {means['attributes']:.0%}" if means else ""


def identity_table(lines: Mapping[str, Any]) -> str:
    """In and out of domain, at scale 0 and 1, as Markdown."""
    rows = ["| | in-domain, 0 | in-domain, 1 | out-of-domain, 0 | out-of-domain, 1 |", "|---|---|---|---|---|"]
    for variant, domains in lines.items():
        cells = [cell(domains.get(domain, {}).get(scale)) for domain in DOMAINS for scale in SCALES]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


def seed_table(found: Mapping[str, Any]) -> str:
    """One line a concept, as Markdown."""
    rows = [
        "| concept | class word | seeds | mean | deviation | least | seeds that lose it |",
        "|---|---|---|---|---|---|---|",
    ]
    for concept, values in found.items():
        deviation = "" if values["deviation"] is None else f"{values['deviation']:.3f}"
        lost = ", ".join(map(str, values["lost"])) or "none"
        least = min(values["alignment"].values())
        rows.append(
            f"| {concept} | {values['class_word']:.3f} | {len(values['alignment'])} | {values['mean']:.3f} "
            f"| {deviation} | {least:.3f} | {lost} |"
        )
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    usual = TrainingConfig.toyland(instance_data_dir="photos", concept="rex", class_word="dog")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the numbers of every run are kept")
    parser.add_argument("--short", action="store_true", help="very few steps and pictures: does it run?")
    parser.add_argument("--minutes", type=float, help="begin no run that would probably end later (default: all runs)")
    names = (*IN_DOMAIN, *OUT_OF_DOMAIN)
    parser.add_argument("--concepts", nargs="+", choices=names, default=["bobo", "rex", "nono", "pixel"])
    parser.add_argument(
        "--few", nargs="+", choices=names, default=["bobo", "nono"], help="concepts of other seeds and of ablations"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds of ED-LoRA")
    parser.add_argument("--pictures", type=int, default=24, help="of every run and scale")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=DemoSettings.guidance_scale)
    parser.add_argument("--embedding-steps", type=int, default=usual.embedding_phase_steps)
    parser.add_argument("--joint-steps", type=int, default=usual.max_train_steps)
    parser.add_argument("--base", choices=(TOYLAND, TOYLAND_XL), default=TOYLAND, help="the embedded base")
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), help="variants that are measured (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--record", type=Path, help="default: benchmarks/records/training[-short].json")
    options = parser.parse_args()
    if options.short:
        options.pictures, options.sampling_steps = 2, 4
        options.embedding_steps, options.joint_steps = 2, 4
    return options


def main() -> None:
    options = parse_arguments()
    plan = Plan(
        concepts=tuple(options.concepts),
        few=tuple(options.few),
        seeds=options.seeds,
        pictures=options.pictures,
        sampling_steps=options.sampling_steps,
        guidance_scale=options.guidance,
        embedding_steps=options.embedding_steps,
        joint_steps=options.joint_steps,
        base=base_digest(options.base),
        base_model=options.base,
        only=tuple(options.only or ()),
    )
    runs = measure_all(plan, options.work, options.workers, options.minutes)
    measured = plan.only or (*METHODS, *SCHEDULES, *LAST)
    tables = {"methods": summary(runs, (CLASS_WORD, *measured), plan.concepts)}
    if not plan.only:
        tables |= {
            "ablations": summary(runs, (CLASS_WORD, "ED-LoRA", "ED-LoRA, all at once", *ABLATIONS), plan.few),
            "seeds": seed_variance(runs, plan.few),
        }
    make: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "methods": identity_table,
        "ablations": identity_table,
        "seeds": seed_table,
    }
    for name, lines in tables.items():
        print(f"\n{name.capitalize()}\n\n{make[name](lines)}")
    default = Path(__file__).parent / "records" / f"training{'-short' if options.short else ''}.json"
    content = {"run_info": record.run_info(Path(__file__).parent), "plan": asdict(plan), **tables, "runs": runs}
    print(f"\nRecord: {record.write(options.record or default, content)}")


if __name__ == "__main__":
    main()
