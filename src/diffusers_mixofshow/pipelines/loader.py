"""Load concepts into a pipeline, and unload them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from diffusers_mixofshow.base_models import dtype_argument, location_of, name_of
from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.conditioning.tokenize import list_bracketed_words
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.card import Samples
from diffusers_mixofshow.edlora.embeddings import rows_for
from diffusers_mixofshow.edlora.models import silence_if_embedded
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, suggest, warn
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import components_with_sites
from diffusers_mixofshow.lora import (
    adapter_names,
    check_name,
    eject,
    find_adapted,
    find_holders,
    inject,
    is_fused,
    keep_active,
    keep_gradient_flags,
    merged,
    refuse_copied,
    refuse_fused,
    remember_fused,
    subtract_fused,
)
from diffusers_mixofshow.pipelines.opening import check_arguments, open_source, read_own_concepts
from diffusers_mixofshow.pipelines.other_families import (
    refuse_other_checkpoints,
    refuse_other_families,
    refuse_other_index,
)
from diffusers_mixofshow.pipelines.publishing import join_packs
from diffusers_mixofshow.sharing import changing


_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
"""Arguments of `from_pretrained` that say where a file of the Hub is found."""


_keeps_dtypes: ContextVar[bool] = ContextVar("keeps_dtypes", default=False)
"""Whether `EDLoRALoader.to` does nothing, as `from_pipe` of diffusers casts all components with it."""


class EDLoRALoader:
    """Mixin for a diffusers pipeline: load, unload, save and publish ED-LoRAs.

    The updates become PEFT adapters, so `set_adapters`, `get_list_adapters` and
    `cross_attention_kwargs={"scale": ...}` work on them. The embeddings are kept outside of the model: tokenizer and
    embedding table never change.
    """

    components: Mapping[str, object]
    # What `load_edlora` loaded and nobody unloaded by `unload_edlora`, by adapter name. Shared class default: assign a
    # new mapping, never mutate.
    _given: Mapping[str, EDLoRA] = MappingProxyType({})
    # Concepts that `from_pretrained` found, whose updates are in the pipeline's weights.
    _in_weights: EDLoRA | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline, with the concepts in its weights where it has any.

        It has some if `EDLoRA.save_pretrained(..., merged=True)` wrote it, or if the authors' code fused it and left
        ``new_concept_cfg.json`` beside its index.

        Takes what `DiffusionPipeline.from_pretrained` takes, ``dtype=`` with every version of diffusers, and
        ``"toyland"`` for the base that ships in the package. Without a dtype all parts are float32, whatever their
        files hold.

        Raises:
            ConfigurationError: If it is a pipeline of another family; its index is read before its weights.
        """
        name = os.fspath(pretrained_model_name_or_path)
        source = location_of(name)
        if "torch_dtype" not in kwargs:
            # By default diffusers loads its models in float32, transformers 5 its models in the dtype of their files.
            kwargs |= dtype_argument(kwargs.pop("dtype", torch.float32))
        hub = {option: kwargs[option] for option in _HUB_OPTIONS if option in kwargs}
        with silence_if_embedded(name):
            refuse_other_index(cls, name, source, hub)
            pipeline: Self = super().from_pretrained(source, **kwargs)  # type: ignore[misc]
        refuse_other_families(cls, name, pipeline.components)
        own = read_own_concepts(source, pipeline.components, hub)
        if own is not None:
            pipeline.load_edlora(own)
            pipeline._in_weights = own
        return pipeline

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline out of a checkpoint of one file, the form in which many tuned models are published.

        Takes what `FromSingleFileMixin.from_single_file` of diffusers takes, and ``dtype=`` with every version of it.
        Without a dtype all parts are float32, whatever the file holds. ``config=`` names a folder or Hub id of a
        pipeline with the same configuration, which otherwise is downloaded from the family's own.

        Raises:
            ConfigurationError: If it is a file on this disk that is no checkpoint, is damaged, or of another family.
        """
        refuse_other_checkpoints(cls, pretrained_model_link_or_path)
        if "torch_dtype" not in kwargs:
            kwargs |= dtype_argument(kwargs.pop("dtype", torch.float32))
        return super().from_single_file(os.fspath(pretrained_model_link_or_path), **kwargs)  # type: ignore[misc]

    @property
    def _edloras(self) -> dict[str, EDLoRA]:
        """Those of `_given` whose updates neither diffusers' methods nor another pipeline removed, by adapter name."""
        components = self.components
        return {
            name: edlora
            for name, edlora in self._given.items()
            if not find_adapted(components, edlora) or find_holders(components, edlora, name)
        }

    @_edloras.setter
    def _edloras(self, edloras: Mapping[str, EDLoRA]) -> None:
        self._given = edloras

    @property
    def concepts(self) -> dict[str, Concept]:
        """The loaded concepts by placeholder, in the order of loading.

        A concept whose updates `unload_lora_weights` or `delete_adapters` removed is no longer listed. Until it is
        unloaded or loaded again, prompts may name it: they then use its embeddings alone, with a warning.
        """
        return {concept.placeholder: concept for edlora in self._edloras.values() for concept in edlora.concepts}

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Make a pipeline of this class from the components of another one, loaded concepts included.

        Takes what `DiffusionPipeline.from_pipe` takes. Without a dtype the components keep theirs, each its own, where
        diffusers would cast them to float32, and the other pipeline with them; models that are given beside them are
        cast to the U-Net's. Both pipelines share the components: a concept which one of them unloads loses its weight
        updates in the other one, too.
        """
        if "dtype" in kwargs:
            kwargs |= dtype_argument(kwargs.pop("dtype"))
        if kwargs.keys() & {"dtype", "torch_dtype"}:
            made: Self = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        else:
            before = _keeps_dtypes.set(True)
            try:
                made = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
            finally:
                _keeps_dtypes.reset(before)
            wanted = (pipeline.components.get("unet") or pipeline).dtype
            for part in kwargs.values():
                if isinstance(part, ModelMixin | PreTrainedModel) and part.dtype != wanted:
                    part.to(wanted)
        made._edloras = dict(getattr(pipeline, "_edloras", {}))
        made._in_weights = getattr(pipeline, "_in_weights", None)
        return made

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the pipeline as diffusers does."""
        return self if _keeps_dtypes.get() else super().to(*args, **kwargs)  # type: ignore[misc]

    def load_edlora(
        self,
        source: str | os.PathLike[str] | EDLoRA,
        scale: float | str = 1.0,
        adapter_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Load an ED-LoRA, a LoRA, a textual inversion or a file of the authors' code, beside what is loaded already.

        Args:
            source: Hub id, folder or file, or an `EDLoRA` object. Files of other programs are read as far as
                `mixofshow inspect` understands them; a plain LoRA has no concept and acts by its trigger words.
            scale: Strength of the weight updates; at 0 only the embeddings act. A text in its place is the adapter's
                name, as in ``load_lora_weights``.
            adapter_name: PEFT's name for the updates; by default made from the concepts' names.
            hub: Where to find the file, see `EDLoRA.from_pretrained`: `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`; and `weight_name`, the file inside a folder or repository.

        Raises:
            ConceptError: If a name is taken by a loaded concept or a word of the tokenizer.
            EDLoRAFormatError: If the file is defective, or made for another model.
            ConfigurationError: If the adapter name is taken or malformed, or an argument has a wrong type.
        """
        strength, name = check_arguments(source, scale, adapter_name, hub)
        edlora, name = open_source(source, name, self.components, hub)
        check_distinct([*self.concepts.values(), *edlora.concepts])
        self._refuse_words_of_tokenizer(edlora.concepts)
        check_name(self._edloras.keys(), name)  # `inject` misses names of packs that have embeddings alone
        inject(self.components, edlora, name, strength)
        if not edlora.base_model:  # other programs' files do not name it
            edlora = replace(edlora, base_model=name_of(self))
        loaded, taken = self._edloras, _list_words(edlora)
        # Packs whose updates were removed give up words that the new one takes.
        others = {
            other: pack for other, pack in self._given.items() if other in loaded or not taken & _list_words(pack)
        }
        self._given = {**others, name: edlora}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA as diffusers does; concepts that are active stay active beside it.

        Raises:
            ConfigurationError: If the adapter name is a concept's, even of one that has embeddings alone; if
                hotswapping would replace a concept's updates; or if another thread uses the model.
        """
        if adapter_name in self._edloras:
            if hotswap:
                raise ConfigurationError(
                    f"hotswap=True would replace the weights of {adapter_name!r}, which belong to a concept's"
                    " embeddings. Call unload_edlora() and load_edlora(), or name another adapter."
                )
            check_name(self._edloras.keys(), adapter_name)
        with self._reserve_models(), keep_active(self.components, self._edloras):
            super().load_lora_weights(  # type: ignore[misc]
                pretrained_model_name_or_path_or_dict, adapter_name=adapter_name, hotswap=hotswap, **kwargs
            )

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Fuse adapters into the weights as diffusers does.

        Raises:
            ConfigurationError: If a concept is fused already and a scale is given: diffusers would then subtract it
                with the new strength. Or if concepts are loaded, and `fuse_qkv_projections` has made copies of the
                weights, which attention reads.
        """
        if self._edloras:
            refuse_copied(self.components)
        if kwargs.get("lora_scale", args[1] if len(args) > 1 else 1.0) != 1.0:
            refuse_fused(self.components, self._edloras.keys())
        super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Take fused adapters out of the weights as diffusers does.

        Raises:
            ConfigurationError: If concepts are loaded, and `fuse_qkv_projections` has made copies of the weights,
                which attention reads.
        """
        if self._edloras:
            refuse_copied(self.components)
        super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Unload all adapters as diffusers does, those of concepts included; fused updates stay in the weights."""
        with self._reserve_models():
            remember_fused(self.components, self._edloras.keys())
            super().unload_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Delete adapters as diffusers does; a concept is unloaded with its adapter, unless that is fused."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        with self._reserve_models():
            remember_fused(self.components, self._edloras.keys() & names)
            super().delete_adapters(adapter_names)  # type: ignore[misc]

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict[str, Any] | list[float] | list[dict[str, Any]] | None = None,
    ) -> None:
        """Choose the active adapters and their strengths as diffusers does.

        Raises:
            ConfigurationError: If a concept is fused, because `unfuse_lora` would later subtract it with the new
                strength; or if another thread uses the model.
        """
        refuse_fused(self.components, self._edloras.keys())
        with self._reserve_models():
            super().set_adapters(adapter_names, adapter_weights)  # type: ignore[misc]

    def unload_edlora(self, names: str | Iterable[str] | None = None) -> None:
        """Unload ED-LoRAs; the model's modules and weights are then exactly what they were before loading.

        Updates that `fuse_lora` put into the weights and whose adapter `unload_lora_weights` removed are subtracted
        from the weights, which restores these up to rounding; a warning says so.

        Args:
            names: One or several placeholders or adapter names; all that are loaded by default. A pack with
                several concepts is unloaded as a whole.

        Raises:
            ConceptError: If a name is not loaded; nothing is unloaded then.
            ConfigurationError: If adapters are fused, or another thread uses the model.
        """
        loaded = self._edloras
        for name in self._find_adapters(names):
            if is_fused(self.components, name):
                subtract_fused(self.components, self._given[name], name)
                warn(
                    f"The updates of {name!r} had been fused into the weights, and are now subtracted again: the"
                    " weights are what they were up to rounding, which shows in half precision. Load the base anew to"
                    " have it exactly."
                )
            # A name that is not among the loaded ones may by now belong to another adapter, which stays.
            if name in loaded or name not in adapter_names(self.components):
                eject(self.components, name)
            self._given = {other: edlora for other, edlora in self._given.items() if other != name}

    def save_edlora(self, folder: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False) -> Path:
        """Write a loaded ED-LoRA as it was loaded, without the scale at which it was loaded.

        Args:
            folder: Where to, see `EDLoRA.save_pretrained`.
            name: Its placeholder or adapter name; needed if several are loaded.
            overwrite: Replace the pack that is there, if any.

        Returns:
            Path of the file written.

        Raises:
            ConceptError: If none is loaded, or several are and no name is given.
        """
        adapters = list(self._edloras) if name is None else self._find_adapters(name)
        if len(adapters) != 1:
            raise ConceptError(
                f"save_edlora() writes one ED-LoRA, but {len(adapters)} are loaded{_list_names(self._edloras)}. "
                "Choose one with name=..., or load one first."
            )
        return self._given[adapters[0]].save_pretrained(folder, overwrite=overwrite)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Write the pipeline without its concepts, unlike `push_to_hub`; `save_edlora` writes concepts.

        Only concepts that `from_pretrained` found in the pipeline's weights are written with it.
        Takes what `DiffusionPipeline.save_pretrained` takes.

        Raises:
            OverwriteError: If concepts would be written, and the folder holds an `edlora.safetensors` of others;
                nothing is written then.
        """
        folder = str(args[0] if args else kwargs["save_directory"])
        own = [one for one in self._edloras.values() if one is self._in_weights]
        for edlora in own:
            edlora.check_beside(folder)
        with self._remove_adapters():
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        for edlora in own:
            edlora.save_beside(folder)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        *,
        revision: str | None = None,
        samples: Samples | None = None,
        license: str | None = None,
    ) -> str:
        """Upload the pipeline with all loaded concepts merged into its weights, unlike `save_pretrained`.

        `MixOfShowPipeline.from_pretrained` loads it with its concepts. This pipeline itself does not change. To upload
        the concepts alone, which are some megabytes, use `EDLoRA.push_to_hub`.

        Args:
            repo_id: ``user/name``, or a name under your own account; by default derived from the concepts.
            commit_message: By default names the concepts.
            private: Whether a new repository is private; by default your account's setting.
            token: By default the one of ``hf auth login``.
            create_pr: Open a pull request instead.
            revision: Branch to commit to, created where it is missing; by default ``main``.
            samples: Prompt to the picture it drew, for the card's gallery and the Hub's widget.
            license: Licence in the card, see `EDLoRA.save_pretrained`.

        Returns:
            The repository's URL, or the pull request's.

        Raises:
            ConceptError: If no concept is loaded.
            HubError: If the Hub refuses or cannot be reached.
        """
        edlora = join_packs(self.components, self._edloras)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with self._remove_adapters(), merged(self.components, edlora):
                super().save_pretrained(folder)  # type: ignore[misc]
            edlora.save_beside(folder)
            return edlora.push_folder(
                folder,
                repo_id,
                merged=True,
                samples=samples,
                license=license,
                token=token,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    @contextmanager
    def set_concepts_aside(self) -> Iterator[None]:
        """Unload every concept inside the block; afterwards each is back at its strength, active or not as before.

        Concepts that are loaded inside the block must be unloaded inside it.
        """
        with self._remove_adapters():
            given, self._given = self._given, {}
            try:
                yield
            finally:
                self._given = given

    @property
    def _concept_embeddings(self) -> dict[str, torch.Tensor]:
        """The embeddings of all concepts that prompts may name, see `EDLoRA.embeddings`."""
        return {token: rows for edlora in self._given.values() for token, rows in edlora.embeddings.items()}

    def _select_embeddings(self, text_encoder: str) -> dict[str, torch.Tensor]:
        """Concept token to its embeddings for a text encoder, the last row for the pooled vector if one is read."""
        return rows_for(text_encoder, self._concept_embeddings, family_of(self.components))

    @property
    def _tokenizers(self) -> list[Any]:
        """The tokenizers among the components."""
        components = self.components
        encoders = family_of(components).text_encoders.values()
        return [words for one in encoders if (words := components.get(one.tokenizer)) is not None]

    @property
    def _known_words(self) -> frozenset[str]:
        """Words such as ``<cat>`` that some tokenizer knows."""
        return frozenset().union(*map(list_bracketed_words, self._tokenizers))

    @property
    def _nameable(self) -> tuple[Concept, ...]:
        """Concepts that prompts may name: the loaded ones, and those whose updates were removed (see `concepts`)."""
        return tuple(concept for edlora in self._given.values() for concept in edlora.concepts)

    def _refuse_words_of_tokenizer(self, concepts: Iterable[Concept]) -> None:
        words = self._known_words
        taken = [name for concept in concepts for name in (concept.placeholder, *concept.tokens) if name in words]
        if taken:
            raise ConceptError(
                f"The tokenizer already knows {', '.join(taken)}, perhaps from load_textual_inversion(). "
                "Unload that first, or rename the concept."
            )

    def _find_adapters(self, names: str | Iterable[str] | None) -> list[str]:
        """Resolve placeholders and adapter names to adapter names, each once; None means all."""
        if names is None:
            return list(self._given)
        adapter_of = {
            concept.placeholder: adapter for adapter, edlora in self._given.items() for concept in edlora.concepts
        } | {adapter: adapter for adapter in self._given}
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in wanted if name not in adapter_of]
        if unknown:
            guess = suggest(unknown[0], adapter_of) if len(unknown) == 1 else ""
            raise ConceptError(f"Not loaded: {', '.join(unknown)}{_list_names(adapter_of)}.{guess}")
        return list(dict.fromkeys(adapter_of[name] for name in wanted))

    def _reserve_models(self) -> AbstractContextManager[bool]:
        """Reserve the models for changes inside a block; raises while another thread uses them."""
        return changing(*components_with_sites(self.components).values())

    @contextmanager
    def _remove_adapters(self) -> Iterator[None]:
        """Remove the weight updates inside the block; afterwards each is back at its strength, active or not."""
        components, ours = self.components, self._edloras
        if fused := [name for name in ours if is_fused(components, name)]:
            raise ConfigurationError(
                f"{', '.join(fused)}: fused into the weights by adapters that have been removed, so that the base"
                " cannot be had without them. Call pipe.unload_edlora() and load_edlora() first."
            )
        models = components_with_sites(components)
        held = {
            name: {holder: models[holder] for holder in found}
            for name, edlora in ours.items()
            if (found := find_holders(components, edlora, name))  # empty for a pack that has embeddings alone
        }
        states = [
            (model, path, dict(layer.scaling), list(layer.active_adapters), layer.disable_adapters)
            for model in models.values()
            for path, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        ]
        with self._reserve_models():
            try:
                for name, parts in held.items():
                    eject(parts, name)
                yield
            finally:
                for name, parts in held.items():
                    inject(parts, ours[name], name)
                for model, path, scaling, active, disabled in states:
                    layer: Any = model.get_submodule(path)
                    layer.scaling.update(scaling)
                    with keep_gradient_flags(layer):
                        layer.set_adapter(active)
                        if disabled:
                            layer.enable_adapters(False)


def _list_words(edlora: EDLoRA) -> set[str]:
    """Everything in a prompt that stands for one of its concepts."""
    return {word for concept in edlora.concepts for word in (concept.placeholder, *concept.tokens)}


def _list_names(names: Iterable[str]) -> str:
    names = sorted(names)
    return f" (loaded: {', '.join(names)})" if names else " (nothing is loaded)"
