"""How much identity every fusion method keeps on Toyland, for 8, 14 and 30 concepts, and what it does to the base.

    python benchmarks/retention.py --work DIR               # eight methods; goes on where it stopped when restarted
    python benchmarks/retention.py --work DIR --minutes 35  # begins nothing new after that, and writes what there is
    python benchmarks/retention.py --work DIR --counts 8 --settings  # ridges, a prior, each concept's own model, ...
    python benchmarks/retention.py --work DIR --counts 2 --methods closed-form average --pictures 2

Concepts that `benchmarks/toyland.py --work DIR` tuned in the same folder are used again; ``--concepts DIR`` takes
others as they are. One thread is as fast as two: set ``OMP_NUM_THREADS=1``.

The first eight concepts are the critters of `benchmarks/toyland.py`, one class on purpose; then come Toyland's other
things, then random instances. Identity, text-alignment and the neighbours in the photos are measured with prompts that
fusion never recorded; drift compares pictures of concept-free prompts of the base and of the fused model at equal
seeds. Every finished method lies in the work folder and is not done again, unless the base, a concept or the plan has
changed. Prints Markdown tables and writes one record.

A method may carry settings: ``closed-form:ridge=0.1``, ``closed-form:prior=0.1``, ``closed-form:sequential=false``,
``closed-form:dtype=float32``, ``closed-form:sequential=false,statistics_bytes=200000``; and of the recording, so
that it can be found how little of it is enough: ``closed-form:prompts=3``, ``closed-form:steps=5``,
``closed-form:seeds=[0,1]``, ``closed-form:without=beach+snow`` (no prompts of these places).
``closed-form:features=none`` records nothing and takes each update's own rows in place of its inputs. With
``--held-out content`` pictures are of places by night, which no recorded prompt has. ``closed-form:own=text-kv``
shows where identity is lost: there, each concept is measured with its own layers in place of the fused ones
(``text-encoder``, ``text-kv``, ``spatial``, or joined by ``+``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from judging import is_colour, share_of_looks, subject_of
from kept import Kept
from PIL import Image
from rich.console import Console
from rivals import UNSEEN_PROMPTS, WITH_RIDGE, weights_as_features
from toyland_base.instances import random_instances

from diffusers_mixofshow import toyland
from diffusers_mixofshow.base_models import TOYLAND, embedded_base
from diffusers_mixofshow.demo.settings import DemoConcept, DemoSettings
from diffusers_mixofshow.demo.tuning import tune_all
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.identity import Identity, Subject, mean_identity, measure_identity, retention
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS, RECORDING_PROMPTS
from diffusers_mixofshow.evaluation.sampling import Sampling, fill_templates, sample_pictures
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.families import BaseModel
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.solving import Method, Settings, sites_of, solve
from diffusers_mixofshow.fusion.sources import gather
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.concepts import CONCEPTS, ToyConcept


FIRST = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "nono", "vivi")
METHODS: tuple[Method, ...] = ("closed-form", "average", "lbfgs", "ssr", "svd", "ties", "dare", "sum")
"""Every solver."""

SETTINGS = (
    "closed-form:ridge=auto",
    "closed-form:ridge=0.0001",
    "closed-form:ridge=0.01",
    "closed-form:ridge=0.1",
    "closed-form:prior=0.1",
    "closed-form:sequential=false",
    "closed-form:sequential=false,ridge=auto",
    "closed-form:sequential=false,ridge=0.01",
    "closed-form:sequential=false,ridge=0.001",
    "closed-form:sequential=false,statistics_bytes=80000",
    "closed-form:text_tokens=unpadded",
    "closed-form:text_tokens=concept",
    "closed-form:dtype=float32",
)
"""The closed form with other ridges, a prior, each concept's own model, statistics cut down to 7 % of their size (what
10 MB are of SD 1.5's), fewer positions of the texts, and a file in float32 instead of float16."""

