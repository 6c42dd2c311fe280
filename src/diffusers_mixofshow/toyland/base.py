"""Load the models of Toyland from the package: the pipeline, the T2I-Adapter, the metric model, the reader."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusers_mixofshow.base_models import TOYLAND, absent_parts, dtype_argument, location_of
from diffusers_mixofshow.edlora.models import silence_libraries
from diffusers_mixofshow.errors import MixOfShowError
from diffusers_mixofshow.toyland.metric import MetricModel, MetricTowers
from diffusers_mixofshow.toyland.reader import AttributeReader


if TYPE_CHECKING:
    from diffusers import T2IAdapter


BASE_MODEL_ID = TOYLAND
"""Base model named in files made for this base."""


def path(base_model: str = TOYLAND) -> Path:
    """The folder of an embedded base's weights, in diffusers' layout.

    Args:
        base_model: ``toyland``; or of the extra ``bases`` ``toyland-xl``, a Stable Diffusion XL, or ``toyland-sd3``, a
            transformer that plain LoRAs can be fused for.

    Raises:
        MissingExtraError: If the base lies in a package that is not installed.
        MixOfShowError: If the package was installed without its weights.
    """
    folder = Path(location_of(base_model))
    if not (folder / "model_index.json").exists():
        raise MixOfShowError(
            f"{folder} holds no weights. Install the wheel, or train the base in a checkout with "
            "`python -m benchmarks.toyland_base.train --output DIR --weights FOLDER`."
        )
    return folder


def load_pipeline(
    pipeline_class: type[Any] | None = None,
    dtype: torch.dtype = torch.float32,
    folder: Path | str | None = None,
    base_model: str = TOYLAND,
) -> Any:
    """Load an embedded base as a pipeline.

    Args:
        pipeline_class: By default the class of diffusers that its folder names, such as `StableDiffusionPipeline`; or
            a class derived from it.
        dtype: Type of the weights; half precision is for GPUs.
        folder: Folder of other weights than the package's.
        base_model: ``toyland``, or ``toyland-sd3`` or ``toyland-xl`` of the extra ``bases``.

    Raises:
        MissingExtraError: If the base lies in a package that is not installed.
    """
    place = str(folder or path(base_model))
    with silence_libraries():
        from diffusers import DiffusionPipeline

        kind = pipeline_class or DiffusionPipeline
        absent = absent_parts(DiffusionPipeline.load_config(place))
        return kind.from_pretrained(place, **dtype_argument(dtype), **absent, local_files_only=True)


def load_layout_adapter(dtype: torch.dtype = torch.float32, folder: Path | str | None = None) -> T2IAdapter:
    """Load Toyland's T2I-Adapter, whose condition images `draw_places` draws.

    Args:
        dtype: Type of the weights; half precision is for GPUs.
        folder: Folder of other weights than the package's.
    """
    from diffusers import T2IAdapter

    with silence_libraries():
        return T2IAdapter.from_pretrained(Path(folder or path()) / "layout_adapter", **dtype_argument(dtype))


def load_metric_model(folder: Path | str | None = None) -> MetricModel:
    """Load the metric model: an image tower, aligned with the pipeline's text encoder."""
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
    """Load the network that reads hidden attributes in a picture of one large thing."""
    return AttributeReader.from_pretrained(Path(folder or path()) / "reader")
