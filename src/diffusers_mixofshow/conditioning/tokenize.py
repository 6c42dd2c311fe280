"""Tokenise prompts, and note where a concept's embeddings go. The tokenizer does not change."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffusers_mixofshow.concepts import Concept, split_prompt
from diffusers_mixofshow.families.clip import POSITIONS


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STAND_IN_ID = 0
"""Id at a concept token's position, until its embedding is written there.

It must be below the end token's id, because some CLIP text models take the highest id for the end of the text.
"""


@dataclass(frozen=True, eq=False)
class TokenizedPrompts:
    """Prompts as ids, padded or cut to one length.

    Args:
        ids: Token ids, shape (prompts, tokens); `STAND_IN_ID` at the positions of concept tokens.
        attention_mask: 1 from the start to the end token, 0 for padding, shape (prompts, tokens).
        concept_tokens: For each prompt, position to the name of the concept token there.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    concept_tokens: tuple[Mapping[int, str], ...]

    def select(self, prompts: Sequence[int]) -> TokenizedPrompts:
        """Pick some of the prompts by their numbers."""
        rows = list(prompts)
        return TokenizedPrompts(
            self.ids[rows], self.attention_mask[rows], tuple(self.concept_tokens[row] for row in rows)
        )


def list_bracketed_words(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """List the bracketed words that the tokenizer itself knows: textual-inversion and special tokens."""
    return frozenset(tokenizer.get_added_vocab()) | frozenset(tokenizer.all_special_tokens)


def tokenize_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokenise texts without concepts, for CLIP models that compare texts and pictures: ids of shape (texts, 77)."""
    settings = {"padding": "max_length", "truncation": True, "max_length": POSITIONS, "return_tensors": "pt"}
    ids: torch.Tensor = tokenizer(list(texts), **settings).input_ids
    return ids


def tokenize(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    concepts: Iterable[Concept],
    also_known: Collection[str] = (),
) -> TokenizedPrompts:
    """Tokenise prompts that may name concepts, by placeholder or by token.

    Without concepts the ids are exactly the tokenizer's own. A prompt that is too long, concept tokens counted, is
    cut, and diffusers' warning names what was lost.

    Args:
        prompts: The texts.
        tokenizer: A CLIP tokenizer; its `model_max_length` is the length.
        concepts: The loaded concepts.
        also_known: Other bracketed words that are allowed, such as those of another text encoder's tokenizer.

    Returns:
        One row of `tokenizer.model_max_length` ids for each prompt.

    Raises:
        ConceptError: If a prompt has a bracketed word that neither the concepts nor the tokenizer know.
    """
    concepts = tuple(concepts)
    length = tokenizer.model_max_length
    rows, masks, positions = [], [], []
    for prompt in prompts:
        ids, names = _tokenize_prompt(prompt, tokenizer, concepts, also_known)
        if len(ids) > length - 2:
            _warn_truncated(ids, names, tokenizer)
        kept = [tokenizer.bos_token_id, *ids[: length - 2], tokenizer.eos_token_id]
        padding = length - len(kept)
        rows.append(kept + [tokenizer.pad_token_id] * padding)
        masks.append([1] * len(kept) + [0] * padding)
        positions.append({place + 1: name for place, name in names.items() if place < length - 2})
    return TokenizedPrompts(
        torch.tensor(rows).reshape(-1, length), torch.tensor(masks).reshape(-1, length), tuple(positions)
    )


def _tokenize_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, concepts: tuple[Concept, ...], also_known: Collection[str]
) -> tuple[list[int], dict[int, str]]:
    """Ids of a whole prompt without start and end tokens, and position to name of every concept token among them."""
    concept_tokens = {token for concept in concepts for token in concept.tokens}
    ids: list[int] = []
    names: dict[int, str] = {}
    for piece in split_prompt(prompt, concepts, also_known=list_bracketed_words(tokenizer).union(also_known)):
        if piece in concept_tokens:
            names[len(ids)] = piece
            ids.append(STAND_IN_ID)
        elif piece.strip():
            # verbose=False: the tokenizer's own length warning does not know about the concept's tokens.
            ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    return ids, names


def _warn_truncated(ids: list[int], names: Mapping[int, str], tokenizer: PreTrainedTokenizerBase) -> None:
    length = tokenizer.model_max_length
    pieces: list[str] = []
    plain: list[int] = []
    for place in range(length - 2, len(ids)):
        if place in names:
            pieces += [tokenizer.decode(plain), names[place]]
            plain = []
        else:
            plain.append(ids[place])
    pieces.append(tokenizer.decode(plain))
    removed_text = " ".join(piece.strip() for piece in pieces if piece.strip())
    logger.warning(
        "The following part of your input was truncated because CLIP can only handle sequences up to %d tokens: %s",
        length,
        [removed_text],
    )
