"""Writing the trained parts as one folder in diffusers' layout, in half precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .denoiser import SCHEDULE


_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
_TEXT_PREFIX = "text_model."


def text_tower(model: CLIPModel) -> CLIPTextModel:
    """The text tower of `model` as a CLIPTextModel of its own, with copied weights."""
    tower = CLIPTextModel(model.config.text_config)
    prefix = _TEXT_PREFIX if any(name.startswith(_TEXT_PREFIX) for name in tower.state_dict()) else ""
    state = {prefix + name: value.clone() for name, value in model.text_model.state_dict().items()}
    tower.load_state_dict(state, strict=True)
    return tower.eval()


def spell_text_keys(path: Path) -> None:
    """Rewrite a text encoder's file with the names that every transformers release reads."""
    own = (_TEXT_PREFIX, "text_projection.")
    state = load_file(path)
    named = {name if name.startswith(own) else _TEXT_PREFIX + name: value for name, value in state.items()}
    save_file(named, path, metadata={"format": "pt"})


def forget_origin(path: Path) -> None:
    """Take the folder of this machine that a model was loaded from out of its configuration."""
    configuration = json.loads(path.read_text(encoding="utf-8"))
    configuration.pop("_name_or_path", None)
    path.write_text(json.dumps(configuration, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path, max_length: int | None) -> None:
    """Replace a tokenizer that was saved by one in the files that every transformers release reads.

    Args:
        source: Folder of these files.
        target: Folder to replace.
        max_length: Positions of a prompt, if other than in `source`.
    """
    shutil.rmtree(target)
    target.mkdir()
    for name in _TOKENIZER_FILES:
        shutil.copy(source / name, target / name)
    if max_length is not None:
        file = target / "tokenizer_config.json"
        told = json.loads(file.read_text(encoding="utf-8")) | {"model_max_length": max_length}
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def export_pipeline(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer_folder: Path,
) -> None:
    """Write a StableDiffusionPipeline without safety checker to `folder`, replacing one that is there."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder),
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    write_pipeline(folder, pipeline, tokenizer_folder)


def write_pipeline(
    folder: Path, pipeline: DiffusionPipeline, tokenizer_folder: Path, max_length: int | None = None
) -> None:
    """Write a pipeline to `folder` in half precision and diffusers' layout, replacing one that is there.

    Args:
        folder: Where to.
        pipeline: Its text encoders are CLIP's.
        tokenizer_folder: Files of every tokenizer.
        max_length: See `copy_tokenizer`.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
    for part in sorted(temporary.iterdir()):
        if part.name.startswith("text_encoder"):
            spell_text_keys(part / "model.safetensors")
        elif part.name.startswith("tokenizer"):
            copy_tokenizer(tokenizer_folder, part, max_length)
        elif part.name in ("unet", "transformer", "vae"):
            forget_origin(part / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def copy_pipeline(output: Path, stage: str, weights: Path) -> None:
    """Copy what a stage of a training folder wrote, and how it was trained, to the folder that is shipped.

    Where a later stage, named after it, trained it on, that one's.
    """
    stages = json.loads((output / "training.json").read_text(encoding="utf-8"))
    told = {name: record for name, record in stages.items() if name.partition("_")[0] == stage}
    shutil.copytree(output / f"{list(told)[-1]}_pipeline", weights, dirs_exist_ok=True)
    (weights / "training.json").write_text(json.dumps(told, indent=1), encoding="utf-8")


def export_metric_model(folder: Path, towers: torch.nn.Module) -> None:
    """Write the metric model's own parts; its text tower is the pipeline's text encoder."""
    _write_half(folder, towers)


def export_reader(folder: Path, network: torch.nn.Module, vocabulary: Mapping[str, Sequence[str]]) -> None:
    """Write what `AttributeReader.from_pretrained` reads.

    Args:
        folder: Where to.
        network: Its `ReaderNetwork`.
        vocabulary: Values of every attribute, in the order of the network's outputs.
    """
    _write_half(folder, network)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1), encoding="utf-8")


def _write_half(folder: Path, model: torch.nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def take_over(weights: Path, output: Path) -> None:
    """Copy the parts of a folder that `assemble` wrote to a training folder, as if they had been trained there."""
    for part in ("vae", "tokenizer", "text_encoder", "reader", "metric"):
        shutil.copytree(weights / part, output / part)
    if (weights / "layout_adapter").exists():
        shutil.copytree(weights / "layout_adapter", output / "layout_adapter")
    shutil.copytree(weights / "unet", output / "initial_unet")
    shutil.copy(weights / "training.json", output / "training.json")


def take_over_xl(weights: Path, output: Path) -> None:
    """Copy the third base's folder to a training folder, as if it had been trained there."""
    shutil.copytree(weights, output / "xl_pipeline")
    record = output / "training.json"
    stages = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    stages["xl"] = json.loads((weights / "training.json").read_text(encoding="utf-8"))["xl"]
    record.write_text(json.dumps(stages, indent=1), encoding="utf-8")


def trained_unet(output: Path) -> Path:
    """The U-Net of a training folder: the one trained there, else the one that was taken over."""
    trained = output / "pipeline" / "unet"
    return trained if trained.exists() else output / "initial_unet"


def assemble(output: Path, weights: Path) -> None:
    """Gather all stages of a training folder into the folder that the package ships.

    A layout adapter, metric model or reader that is not trained yet is left out.
    """
    export_pipeline(
        weights,
        unet=UNet2DConditionModel.from_pretrained(trained_unet(output)),
        vae=AutoencoderKL.from_pretrained(output / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(output / "text_encoder"),
        tokenizer_folder=output / "tokenizer",
    )
    if (output / "training.json").exists():
        shutil.copy(output / "training.json", weights / "training.json")
    for name in ("layout_adapter", "metric", "reader"):
        if (output / name).exists():
            shutil.copytree(output / name, weights / name, dirs_exist_ok=True)
