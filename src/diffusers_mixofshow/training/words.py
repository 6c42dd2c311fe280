"""Check a concept's names and class word against the base model's tokenizers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffusers_mixofshow.concepts import SLOT, Concept, split_prompt
from diffusers_mixofshow.conditioning.tokenize import list_bracketed_words
from diffusers_mixofshow.errors import ConceptError, warn
from diffusers_mixofshow.training.config import TrainingConfig


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_OF_WORD = "</w>"
_SHOWN = 8
_NEARLY = 0.85
"""Least similarity (difflib) of a suggested word that is no class word; one letter of seven may differ, a typo."""

PLAIN_CLASSES = {
    "character": ("man", "woman", "boy", "girl", "person", "robot"),
    "pet": ("dog", "cat", "bird", "horse", "rabbit"),
    "object": ("toy", "vase", "chair", "table", "bag", "cup", "shoe", "car"),
    "scene": ("castle", "house", "garden", "room", "street", "mountain"),
}
"""Class words that the tokenizers of published base models have as one token, by kind of concept."""


def check_words(concept: Concept, *tokenizers: PreTrainedTokenizerBase, drawn: Sequence[str] = ()) -> None:
    """Refuse names that are in a tokenizer's vocabulary, and warn of a class word that is several tokens.

    V_class starts from the mean of the class word's token embeddings. For "golden retriever" that is the mean of two
    meaningful words; a word that the tokenizer does not know is split into meaningless pieces.

    Args:
        concept: The concept to learn.
        tokenizers: The base model's tokenizers, in the order of its text encoders.
        drawn: Class words that the base is limited to (`BaseModel.classes`); empty for no limit.

    Warns:
        MixOfShowWarning: If the class word is several tokens, or not among `drawn`.

    Raises:
        ConceptError: If the placeholder or a token is in a tokenizer's vocabulary, or a tokenizer cannot read
            characters of the class word.
    """
    tokenizer, vocabulary = tokenizers[0], set().union(*(each.get_vocab() for each in tokenizers))
    names = (concept.placeholder, *concept.tokens)
    taken = [name for name in names if name in vocabulary or name + _END_OF_WORD in vocabulary]
    defects = [f"{', '.join(taken)} is already a word of the base's tokenizer; choose another name"] if taken else []
    pieces = tokenizer.tokenize(concept.class_word)
    if any(each.unk_token in each.tokenize(concept.class_word) for each in tokenizers):
        defects.append(f"the base's tokenizer cannot read its class word {concept.class_word!r}; use plain letters")
    if defects:
        raise ConceptError(f"Concept {concept.placeholder!r}: {'; '.join(defects)}.")
    if len(pieces) > 1:
        unknown = [word for word in concept.class_word.split() if len(tokenizer.tokenize(word)) > 1]
        whole = [word.removesuffix(_END_OF_WORD) for word in vocabulary if word.endswith(_END_OF_WORD)]
        warn(_describe_pieces(concept, pieces, unknown, _suggest_class_words(concept.kind, unknown, whole, drawn)))
    elif drawn and concept.class_word.lower() not in drawn:
        warn(
            f"The base draws {', '.join(drawn)} alone, and no {concept.class_word!r}. Choose one of these class words."
        )


def check_prompts(config: TrainingConfig, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Check the prompts of pictures that are drawn during or before the training.

    Args:
        config: Its validation prompt may name the concept; the prompt of the class may not.
        tokenizers: The base model's tokenizers, which may know bracketed words of their own.

    Raises:
        ConceptError: If a prompt has another bracketed word.
    """
    concept = config.concept_to_learn
    told = config.validation_prompt.replace(SLOT, concept.placeholder)
    prompts = {
        "validation_prompt": (told if config.num_validation_images else "", [concept]),
        "class_prompt": (config.class_prompt or "", []),
    }
    for name, (prompt, concepts) in prompts.items():
        for tokenizer in tokenizers:
            try:
                split_prompt(prompt, concepts, also_known=list_bracketed_words(tokenizer))
            except ConceptError as error:
                raise ConceptError(f"{name} is {prompt!r}: {str(error).partition('. ')[0]}. Leave it out.") from error


def _describe_pieces(concept: Concept, pieces: list[str], unknown: list[str], hint: str) -> str:
    shown = " + ".join(piece.removesuffix(_END_OF_WORD) for piece in pieces)
    start = f"The class word {concept.class_word!r} is {len(pieces)} tokens of the base ({shown})"
    if not unknown:
        return f"{start}; {concept.tokens[-1]} starts from the mean of their embeddings."
    return (
        f"{start}, so {' and '.join(map(repr, unknown))} is no word that the base knows; {concept.tokens[-1]} starts "
        f"from the mean of pieces that mean nothing by themselves. Choose a plainer class word.{hint}"
    )


def _suggest_class_words(kind: str, unknown: Sequence[str], vocabulary: Sequence[str], drawn: Sequence[str]) -> str:
    """Suggest class words that are single tokens: similarly spelt ones, else those of the concept's kind first."""
    kinds = (kind, *(other for other in PLAIN_CLASSES if other != kind))
    known = {*vocabulary}
    classes = list(drawn) or [word for each in kinds for word in PLAIN_CLASSES[each] if word in known]
    near: dict[str, None] = {}
    for word in map(str.lower, unknown):
        near |= dict.fromkeys(difflib.get_close_matches(word, classes))
        near |= dict.fromkeys([] if drawn else difflib.get_close_matches(word, vocabulary, cutoff=_NEARLY))
    if near:
        return f" Similar words that the base knows: {', '.join(near)}."
    return f" Class words that the base knows: {', '.join(classes[:_SHOWN])}." if classes else ""
