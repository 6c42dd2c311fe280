"""Metrics as pure functions of feature matrices; nothing here knows about models, files or pictures.

Feature matrices hold one row a picture or text, shape (n, d), any floating dtype; they are compared in float64.
Rows need no normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from diffusers_mixofshow.errors import ConfigurationError


CLIP_SCORE_WEIGHT = 2.5
"""w of CLIPScore (arXiv:2104.08718, equation 1)."""


def clip_score(text_features: torch.Tensor, image_features: torch.Tensor) -> float:
    """Text-alignment: mean of 2.5 * max(cos, 0) over pairs of a text and its picture (arXiv:2104.08718).

    Args:
        text_features: For each picture, the features of its prompt, shape (n, d), floating.
        image_features: Features of the pictures, shape (n, d), floating.

    Raises:
        ConfigurationError: If the shapes differ or there is nothing to compare.
    """
    if text_features.shape != image_features.shape:
        raise ConfigurationError(
            f"clip_score got texts of shape {tuple(text_features.shape)} and pictures of shape "
            f"{tuple(image_features.shape)}, expected one text for each picture."
        )
    texts, images = _normalize(text_features, "text_features"), _normalize(image_features, "image_features")
    cosines = (texts * images).sum(dim=1)  # (n,)
    return float(CLIP_SCORE_WEIGHT * cosines.clamp(min=0).mean())


def image_alignment(samples: torch.Tensor, photos: torch.Tensor) -> float:
    """Image-alignment: mean cosine over every pair of a sample and a photo of the concept (section 6.2).

    Args:
        samples: Features of sampled pictures, shape (n, d), floating.
        photos: Features of the concept's photos, shape (m, d), floating.
    """
    return float(cosine_matrix(samples, photos).mean())


def likeness_among(photos: torch.Tensor) -> float | None:
    """Mean cosine of every photo of a concept with every other one, shape (m, d); None of a single photo."""
    count = len(photos)
    return float(cosine_matrix(photos, photos).sum() - count) / (count * (count - 1)) if count > 1 else None


def cosine_matrix(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Cosine of every row of one matrix with every row of another.

    Args:
        rows: Shape (n, d), floating.
        columns: Shape (m, d), floating.

    Returns:
        Shape (n, m), float64.
    """
    left, right = _normalize(rows, "rows"), _normalize(columns, "columns")
    if left.shape[1] != right.shape[1]:
        raise ConfigurationError(
            f"Features of {left.shape[1]} and of {right.shape[1]} dimensions cannot be compared; "
            "expected both from one model."
        )
    return left @ right.T


def identity_retention(fused: float, single: float, class_word: float) -> float:
    """Share of the identity gained by tuning that fusion keeps: (fused - class word) / (single - class word).

    With table 1 of the paper (0.818, 0.843, 0.596) this is 0.90 for gradient fusion and 0.62 for weight fusion.

    Args:
        fused: Identity (image-alignment, attribute accuracy, ...) of samples of the fused model.
        single: The same for the concept's own ED-LoRA.
        class_word: The same for the base model prompted with the class word, which needs no tuning.

    Raises:
        ConfigurationError: If tuning gained nothing, so that there is nothing to keep.
    """
    if single <= class_word:
        raise ConfigurationError(
            f"Identity retention is undefined: the single ED-LoRA scores {single:.3f}, expected more than the "
            f"class word's {class_word:.3f}. Tune for longer."
        )
    return (fused - class_word) / (single - class_word)


def nearest_concept(features: torch.Tensor, references: Mapping[str, torch.Tensor]) -> list[str]:
    """For each picture, the name of the concept whose photos are nearest by mean cosine.

    Args:
        features: Features of pictures, shape (n, d), floating.
        references: Concept name to the features of its photos, shape (m_concept, d), floating.

    Returns:
        n names; of equally near concepts the first.
    """
    if not references:
        raise ConfigurationError("nearest_concept got no references, expected photos of at least one concept.")
    similarity = torch.stack([cosine_matrix(features, photos).mean(dim=1) for photos in references.values()], dim=1)
    names = list(references)
    return [names[int(index)] for index in similarity.argmax(dim=1)]


def retrieval_accuracy(
    features: torch.Tensor, expected: Sequence[str], references: Mapping[str, torch.Tensor]
) -> float:
    """Share of pictures whose nearest concept is the expected one.

    Args:
        features: Features of pictures, shape (n, d), floating.
        expected: The n names of the right concepts.
        references: See `nearest_concept`.
    """
    found = nearest_concept(features, references)
    if len(found) != len(expected):
        raise ConfigurationError(f"Got {len(found)} pictures but {len(expected)} expected names, expected one each.")
    return sum(name == right for name, right in zip(found, expected, strict=True)) / len(expected)


def attribute_accuracy(read: Sequence[Mapping[str, str]], expected: Mapping[str, str]) -> float:
    """Share of a concept's attributes that a reader finds in its pictures, averaged over pictures.

    Args:
        read: For each picture, attribute name to the value read; further attributes are ignored.
        expected: Attribute name to the concept's value.
    """
    if not read or not expected:
        raise ConfigurationError(
            f"Attribute accuracy of {len(read)} pictures and {len(expected)} attributes is undefined; "
            "expected at least one of each."
        )
    hits = sum(picture.get(name) == value for picture in read for name, value in expected.items())
    return hits / (len(read) * len(expected))


def _normalize(features: torch.Tensor, name: str) -> torch.Tensor:
    """Rows of length one, float64."""
    if features.ndim != 2 or len(features) == 0 or not features.is_floating_point():
        raise ConfigurationError(
            f"{name} has shape {tuple(features.shape)} and dtype {features.dtype}, "
            "expected floating features of shape (n, d) with n of at least 1."
        )
    return F.normalize(features.double(), dim=1)
