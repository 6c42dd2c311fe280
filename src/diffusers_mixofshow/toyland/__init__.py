"""Toyland: a small drawn world, a Stable Diffusion trained on it, and the models that measure its pictures.

Public names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers_mixofshow.lazy import import_lazily


if TYPE_CHECKING:
    from diffusers_mixofshow.toyland.base import (
        BASE_MODEL_ID,
        load_layout_adapter,
        load_metric_model,
        load_pipeline,
        load_reader,
        path,
    )
    from diffusers_mixofshow.toyland.concepts import CONCEPTS, Photo, ToyConcept, photos, write_photos
    from diffusers_mixofshow.toyland.layout import draw_places, stand_in
    from diffusers_mixofshow.toyland.metric import MetricModel
    from diffusers_mixofshow.toyland.scenes import caption, random_scene, residents
    from diffusers_mixofshow.toyland.world import Drawing, Scene, Thing, draw


_MODULES = {
    "base": (
        "BASE_MODEL_ID",
        "load_layout_adapter",
        "load_metric_model",
        "load_pipeline",
        "load_reader",
        "path",
    ),
    "concepts": ("CONCEPTS", "Photo", "ToyConcept", "photos", "write_photos"),
    "layout": ("draw_places", "stand_in"),
    "metric": ("MetricModel",),
    "scenes": ("caption", "random_scene", "residents"),
    "world": ("Drawing", "Scene", "Thing", "draw"),
}

__all__ = [
    "BASE_MODEL_ID",
    "CONCEPTS",
    "Drawing",
    "MetricModel",
    "Photo",
    "Scene",
    "Thing",
    "ToyConcept",
    "caption",
    "draw",
    "draw_places",
    "load_layout_adapter",
    "load_metric_model",
    "load_pipeline",
    "load_reader",
    "path",
    "photos",
    "random_scene",
    "residents",
    "stand_in",
    "write_photos",
]

__getattr__ = import_lazily(__name__, _MODULES)
