"""What the denoiser is told of texts while a concept is learnt: states of every text encoder, and their vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.conditioning.encode import Encoded, encode
from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts, tokenize
from diffusers_mixofshow.edlora.embeddings import rows_for
from diffusers_mixofshow.families import family_of


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedTexts:
    """Texts as every text encoder of a base model reads them.

    Args:
        of_encoder: Name of a text encoder to the texts' tokens.
        there: Whether a text is one: where a pipeline takes zeros for no text at all, the empty one is not.
    """

    of_encoder: Mapping[str, TokenizedPrompts]
    there: tuple[bool, ...]

    @property
    def concept_tokens(self) -> tuple[Mapping[int, str], ...]:
        """For each text, position to the name of the concept token there, which is the same for all text encoders."""
        return next(iter(self.of_encoder.values())).concept_tokens

    def select(self, rows: Sequence[int]) -> TokenizedTexts:
        """Pick some of the texts by their numbers."""
        return TokenizedTexts(
            of_encoder={name: tokens.select(rows) for name, tokens in self.of_encoder.items()},
            there=tuple(self.there[row] for row in rows),
        )


def tokenize_for(pipeline: Any, texts: Iterable[str], concept: Concept) -> TokenizedTexts:
    """Tokenise texts that may name a concept for every text encoder of a pipeline."""
    texts, components = list(texts), pipeline.components
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
    return TokenizedTexts(
        of_encoder={
            name: tokenize(texts, components[reading.tokenizer], [concept])
            for name, reading in family_of(components).text_encoders.items()
        },
        there=tuple(bool(text) or not zeros for text in texts),
    )


class TextReader(nn.Module):
    """The text encoders of a pipeline, with the embeddings of the concept that is learnt.

    Args:
        components: ``pipeline.components``; text encoders are borrowed, with their trainable LoRA inside.
        embeddings: What is learnt, by the names of an ED-LoRA's file; (1, dim) where all layers share it.
    """

    def __init__(self, components: Mapping[str, Any], embeddings: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.family = family_of(components)
        self.encoders = nn.ModuleDict({name: components[name] for name in self.family.text_encoders})
        self.names = tuple(embeddings)
        self.values = nn.ParameterList(embeddings.values())

    def forward(self, texts: TokenizedTexts) -> Encoded:
        """Encode each text once for every layer, or once for all where they share the embeddings."""
        embeddings = dict(zip(self.names, self.values, strict=True))
        layers = len(self.values[0])
        parts = [
            encode(
                self.encoders[name],
                texts.of_encoder[name],
                rows_for(name, embeddings, self.family),
                layers,
                reading=reading,
            )
            for name, reading in self.family.text_encoders.items()
        ]
        return Encoded.join_encoders(parts).keep_where(texts.there)

    @property
    def learns(self) -> bool:
        """Whether anything of it changes in the running phase."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @torch.no_grad()
    def embedding_norm(self) -> float:
        """Mean Euclidean norm over the concept's tokens, what they have embeddings for, and their layers."""
        return float(torch.cat([rows.float().norm(dim=1) for rows in self.values]).mean())
