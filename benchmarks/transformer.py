"""Eight plain LoRAs of a transformer, fused into one: what each method keeps of their outputs and identities.

    python -m benchmarks.toyland_base.plain_lora --output LORAS
    python benchmarks/transformer.py --work DIR --loras LORAS    # goes on where it stopped when restarted
    python benchmarks/transformer.py --work DIR --loras LORAS --count 2 --pictures 2 --methods average closed-form

The base is Toyland's second one, a flow-matching transformer of Stable Diffusion 3's class. Methods that need
statistics record every LoRA on prompts that are not measured. Every LoRA and every fused file is loaded by diffusers'
own ``load_lora_weights``. A method may carry a ridge, as in ``closed-form:ridge=auto``. Identity, text-alignment and
drift are those of `benchmarks/retention.py`. The residual |D X - dW X| / |dW X| is that of features X which each LoRA
alone makes of prompts and seeds that no method saw: 0 keeps a LoRA's outputs, 1 is the base's; means over layers and
concepts, by group of layers. Set ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from judging import subject_of
from kept import Kept
from PIL import Image
from recording_curve import residuals
from retention import HELD_OUT, METHODS, as_markdown, concept_free_prompts, drift, judge_pictures, parsed, summary
from rich.console import Console
from toyland_base.instances import PLAIN_LORAS, name_before_class

from diffusers_mixofshow import GradientFuser, LoRASource, toyland
from diffusers_mixofshow.base_models import TOYLAND_SD3
from diffusers_mixofshow.concepts import SLOT
from diffusers_mixofshow.edlora.file import PLAIN_NAME
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.evaluation.sampling import fill_templates
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.fusion.collection import Recording, collect
from diffusers_mixofshow.fusion.solving import sites_of
from diffusers_mixofshow.fusion.sources import Source, gather
from diffusers_mixofshow.fusion.statistics import ConceptStatistics
from diffusers_mixofshow.interop.lora_files import read_lora
from diffusers_mixofshow.progress import hide_bars
from diffusers_mixofshow.sampling.loading import load_base


STEPS, BATCH = 20, 16
MEASURED_SEED, DRIFT_SEED = 10_000, 70_000


class Study:
    """Measures files of LoRAs on one base, and keeps what is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the base and the judge."""
        self.options, self.judge = options, ToylandJudge.load()
        self.pipe = load_base(options.base, "cpu", "float32", concepts=False)
        self.concepts = [toyland.CONCEPTS[name] for name in PLAIN_LORAS[: options.count]]
        self.files = {concept.name: options.loras / f"{concept.name}.safetensors" for concept in self.concepts}
        self.subjects = [subject_of(toyland.CONCEPTS[name], self.judge) for name in PLAIN_LORAS]
        plan = {name: str(getattr(options, name)) for name in ("count", "pictures", "guidance", "held_out")}
        self.kept = Kept(options.work, plan, [*self.files.values(), *sorted(weights_of(options.base))])
        self._of_base: list[Image.Image] = []

    def draw(self, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
        """One picture a prompt, with the same seeds for every method."""
        pictures: list[Image.Image] = []
        for start in range(0, len(prompts), BATCH):
            part = list(prompts[start : start + BATCH])
            generators = [torch.Generator().manual_seed(first_seed + start + number) for number in range(len(part))]
            arguments = {"num_inference_steps": STEPS, "guidance_scale": self.options.guidance}
            with hide_bars(self.pipe):
                pictures += self.pipe(part, generator=generators, **arguments).images
        return pictures

    def draw_with(self, file: Path | None, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
        """The same with a LoRA that diffusers loads; None leaves the base as it is."""
        if file is not None:
            self.pipe.load_lora_weights(file)
        try:
            return self.draw(prompts, first_seed)
        finally:
            self.pipe.unload_lora_weights()

    def measure(self, concept: toyland.ToyConcept, name: str, file: Path | None) -> dict[str, Any]:
        """Identity of one concept in pictures that call it by a name, and their text-alignment with its class word."""
        templates = HELD_OUT[self.options.held_out]
        pictures = self.draw_with(file, fill_templates(templates, name, self.options.pictures), MEASURED_SEED)
        return judge_pictures(pictures, concept, self.subjects, self.judge, templates)

    def measure_all(self, kind: str, call: Callable[[toyland.ToyConcept], str], find: Any) -> dict[str, Any]:
        """Every concept called by the words that `call` gives, with the LoRA that `find` gives for its name."""
        return {
            one.name: self.kept.result(f"{kind}-{one.name}", partial(self.measure, one, call(one), find(one.name)))
            for one in self.concepts
        }

    def measure_drift(self, file: Path) -> dict[str, float]:
        """Distance of the base's and a fused file's pictures of prompts without concepts, at equal seeds."""
        prompts = concept_free_prompts(16)
        self._of_base = self._of_base or self.draw(prompts, DRIFT_SEED)
        return drift(self.judge, self._of_base, self.draw_with(file, prompts, DRIFT_SEED))

    def fuse(self, method: str, folder: Path) -> float:
        """Fuse all LoRAs into one folder for diffusers, by a method and its settings; return the seconds it took."""
        start, (name, settings) = time.perf_counter(), parsed(method)
        fuser = GradientFuser(self.pipe, batch_size=BATCH, **settings)
        fuser.fuse(self.sources, method=name).save_pretrained(folder)
        return round(time.perf_counter() - start, 1)

    @property
    def sources(self) -> list[LoRASource]:
        """All LoRAs with the prompts that they are recorded on."""
        return [
            LoRASource(self.files[one.name], prompts=prompts_about(one, RECORDING_PROMPTS), name=one.name)
            for one in self.concepts
        ]

    @cached_property
    def held_out(self) -> list[ConceptStatistics]:
        """Features that every LoRA alone makes of the measured prompts."""
        templates = HELD_OUT[self.options.held_out]
        recording = Recording(batch_size=BATCH, seeds=(MEASURED_SEED,)).resolve(self.pipe)
        return [
            collect(self.pipe, source.edlora, prompts_about(one, templates), sites_of(self.gathered), recording)
            for one, source in zip(self.concepts, self.gathered, strict=True)
        ]

    @cached_property
    def gathered(self) -> tuple[Source, ...]:
        """The sources as fusion reads them."""
        return gather(self.sources, self.pipe.components, prompts=None)

    def measure_residuals(self, folder: Path) -> dict[str, float]:
        """Mean relative residual of a fused file over layers and concepts, by group of layers."""
        sites = sites_of(self.gathered)
        found = residuals(self.gathered, read_lora(folder / PLAIN_NAME), sites, self.held_out)
        return {group: value["mean"] for group, value in found.items()}


def prompts_about(concept: toyland.ToyConcept, templates: Sequence[str]) -> list[str]:
    """Prompts that call a concept's LoRA by its words."""
    return [template.replace(SLOT, name_before_class(concept)) for template in templates]


