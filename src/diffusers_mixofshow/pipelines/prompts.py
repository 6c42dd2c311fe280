"""Layer-wise prompt encoding for pipelines with one CLIP text encoder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.utils.peft_utils import scale_lora_layers
from peft.tuners.lora import LoraLayer
from torch import nn

from diffusers_mixofshow.concepts import mentions_concept, split_prompt
from diffusers_mixofshow.conditioning.encode import encode_layerwise
from diffusers_mixofshow.conditioning.tokenize import known_words, tokenize
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.clip import POSITIONS
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.pipelines.loader import EDLoRALoader
from diffusers_mixofshow.regions import Region


# For a pipeline that was given no tokenizer, only ready-made embeddings.

_Anything = TypeVar("_Anything")

_lock = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """Keep other threads from encoding meanwhile: truncation is a fast tokenizer's state, scale a text encoder's."""
    with _lock:
        yield


class LayerwisePrompts(EDLoRALoader):
    """Mixin for a diffusers pipeline: `encode_prompt` for prompts with concepts and for regions.

    Without either it is the parent's `encode_prompt`. Otherwise prompts are encoded here, once for each
    cross-attention layer and region, to the 3-D stack described in `conditioning.attention`, and the parent
    repeats and casts it like any given `prompt_embeds`.
    """

    text_encoder: Any
    unet: nn.Module | None
    maybe_convert_prompt: Callable[..., list[str]]
    # The regions of the call under way: of all prompts, or of each.
    _regions: tuple[tuple[Region, ...], ...] = ()

    @_alone()
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
        arguments = {"lora_scale": lora_scale, "clip_skip": clip_skip}
        if self._is_layerwise(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds):
            batch = prompt_count(prompt, prompt_embeds)
            with _lora_scaled(self.text_encoder, lora_scale):
                if prompt_embeds is None:
                    positive = self._encode(_texts(prompt, batch), clip_skip, device)
                else:
                    positive = self._stacked(prompt_embeds)
                if not do_classifier_free_guidance:
                    negative = None
                elif negative_prompt_embeds is None:
                    # Like the parent, without clip_skip.
                    negative = self._encode(_texts(negative_prompt, batch), None, device)
                else:
                    negative = self._stacked(negative_prompt_embeds)
                prompt_embeds, negative_prompt_embeds = self._with_regions(positive, negative, clip_skip, device)
            arguments = {}
        return super().encode_prompt(  # type: ignore[misc]
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            **arguments,
        )

    def _is_layerwise(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> bool:
        """Whether these arguments need more than the parent; complains about unknown bracketed words."""
        given = self._texts_of({"prompt": prompt, "negative_prompt": negative_prompt})
        self._refuse_unknown_words(given)
        return (
            any(self._regions)
            or any(mentions_concept(text, self._nameable) for text in given)
            or any(self._is_stack(embeds) for embeds in (prompt_embeds, negative_prompt_embeds))
        )

    def _refuse_unknown_words(self, texts: Sequence[str]) -> None:
        if any("<" in text for text in texts):
            split_prompt(" ".join(texts), self._nameable, also_known=known_words(self.tokenizer))

    def _texts_of(self, arguments: Mapping[str, Any]) -> list[str]:
        """All texts of a call, those of its regions included."""
        texts = [*_as_list(arguments.get("prompt")), *_as_list(arguments.get("negative_prompt"))]
        regions = [region for own in self._regions for region in own]
        return texts + [text for region in regions for text in (region.prompt, region.negative_prompt) if text]

    @property
    def _layers(self) -> int:
        """Number of encodings in a stack."""
        if self.unet is None:  # a pipeline for encoding only
            return max((len(rows) for rows in self._concept_embeddings.values()), default=0)
        return len(cross_attention_layers(self.unet))

    @property
    def _tokens(self) -> int:
        """Number of tokens of one encoding."""
        return POSITIONS if self.tokenizer is None else self.tokenizer.model_max_length

    def _is_stack(self, embeds: torch.Tensor | None) -> bool:
        return embeds is not None and embeds.shape[1] == self._layers * self._tokens

    def _stacked(self, embeds: torch.Tensor) -> torch.Tensor:
        """Ready-made embeddings as a stack of layers, shape (prompts, layers * tokens, dim)."""
        if self._is_stack(embeds):
            return embeds
        if embeds.shape[1] != self._tokens:
            raise ConfigurationError(
                f"Embeddings of shape {tuple(embeds.shape)} cannot be combined with concepts or regions; expected"
                f" {self._tokens} tokens, or {self._layers} layers of {self._tokens} as encode_prompt() makes them."
            )
        return embeds.repeat(1, self._layers, 1)

    def _encode(self, texts: Sequence[str], clip_skip: int | None, device: torch.device) -> torch.Tensor:
        """Encode texts, equal ones once, shape (texts, layers * tokens, dim)."""
        unique = list(dict.fromkeys(texts))
        # Spells out textual-inversion tokens of several vectors.
        converted = self.maybe_convert_prompt(unique, self.tokenizer)
        tokenized = tokenize(converted, self.tokenizer, self._nameable)
        encoded = encode_layerwise(
            self.text_encoder, tokenized, self._concept_embeddings, self._layers, clip_skip, device=device
        )
        return encoded[[unique.index(text) for text in texts]]

    def _with_regions(
        self,
        positive: torch.Tensor,
        negative: torch.Tensor | None,
        clip_skip: int | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Append the regions' stacks to the global prompt's, shape (prompts, contexts * layers * tokens, dim)."""
        if not self._regions:
            return positive, negative
        regions = self._regions_of_prompts(len(positive))
        prompts = [[region.prompt for region in own] for own in regions]
        positive = self._with_texts(positive, prompts, clip_skip, device)
        if negative is not None:
            negatives = [[region.negative_prompt for region in own] for own in regions]
            negative = self._with_texts(negative, negatives, None, device)
        return positive, negative

    def _regions_of_prompts(self, prompts: int) -> list[tuple[Region, ...]]:
        """The regions of each prompt of a batch."""
        return list(self._regions) if len(self._regions) == prompts else list(self._regions) * prompts

    def _with_texts(
        self,
        stacks: torch.Tensor,
        texts: Sequence[Sequence[str | None]],
        clip_skip: int | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Append each prompt's texts to its own stack; where there is none, the stack itself once more.

        Args:
            stacks: Shape (prompts, layers * tokens, dim).
            texts: For each prompt the texts of its regions; the shorter lists count as filled up with None.
            clip_skip: See `encode_layerwise`.
            device: Where to encode.

        Returns:
            Shape (prompts, contexts * layers * tokens, dim).
        """
        given = list(dict.fromkeys(text for own in texts for text in own if text is not None))
        encoded = dict(zip(given, self._encode(given, clip_skip, device).to(stacks), strict=True)) if given else {}
        contexts = [stacks]
        for number in range(max(len(own) for own in texts)):
            chosen = [own[number] if number < len(own) else None for own in texts]
            rows = [row if text is None else encoded[text] for row, text in zip(stacks, chosen, strict=True)]
            contexts.append(torch.stack(rows))
        return torch.cat(contexts, dim=1)


def prompt_count(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    """Count the prompts of a call."""
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return len(prompt) if isinstance(prompt, list) else 1


def of_pictures(shared: Sequence[_Anything], arguments: Mapping[str, Any]) -> list[_Anything]:
    """What belongs to all prompts of a call, or to each, once for every picture."""
    prompts = prompt_count(arguments.get("prompt"), arguments.get("prompt_embeds"))
    of_prompts = list(shared) * prompts if len(shared) == 1 else shared[:prompts]
    return [each for each in of_prompts for _ in range(arguments.get("num_images_per_prompt") or 1)]


def negatives_of_pictures(arguments: Mapping[str, Any]) -> list[str]:
    """The negative prompt of every picture of a call; none is an empty one."""
    negative = arguments.get("negative_prompt") or ""
    return of_pictures(negative if isinstance(negative, list) else [negative], arguments)


def _as_list(prompt: str | list[str] | None) -> list[str]:
    # What is no text at all is left to the parent's own check.
    return [text for text in (prompt if isinstance(prompt, list) else [prompt]) if isinstance(text, str)]


def _texts(prompt: str | list[str] | None, batch: int) -> list[str]:
    """One text for each prompt of the batch; none means the empty prompt."""
    texts = prompt if isinstance(prompt, list) else [prompt or ""] * batch
    if len(texts) != batch:
        raise ConfigurationError(
            f"Got {len(texts)} negative prompts for {batch} prompts; give one text, or as many as prompts."
        )
    return texts


@contextmanager
def _lora_scaled(text_encoder: Any, lora_scale: float | None) -> Iterator[None]:
    """Scale the text encoder's LoRA layers; afterwards every adapter has its own strength back, also after 0."""
    layers = [] if text_encoder is None else text_encoder.modules()
    strengths = [(module.scaling, dict(module.scaling)) for module in layers if isinstance(module, LoraLayer)]
    try:
        if lora_scale is not None and text_encoder is not None:
            scale_lora_layers(text_encoder, lora_scale)
        yield
    finally:
        for scaling, original in strengths:
            scaling.update(original)
