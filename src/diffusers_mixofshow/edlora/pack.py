"""The class `EDLoRA`: one concept, or several fused ones. Files and the Hub are handled by the modules beside this."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_mixofshow.atomic import find_existing, refuse_overwriting
from diffusers_mixofshow.base_models import public_name
from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.edlora import card, defects, file, hub, reading
from diffusers_mixofshow.edlora import folder as pack_folder
from diffusers_mixofshow.edlora import merged as merged_pipeline
from diffusers_mixofshow.edlora.embeddings import family_of_embeddings
from diffusers_mixofshow.edlora.fusion_record import find_plain_prompts
from diffusers_mixofshow.edlora.low_rank import LowRank
from diffusers_mixofshow.edlora.pushing import push
from diffusers_mixofshow.errors import MixOfShowError, OverwriteError


@dataclass(frozen=True, kw_only=True, repr=False)
class EDLoRA:
    """Embedding-decomposed LoRA of one or several concepts (arXiv:2305.18292, section 3.3.1).

    Args:
        concepts: The concepts it holds; one after tuning, several after fusion.
        embeddings: Token to its layer-wise embedding, shape (layers, dim), in the order of `layers`. With two text
            encoders also ``text_encoder_2.<potter1>``, of the same shape, for the second, and ``pooled.<potter1>``,
            shape (1, dim), for its pooled vector.
        lora: Site name (see `families.family`) to its low-rank update.
        base_model: Id of the model it was tuned on.
        layers: The U-Net's cross-attention layers in order down, mid, up; for SDXL, groups that share an embedding.
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
        """Raise an `EDLoRAFormatError` that lists all defects, or everything that does not fit the model.

        Args:
            components: ``pipeline.components``, or any mapping with some of ``unet`` and ``text_encoder``;
                missing components are not checked.
        """
        inner = defects.content_defects(self.concepts, self.embeddings, self.lora, self.layers)
        defects.raise_if_any(
            inner, subject=f"{self._subject} is defective", remedy="Tune it again or load another copy."
        )
        found = defects.fit_defects(self.embeddings, self.lora, self.layers, components)
        tuned = f"It was tuned on {self.base_model!r}" if self.base_model else "It was made for another"
        defects.raise_if_any(
            found,
            subject=f"{self._subject} does not fit the model",
            remedy=f"{tuned}; load it into that model or one of the same architecture.",
        )

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        merged: bool = False,
        samples: card.Samples | None = None,
        license: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the pack to ``folder/edlora.safetensors``, which stock diffusers reads as a LoRA, and a model card.

        The file appears whole or not at all. Tensors keep their dtype. In an existing README.md only the generated
        section is replaced; one without such a section is not changed. Unrelated files in the folder are kept.

        Args:
            folder: Created where it is missing.
            merged: Write a complete pipeline instead: the base model with the updates in its weights, in float16.
                `MixOfShowPipeline.from_pretrained` loads it with its concepts, any other program based on diffusers
                without them.
            samples: Prompt to the picture it produced, for the card's gallery; written to ``folder/samples``.
            license: For the card, as the Hub spells it, e.g. ``apache-2.0``; by default that of the base model, if
                known. A licence in an existing card is kept.
            overwrite: Replace an existing pack; if it is another one, its statistics, sources, samples and merged
                pipeline are deleted. With `merged`, also replace any pipeline in the folder.

        Returns:
            Path of the safetensors file; in a merged pipeline it holds only the embeddings.

        Raises:
            EDLoRAFormatError: If the pack is inconsistent, or with `merged` does not fit its base model; nothing is
                written then.
            ConfigurationError: If a sample is not a picture, or with `merged` the base model cannot be loaded.
            OverwriteError: If the folder has a pack, or with `merged` a pipeline; see `overwrite`.
            FileWriteError: If the disk is full or the folder is not writable; existing files are kept.
        """
        path, written = Path(folder) / self._file_name, set()
        refuse_overwriting(*pack_folder.find_places(path.parent, path.name, merged=merged), overwrite=overwrite)
        stale = self._stale(path.parent, merged=merged)
        pictures = self._read_samples(samples, merged=merged, license_id=license)
        if merged:
            pipeline = merged_pipeline.load_base(self.base_model, family_of_embeddings(self.embeddings).pipeline)
            self.check_fits(pipeline.components)
            merged_pipeline.add_updates(pipeline, self.lora)
            with merged_pipeline.replace_pipeline(pipeline, path.parent) as temporary:
                file.write(temporary / file.FILE_NAME, replace(self, lora={})._contents())
                written = {path.with_name(part.name) for part in temporary.iterdir()}
        else:
            self._write(path)
        pack_folder.remove(set(stale) - written)
        shown = card.write_samples(path.parent, pictures)
        card.write_card(
            path.parent, self._card(public_name(os.fspath(folder)), merged, shown, license), anew=bool(stale)
        )
        return path

    def check_beside(self, pipeline: str | os.PathLike[str]) -> None:
        """Check, before a pipeline is written to a folder, that `save_beside` would not overwrite another pack.

        Args:
            pipeline: The folder; may be missing.

        Raises:
            OverwriteError: If the folder has another pack, or another file of that name.
        """
        there = find_existing(Path(pipeline) / file.FILE_NAME)
        if there and not self._is_in(there[0].parent, merged=True):
            raise OverwriteError(
                f"{there[0]} exists and is not the pack of {self._names}, whose updates are in the pipeline's "
                "weights. Choose another folder, or move that file away."
            )

    def save_beside(self, pipeline: str | os.PathLike[str]) -> Path:
        """Write the concepts into the folder of a complete pipeline whose weights contain the updates.

        Args:
            pipeline: The folder, written already; `MixOfShowPipeline.from_pretrained` loads it with its concepts.

        Returns:
            Path of the safetensors file, which holds only the embeddings.

        Raises:
            FileWriteError: If the disk is full or the folder is not writable.
        """
        path = Path(pipeline) / file.FILE_NAME
        file.write(path, replace(self, lora={})._contents())
        merged_pipeline.mark(path.parent)
        card.write_card(path.parent, self._card(public_name(os.fspath(pipeline)), True, {}, None))
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
        """Read a pack; tensors are on the CPU, in the file's dtype.

        Args:
            source: A folder that holds ``edlora.safetensors``, a safetensors file, or a Hub id such as
                ``user/edlora-potter``. An existing path has priority.
            revision: Branch, tag or commit on the Hub.
            subfolder: Folder inside the repository, or inside the local folder.
            token: For private repositories; by default the one of ``hf auth login``.
            cache_dir: Where downloads are kept; by default the Hub client's cache.
            local_files_only: Use the cache only, without connecting to the Hub.

        Raises:
            EDLoRANotFoundError: If `source` does not exist.
            EDLoRAFormatError: If the file is not a valid ED-LoRA; lists every defect.
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
            path = Path(source)
            if os.path.isdir(path):  # False, too, for what is too long to be a path
                path = reading.within(path, subfolder or "", file.FILE_NAME)
        return cls(**file.read(path))

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        merged: bool = False,
        samples: card.Samples | None = None,
        license: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        **saving: Any,
    ) -> str:
        """Upload the pack with its model card, in one commit; creates the repository where it is missing.

        In an existing card on the Hub, only the generated section is replaced.

        Args:
            repo_id: ``user/name``, or a name under your own account; by default derived from the concepts:
                ``edlora-potter``, or ``mixofshow-potter-hermione`` for several.
            merged: Upload a complete pipeline instead, see `save_pretrained`.
            samples: Prompt to the picture it produced, for the card's gallery and the Hub's widget.
            license: For the card, see `save_pretrained`.
            token: By default the one of ``hf auth login``.
            private: Whether a new repository is private; by default your account's setting.
            revision: Branch to commit to, created where it is missing; by default ``main``.
            create_pr: Open a pull request to ``main`` instead, as needed for other users' repositories.
            commit_message: By default, one that names the concepts.
            saving: Passed to `save_pretrained`, such as `sources` of a fused pack.

        Returns:
            The repository's URL, or the pull request's.

        Raises:
            ConceptError: If it holds no concept and no `repo_id` is given.
            HubError: If the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as temporary:
            # Saving first raises errors before the repository is created.
            self.save_pretrained(temporary, merged=merged, **saving)
            return self.push_folder(
                Path(temporary),
                repo_id,
                merged=merged,
                samples=samples,
                license=license,
                token=token,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def push_folder(
        self,
        folder: Path,
        repo_id: str | None,
        *,
        merged: bool,
        samples: card.Samples | None,
        license: str | None,
        token: str | bool | None,
        private: bool | None,
        revision: str | None,
        create_pr: bool,
        commit_message: str | None,
    ) -> str:
        """Upload a folder that holds the pack, with its model card; arguments and errors as of `push_to_hub`."""
        shown = card.write_samples(folder, samples or {})
        return push(
            folder,
            repo_id or hub.repo_name(self.concepts),
            lambda location: self._card(location, merged, shown, license),
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=commit_message or f"ED-LoRA of {self._names}",
        )

    def __repr__(self) -> str:
        plain = ", ".join(find_plain_prompts(self.training))
        names = self._names or (f"the plain LoRAs {plain}" if plain else "no concept")
        return (
            f"<{type(self).__name__} of {names}: {len(self.lora)} updated layers, "
            f"{len(self.layers)} cross-attention layers, base model {self.base_model!r}>"
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of embeddings and updates, independent of the file they come from."""
        digest = hashlib.sha256()

        def feed(name: str, tensor: torch.Tensor) -> None:
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())

        for token, rows in sorted(self.embeddings.items()):
            feed(token, rows)
        for site, update in sorted(self.lora.items()):
            feed(f"{site} {float(update.scaling)!r} down", update.down)
            feed(f"{site} up", update.up)
        return digest.hexdigest()

    def _write(self, path: Path) -> None:
        """Write the pack's file."""
        file.write(path, self._contents())

    def _check(self) -> None:
        """Raise an `EDLoRAFormatError` that lists why the pack's file cannot be written, if there is any reason."""
        file.check(self._contents())

    def _read_samples(
        self, samples: card.Samples | None, *, merged: bool, license_id: str | None
    ) -> dict[str, Image.Image]:
        """Read the pictures of the card; raises, before anything is written, what makes the pack or its card fail."""
        self._check()
        pictures = card.read_samples(samples or {})
        self._card("", merged, card.name_samples(pictures), license_id)
        return pictures

    def _stale(self, folder: Path, *, merged: bool = False) -> list[Path]:
        """Files that an earlier pack has left in a folder; empty if it is the same pack as this one."""
        left = pack_folder.find_beside(folder, self._file_name)
        return [] if left and self._is_in(folder, merged=merged) else left

    def _is_in(self, folder: Path, *, merged: bool) -> bool:
        """Whether a folder holds this pack, or with `merged` its embeddings."""
        in_file = self._contents() | ({"lora": {}} if merged else {})
        try:
            return EDLoRA.from_pretrained(folder).digest == replace(self, **in_file).digest
        except MixOfShowError:  # missing or broken
            return False

    @property
    def _file_name(self) -> str:
        return file.FILE_NAME

    @property
    def _subject(self) -> str:
        return f"The ED-LoRA of {self._names}" if self.concepts else "The plain LoRA"

    @property
    def _names(self) -> str:
        return ", ".join(concept.placeholder for concept in self.concepts)

    def card(self, location: str) -> str:
        """The model card as Markdown, without metadata.

        Args:
            location: What the code example loads: a Hub id or the name of a folder.
        """
        return str(self._card(location, False, {}, None).text)

    def _card(self, location: str, merged: bool, samples: Mapping[str, str], license_id: str | None) -> ModelCard:
        return card.model_card(self._contents(), location, merged=merged, samples=samples, license_id=license_id)

    def _contents(self) -> file.Contents:
        return file.Contents(
            concepts=self.concepts,
            embeddings=self.embeddings,
            lora=self.lora,
            base_model=self.base_model,
            layers=self.layers,
            training=self.training,
        )
