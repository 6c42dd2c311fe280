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
"""Arguments with texts; what is for the second text encoder is as for the first where it is not given."""

_NO_ARGUMENTS = ("self", "__class__")
"""What `locals` has besides in a method that calls its parent's."""

_Text = tuple[str, ...] | None
"""What each text encoder reads as one text; None where the pipeline takes zeros for no text at all."""

_Anything = TypeVar("_Anything")

_lock = threading.RLock()


@contextmanager
def _take_turns() -> Iterator[None]:
    """Keep other threads from encoding meanwhile: truncation is a fast tokenizer's state, scale a text encoder's."""
    with _lock:
        yield


class LayerwisePrompts(EDLoRALoader):
    """Mixin for a diffusers pipeline: prompts with concepts, and regions, in `encode_prompt`.

    Without either that is the parent's. Otherwise prompts are encoded here, once for each cross-attention layer and
    region, to the 3-D stack described in `conditioning.attention`, and the parent repeats and casts it like any given
    `prompt_embeds`. Each pipeline's own `encode_prompt` only has the parent's signature.
    """

    unet: nn.Module | None
    config: Any
    maybe_convert_prompt: Callable[..., list[str]]
    # The regions of the call under way: of all prompts, or of each.
    _regions: tuple[tuple[Region, ...], ...] = ()
    _guidance_scale: float
    _execution_device: torch.device
    cross_attention_kwargs: Mapping[str, Any] | None

    def _encode_texts(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of an `encode_prompt`, its texts encoded where the parent could not do it.

        Raises:
            ConceptError: If a prompt has a bracketed word that is not loaded.
        """
        if not self._is_layerwise(arguments):
            return dict(arguments)
        clip_skip, device = arguments["clip_skip"], arguments["device"]
        with _scale_lora(self._encoders.values(), arguments["lora_scale"]):
            positive = self._side("", arguments, clip_skip, device)
            # Like the parent, without clip_skip.
            negative = self._side("negative_", arguments, None, device) if _is_guided(arguments) else None
            sides = self._with_regions(positive, negative, clip_skip, device)
        encoded: dict[str, Any] = {"lora_scale": None, "clip_skip": None}
        for kind, side, states in zip(("", "negative_"), (positive, negative), sides, strict=True):
            if side is not None:
                encoded |= {f"{kind}prompt_embeds": states, f"{kind}pooled_prompt_embeds": side.pooled}
        return {name: encoded.get(name, value) for name, value in arguments.items()}

    def _is_layerwise(self, arguments: Mapping[str, Any]) -> bool:
        """Whether these arguments need more than the parent; complains about unknown bracketed words."""
        given = self._texts_of({name: arguments.get(name) for name in _PROMPTS})
        self._refuse_unknown_words(given)
        return (
            any(self._regions)
            or any(mentions_concept(text, self._nameable) for text in given)
            or any(self._is_stack(arguments.get(name)) for name in ("prompt_embeds", "negative_prompt_embeds"))
        )

    def _refuse_unknown_words(self, texts: Sequence[str]) -> None:
        if any("<" in text for text in texts):
            split_prompt(" ".join(texts), self._nameable, also_known=self._known_words)

    def _texts_of(self, arguments: Mapping[str, Any]) -> list[str]:
        """All texts of a call, those of its regions included."""
        texts = [text for name in _PROMPTS for text in _as_list(arguments.get(name))]
        regions = [region for own in self._regions for region in own]
        return texts + [text for region in regions for text in (region.prompt, region.negative_prompt) if text]

    @property
    def _encoders(self) -> dict[str, Any]:
        """The text encoders that are there, by name; none in a pipeline for ready-made embeddings."""
        components = self.components
        found = {name: components.get(name) for name in self._readings}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    @property
    def _readings(self) -> Mapping[str, TextEncoder]:
        """What is read of each text encoder."""
        return family_of(self.components).text_encoders

    @property
    def _layers(self) -> int:
        """Number of encodings in a stack."""
        if self.unet is None:  # a pipeline for encoding only
            return max((len(rows) for rows in self._concept_embeddings.values()), default=0)
        return len(self._layer_names)

    @property
    def _layer_names(self) -> tuple[str, ...]:
        """Whose encodings stand in a stack."""
        return embedding_layers(self.components)

    @property
    def _tokens(self) -> int:
        """Number of tokens of one encoding."""
        return next((words.model_max_length for words in self._tokenizers), POSITIONS)

    def _is_stack(self, embeds: torch.Tensor | None) -> bool:
        return embeds is not None and embeds.shape[1] == self._layers * self._tokens

    def _stack_layers(self, embeds: torch.Tensor) -> torch.Tensor:
        """Ready-made embeddings as a stack of layers, shape (prompts, layers * tokens, dim)."""
        if self._is_stack(embeds):
            return embeds
        if embeds.shape[1] != self._tokens:
            raise ConfigurationError(
                f"Embeddings of shape {tuple(embeds.shape)} cannot be combined with concepts or regions; expected"
                f" {self._tokens} tokens, or {self._layers} layers of {self._tokens} as encode_prompt() makes them."
            )
        return embeds.repeat(1, self._layers, 1)

    def _side(self, kind: str, arguments: Mapping[str, Any], clip_skip: int | None, device: torch.device) -> Encoded:
        """The prompts of a call, or with the kind ``negative_`` the negative ones; what is given encoded stays."""
        embeds, pooled = arguments[f"{kind}prompt_embeds"], arguments.get(f"{kind}pooled_prompt_embeds")
        if embeds is not None:
            return Encoded(self._stack_layers(embeds), pooled)
        encoded = self._encode(self._side_texts(kind, arguments), clip_skip, device)
        return encoded if pooled is None else Encoded(encoded.states, pooled)

    def _side_texts(self, kind: str, arguments: Mapping[str, Any]) -> list[_Text]:
        batch = prompt_count(arguments["prompt"], arguments["prompt_embeds"])
        first = arguments[f"{kind}prompt"]
        if kind and first is None:
            return [self._no_text] * batch
        names = [f"{kind}prompt", f"{kind}prompt_2"][: len(self._readings)]
        texts = [_texts(arguments.get(name) or first, batch, called=name.replace("_", " ")) for name in names]
        return list(zip(*texts, strict=True))

    @property
    def _no_text(self) -> _Text:
        """What the parent takes where no negative prompt is given: zeros, or the empty text."""
        return None if self.config.get("force_zeros_for_empty_prompt") else ("",) * len(self._readings)

    def _encode(self, texts: Sequence[_Text], clip_skip: int | None, device: torch.device) -> Encoded:
        """Encode texts, equal ones once; states of shape (texts, layers * tokens, dim)."""
        unique = list(dict.fromkeys(texts))
        of_encoders = [
            self._encode_by(name, [_of_encoder(text, number) for text in unique], clip_skip, device)
            for number, name in enumerate(self._encoders)
        ]
        encoded = Encoded.side_by_side(of_encoders).rows([unique.index(text) for text in texts])
        return encoded.where([text is not None for text in texts])

    def _encode_by(self, name: str, texts: Sequence[str], clip_skip: int | None, device: torch.device) -> Encoded:
        """Encode texts by one of the text encoders."""
        reading = self._readings[name]
        tokenizer = self.components[reading.tokenizer]
        # Spells out textual-inversion tokens of several vectors.
        converted = self.maybe_convert_prompt(list(texts), tokenizer)
        tokenized = tokenize(converted, tokenizer, self._nameable, self._known_words)
        embeddings = self._embeddings_for(name)
        return encode(
            self._encoders[name], tokenized, embeddings, self._layers, clip_skip, reading=reading, device=device
        )

    def _with_regions(
        self, positive: Encoded, negative: Encoded | None, clip_skip: int | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Append the regions' stacks to the global prompt's, shape (prompts, contexts * layers * tokens, dim).

        The vector of the whole text has no place in the picture, so it stays the global prompt's.
        """
        without = None if negative is None else negative.states
        if not self._regions:
            return positive.states, without
        regions = self._regions_of_prompts(len(positive.states))
        prompts = [[region.prompt for region in own] for own in regions]
        states = self._with_texts(positive.states, prompts, clip_skip, device)
        if without is not None:
            negatives = [[region.negative_prompt for region in own] for own in regions]
            without = self._with_texts(without, negatives, None, device)
        return states, without

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

    @_take_turns()
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
        return super().encode_prompt(**self._encode_texts(arguments))  # type: ignore[misc]

    def _conditions(
        self, prompts: list[str], negatives: list[str | None], size: tuple[int, int], call: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the U-Net is told of texts that are drawn alone within a call, of what to avoid first if it is guided.

        Args:
            prompts: The texts.
            negatives: What each shall avoid; None where nobody said.
            size: Height and width of the pictures in pixels.
            call: Arguments of the call.
        """
        text, without = self.encode_prompt(
            prompts,
            self._execution_device,
            1,
            self._guidance_scale > 1,
            negative_prompt=[negative or "" for negative in negatives],
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=call.get("clip_skip"),
        )
        return {"encoder_hidden_states": text if without is None else torch.cat([without, text])}


class XLPrompts(LayerwisePrompts):
    """Mixin for a pipeline of Stable Diffusion XL: two text encoders, and the vector of the whole text."""

    _get_add_time_ids: Callable[..., torch.Tensor]

    @_take_turns()
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
            prompt names a concept, and the vectors of both, shape (images, dim). The negative ones are None without
            guidance.

        Raises:
            ConceptError: If a prompt has a bracketed word that is not loaded.
        """
        arguments = {name: value for name, value in locals().items() if name not in _NO_ARGUMENTS}
        return super().encode_prompt(**self._encode_texts(arguments))  # type: ignore[misc]

    def _conditions(
        self, prompts: list[str], negatives: list[str | None], size: tuple[int, int], call: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `StableDiffusionPrompts`; sizes for the U-Net are the call's where it says any."""
        encoded = self.encode_prompt(
            prompts,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self._guidance_scale > 1,
            negative_prompt=[negative or "" for negative in negatives],
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=call.get("clip_skip"),
        )
        text, without, pooled, pooled_without = encoded
        times = self._tell_sizes("", size, call, pooled).repeat(len(prompts), 1)
        if without is not None and pooled_without is not None:
            said = torch.tensor(
                [[self._no_text is not None or negative is not None] for negative in negatives], device=text.device
            )
            text = torch.cat([without * said[..., None], text])
            pooled = torch.cat([pooled_without * said, pooled])
            both = call.get("negative_original_size") is not None and call.get("negative_target_size") is not None
            avoided = self._tell_sizes("negative_" if both else "", size, call, pooled)
            times = torch.cat([avoided.repeat(len(prompts), 1), times])
        return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}

    def _tell_sizes(
        self, kind: str, size: tuple[int, int], call: Mapping[str, Any], pooled: torch.Tensor
    ) -> torch.Tensor:
        """What the U-Net is told of the picture's size, and of a photo it might be cropped from, shape (1, 6)."""
        ids = self._get_add_time_ids(
            call.get(f"{kind}original_size") or size,
            call.get(f"{kind}crops_coords_top_left") or (0, 0),
            size,
            dtype=pooled.dtype,
            text_encoder_projection_dim=pooled.shape[-1],
        )
        return ids.to(pooled.device)


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


def negatives_of_pictures(arguments: Mapping[str, Any]) -> list[str | None]:
    """The negative prompt of every picture of a call; None where there is none."""
    negative = arguments.get("negative_prompt")
    return of_pictures(negative if isinstance(negative, list) else [negative], arguments)


def _is_guided(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments["do_classifier_free_guidance"])


def _of_encoder(text: _Text, number: int) -> str:
    """What the text encoder of this number reads; of no text at all anything, as zeros take its place."""
    return "" if text is None else text[number]


def _as_list(prompt: str | list[str] | None) -> list[str]:
    # What is no text at all is left to the parent's own check.
    return [text for text in (prompt if isinstance(prompt, list) else [prompt]) if isinstance(text, str)]


def _texts(prompt: str | list[str] | None, batch: int, *, called: str) -> list[str]:
    """One text for each prompt of the batch; none means the empty prompt."""
    texts = prompt if isinstance(prompt, list) else [prompt or ""] * batch
    if len(texts) != batch:
        raise ConfigurationError(
            f"Got {len(texts)} {called}s for {batch} prompts; give one text, or as many as prompts."
        )
    return texts


@contextmanager
def _scale_lora(text_encoders: Collection[Any], lora_scale: float | None) -> Iterator[None]:
    """Scale the text encoders' LoRA layers; afterwards every adapter has its own strength back, also after 0."""
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