LAYERS: Mapping[str, Callable[[str], bool]] = {
    "text-encoder": lambda site: site.startswith("text_encoder."),
    "text-kv": STABLE_DIFFUSION.reads_text,
    "spatial": lambda site: site.startswith("unet.") and not STABLE_DIFFUSION.reads_text(site),
}
"""Groups of layers, as fusion records them one after another."""

COUNTS = (8, 14, 30)
HELD_OUT = {"wording": HELD_OUT_PROMPTS, "content": UNSEEN_PROMPTS}
"""Prompts of the pictures, by how they differ from those that fusion records."""
PRIOR_PROMPTS = (
    "",
    "a red vase in a meadow",
    "a brown dog on a beach",
    "a green chair in a room",
    "a grey cat at night",
    "a blue table in the desert",
)
"""What the prior keeps: none of them is measured."""

CONCEPT_FREE_PROMPTS = (
    "a photo of a critter in the meadow",
    "there is a pink critter at the beach",
    "a picture of a dog in snow",
    "a white cat, in the room",
    "a photo of a yellow vase in the night",
    "a brown chair in the desert",
    "there is a green table in the meadow",
    "a blue critter on the left and a red vase on the right in the snow",
)
"""Prompts without concepts, for drift; class words and things that no concept is."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    pictures: int
    drift_pictures: int
    steps: int
    guidance_scale: float
    seed: int
    tuning: Mapping[str, Any]
    """Training settings, the base model among them."""
    held_out: tuple[str, ...]
    """Prompts of the pictures."""


@dataclass
class Study:
    """Everything that the measurements share."""

    plan: Plan
    kept: Kept
    work: Path
    pipe: Any
    judge: ToylandJudge
    concepts: list[ToyConcept]
    subjects: list[Subject]
    packs: dict[str, Path]
    console: Console
    ends: float
    """When nothing new is begun any more, as `time.monotonic` counts."""

    def sampling(self, first_seed: int) -> Sampling:
        """The same seeds for every method."""
        return Sampling(
            steps=self.plan.steps,
            guidance_scale=self.plan.guidance_scale,
            batch_size=8,
            first_seed=first_seed + 100_000 * self.plan.seed,
        )

    def digest(self, names: Sequence[str]) -> str:
        """Hash of the concepts' ED-LoRAs, so that those tuned anew are measured anew."""
        digest = hashlib.sha256()
        for name in names:
            digest.update((self.packs[name] / "edlora.safetensors").read_bytes())
        return digest.hexdigest()[:8]

    def key(self, method: str, count: int) -> str:
        """What the results of a method are kept under."""
        return f"{count}-{self.digest([concept.name for concept in self.concepts[:count]])}-{method}"

    def has_time_for(self, method: str, count: int) -> bool:
        """Whether a method may begin, or is finished already."""
        names = (f"{self.key(method, count)}-alone", f"{self.key(split_own(method)[0], count)}-drift")
        kept = [self.kept.path(name).exists() for name in names]
        return all(kept) or time.monotonic() < self.ends


def base_of(plan: Plan) -> BaseModel:
    """The embedded base that concepts are tuned on."""
    base = embedded_base(plan.tuning.get("pretrained_model_name_or_path", TOYLAND))
    if base is None:
        raise SystemExit(f"The base is {plan.tuning['pretrained_model_name_or_path']}, expected an embedded one.")
    return base


def chosen_concepts(count: int, seed: int) -> list[ToyConcept]:
    """The first concepts of the study; fewer are the first of more."""
    things = [concept for concept in CONCEPTS.values() if concept.kind != "scene"]
    known = [CONCEPTS[name] for name in FIRST] + [concept for concept in things if concept.name not in FIRST]
    return [*known, *random_instances(max(0, count - len(known)), seed)][:count]


