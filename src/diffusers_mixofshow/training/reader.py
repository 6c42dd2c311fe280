"""Encode texts with the embeddings of the concept that is learnt: states of all text encoders and a pooled vector."""

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
    """Texts tokenised for every text encoder of a base model.

    Args:
        of_encoder: Name of a text encoder to the tokens of all texts.
        there: For each text, False if its states are replaced by zeros, as SDXL does with the empty prompt.
    """

    of_encoder: Mapping[str, TokenizedPrompts]
    there: tuple[bool, ...]

    @property
    def concept_tokens(self) -> tuple[Mapping[int, str], ...]:
        """For each text, position to the concept token there; positions are equal for all text encoders."""
        return next(iter(self.of_encoder.values())).concept_tokens

    def select(self, rows: Sequence[int]) -> TokenizedTexts:
        """Select texts by their indices."""
        return TokenizedTexts(
            of_encoder={name: tokens.select(rows) for name, tokens in self.of_encoder.items()},
            there=tuple(self.there[row] for row in rows),
        )


def tokenize_for(pipeline: Any, texts: Iterable[str], concept: Concept) -> TokenizedTexts:
    """Tokenise texts, which may name the concept, for every text encoder of a pipeline."""
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
        components: ``pipeline.components``; text encoders with their trainable LoRA.
        embeddings: The embeddings to learn, by their names in an ED-LoRA's file; shape (layers, dim), or (1, dim) if
            all layers share one.
    """

    def __init__(self, components: Mapping[str, Any], embeddings: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.family = family_of(components)
        self.encoders = nn.ModuleDict({name: components[name] for name in self.family.text_encoders})
        self.names = tuple(embeddings)
        self.values = nn.ParameterList(embeddings.values())

    def forward(self, texts: TokenizedTexts) -> Encoded:
        """Encode each text once for every layer, or once if all layers share their embeddings."""
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
        """Whether embeddings or text encoders are trained in the current phase."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @torch.no_grad()
    def embedding_norm(self) -> float:
        """Mean Euclidean norm of all embeddings: over tokens, text encoders and layers."""
        return float(torch.cat([rows.float().norm(dim=1) for rows in self.values]).mean())
