"""Layer-wise prompt encoding for pipelines with one or several CLIP text encoders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.utils.peft_utils import scale_lora_layers
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.concepts import mentions_concept, split_prompt
from diffusers_mixofshow.conditioning.encode import Encoded, encode
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families import TextEncoder, family_of
from diffusers_mixofshow.families.clip import POSITIONS
from diffusers_mixofshow.families.layers import embedding_layers
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.regions import Region


_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
"""Arguments with texts; without a text of its own, the second text encoder reads the first one's."""

_NO_ARGUMENTS = ("self", "__class__")
"""Names that `locals()` holds beside the arguments, in a method that calls `super()`."""

Texts = tuple[str, ...] | None
"""What each text encoder reads of one prompt; None where the pipeline takes zeros instead of an encoded text."""

NEGATIVE_EMBEDDINGS = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
"""Arguments of a call in place of its negative prompts, each with a row for every prompt; the second is SDXL's."""

_Anything = TypeVar("_Anything")

_one_thread = threading.RLock()
"""Held while prompts are encoded: fast tokenizers keep truncation as state, and text encoders the LoRA scale."""


class LayerwisePrompts(EDLoRALoader):
    """Mixin for a diffusers pipeline: `encode_prompt` takes prompts with concepts, and encodes those of regions.

    Without concepts and regions the parent encodes the prompts. Otherwise they are encoded here, once for each
    cross-attention layer and region, to the 3-D stack described in `conditioning.attention`, which the parent repeats
    and casts like any given `prompt_embeds`. Subclasses define `encode_prompt` with the signature of their parent.
    """

    unet: nn.Module | None
    config: Any
    maybe_convert_prompt: Callable[..., list[str]]
    # The current call's regions: one entry for all prompts, or one for each.
    _regions: tuple[tuple[Region, ...], ...] = ()
    _guidance_scale: float
    _execution_device: torch.device
    cross_attention_kwargs: Mapping[str, Any] | None

    def _encode_texts(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the texts among the arguments of `encode_prompt` by embeddings, where the parent cannot encode them.

        Raises:
            ConceptError: If a prompt has a bracketed word that is not loaded.
            ConfigurationError: If a text encoder is missing, or the pooled vector of given embeddings.
        """
        self._refuse_missing_vectors(arguments)
        if not self._is_layerwise(arguments):
            if arguments["prompt_embeds"] is None:
                self._refuse_missing_encoders()
            return dict(arguments)
        clip_skip, device = arguments["clip_skip"], arguments["device"]
        with _scale_lora(self._encoders.values(), arguments["lora_scale"]):
            positive = self._encode_side("", arguments, clip_skip, device)
            # Like the parent, without clip_skip.
            guided = arguments["do_classifier_free_guidance"]
            negative = self._encode_side("negative_", arguments, None, device) if guided else None
            sides = self._append_regions(positive, negative, clip_skip, device)
        encoded: dict[str, Any] = {"lora_scale": None, "clip_skip": None}
        for kind, side, states in zip(("", "negative_"), (positive, negative), sides, strict=True):
            if side is not None:
                encoded |= {f"{kind}prompt_embeds": states, f"{kind}pooled_prompt_embeds": side.pooled}
        return {name: encoded.get(name, value) for name, value in arguments.items()}

    def _is_layerwise(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the parent cannot encode these arguments; raises if a prompt has an unknown bracketed word."""
        given = self._list_texts({name: arguments.get(name) for name in _PROMPTS})
        self._refuse_unknown_words(given)
        return (
            any(self._regions)
            or any(mentions_concept(text, self._nameable) for text in given)
            or any(self._is_stack(arguments.get(name)) for name in ("prompt_embeds", "negative_prompt_embeds"))
        )

    def _refuse_unknown_words(self, texts: Sequence[str]) -> None:
        if any("<" in text for text in texts):
            split_prompt(" ".join(texts), self._nameable, also_known=self._known_words)

    def _list_texts(self, arguments: Mapping[str, Any]) -> list[str]:
        """List all texts of a call, those of its regions included."""
        texts = [text for name in _PROMPTS for text in _as_list(arguments.get(name))]
        regions = [region for own in self._regions for region in own]
        return texts + [text for region in regions for text in (region.prompt, region.negative_prompt) if text]

    @property
    def _encoders(self) -> dict[str, Any]:
        """The text encoders by name; empty in a pipeline that is given embeddings only."""
        components = self.components
        found = {name: components.get(name) for name in self._readings}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    @property
    def _readings(self) -> Mapping[str, TextEncoder]:
        """Text encoder to what the denoiser reads of it."""
        return family_of(self.components).text_encoders

    @property
    def _layers(self) -> int:
        """Number of encodings in a stack."""
        if self.unet is None:  # a pipeline that only encodes prompts
            return max((len(rows) for rows in self._concept_embeddings.values()), default=0)
        return len(self._layer_names)

    @property
    def _layer_names(self) -> tuple[str, ...]:
        """The cross-attention layers, or groups of them, that have an encoding of their own in a stack."""
        return embedding_layers(self.components)

    @property
    def _tokens(self) -> int:
        """Number of tokens of one encoding."""
        return next((words.model_max_length for words in self._tokenizers), POSITIONS)

    def _is_stack(self, embeds: torch.Tensor | None) -> bool:
        return embeds is not None and embeds.shape[1] == self._layers * self._tokens

    def _stack_layers(self, embeds: torch.Tensor) -> torch.Tensor:
        """Turn given embeddings into a stack of layers, shape (prompts, layers * tokens, dim)."""
        if self._is_stack(embeds):
            return embeds
        if embeds.shape[1] != self._tokens:
            raise ConfigurationError(
                f"Embeddings of shape {tuple(embeds.shape)} cannot be combined with concepts or regions; expected"
                f" {self._tokens} tokens, or {self._layers} layers of {self._tokens} as encode_prompt() makes them."
            )
        return embeds.repeat(1, self._layers, 1)

    def _encode_side(
        self, kind: str, arguments: Mapping[str, Any], clip_skip: int | None, device: torch.device
    ) -> Encoded:
        """Encode a call's prompts, or its negative prompts (kind ``negative_``); given embeddings are kept."""
        embeds, pooled = arguments[f"{kind}prompt_embeds"], arguments.get(f"{kind}pooled_prompt_embeds")
        if embeds is not None:
            return Encoded(self._stack_layers(embeds), pooled)
        encoded = self._encode(self._read_side(kind, arguments), clip_skip, device)
        return encoded if pooled is None else Encoded(encoded.states, pooled)

    def _read_side(self, kind: str, arguments: Mapping[str, Any]) -> list[Texts]:
        """The texts of a call's prompts, or of its negative prompts, one entry for each prompt."""
        batch = count_prompts(arguments["prompt"], arguments["prompt_embeds"])
        first = arguments[f"{kind}prompt"]
        if kind and first is None and self._takes_zeros:
            return [None] * batch
        names = [f"{kind}prompt", f"{kind}prompt_2"][: len(self._readings)]
        texts = [_repeat_text(arguments.get(name) or first, batch, called=name.replace("_", " ")) for name in names]
        return list(zip(*texts, strict=True))

    @property
    def _takes_zeros(self) -> bool:
        """Whether the parent takes zeros, not the encoded empty text, where there is no negative prompt."""
        return bool(self.config.get("force_zeros_for_empty_prompt"))

    def _list_negatives(self, arguments: Mapping[str, Any]) -> list[Texts]:
        """List what the text encoders read as the negative prompt of every picture of a call."""
        names = ("prompt", "prompt_embeds", "negative_prompt", "negative_prompt_2")
        of_prompts = self._read_side("negative_", {name: arguments.get(name) for name in names})
        return repeat_for_pictures(of_prompts, arguments)

    def _list_negative_embeddings(self, arguments: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
        """List the rows of the negative embeddings that a call was given, for every picture; empty without any."""
        if arguments.get("negative_prompt_embeds") is None:
            return {}
        given = {name: arguments.get(name) for name in NEGATIVE_EMBEDDINGS}
        return {name: repeat_for_pictures(list(rows), arguments) for name, rows in given.items() if rows is not None}

    def _choose_negative(self, region: Region, shared: Texts) -> Texts:
        """Choose a region's own negative prompt, which all text encoders read, or the one of its picture."""
        own = region.negative_prompt
        return shared if own is None else (own,) * len(self._readings)

    def _refuse_missing_vectors(self, arguments: Mapping[str, Any]) -> None:
        """Raise if embeddings are given without their pooled vector, which not all parents check."""
        if not any(reading.pooled for reading in self._readings.values()):
            return
        for kind in ("", "negative_") if arguments["do_classifier_free_guidance"] else ("",):
            embeds, vector = (f"{kind}prompt_embeds", f"{kind}pooled_prompt_embeds")
            if arguments.get(embeds) is not None and arguments.get(vector) is None:
                raise ConfigurationError(
                    f"`{embeds}` is given without `{vector}`; expected both, as encode_prompt() returns them."
                )

    def _refuse_missing_encoders(self) -> None:
        """Raise if a text encoder or a tokenizer is missing for texts that the denoiser reads."""
        components, readings = self.components, self._readings
        tokenizers = [reading.tokenizer for reading in readings.values()]
        missing = [name for name in (*readings, *tokenizers) if components.get(name) is None]
        if not missing or self._reads_remaining_encoders():
            return
        given = "prompt_embeds and pooled_prompt_embeds" if len(readings) > 1 else "prompt_embeds"
        raise ConfigurationError(
            f"The pipeline has no {' and no '.join(missing)}, so that prompts cannot be encoded; expected all of "
            f"{', '.join((*readings, *tokenizers))}. Load it with these, or call it with {given} and without regions."
        )

    def _reads_remaining_encoders(self) -> bool:
        """Whether the denoiser reads no more than the encoders that there are, as SDXL's refiner reads the second."""
        complete = [name for name in self._encoders if self.components.get(self._readings[name].tokenizer) is not None]
        if self.unet is None:
            return bool(complete)
        width: Any = self.unet.config.get("cross_attention_dim")  # type: ignore[union-attr, operator]
        return width == sum(self._encoders[name].config.hidden_size for name in complete)

    def _encode(self, texts: Sequence[Texts], clip_skip: int | None, device: torch.device) -> Encoded:
        """Encode texts, equal ones once; states of shape (texts, layers * tokens, dim)."""
        self._refuse_missing_encoders()
        unique = list(dict.fromkeys(texts))
        of_encoders = [
            # None becomes zeros below, so that any text does for it here.
            self._encode_with(name, ["" if text is None else text[number] for text in unique], clip_skip, device)
            for number, name in enumerate(self._encoders)
        ]
        encoded = Encoded.join_encoders(of_encoders).select([unique.index(text) for text in texts])
        return encoded.keep_where([text is not None for text in texts])

    def _encode_with(self, name: str, texts: Sequence[str], clip_skip: int | None, device: torch.device) -> Encoded:
        """Encode texts with one of the text encoders."""
        reading = self._readings[name]
        tokenizer = self.components[reading.tokenizer]
        # A textual-inversion token with several vectors becomes as many tokens.
        converted = self.maybe_convert_prompt(list(texts), tokenizer)
        tokenized = tokenize(converted, tokenizer, self._nameable, self._known_words)
        embeddings = self._select_embeddings(name)
        return encode(
            self._encoders[name], tokenized, embeddings, self._layers, clip_skip, reading=reading, device=device
        )

    def _append_regions(
        self, positive: Encoded, negative: Encoded | None, clip_skip: int | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Append the regions' stacks to the global prompt's, shape (prompts, contexts * layers * tokens, dim).

        The pooled vector applies to the whole picture, so it remains the global prompt's.
        """
        negative_states = None if negative is None else negative.states
        if not self._regions:
            return positive.states, negative_states
        prompts = len(positive.states)
        regions = self._regions if len(self._regions) == prompts else self._regions * prompts
        texts = [[region.prompt for region in own] for own in regions]
        states = self._append_texts(positive.states, texts, clip_skip, device)
        if negative_states is not None:
            negatives = [[region.negative_prompt for region in own] for own in regions]
            negative_states = self._append_texts(negative_states, negatives, None, device)
        return states, negative_states

    def _append_texts(
        self,
        stacks: torch.Tensor,
        texts: Sequence[Sequence[str | None]],
        clip_skip: int | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Encode the texts of regions, and append them to the stack of their prompt.

        Args:
            stacks: Shape (prompts, layers * tokens, dim).
            texts: For each prompt the texts of its regions; None, and what a shorter list lacks, repeats the prompt's
                own stack.
            clip_skip: See `conditioning.encode`.
            device: Where to encode.

        Returns:
            Shape (prompts, contexts * layers * tokens, dim).
        """
        given = list(dict.fromkeys(text for own in texts for text in own if text is not None))
        if not given:
            return stacks.repeat(1, 1 + max(len(own) for own in texts), 1)
        states = self._encode([(text,) * len(self._readings) for text in given], clip_skip, device).states
        encoded = dict(zip(given, states.to(stacks), strict=True))
        contexts = [stacks]
        for number in range(max(len(own) for own in texts)):
            chosen = [own[number] if number < len(own) else None for own in texts]
            rows = [row if text is None else encoded[text] for row, text in zip(stacks, chosen, strict=True)]
            contexts.append(torch.stack(rows))
        return torch.cat(contexts, dim=1)


class StableDiffusionPrompts(LayerwisePrompts):
    """Mixin for a pipeline of Stable Diffusion 1.x and 2.x: one text encoder."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode prompts like the parent; arguments are the parent's.

        Returns:
            Positive and negative embeddings, shape (images, tokens, dim), or (images, layers * tokens, dim) if a
            prompt names a concept. The negative is None without guidance.

        Raises:
            ConceptError: If a prompt has a bracketed word that is not loaded.
        """
        arguments = {name: value for name, value in locals().items() if name not in _NO_ARGUMENTS}
        with _one_thread:
            return super().encode_prompt(**self._encode_texts(arguments))  # type: ignore[misc]

    def _encode_conditions(
        self,
        prompts: list[str],
        negatives: list[Texts],
        embeddings: Mapping[str, Any],
        size: tuple[int, int],
        call: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Encode texts that a call draws alone, as arguments of the U-Net; with guidance the negatives come first.

        Args:
            prompts: The texts.
            negatives: The negative prompt of each, see `_list_negatives`.
            embeddings: Negative embeddings of all, which are read in place of these; may be empty.
            size: Height and width of the pictures in pixels.
            call: Arguments of the call.
        """
        texts = {"negative_prompt": [negative[0] if negative else "" for negative in negatives]}
        text, avoided = self.encode_prompt(
            prompts,
            self._execution_device,
            1,
            self._guidance_scale > 1,
            **(embeddings or texts),
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=call.get("clip_skip"),
        )
        return {"encoder_hidden_states": text if avoided is None else torch.cat([avoided, text])}


class XLPrompts(LayerwisePrompts):
    """Mixin for a pipeline of Stable Diffusion XL: two text encoders, and a pooled vector of the whole text."""

    _get_add_time_ids: Callable[..., torch.Tensor]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Encode prompts like the parent; arguments are the parent's.

        Returns:
            Positive and negative embeddings, shape (images, tokens, dim), or (images, layers * tokens, dim) if a
            prompt names a concept, and the pooled vectors of both, shape (images, dim). The negative ones are None
            without guidance.

        Raises:
            ConceptError: If a prompt has a bracketed word that is not loaded.
        """
        arguments = {name: value for name, value in locals().items() if name not in _NO_ARGUMENTS}
        with _one_thread:
            return super().encode_prompt(**self._encode_texts(arguments))  # type: ignore[misc]

    def _encode_conditions(
        self,
        prompts: list[str],
        negatives: list[Texts],
        embeddings: Mapping[str, Any],
        size: tuple[int, int],
        call: Mapping[str, Any],
    ) -> dict[str, Any]:
        """See `StableDiffusionPrompts`; adds the pooled vectors and the sizes, which the U-Net of XL reads."""
        first, second = ([negative[number] if negative else "" for negative in negatives] for number in (0, 1))
        text, avoided, pooled, avoided_pooled = self.encode_prompt(
            prompts,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self._guidance_scale > 1,
            **(embeddings or {"negative_prompt": first, "negative_prompt_2": second}),
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=call.get("clip_skip"),
        )
        sizes = self._make_size_ids("", size, call, pooled).repeat(len(prompts), 1)
        if avoided is not None and avoided_pooled is not None:
            given = torch.tensor(
                [[bool(embeddings) or negative is not None] for negative in negatives], device=text.device
            )
            text = torch.cat([avoided * given[..., None], text])
            pooled = torch.cat([avoided_pooled * given, pooled])
            both = call.get("negative_original_size") is not None and call.get("negative_target_size") is not None
            avoided_sizes = self._make_size_ids("negative_" if both else "", size, call, pooled)
            sizes = torch.cat([avoided_sizes.repeat(len(prompts), 1), sizes])
        return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}

    def _make_size_ids(
        self, kind: str, size: tuple[int, int], call: Mapping[str, Any], pooled: torch.Tensor
    ) -> torch.Tensor:
        """Original size, crop and target size as the U-Net of XL reads them, shape (1, 6); the call's where given."""
        ids = self._get_add_time_ids(
            call.get(f"{kind}original_size") or size,
            call.get(f"{kind}crops_coords_top_left") or (0, 0),
            size,
            dtype=pooled.dtype,
            text_encoder_projection_dim=pooled.shape[-1],
        )
        return ids.to(pooled.device)


def count_prompts(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    """Count the prompts of a call."""
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return len(prompt) if isinstance(prompt, list) else 1


def repeat_for_pictures(shared: Sequence[_Anything], arguments: Mapping[str, Any]) -> list[_Anything]:
    """Repeat what belongs to all prompts of a call, or to each of them, to one entry for every picture."""
    prompts = count_prompts(arguments.get("prompt"), arguments.get("prompt_embeds"))
    of_prompts = list(shared) * prompts if len(shared) == 1 else shared[:prompts]
    return [each for each in of_prompts for _ in range(arguments.get("num_images_per_prompt") or 1)]


def _as_list(prompt: str | list[str] | None) -> list[str]:
    # The parent raises for anything that is no text.
    return [text for text in (prompt if isinstance(prompt, list) else [prompt]) if isinstance(text, str)]


def _repeat_text(prompt: str | list[str] | None, batch: int, *, called: str) -> list[str]:
    """One text for each prompt of the batch; None means the empty prompt."""
    texts = prompt if isinstance(prompt, list) else [prompt or ""] * batch
    if len(texts) != batch:
        raise ConfigurationError(
            f"Got {len(texts)} {called}s for {batch} prompts; give one text, or as many as prompts."
        )
    return texts


@contextmanager
def _scale_lora(text_encoders: Collection[Any], lora_scale: float | None) -> Iterator[None]:
    """Scale the text encoders' LoRA layers inside the block; afterwards every adapter has its own strength again.

    diffusers' own `unscale_lora_layers` would reset strengths to 1 after a scale of 0, so they are stored.
    """
    layers = [module for encoder in text_encoders for module in encoder.modules()]
    strengths = [(module.scaling, dict(module.scaling)) for module in layers if isinstance(module, LoraLayer)]
    try:
        if lora_scale is not None:
            for encoder in text_encoders:
                scale_lora_layers(encoder, lora_scale)
        yield
    finally:
        for scaling, original in strengths:
            scaling.update(original)
