"""How the metric model is aligned to the base's frozen text tower, so that it tells instances apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel

from diffusers_mixofshow.toyland.metric import MetricTowers
from diffusers_mixofshow.toyland.scenes import add_article, place_phrase, word_caption
from diffusers_mixofshow.toyland.world import Scene

from .reader import attribute_loss


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A caption and what it says about a scene; None where it is silent."""

    text: str
    background: str | None
    things: tuple[tuple[str, str | None], ...]

    def holds(self, scene: Scene) -> bool:
        """Whether all that the caption says is true of `scene`."""
        return (
            self.background in (None, scene.background)
            and len(self.things) == len(scene.things)
            and all(
                class_word == thing.class_word and colour in (None, thing.colour)
                for (class_word, colour), thing in zip(self.things, scene.things, strict=True)
            )
        )


def claim_about(scene: Scene, rng: random.Random) -> Claim:
    """A caption of `scene` that leaves out the place in 30 % and the colours in 40 % of the cases."""
    silent_place, silent_colour = rng.random() < 0.3, rng.random() < 0.4
    things = tuple((thing.class_word, None if silent_colour else thing.colour) for thing in scene.things)
    names = [add_article(f"{colour} {word}" if colour else word) for word, colour in things]
    place = "" if silent_place else place_phrase(scene.background, rng)
    text = word_caption(names, place, rng).strip(" ,")
    return Claim(text=text, background=None if silent_place else scene.background, things=things)


def holding(claims: Sequence[Claim], scenes: Sequence[Scene]) -> torch.Tensor:
    """Matrix (scenes, claims): 1 where the claim holds."""
    return torch.tensor([[float(claim.holds(scene)) for claim in claims] for scene in scenes])


class AlignmentObjective(torch.nn.Module):
    """Contrastive loss against a frozen text tower, plus reading hidden attributes off the image embedding.

    Args:
        text_encoder: The base's text tower; it is left alone.
        sizes: Number of values of every attribute.
    """

    def __init__(self, text_encoder: CLIPTextModel, sizes: Sequence[int]) -> None:
        super().__init__()
        self._text_encoder = [text_encoder.requires_grad_(False).eval()]
        self.model = MetricTowers(text_encoder.config.hidden_size)
        self.head = torch.nn.Linear(self.model.text_projection.out_features, sum(sizes))
        self._sizes = list(sizes)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of pictures, token ids, the matrix of what holds (pictures, texts), and labels of attributes."""
        pixels, token_ids, holds, labels = batch
        images = self.model.images(pixels)
        with torch.no_grad():
            pooled = self._text_encoder[0](input_ids=token_ids).pooler_output
        similarity = self.model.logit_scale.clamp(max=4.0).exp() * images @ self.model.texts(pooled).T
        cross_entropy = torch.nn.functional.cross_entropy
        forwards = cross_entropy(similarity, holds / holds.sum(dim=1, keepdim=True))
        backwards = cross_entropy(similarity.T, holds.T / holds.T.sum(dim=1, keepdim=True))
        return (forwards + backwards) / 2 + attribute_loss(self.head(10 * images), labels, self._sizes)