def tuned(
    concepts: Sequence[ToyConcept], plan: Plan, work: Path, given: Path | None, console: Console
) -> dict[str, Path]:
    """Take the concepts that are given, and tune all others that are not tuned yet."""
    packs = {} if given is None else {concept.name: given / concept.name for concept in concepts}
    packs = {name: folder for name, folder in packs.items() if (folder / "edlora.safetensors").exists()}
    if packs:
        console.print(f"  given: {' '.join(packs)}")
    settings = DemoSettings(folder=work, seed=plan.seed, tuning=plan.tuning)
    described = [
        DemoConcept(
            name=concept.name,
            kind=concept.kind,
            class_word=concept.class_word,
            folder=toyland.write_photos(
                concept, work / "photos" / concept.name, seed=plan.seed, height=base_of(plan).least_resolution
            ),
        )
        for concept in concepts
        if concept.name not in packs
    ]
    start = time.monotonic()

    def on_step(name: str, step: int, total: int, loss: float) -> None:
        if step == total:
            console.print(f"  {name} is tuned, {time.monotonic() - start:.0f} s")

    return packs | tune_all(described, settings, on_step)


def parsed(method: str) -> tuple[Method, dict[str, Any]]:
    """``closed-form:ridge=0.1,prior=0.1`` as a method and settings of `GradientFuser`."""
    name, _, rest = method.partition(":")
    if name not in METHODS:
        raise SystemExit(f"Unknown method {name!r} in {method!r}; expected {', '.join(METHODS)}.")
    settings: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", rest) if rest else ():
        key, _, value = part.partition("=")
        settings[key] = getattr(torch, value) if key == "dtype" else _value(value)
    return name, settings


def split_own(method: str) -> tuple[str, tuple[str, ...]]:
    """``closed-form:ridge=0.1,own=text-kv`` as the method of the pack, and the groups of layers to exchange in it."""
    name, _, rest = method.partition(":")
    parts = rest.split(",") if rest else []
    groups = tuple(group for part in parts if part.startswith("own=") for group in part[4:].split("+"))
    if unknown := set(groups) - set(LAYERS):
        raise SystemExit(f"own={'+'.join(sorted(unknown))}: expected {', '.join(LAYERS)}, joined by +.")
    settings = ",".join(part for part in parts if not part.startswith("own="))
    return f"{name}:{settings}" if settings else name, groups


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def fused(study: Study, method: str, count: int) -> EDLoRA:
    """The pack of the first concepts under a method, read from its file, as users have it."""
    names = [concept.name for concept in study.concepts[:count]]
    folder = study.kept.folder / "packs" / study.key(method, count).replace(":", "@")
    if not (folder / "edlora.safetensors").exists():
        name, settings = parsed(method)
        sources = [str(study.packs[name]) for name in names]
        if settings.pop("features", None) == "none":
            fuse_without_features(study, sources).save_pretrained(folder)
            return EDLoRA.from_pretrained(folder)
        size = settings.setdefault("statistics_bytes", None)
        recording: dict[str, Any] = {
            "steps": study.plan.steps,
            "guidance_scale": study.plan.guidance_scale,
            "batch_size": 8,
            "prior_prompts": PRIOR_PROMPTS,
            "statistics": study.work / (f"statistics-{size}" if size else "statistics"),
        }
        places = str(settings.pop("without", "")).split("+")
        first = RECORDING_PROMPTS[: settings.pop("prompts", None)]
        prompts = [prompt for prompt in first if not any(place and place in prompt for place in places)]
        fuser = GradientFuser(study.pipe, prompts=prompts, **recording | settings)
        start = time.perf_counter()
        fuser.fuse(sources, method=name).save_pretrained(folder)
        study.console.print(f"  fused {count} by {method} in {time.perf_counter() - start:.0f} s")
    return EDLoRA.from_pretrained(folder)


def fuse_without_features(study: Study, sources: Sequence[str]) -> EDLoRA:
    """The closed form with the rows of each update for its layer's inputs, as `benchmarks/rivals.py` measures it."""
    read = gather(sources, study.pipe.components, prompts=None)
    sites = sites_of(read)
    statistics = [[weights_as_features(source, sites)] for source in read]
    settings = Settings(method="closed-form", ridge=WITH_RIDGE["closed-form:weights alone"])
    solved = solve(read, statistics, sites, settings).lora
    return replace(GradientFuser(study.pipe).fuse(sources, method="average"), lora=solved)


