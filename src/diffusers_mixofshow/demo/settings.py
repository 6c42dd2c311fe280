"""Settings of the demo: which concepts, how they are tuned, how many pictures are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import TOYLAND, usual_guidance
from diffusers_mixofshow.errors import ConfigurationError


CONCEPTS = ("bobo", "kiki", "rex", "ming")
"""Toyland's concepts of the demo: two critters, a dog and a vase."""

OWN_NAME = "mine"
"""Name of the concept of the user's own photos."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of one demo.

    Args:
        folder: Folder for photos, ED-LoRAs, pictures and the page; finished ED-LoRAs in it are used again.
        photos: Folder of the user's own pictures of one concept, which replaces one of Toyland's.
        class_word: What the user's pictures show; a class that Toyland's base knows.
        seed: Seed of tuning and sampling.
        concepts: Names of Toyland's concepts; the first three are sampled together.
        photo_count: Number of photos drawn of every concept.
        tuning: Training settings that replace `TrainingConfig.toyland`'s.
        fusion: Arguments of `GradientFuser` that replace the demo's own.
        pictures: Number of pictures of every concept with every method.
        together: Number of pictures of several concepts, with regions and as many without.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        workers: Number of concepts tuned at the same time, with one thread each; None: the number of cores.
        overwrite: Whether a demo of other settings, or anything else in the folder, may be replaced.

    Raises:
        ConfigurationError: If a number is too small, or the user's photos lack a class word or folder.
    """

    folder: Path = Path("mixofshow-demo")
    photos: Path | None = None
    class_word: str | None = None
    seed: int = 0
    concepts: tuple[str, ...] = CONCEPTS
    photo_count: int = 12
    tuning: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fusion: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pictures: int = 12
    together: int = 12
    steps: int = 20
    guidance_scale: float = usual_guidance(TOYLAND)
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Report every defect at once."""
        least = {"photo_count": 1, "pictures": 1, "together": 1, "steps": 1}
        defects = [
            f"{name} is {getattr(self, name)}, expected at least {minimum}"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        if self.workers is not None and self.workers < 1:
            defects.append(f"workers is {self.workers}, expected at least 1, or None for the number of cores")
        if len(self.concepts) < 2:
            defects.append(f"{len(self.concepts)} concepts cannot be fused, expected two or more")
        if (self.photos is None) != (self.class_word is None):
            defects.append(
                "your own pictures need both --photos DIR and --class-word, a plain word for what they show"
            )
        if self.photos is not None and not self.photos.is_dir():
            defects.append(f"--photos {self.photos} is no folder, expected one with your own pictures")
        elif self.photos is not None and self.photos.resolve().is_relative_to(self.folder.resolve()):
            defects.append(f"--photos {self.photos} lies in the demo's own folder, where pictures are written")
        if defects:
            raise ConfigurationError("The demo cannot start: " + "; ".join(defects) + ".")


@dataclass(frozen=True, kw_only=True)
class DemoConcept:
    """One concept of the demo.

    Args:
        name: The name; prompts write ``<name>``.
        kind: ``character``, ``pet`` or ``object``.
        class_word: The base's word for its class.
        folder: The folder of its photos.
        attributes: Values that the attribute reader should read; empty for the user's own pictures.
    """

    name: str
    kind: str
    class_word: str
    folder: Path
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def placeholder(self) -> str:
        """The concept's name in prompts."""
        return f"<{self.name}>"
