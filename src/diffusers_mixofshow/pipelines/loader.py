"""Loading concepts into a pipeline and taking them out again."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from peft.tuners.lora import LoraLayer

from diffusers_mixofshow.base_models import in_dtype, location_of, name_of
from diffusers_mixofshow.concepts import Concept, check_distinct
from diffusers_mixofshow.conditioning.tokenize import known_words
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.card import Samples
from diffusers_mixofshow.edlora.embeddings import rows_for
from diffusers_mixofshow.edlora.models import silence_if_embedded
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, meant, warn
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import components_with_sites
from diffusers_mixofshow.lora import (
    adapted_components,
    adapter_names,
    check_name,
    eject,
    holders,
    inject,
    is_fused,
    keep_active,
    keep_gradient_flags,
    merged,
    note_fused,
    refuse_copied,
    refuse_fused,
    take_out_fused,
)
from diffusers_mixofshow.pipelines.opening import LoadingRequest, own_concepts
from diffusers_mixofshow.pipelines.publishing import join_packs
from diffusers_mixofshow.sharing import changing


@contextmanager
def _without_cast_warnings() -> Iterator[None]:
    """Hush diffusers, which warns of every cast, also of one to the dtype that a model has."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class EDLoRALoader:
    """Mixin for a diffusers pipeline: ED-LoRAs in, ED-LoRAs out.

    The updates become PEFT adapters, so `set_adapters`, `get_list_adapters` and
    `cross_attention_kwargs={"scale": ...}` work on them. The embeddings stay beside the model: tokenizer and
    embedding table are never touched.
    """

    components: Mapping[str, object]
    # All that were ever loaded here and not unloaded, by adapter name. Shared class default: assign a new mapping,
    # never mutate.
    _given: Mapping[str, EDLoRA] = MappingProxyType({})
    # The concepts that came with the pipeline, their updates in its weights.
    _in_weights: EDLoRA | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline, and its concepts where `EDLoRA.save_pretrained(..., merged=True)` wrote them.

        Also those of a model that the authors' code fused: a pipeline with ``new_concept_cfg.json`` beside its index.

        Takes what `DiffusionPipeline.from_pretrained` takes, ``dtype=`` with every version of diffusers, and
        ``"toyland"`` for the base that ships in the package. Without a dtype all parts are float32, whatever their
        files hold.
        """
        name = os.fspath(pretrained_model_name_or_path)
        source = location_of(name)
        if "torch_dtype" not in kwargs:
            # By themselves diffusers reads its models in float32, and transformers 5 its own as they were written.
            kwargs |= in_dtype(kwargs.pop("dtype", torch.float32))
        with silence_if_embedded(name):
            pipeline: Self = super().from_pretrained(source, **kwargs)  # type: ignore[misc]
        shared = ("revision", "token", "cache_dir", "local_files_only")
        own = own_concepts(source, pipeline.components, {name: kwargs[name] for name in shared if name in kwargs})
        if own is not None:
            pipeline.load_edlora(own)
            pipeline._in_weights = own
        return pipeline

    @property
    def _edloras(self) -> dict[str, EDLoRA]:
        """What is loaded, by adapter name: not what diffusers' methods or another pipeline took out of the models."""
        components = self.components
        return {
            name: edlora
            for name, edlora in self._given.items()
            if not adapted_components(components, edlora) or holders(components, edlora, name)
        }

    @_edloras.setter
    def _edloras(self, edloras: Mapping[str, EDLoRA]) -> None:
        self._given = edloras

    @property
    def concepts(self) -> dict[str, Concept]:
        """The loaded concepts by placeholder, in the order of loading.

        One whose updates were removed by `unload_lora_weights` or `delete_adapters` is no longer among them. Prompts
        may name it until it is unloaded or loaded again, but draw it from its embeddings alone, with a warning.
        """
        return {concept.placeholder: concept for edlora in self._edloras.values() for concept in edlora.concepts}

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Make a pipeline of this class from the components of another one, loaded concepts included.

        Takes what `DiffusionPipeline.from_pipe` takes, but where no dtype is asked for, the components keep theirs:
        diffusers would turn them, and with them the other pipeline, to float32. Both pipelines share the components,
        so that a concept which one of them unloads loses its weight updates in the other one, too.
        """
        if "dtype" in kwargs:
            kwargs |= in_dtype(kwargs.pop("dtype"))
        if kwargs.keys() & {"dtype", "torch_dtype"}:
            made: Self = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        else:
            with _without_cast_warnings():
                made = super().from_pipe(pipeline, **kwargs, **in_dtype(pipeline.dtype))  # type: ignore[misc]
        made._edloras = dict(getattr(pipeline, "_edloras", {}))
        made._in_weights = getattr(pipeline, "_in_weights", None)
        return made

    def load_edlora(
        self,
        source: str | os.PathLike[str] | EDLoRA,
        scale: float | str = 1.0,
        adapter_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Load one ED-LoRA, beside those already loaded; or any LoRA, textual inversion or file of the authors.

        Args:
            source: Hub id, folder or file, or an `EDLoRA` itself. Of another program's file what `mixofshow inspect`
                understands; a plain LoRA brings no concept and acts by its trigger words.
            scale: Strength of the weight updates; at 0 only the embeddings act. A text in its place is the adapter's
                name, as in ``load_lora_weights``.
            adapter_name: PEFT's name for the updates; by default made from the concepts' names.
            hub: Where it lies, see `EDLoRA.from_pretrained`: `revision`, `subfolder`, `token`, `cache_dir`,
                `local_files_only`; and `weight_name`, the file inside a folder or repository.

        Raises:
            ConceptError: If a name is taken by a loaded concept or a word of the tokenizer.
            EDLoRAFormatError: If the file is defective, or made for another model.
            ConfigurationError: If the adapter name is taken or malformed, or an argument is not of its kind.
        """
        request = LoadingRequest.of(source, scale, adapter_name, hub)
        edlora, name = request.opened(self.components)
        check_distinct([*self.concepts.values(), *edlora.concepts])
        self._refuse_words_of_tokenizer(edlora.concepts)
        check_name(self._edloras.keys(), name)  # also of embeddings alone, of which the models know nothing
        inject(self.components, edlora, name, request.scale)
        if not edlora.base_model:  # as other programs' files leave it
            edlora = replace(edlora, base_model=name_of(self))
        loaded, taken = self._edloras, {word for concept in edlora.concepts for word in _words(concept)}
        others = {
            other: pack
            for other, pack in self._given.items()
            if other in loaded or not taken & {word for concept in pack.concepts for word in _words(concept)}
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
            ConfigurationError: If a concept goes by that adapter name, also one of embeddings alone; or its updates
                would be swapped for others; or another thread uses the model.
        """
        if hotswap and adapter_name in self._edloras:
            raise ConfigurationError(
                f"hotswap=True would put other weights in the place of {adapter_name!r}, which belong to embeddings of"
                " their own. Call unload_edlora() and load_edlora(), or name another adapter."
            )
        if adapter_name in self._edloras:
            check_name(self._edloras.keys(), adapter_name)
        with self._changing(), keep_active(self.components, self._edloras):
            super().load_lora_weights(  # type: ignore[misc]
                pretrained_model_name_or_path_or_dict, adapter_name=adapter_name, hotswap=hotswap, **kwargs
            )

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Fuse adapters into the weights as diffusers does.

        Raises:
            ConfigurationError: If a concept is fused already and a scale is given: diffusers would not add it once
                more, but subtract it with the new strength. Or if there are concepts, and attention reads copies of
                the weights, which `fuse_qkv_projections` made.
        """
        if self._edloras:
            refuse_copied(self.components)
        if kwargs.get("lora_scale", args[1] if len(args) > 1 else 1.0) != 1.0:
            refuse_fused(self.components, self._edloras.keys())
        super().fuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Take fused adapters out of the weights as diffusers does.

        Raises:
            ConfigurationError: If there are concepts, and attention reads copies of the weights.
        """
        if self._edloras:
            refuse_copied(self.components)
        super().unfuse_lora(*args, **kwargs)  # type: ignore[misc]

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Unload all adapters as diffusers does, concepts' included; what is fused stays in the weights."""
        with self._changing():
            note_fused(self.components, self._edloras.keys())
            super().unload_lora_weights(*args, **kwargs)  # type: ignore[misc]

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Delete adapters as diffusers does; a concept goes with its own, unless that is fused into the weights."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        with self._changing():
            note_fused(self.components, self._edloras.keys() & names)
            super().delete_adapters(adapter_names)  # type: ignore[misc]

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: float | dict[str, Any] | list[float] | list[dict[str, Any]] | None = None,
    ) -> None:
        """Choose the active adapters and their strengths as diffusers does.

        Raises:
            ConfigurationError: If a concept is fused, as `unfuse_lora` would subtract it with its new strength,
                or another thread uses the model.
        """
        refuse_fused(self.components, self._edloras.keys())
        with self._changing():
            super().set_adapters(adapter_names, adapter_weights)  # type: ignore[misc]

    def unload_edlora(self, names: str | Iterable[str] | None = None) -> None:
        """Unload ED-LoRAs; the model's modules and weights are then exactly what they were.

        Where updates were fused and their adapter removed, `fuse_lora` and `unload_lora_weights`, they are subtracted
        from the weights, and a warning says that these are then what they were up to rounding.

        Args:
            names: One or several placeholders or adapter names; all that are loaded by default. A pack with
                several concepts goes as a whole.

        Raises:
            ConceptError: If a name is not loaded; nothing is unloaded then.
            ConfigurationError: If adapters are fused, or another thread uses the model.
        """
        loaded = self._edloras
        for name in self._adapters_of(names):
            if is_fused(self.components, name):
                take_out_fused(self.components, self._given[name], name)
                warn(_subtracted(name))
            if name in loaded or name not in adapter_names(self.components):  # else it is somebody else's by now
                eject(self.components, name)
            self._given = {other: edlora for other, edlora in self._given.items() if other != name}

    def save_edlora(self, folder: str | os.PathLike[str], name: str | None = None, *, overwrite: bool = False) -> Path:
        """Write a loaded ED-LoRA as it was loaded; its scale is not part of it.

        Args:
            folder: Where to, see `EDLoRA.save_pretrained`.
            name: Which one, by placeholder or adapter name; needed if several are loaded.
            overwrite: Take the place of the pack that is there, if any.

        Returns:
            Path of the file written.

        Raises:
            ConceptError: If no or several ED-LoRAs are meant.
        """
        adapters = list(self._edloras) if name is None else self._adapters_of(name)
        if len(adapters) != 1:
            raise ConceptError(
                f"save_edlora() writes one ED-LoRA, but {len(adapters)} are loaded{_list_names(self._edloras)}. "
                "Choose one with name=..., or load one first."
            )
        return self._given[adapters[0]].save_pretrained(folder, overwrite=overwrite)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Write the pipeline without its concepts, unlike `push_to_hub`; see `save_edlora` for theirs.

        Only concepts that came with the pipeline go with it, as their updates are in its weights.
        Takes what `DiffusionPipeline.save_pretrained` takes.

        Raises:
            OverwriteError: If concepts go with it, and the folder holds others' `edlora.safetensors`; nothing is
                written then.
        """
        folder = str(args[0] if args else kwargs["save_directory"])
        own = [one for one in self._edloras.values() if one is self._in_weights]
        for edlora in own:
            edlora.check_beside(folder)
        with self._without_adapters():
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
        """Upload the pipeline with all loaded concepts, their updates in its weights, unlike `save_pretrained`.

        `MixOfShowPipeline.from_pretrained` loads it with its concepts. The pipeline itself stays as it is. To send the
        concepts alone, which are some megabytes, use `EDLoRA.push_to_hub`.

        Args:
            repo_id: ``user/name``, or a name under your own account; by default derived from the concepts.
            commit_message: By default names the concepts.
            private: Whether a new repository is private; by default your account's setting.
            token: By default the one of ``hf auth login``.
            create_pr: Open a pull request instead.
            revision: Branch to commit to, created where it is missing; by default ``main``.
            samples: Prompt to the picture it drew, for the card's gallery and the Hub's widget.
            license: For the card, see `EDLoRA.save_pretrained`.

        Returns:
            The repository's URL, or the pull request's.

        Raises:
            ConceptError: If no concept is loaded.
            HubError: If the Hub refuses or cannot be reached.
        """
        edlora = join_packs(self.components, self._edloras)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with self._without_adapters(), merged(self.components, edlora):
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
    def concepts_set_aside(self) -> Iterator[None]:
        """Take every concept out for the length of a block; afterwards all are loaded as strong and active as before.

        Inside, other concepts may be loaded, but must be unloaded again.
        """
        with self._without_adapters():
            given, self._given = self._given, {}
            try:
                yield
            finally:
                self._given = given

    @property
    def _concept_embeddings(self) -> dict[str, torch.Tensor]:
        """The embeddings of everything that prompts may name, see `EDLoRA.embeddings`."""
        return {token: rows for edlora in self._given.values() for token, rows in edlora.embeddings.items()}

    def _embeddings_for(self, text_encoder: str) -> dict[str, torch.Tensor]:
        """Concept token to its embeddings for a text encoder, that for the vector of the whole text the last."""
        return rows_for(text_encoder, self._concept_embeddings, family_of(self.components))

    @property
    def _tokenizers(self) -> list[Any]:
        """The tokenizers that are there."""
        components = self.components
        encoders = family_of(components).text_encoders.values()
        return [words for one in encoders if (words := components.get(one.tokenizer)) is not None]

    @property
    def _known_words(self) -> frozenset[str]:
        """Bracketed words that some tokenizer knows."""
        return frozenset().union(*map(known_words, self._tokenizers))

    @property
    def _nameable(self) -> tuple[Concept, ...]:
        """What prompts may name: the loaded concepts, and those whose updates somebody else took out."""
        return tuple(concept for edlora in self._given.values() for concept in edlora.concepts)

    def _refuse_words_of_tokenizer(self, concepts: Iterable[Concept]) -> None:
        words = self._known_words
        taken = [name for concept in concepts for name in (concept.placeholder, *concept.tokens) if name in words]
        if taken:
            raise ConceptError(
                f"The tokenizer already knows {', '.join(taken)}, perhaps from load_textual_inversion(). "
                "Unload that first, or rename the concept."
            )

    def _adapters_of(self, names: str | Iterable[str] | None) -> list[str]:
        """Adapter names, each once, for placeholders and adapter names mixed; all of them for None."""
        if names is None:
            return list(self._given)
        adapter_of = {
            concept.placeholder: adapter for adapter, edlora in self._given.items() for concept in edlora.concepts
        } | {adapter: adapter for adapter in self._given}
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in wanted if name not in adapter_of]
        if unknown:
            guess = meant(unknown[0], adapter_of) if len(unknown) == 1 else ""
            raise ConceptError(f"Not loaded: {', '.join(unknown)}{_list_names(adapter_of)}.{guess}")
        return list(dict.fromkeys(adapter_of[name] for name in wanted))

    def _changing(self) -> AbstractContextManager[bool]:
        """A block that changes the models, refused while another thread uses them."""
        return changing(*components_with_sites(self.components).values())

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Take the weight updates out for a while; afterwards all are back, as strong and as active as before."""
        components, ours = self.components, self._edloras
        if fused := [name for name in ours if is_fused(components, name)]:
            raise ConfigurationError(
                f"{', '.join(fused)}: fused into the weights, whose adapters are gone since, so that the base cannot"
                " be given without them. Call pipe.unload_edlora() and load_edlora() first."
            )
        models = components_with_sites(components)
        held = {
            name: {holder: models[holder] for holder in found}
            for name, edlora in ours.items()
            if (found := holders(components, edlora, name))  # none where there are embeddings alone
        }
        states = [
            (model, path, dict(layer.scaling), list(layer.active_adapters), layer.disable_adapters)
            for model in models.values()
            for path, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        ]
        with self._changing():
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


def _subtracted(name: str) -> str:
    return (
        f"The updates of {name!r} had been fused into the weights, and are now subtracted again: the weights are what"
        " they were up to rounding, which shows in half precision. Load the base anew to have it exactly."
    )


def _words(concept: Concept) -> tuple[str, ...]:
    return (concept.placeholder, *concept.tokens)


def _list_names(names: Iterable[str]) -> str:
    names = sorted(names)
    return f" (loaded: {', '.join(names)})" if names else " (nothing is loaded)"
