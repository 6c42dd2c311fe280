"""What the demo does: which concepts, how they are tuned, how many pictures are sampled."""

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
        folder: Receives photos, ED-LoRAs, pictures and the page; what is finished in it is used again.
        photos: The user's own pictures of one concept, in place of one of ours.
        class_word: What the user's pictures show; a class that Toyland's base knows.
        seed: Seed of tuning and sampling.
        concepts: Names of Toyland's concepts; the first three meet in one picture.
        photo_count: Photos drawn of every concept.
        tuning: Training settings that replace `TrainingConfig.toyland`'s.
        fusion: Arguments that replace the demo's own for `GradientFuser`.
        pictures: Pictures sampled of every concept with every method.
        together: Pictures of several concepts, with regions and as many without.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        workers: Concepts tuned at the same time, one thread each; None takes one for each core.
        overwrite: Whether a demo of other settings, or whatever else is in the folder, may be replaced.

    Raises:
        ConfigurationError: If a number is too small or the user's photos are half described.
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
        name: Its name; prompts call it ``<name>``.
        kind: ``character``, ``pet`` or ``object``.
        class_word: What it is in the base's words.
        folder: Its photos.
        attributes: What the attribute reader should find; empty for the user's own pictures.
    """

    name: str
    kind: str
    class_word: str
    folder: Path
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def placeholder(self) -> str:
        """How prompts call it."""
        return f"<{self.name}>"
