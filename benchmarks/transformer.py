"""Eight plain LoRAs of a transformer, fused into one: what each method keeps of their identities.

    python -m benchmarks.transformer --work DIR                # goes on where it stopped when restarted
    python -m benchmarks.transformer --work DIR --concepts 2 --steps 20 --pictures 2 --methods average closed-form

The base is Toyland's second one, a flow-matching transformer of Stable Diffusion 3's class. Each LoRA is tuned as
diffusers' ``train_dreambooth_lora_sd3.py`` does: PEFT's LoRA on the attention of both streams, the text encoders left
alone, noise levels from a logit-normal distribution, AdamW; batch, steps and rate are a small model's. A LoRA answers
to its name before the class word, such as ``bobo critter``. Fusion records each with its own LoRA on prompts that are
not measured. Every fused file is loaded by diffusers' own ``load_lora_weights``. Set ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from rich.console import Console
from rich.progress import track

from benchmarks.judging import mean_with_interval, subject_of
from benchmarks.kept import Kept, markdown
from benchmarks.toyland_base.transformer import TEXT_TOKENS, FlowObjective
from diffusers_mixofshow import GradientFuser, LoRASource, toyland
from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.evaluation import metrics, record
from diffusers_mixofshow.evaluation.identity import Identity, Subject, mean_identity, measure_identity, retention
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS, RECORDING_PROMPTS, UNSEEN_PROMPTS
from diffusers_mixofshow.evaluation.sampling import fill_templates
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.fusion.solving import Method
from diffusers_mixofshow.progress import hide_bars
from diffusers_mixofshow.toyland.reader import to_pixels


NAMES = ("bobo", "kiki", "momo", "zuzu", "lulu", "tiki", "rex", "ming")
"""Six critters, a dog and a vase, of looks that the base was trained on."""
METHODS = ("closed-form", "closed-form:auto", "ssr", "average", "ties", "dare", "svd", "sum")
ADAPTED = tuple(
    f"attn.{name}"
    for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
)
"""The layers of diffusers' recipe."""
HELD_OUT = {"wording": HELD_OUT_PROMPTS, "content": UNSEEN_PROMPTS}
MEASURED_SEED = 10_000


