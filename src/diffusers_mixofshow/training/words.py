"""What the base's tokenizer makes of a concept's names and of its class word."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConceptError, warn


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_OF_WORD = "</w>"


def check_words(concept: Concept, *tokenizers: PreTrainedTokenizerBase) -> None:
    """Refuse names that are taken, and say what happens to a class word that is not one token.

    V_class starts from the mean of the class word's token embeddings. For "golden retriever" that is between two words
    that mean something; a word that the tokenizer does not know falls into pieces that mean nothing.

    Args:
        concept: To be learnt.
        tokenizers: Of the base model, the first of them for the first text encoder.

    Warns:
        MixOfShowWarning: If the class word is several tokens.

    Raises:
        ConceptError: If the placeholder or a token is a word of the tokenizer already, or the class word has
            characters that it cannot read.
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
        warn(_about_pieces(concept, pieces, unknown, list(tokenizer.get_vocab())))


def _about_pieces(concept: Concept, pieces: list[str], unknown: list[str], vocabulary: list[str]) -> str:
    shown = " + ".join(piece.removesuffix(_END_OF_WORD) for piece in pieces)
    start = f"The class word {concept.class_word!r} is {len(pieces)} tokens of the base ({shown})"
    if not unknown:
        return f"{start}; {concept.tokens[-1]} starts from the mean of their embeddings."
    whole = [word.removesuffix(_END_OF_WORD) for word in vocabulary if word.endswith(_END_OF_WORD)]
    long_ones = [word for word in whole if len(word) > 2]
    near = [word for each in unknown for word in difflib.get_close_matches(each.lower(), long_ones)]
    hint = f" Its words spelt most alike: {', '.join(near)}." if near else ""
    return (
        f"{start}, so {' and '.join(map(repr, unknown))} is no word that the base knows; {concept.tokens[-1]} starts "
        f"from the mean of pieces that mean nothing by themselves. Choose a plainer class word.{hint}"
    )
