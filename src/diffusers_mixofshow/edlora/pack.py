"""The ED-LoRA: one concept, or several fused ones, as data. How it is written and sent is in its neighbours."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch

from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.edlora import card, defects, file, hub
from diffusers_mixofshow.edlora import merged as merged_pipeline
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
        """Raise one `EDLoRAFormatError` that names everything that is wrong in itself or does not fit the model.

        Args:
            components: ``pipeline.components``, or any mapping with some of ``unet`` and ``text_encoder``;
                what is not given is not checked.
        """
        inner = defects.content_defects(self.concepts, self.embeddings, self.lora, self.layers)
        defects.raise_if_any(
            inner, subject=f"The ED-LoRA of {self._names} is defective", remedy="Tune it again or load another copy."
        )
        found = defects.fit_defects(self.embeddings, self.lora, self.layers, components)
        defects.raise_if_any(
            found,
            subject=f"The ED-LoRA of {self._names} does not fit the model",
            remedy=f"It was tuned on {self.base_model!r}; load it into that model or one of the same architecture.",
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, merged: bool = False) -> Path:
        """Write the pack to ``folder/edlora.safetensors``, which stock diffusers reads as a LoRA, and a model card.

        The file appears whole or not at all. Tensors keep their dtype. A README.md that this package did not write
        is left as it is.

        Args:
            folder: Created where it is missing.
            merged: Write a complete pipeline instead: the base model with the updates in its weights, in float16.
                `MixOfShowPipeline.from_pretrained` loads it with its concepts; any program that knows diffusers
                loads it without them.

        Returns:
            Path of the safetensors file; in a merged pipeline it holds the embeddings alone.

        Raises:
            EDLoRAFormatError: If the pack contradicts itself, or with `merged` does not fit its base model; nothing
                is written then.
            ConfigurationError: If `merged` is asked for and the base model cannot be loaded.
        """
        path = Path(folder) / file.FILE_NAME
        if merged:
            pipeline = merged_pipeline.load_base(self.base_model)
            self.check_fits(pipeline.components)
            merged_pipeline.add_updates(pipeline, self.lora)
            with merged_pipeline.written_whole(pipeline, path.parent) as temporary:
                file.write(temporary / file.FILE_NAME, replace(self, lora={})._contents())
        else:
            file.write(path, self._contents())
        self._write_card(path.parent, location=os.fspath(folder), merged=merged)
        return path

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read a pack; its tensors come to the CPU in the file's dtype.

        Args:
            source: A folder that holds ``edlora.safetensors``, a safetensors file, or a Hub id such as
                ``user/edlora-potter``. What exists on disk comes first.
            revision: Branch, tag or commit on the Hub.
            subfolder: Folder inside the repository, or inside the local folder.
            token: For private repositories; by default the one of ``hf auth login``.
            cache_dir: Where downloads are kept; by default the Hub client's cache.
            local_files_only: Take it from the cache and do not ask the Hub.

        Raises:
            EDLoRANotFoundError: If there is nothing at `source`.
            EDLoRAFormatError: If the file is no valid ED-LoRA; names every defect.
            HubError: If the Hub refuses or cannot be reached.
        """
        if hub.is_repo_id(source):
            path = hub.download(
                str(source),
                file.FILE_NAME,
                revision=revision,
                subfolder=subfolder,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        else:
            path = Path(source, subfolder or "")
            path = path / file.FILE_NAME if path.is_dir() else path
        return cls(**file.read(path))

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        merged: bool = False,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the pack with its model card, in one commit; creates the repository where it is missing.

        Args:
            repo_id: ``user/name``, or a name under your own account; by default derived from the concepts:
                ``edlora-potter``, or ``mixofshow-potter-hermione`` for several.
            merged: Upload a complete pipeline instead, see `save_pretrained`.
            token: By default the one of ``hf auth login``.
            private: Whether a new repository is private; by default your account's setting.
            revision: Branch to commit to, created where it is missing; by default ``main``.
            commit_message: By default names the concepts.

        Returns:
            The repository's URL.

        Raises:
            HubError: If the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder, merged=merged)  # defects show before anything is created
            repo_id, url = hub.create(
                repo_id or hub.repo_name(self.concepts), token=token, private=private, revision=revision
            )
            self._write_card(folder, location=repo_id, merged=merged)
            message = commit_message or f"ED-LoRA of {self._names}"
            hub.upload(folder, repo_id, token=token, revision=revision, message=message)
        return url

    @property
    def digest(self) -> str:
        """SHA-256 of what it draws with, embeddings and updates, whatever file they come from."""
        digest = hashlib.sha256()

        def feed(name: str, tensor: torch.Tensor) -> None:
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())

        for token, rows in sorted(self.embeddings.items()):
            feed(token, rows)
        for site, update in sorted(self.lora.items()):
            feed(f"{site} {update.scaling!r} down", update.down)
            feed(f"{site} up", update.up)
        return digest.hexdigest()

    @property
    def _names(self) -> str:
        return ", ".join(concept.placeholder for concept in self.concepts)

    def _write_card(self, folder: Path, *, location: str, merged: bool) -> None:
        rank = max((update.rank for update in self.lora.values()), default=0)
        text = card.model_card(
            self.concepts,
            self.base_model,
            location,
            rank,
            merged=merged,
            training=self.training,
            pictures=(folder / card.PICTURES_NAME).is_file(),
        )
        card.write_card(folder, text)

    def _contents(self) -> file.Contents:
        return file.Contents(
            concepts=self.concepts,
            embeddings=self.embeddings,
            lora=self.lora,
            base_model=self.base_model,
            layers=self.layers,
            training=self.training,
        )
