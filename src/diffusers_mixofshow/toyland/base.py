"""Loading what Toyland ships: the pipeline, the metric model and the attribute reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusers_mixofshow.base_models import TOYLAND, dtype_argument, location_of
from diffusers_mixofshow.edlora.models import silence_libraries
from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.toyland.metric import MetricModel, MetricTowers
from diffusers_mixofshow.toyland.reader import AttributeReader


if TYPE_CHECKING:
    from diffusers import T2IAdapter


BASE_MODEL_ID = TOYLAND
"""What files that belong to this base name as their base model."""


def path() -> Path:
    """The folder of the shipped weights, in diffusers' layout.

    Raises:
        MixOfShowError: If the package was installed without its weights.
    """
    folder = Path(location_of(TOYLAND))
    if not (folder / "model_index.json").exists():
        raise MixOfShowError(
            f"{folder} holds no weights. Install the wheel, or train the base in a checkout with "
            "`python -m benchmarks.toyland_base.train --output DIR --weights FOLDER`."
        )
    return folder


def load_pipeline(
    pipeline_class: type[Any] | None = None, dtype: torch.dtype = torch.float32, folder: Path | str | None = None
) -> Any:
    """Toyland's base as a pipeline.

    Args:
        pipeline_class: `StableDiffusionPipeline` by default, or a class derived from it.
        dtype: Type of the weights; half precision is for GPUs.
        folder: Weights other than the shipped ones.
    """
    with silence_libraries():
        if pipeline_class is None:
            from diffusers import StableDiffusionPipeline

            pipeline_class = StableDiffusionPipeline
        return pipeline_class.from_pretrained(
            str(folder or path()), **dtype_argument(dtype), safety_checker=None, local_files_only=True
        )


def load_layout_adapter(dtype: torch.dtype = torch.float32, folder: Path | str | None = None) -> T2IAdapter:
    """Toyland's T2I-Adapter, which follows the pictures of `draw_places`.

    Args:
        dtype: Type of the weights; half precision is for GPUs.
        folder: Weights other than the shipped ones.
    """
    from diffusers import T2IAdapter

    with silence_libraries():
        return T2IAdapter.from_pretrained(Path(folder or path()) / "layout_adapter", **dtype_argument(dtype))


def load_metric_model(folder: Path | str | None = None) -> MetricModel:
    """The image tower and the text tower that it was aligned with, which is the pipeline's."""
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer

    root = Path(folder or path())
    towers = MetricTowers()
    state = load_file(root / "metric" / "model.safetensors")
    towers.load_state_dict({name: value.float() for name, value in state.items()})
    with silence_libraries():
        text_encoder = CLIPTextModel.from_pretrained(root / "text_encoder", dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    return MetricModel(
        towers=towers.eval().requires_grad_(False),
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=tokenizer,
    )


def load_reader(folder: Path | str | None = None) -> AttributeReader:
    """The network that reads hidden attributes off a picture of one large thing."""
    return AttributeReader.from_pretrained(Path(folder or path()) / "reader")