def pictures_of(study: Study, subject: str) -> list[Image.Image]:
    prompts = fill_templates(study.plan.held_out, subject, study.plan.pictures)
    return sample_pictures(study.pipe, prompts, study.sampling(10_000))


def measured(study: Study, concept: ToyConcept, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    return judge_pictures(pictures, concept, study.subjects, study.judge, study.plan.held_out)


def judge_pictures(
    pictures: Sequence[Image.Image],
    concept: ToyConcept,
    subjects: Sequence[Subject],
    judge: ToylandJudge,
    templates: Sequence[str],
) -> dict[str, Any]:
    """Identity of one concept in pictures, that of its shapes alone, and their text-alignment."""
    subject = next(one for one in subjects if one.name == concept.name)
    identity = measure_identity(pictures, subject, subjects, judge)
    texts = judge.text_features(fill_templates(templates, concept.class_word, len(pictures)))
    alignment = metrics.clip_score(texts, judge.features(pictures))
    shapes = share_of_looks(judge.read(pictures), subject, lambda attribute: not is_colour(attribute))
    return {"identity": asdict(identity), "text_alignment": alignment, "shapes": shapes}


def measured_pack(study: Study, pack: EDLoRA | Path, concepts: Sequence[ToyConcept]) -> dict[str, Any]:
    """Every concept of a pack."""
    study.pipe.load_edlora(pack)
    try:
        return {one.name: measured(study, one, pictures_of(study, f"<{one.name}>")) for one in concepts}
    finally:
        study.pipe.unload_edlora()


def measured_with_own_layers(
    study: Study, pack: EDLoRA, concepts: Sequence[ToyConcept], groups: Sequence[str]
) -> dict[str, Any]:
    """Every concept of a pack, with layers of some groups from its own ED-LoRA."""
    rows: dict[str, Any] = {}
    for one in concepts:
        own = EDLoRA.from_pretrained(study.packs[one.name]).lora
        exchanged = {site: own[site] for site in pack.lora if any(LAYERS[group](site) for group in groups)}
        rows |= measured_pack(study, replace(pack, lora={**pack.lora, **exchanged}), [one])
    return rows


def concept_free_prompts(count: int) -> list[str]:
    return [CONCEPT_FREE_PROMPTS[index % len(CONCEPT_FREE_PROMPTS)] for index in range(count)]


def concept_free(study: Study, pack: EDLoRA | None) -> list[Image.Image]:
    if pack is not None:
        study.pipe.load_edlora(pack)
    try:
        prompts = concept_free_prompts(study.plan.drift_pictures)
        return sample_pictures(study.pipe, prompts, study.sampling(70_000))
    finally:
        study.pipe.unload_edlora()


def drift(judge: ToylandJudge, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> dict[str, float]:
    """Distance of two models' pictures of the same prompts and seeds."""
    cosines = metrics.cosine_matrix(judge.features(base), judge.features(other)).diagonal()
    pixels = [pixels_apart(one, two) for one, two in zip(base, other, strict=True)]
    return {"features": float((1 - cosines).mean()), "pixels": sum(pixels) / len(pixels)}


def pixels_apart(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 to 1."""
    left, right = (
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in (one, other)
    )
    return float((left.float() - right.float()).abs().mean() / 255)


def summary(
    rows: Mapping[str, Mapping[str, Any]], single: Mapping[str, Any], floor: Mapping[str, Any]
) -> dict[str, Any]:
    """Means over concepts of one method, what it keeps of what tuning gained, and the values of each concept."""
    means = [mean_identity([Identity(**table[name]["identity"]) for name in rows]) for table in (rows, single, floor)]
    shapes = [mean_over(table, rows, "shapes") for table in (rows, single, floor)]
    identity, of_single, of_class_word = (
        mean.as_record() | {"shapes": share} for mean, share in zip(means, shapes, strict=True)
    )
    return {
        "identity": identity,
        "single": of_single,
        "class_word": of_class_word,
        "retention": retention(*means),
        "text_alignment": mean_over(rows, rows, "text_alignment"),
        "text_alignment_of_single": mean_over(single, rows, "text_alignment"),
        "text_alignment_of_class_word": mean_over(floor, rows, "text_alignment"),
        "of_each": of_each(rows, rows),
        "of_each_single": of_each(single, rows),
        "of_each_class_word": of_each(floor, rows),
    }


def mean_over(table: Mapping[str, Any], names: Iterable[str], measure: str) -> float:
    """Mean of a measure over these concepts."""
    return round(statistics.fmean(table[name][measure] for name in names), 4)


def of_each(table: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """What is measured of these concepts, each apart."""
    return {
        name: table[name]["identity"] | {each: table[name][each] for each in ("shapes", "text_alignment")}
        for name in names
    }


def study_method(
    study: Study, method: str, count: int, base: list[Image.Image], tables: dict[str, Any]
) -> dict[str, Any]:
    """One method on the first concepts; drift is the pack's, whatever layers are exchanged for one concept."""
    pack: list[EDLoRA] = []
    of_pack, own = split_own(method)

    def the_pack() -> EDLoRA:
        pack[:] = pack or [fused(study, of_pack, count)]
        return pack[0]

    concepts = study.concepts[:count]
    key = study.key(method, count)
    away = study.kept.result(
        f"{study.key(of_pack, count)}-drift", lambda: drift(study.judge, base, concept_free(study, the_pack()))
    )
    rows = study.kept.result(
        f"{key}-alone",
        lambda: (
            measured_with_own_layers(study, the_pack(), concepts, own)
            if own
            else measured_pack(study, the_pack(), concepts)
        ),
    )
    result = summary(rows, tables["single"], tables["class_word"]) | {
        "drift": {name: round(value, 4) for name, value in away.items()},
    }
    study.console.print(f"  {count} {method}: {result['retention']} drift {result['drift']}")
    return result


def measured_single(study: Study, concepts: Sequence[ToyConcept]) -> dict[str, Any]:
    """Every concept with its own ED-LoRA alone."""
    rows: dict[str, Any] = {}
    for one in concepts:
        pack = study.packs[one.name]
        key = f"single-{one.name}-{study.digest([one.name])}"
        rows |= study.kept.result(key, lambda: measured_pack(study, pack, [one]))  # noqa: B023
    return rows


def measured_floor(study: Study, concepts: Sequence[ToyConcept]) -> dict[str, Any]:
    """Every concept under its class word on the base."""
    pictures: dict[str, list[Image.Image]] = {}

    def looked_at(one: ToyConcept) -> dict[str, Any]:
        if one.class_word not in pictures:
            pictures[one.class_word] = pictures_of(study, one.class_word)
        return measured(study, one, pictures[one.class_word])

    return {one.name: study.kept.result(f"class-{one.name}", lambda: looked_at(one)) for one in concepts}  # noqa: B023


def run(study: Study, methods: Sequence[str], counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Methods on numbers of concepts; those that time was left for, or that were finished before."""
    base = concept_free(study, None)
    results: dict[str, dict[str, Any]] = {}
    for count in sorted(counts):
        concepts = study.concepts[:count]
        tables = {"single": measured_single(study, concepts), "class_word": measured_floor(study, concepts)}
        results[str(count)] = {}
        for method in methods:
            if not study.has_time_for(method, count):
                study.console.print(f"  No time left for {count} {method}; start again to go on.")
                continue
            results[str(count)][method] = study_method(study, method, count, base, tables)
    return results


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One table for every number of concepts, the concepts alone in its first row."""
    titles = ("", "looks", "looks kept", "alignment", "alignment kept", "nearest", "text", "drift", "drift, pixels")
    lines: list[str] = []
    for count, methods in results.items():
        if not methods:
            continue
        lines += [f"{count} concepts:", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
        one = next(iter(methods.values()))
        rows: list[tuple[str, tuple[float | None, ...]]] = [
            (label, (one[key]["attributes"], None, one[key]["alignment"], None, one[key]["nearest"], text, None, None))
            for label, key, text in (
                ("class word", "class_word", one["text_alignment_of_class_word"]),
                ("alone", "single", one["text_alignment_of_single"]),
            )
        ]
        for method, row in methods.items():
            identity, kept, away = row["identity"], row["retention"], row["drift"]
            likeness = (identity["attributes"], kept["attributes"], identity["alignment"], kept["alignment"])
            others = (identity["nearest"], row["text_alignment"], away["features"], away["pixels"])
            rows.append((method, (*likeness, *others)))
        for name, numbers in rows:
            cells = ("" if number is None else f"{number:.3f}" for number in numbers)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for concepts, packs and finished results")
    parser.add_argument("--concepts", type=Path, help="folder with tuned ED-LoRAs, one subfolder a name")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of concepts to fuse")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD[:SETTING=VALUE,...]")
    parser.add_argument("--base", default=TOYLAND, help="the embedded base: toyland or toyland-xl")
    parser.add_argument("--settings", action="store_true", help="also the closed form with other settings")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no method after so long")
    parser.add_argument("--pictures", type=int, default=6, help="of every concept and method")
    parser.add_argument("--drift-pictures", type=int, default=16, help="without concepts, of every method")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=DemoSettings.guidance_scale)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--held-out", choices=tuple(HELD_OUT), default="wording", help="how the prompts differ from recorded ones"
    )
    parser.add_argument("--tuning", default="{}", help="JSON of training settings to replace, for quick trials")
    parser.add_argument("--record", type=Path, help="where to write the record")
    return parser.parse_args()


def study_of(options: argparse.Namespace, start: float, console: Console) -> Study:
    """Everything that is measured with, concepts tuned. Whose photos are nearest is asked of the same 30 always."""
    plan = Plan(
        pictures=options.pictures,
        drift_pictures=options.drift_pictures,
        steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        tuning=json.loads(options.tuning)
        | ({} if options.base == TOYLAND else {"pretrained_model_name_or_path": options.base}),
        held_out=HELD_OUT[options.held_out],
    )
    candidates, judge = chosen_concepts(max(*COUNTS, *options.counts), plan.seed), ToylandJudge.load()
    concepts = candidates[: max(options.counts)]
    return Study(
        plan=plan,
        kept=Kept(options.work, asdict(plan) | {"measures": "shapes"}, base=options.base),
        work=options.work,
        pipe=load_base(options.base, "cpu", "float32", concepts=True),
        judge=judge,
        concepts=concepts,
        subjects=[subject_of(concept, judge) for concept in candidates],
        packs=tuned(concepts, plan, options.work, options.concepts, console),
        console=console,
        ends=start + 60 * options.minutes,
    )


def main() -> None:
    options, console, start = parse_arguments(), Console(), time.monotonic()
    methods = [*options.methods, *(SETTINGS if options.settings else ())]
    for method in methods:
        split_own(method)  # says what is wrong before anything is tuned
    study = study_of(options, start, console)
    prepared = time.monotonic()
    results = run(study, methods, options.counts)
    console.print(as_markdown(results), markup=False, soft_wrap=True)
    content = {
        "run_info": {
            **record.run_info(Path(__file__).parent),
            "threads": torch.get_num_threads(),
            "seconds_of_last_run": {
                "tuning": round(prepared - start, 1),
                "measuring": round(time.monotonic() - prepared, 1),
            },
        },
        "plan": asdict(study.plan)
        | {
            "concepts": [concept.name for concept in study.concepts],
            "recorded": RECORDING_PROMPTS,
            "concept_free": CONCEPT_FREE_PROMPTS,
        },
        "results": results,
    }
    path = options.record or Path(__file__).parent / "records" / "retention.json"
    console.print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