def tune(pipe: Any, concept: toyland.ToyConcept, file: Path, options: argparse.Namespace) -> None:
    """Tune one plain LoRA and write it by the pipeline's own `save_lora_weights`."""
    torch.manual_seed(options.seed)
    photos = toyland.photos(concept, seed=options.seed)
    with torch.no_grad():
        latents = pipe.vae.encode(to_pixels([photo.image for photo in photos])).latent_dist.mode()
    captions = [photo.caption.replace("<TOK>", called(concept)) for photo in photos]
    token_ids = tokenize_plain(captions, pipe.tokenizer)[:, :TEXT_TOKENS]
    model = pipe.transformer.requires_grad_(False)
    model.add_adapter(
        LoraConfig(r=options.rank, lora_alpha=options.rank, init_lora_weights="gaussian", target_modules=list(ADAPTED))
    )
    objective = FlowObjective(model, (pipe.text_encoder, pipe.text_encoder_2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in track(range(options.steps), description=concept.name):
        chosen = torch.randint(len(photos), (options.batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        levels = torch.randn(options.batch, generator=generator).sigmoid()
        objective((clean, noise, levels, token_ids[chosen])).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    type(pipe).save_lora_weights(
        file.parent, transformer_lora_layers=get_peft_model_state_dict(model), weight_name=file.name
    )
    model.delete_adapters("default")


def called(concept: toyland.ToyConcept) -> str:
    """The words that a LoRA answers to."""
    return f"{concept.name} {concept.class_word}"


def tune_missing(
    pipe: Any, concepts: Sequence[toyland.ToyConcept], folder: Path, options: argparse.Namespace
) -> dict[str, Path]:
    files = {concept.name: folder / f"{concept.name}.safetensors" for concept in concepts}
    folder.mkdir(parents=True, exist_ok=True)
    for concept in concepts:
        if not files[concept.name].exists():
            tune(pipe, concept, files[concept.name], options)
    return files


def draw(pipe: Any, prompts: Sequence[str], guidance: float, batch: int = 8) -> list[Image.Image]:
    """One picture a prompt, with the same seeds for every method."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(MEASURED_SEED + start + number) for number in range(len(part))]
        with hide_bars(pipe):
            pictures += pipe(
                part, num_inference_steps=20, guidance_scale=guidance, generator=generators, height=64, width=64
            ).images
    return pictures


class Study:
    """Measures LoRAs on one base, and keeps what is measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pipe = load_base(options.base)
        self.judge = ToylandJudge.load()
        self.concepts = [toyland.CONCEPTS[name] for name in NAMES[: options.concepts]]
        self.subjects = {name: subject_of(toyland.CONCEPTS[name], self.judge) for name in NAMES}
        plan = {name: value for name, value in vars(options).items() if name not in ("work", "record", "methods")}
        weights = options.base / "transformer" / "diffusion_pytorch_model.safetensors"
        self.kept = Kept(options.work, {name: str(value) for name, value in plan.items()}, [weights])

    def measure(self, concept: toyland.ToyConcept, subject: str) -> dict[str, Any]:
        """Identity of one concept in pictures of a subject, and their text-alignment with its class word."""
        templates = HELD_OUT[self.options.held_out]
        pictures = draw(self.pipe, fill_templates(templates, subject, self.options.pictures), self.options.guidance)
        known: Subject = self.subjects[concept.name]
        texts = self.judge.text_features(fill_templates(templates, concept.class_word, len(pictures)))
        return {
            "identity": asdict(measure_identity(pictures, known, list(self.subjects.values()), self.judge)),
            "text_alignment": metrics.clip_score(texts, self.judge.features(pictures)),
        }

    def measure_all(self, name: str, files: Mapping[str, Path | None], subject: Any) -> dict[str, Any]:
        """Every concept, each with its file loaded by diffusers itself; None leaves the base as it is."""

        def compute() -> dict[str, Any]:
            rows: dict[str, Any] = {}
            for concept in self.concepts:
                if (file := files[concept.name]) is not None:
                    self.pipe.load_lora_weights(file)
                try:
                    rows[concept.name] = self.measure(concept, subject(concept))
                finally:
                    self.pipe.unload_lora_weights()
            return rows

        result: dict[str, Any] = self.kept.result(name, compute)
        return result


def fuse(study: Study, files: Mapping[str, Path], method: str, console: Console) -> Path:
    """Fuse all LoRAs into one folder that diffusers loads; ``closed-form:auto`` chooses ridges."""
    folder = study.kept.folder / f"fused-{method.replace(':', '-')}"
    if (folder / "edlora.safetensors").exists():
        return folder
    name, _, ridge = method.partition(":")
    if name not in get_args(Method):
        raise SystemExit(f"--methods {method}: expected one of {', '.join(get_args(Method))}.")
    settings: dict[str, Any] = {"ridge": ridge if ridge == "auto" else float(ridge)} if ridge else {}
    sources = [
        LoRASource(
            files[concept.name],
            prompts=[prompt.replace("<TOK>", called(concept)) for prompt in RECORDING_PROMPTS],
            name=concept.name,
        )
        for concept in study.concepts
    ]
    start = time.perf_counter()
    fused = GradientFuser(study.pipe, **settings).fuse(sources, method=name)  # type: ignore[arg-type]
    fused.save_pretrained(folder)
    console.print(f"  {method} fused in {time.perf_counter() - start:.0f} s")
    return folder


def load_base(folder: Path) -> Any:
    """The base as diffusers loads it, in full precision."""
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None).to(torch.float32)


def summarise(rows: Mapping[str, Any], single: Mapping[str, Any], floor: Mapping[str, Any]) -> dict[str, Any]:
    """Means over concepts, and what a method keeps of what tuning gained, with the interval over concepts."""
    means = [mean_identity([Identity(**row["identity"]) for row in table.values()]) for table in (rows, single, floor)]
    kept = [
        retention(*(Identity(**table[name]["identity"]) for table in (rows, single, floor)))["attributes"]
        for name in rows
    ]
    return {
        "identity": means[0].as_record(),
        "kept": retention(*means),
        "looks_kept_of_each": mean_with_interval([value for value in kept if value is not None]),
        "text_alignment": round(sum(row["text_alignment"] for row in rows.values()) / len(rows), 4),
        "of_each": {name: row["identity"] for name, row in rows.items()},
    }


def run(study: Study, console: Console) -> dict[str, Any]:
    options = study.options
    files = tune_missing(study.pipe, study.concepts, study.kept.folder / "loras", options)
    floor = study.measure_all("class word", dict.fromkeys(NAMES), lambda concept: concept.class_word)
    single = study.measure_all("alone", files, called)
    results = {"class word": summarise(floor, single, floor), "alone": summarise(single, single, floor)}
    for method in options.methods:
        folder = fuse(study, files, method, console)
        rows = study.measure_all(method, dict.fromkeys(files, folder), called)
        results[method] = summarise(rows, single, floor)
        console.print(f"  {method}: {results[method]['kept']}")
    return results


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {
        name: [
            f"{row['identity']['attributes']:.2f}",
            "{mean:.2f} ({low:.2f} to {high:.2f})".format(**row["looks_kept_of_each"]),
            f"{row['identity']['alignment']:.2f}",
            f"{row['kept']['alignment']:.2f}",
            f"{row['identity']['nearest']:.2f}",
            f"{row['text_alignment']:.3f}",
        ]
        for name, row in results.items()
    }
    return markdown(["looks", "looks kept", "alignment", "alignment kept", "nearest", "text"], rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for LoRAs, fused files and finished results")
    parser.add_argument("--base", type=Path, default=None, help="folder of another base of the class")
    parser.add_argument("--concepts", type=int, default=len(NAMES))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--steps", type=int, default=400, help="of tuning")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step of tuning")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--pictures", type=int, default=16, help="of every concept and method")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--held-out", choices=tuple(HELD_OUT), default="wording")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "transformer.json")
    return parser.parse_args()


def main() -> None:
    options, console, start = parse_arguments(), Console(), time.monotonic()
    results = run(Study(options), console)
    console.print(as_markdown(results), markup=False, soft_wrap=True)
    plan = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    content = {
        "run_info": {
            **record.run_info(Path(__file__).parent),
            "threads": torch.get_num_threads(),
            "seconds_of_last_run": round(time.monotonic() - start, 1),
        },
        "plan": {name: value for name, value in plan.items() if name not in ("work", "record", "base")},
        "results": results,
    }
    console.print(f"Record: {record.write(options.record, content)}")


if __name__ == "__main__":
    main()