def weights_of(base: str) -> list[Path]:
    """The transformer's weights of a base in a folder or in the package."""
    folder = toyland.path(base) if base == TOYLAND_SD3 else Path(base)
    return [*folder.glob("transformer/*.safetensors")]


def run(study: Study, console: Console) -> dict[str, Any]:
    """Every method's row, in the form of the records of `benchmarks/retention.py`."""
    floor = study.measure_all("class", lambda one: one.class_word, lambda name: None)
    single = study.measure_all("single", name_before_class, study.files.get)
    results: dict[str, Any] = {}
    for method in study.options.methods:
        folder = study.kept.folder / "packs" / method.replace(":", "@")
        seconds = study.kept.result(f"{method}-seconds", partial(study.fuse, method, folder))
        rows = study.measure_all(method, name_before_class, lambda name, folder=folder: folder)
        away = study.kept.result(f"{method}-drift", partial(study.measure_drift, folder))
        results[method] = summary(rows, single, floor) | {
            "drift": {name: round(value, 4) for name, value in away.items()},
            "residual": study.kept.result(f"{method}-residual", partial(study.measure_residuals, folder)),
            "seconds": seconds,
        }
        console.print(f"  {method}: {results[method]['retention']} residual {results[method]['residual']}")
    return {str(len(study.concepts)): results}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for fused files and finished results")
    parser.add_argument("--loras", type=Path, required=True, help="folder with NAME.safetensors of the eight")
    parser.add_argument("--base", default=TOYLAND_SD3, help="folder of another base of the class")
    parser.add_argument("--count", type=int, default=len(PLAIN_LORAS), help="fuse the first so many")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD[:ridge=VALUE]")
    parser.add_argument("--pictures", type=int, default=16, help="of every concept and method")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--held-out", choices=tuple(HELD_OUT), default="wording", help="how prompts differ")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "transformer.json")
    return parser.parse_args()


def main() -> None:
    options, console, start = parse_arguments(), Console(), time.monotonic()
    results = run(Study(options), console)
    console.print(as_markdown(results), markup=False, soft_wrap=True)
    names = ("count", "pictures", "guidance", "held_out")
    content = {
        "run_info": {
            **record.run_info(Path(__file__).parent),
            "threads": torch.get_num_threads(),
            "seconds_of_last_run": round(time.monotonic() - start, 1),
        },
        "plan": {name: getattr(options, name) for name in names}
        | {"recorded": RECORDING_PROMPTS, "names": PLAIN_LORAS},
        "results": results,
    }
    console.print(f"Record: {record.write(options.record, content)}")


if __name__ == "__main__":
    main()
