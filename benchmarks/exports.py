"""What other programs draw of a layer-wise concept of Toyland: ``python benchmarks/exports.py --work DIR``.

Concepts are tuned, or found finished in ``DIR/concepts``, and converted to kohya's names: with the mean of their
embeddings alone, and with the base model (`share_layers`). Stock diffusers draws the files by the same prompts and
seeds as the concept's own ED-LoRA and the class word. One JSON record a run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from judging import subject_of
from PIL import Image

from diffusers_mixofshow import toyland
from diffusers_mixofshow.demo.photos import prepare_photos
from diffusers_mixofshow.demo.settings import DemoSettings
from diffusers_mixofshow.demo.tuning import tune_all
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.evaluation.identity import measure_identity, retention
from diffusers_mixofshow.evaluation.prompts import HELD_OUT_PROMPTS
from diffusers_mixofshow.evaluation.sampling import fill_templates
from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge
from diffusers_mixofshow.exporting import share_layers
from diffusers_mixofshow.interop import convert
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.toyland.concepts import find_concept
from toyland import CRITTERS


BATCH = 6


def sample(pipe: Any, subject: str, pictures: int) -> list[Image.Image]:
    """Pictures of one subject, as a user of any pipeline samples them."""
    pipe.set_progress_bar_config(disable=True)
    prompts = fill_templates(HELD_OUT_PROMPTS, subject, pictures)
    found = []
    for start in range(0, pictures, BATCH):
        seeds = range(1000 + start, 1000 + min(start + BATCH, pictures))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        batch = prompts[start : start + BATCH]
        found += pipe(batch, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
    return found


def drawn_by_stock(edlora: EDLoRA, pictures: int) -> list[Image.Image]:
    """Convert to kohya's names, and let stock diffusers load and draw it."""
    pipe, placeholder = toyland.load_pipeline(), edlora.concepts[0].placeholder
    with tempfile.TemporaryDirectory() as folder:
        lora, embedding, _ = convert(edlora, folder, "kohya").files
        pipe.load_lora_weights(str(lora))
        pipe.load_textual_inversion(str(embedding), token=placeholder)
    return sample(pipe, placeholder, pictures)


def measure(name: str, folder: Path, judge: ToylandJudge, pictures: int) -> dict[str, Any]:
    """All ways to draw one concept, and what each keeps of what tuning gained."""
    edlora = EDLoRA.from_pretrained(folder)
    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    shared = share_layers(pipe, edlora)
    pipe.load_edlora(edlora)
    drawn = {
        "own": sample(pipe, edlora.concepts[0].placeholder, pictures),
        "class word": sample(toyland.load_pipeline(), edlora.concepts[0].class_word, pictures),
        "mean": drawn_by_stock(edlora, pictures),
        "with the base": drawn_by_stock(shared, pictures),
    }
    subject = subject_of(find_concept(name), judge)
    found = {way: measure_identity(images, subject, [subject], judge) for way, images in drawn.items()}
    kept = {way: retention(found[way], found["own"], found["class word"]) for way in ("mean", "with the base")}
    return {
        "identity": {way: identity.as_record() for way, identity in found.items()},
        "kept": kept,
        "kept of keys and values": shared.training["shared_layers_kept"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune what is not tuned, measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the concepts, or for them")
    parser.add_argument("--concepts", nargs="+", default=CRITTERS)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "exports-toyland.json")
    given = parser.parse_args(arguments)
    tuning = DemoSettings(folder=given.work, concepts=tuple(given.concepts))
    packs = tune_all(prepare_photos(tuning), tuning, lambda *step: None)
    judge, results = ToylandJudge.load(), {}
    for name, folder in packs.items():
        results[name] = measure(name, folder, judge, given.pictures)
        print(name, results[name], flush=True)
    settings = {"concepts": given.concepts, "pictures": given.pictures}
    content = {"run": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    print(f"Record: {record.write(given.record, content)}")


if __name__ == "__main__":
    main()
