"""The ED-LoRA: one concept, or several fused ones, as data. How it is written and sent is in its neighbours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.edlora import defects, file
from diffusers_mixofshow.edlora.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class EDLoRA:
    """Embedding-decomposed LoRA of one or several concepts (arXiv:2305.18292, section 3.3.1).

    Args:
        concepts: The concepts it holds; one after tuning, several after fusion.
        embeddings: Token to its layer-wise embedding, shape (layers, dim), in the order of `layers`.
        lora: Site name (see `sites`) to its low-rank update.
        base_model: Id of the model it was tuned on.
        layers: The U-Net's cross-attention layers in order down, mid, up.
        training: Settings and measurements of the tuning or fusion, JSON values only.
    """

    concepts: tuple[Concept, ...]
    embeddings: Mapping[str, torch.Tensor]
    lora: Mapping[str, LowRank]
    base_model: str
    layers: tuple[str, ...]
    training: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse concepts that share a name."""
        check_distinct(self.concepts)

    def check_fits(self, components: Mapping[str, object]) -> None:
        """Raise one `EDLoRAFormatError` that names everything that does not fit the model.

        Args:
            components: ``pipeline.components``, or any mapping with some of ``unet`` and ``text_encoder``;
                what is not given is not checked.
        """
        found = defects.fit_defects(self.embeddings, self.lora, self.layers, components)
        defects.raise_if_any(
            found,
            subject=f"The ED-LoRA of {self._names} does not fit the model",
            remedy=f"It was tuned on {self.base_model!r}; load it into that model or one of the same architecture.",
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the pack to ``folder/edlora.safetensors``, which stock diffusers reads as a LoRA.

        The file appears whole or not at all. Tensors keep their dtype.

        Args:
            folder: Created where it is missing.

        Returns:
            Path of the safetensors file.

        Raises:
            EDLoRAFormatError: If the pack contradicts itself; nothing is written then.
        """
        path = Path(folder) / file.FILE_NAME
        file.write(path, self._contents())
        return path

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Self:
        """Read a pack from a folder or a file; tensors come to the CPU in the file's dtype.

        Args:
            source: A folder that holds ``edlora.safetensors``, or a safetensors file.

        Raises:
            EDLoRAFormatError: If the file is no valid ED-LoRA; names every defect.
        """
        path = Path(source)
        return cls(**file.read(path / file.FILE_NAME if path.is_dir() else path))

    @property
    def _names(self) -> str:
        return ", ".join(concept.placeholder for concept in self.concepts)

    def _contents(self) -> file.Contents:
        return file.Contents(
            concepts=self.concepts,
            embeddings=self.embeddings,
            lora=self.lora,
            base_model=self.base_model,
            layers=self.layers,
            training=self.training,
        )
