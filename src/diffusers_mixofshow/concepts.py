"""What a concept is, how it and its tokens are spelt, and where they stand in a prompt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from diffusers_mixofshow.errors import ConceptError


SLOT = "<TOK>"
"""Stands for any concept in captions, prompts and templates."""

KINDS = ("character", "pet", "object", "scene")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_BRACKETED = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One tuned concept: a placeholder for prompts, and the learnable tokens that it stands for.

    Args:
        placeholder: How prompts name the concept, e.g. ``<potter>``.
        tokens: The learnable tokens it stands for, V_rand and V_class of the paper (section 3.3.1),
            e.g. ``("<potter1>", "<potter2>")``.
        class_word: The plain word for what the concept is, e.g. ``man``.
        kind: One of ``character``, ``pet``, ``object``, ``scene``.

    Raises:
        ConceptError: If a name is malformed, repeated, or the kind is unknown.
    """

    placeholder: str
    tokens: tuple[str, ...]
    class_word: str
    kind: str = "object"

    def __post_init__(self) -> None:
        """Check spelling, uniqueness and kind, and report every defect at once."""
        defects = [
            f"{name!r} is not of the form <name> (letters, digits, '_', '.', '-')"
            for name in (self.placeholder, *self.tokens)
            if not (name.startswith("<") and name.endswith(">") and _NAME.fullmatch(name[1:-1]))
        ]
        if not self.tokens:
            defects.append("it has no tokens")
        if len({self.placeholder, *self.tokens}) != 1 + len(self.tokens):
            defects.append(f"placeholder and tokens must differ, got {(self.placeholder, *self.tokens)}")
        if not self.class_word.strip():
            defects.append("its class word is empty; give the plain word for what it is, such as 'dog'")
        if self.kind not in KINDS:
            defects.append(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if defects:
            raise ConceptError(f"Concept {self.placeholder!r}: " + "; ".join(defects))

    @classmethod
    def from_name(cls, name: str, class_word: str, *, kind: str = "object") -> Concept:
        """Spell the usual concept of two tokens: ``potter`` becomes ``<potter>`` = ``<potter1> <potter2>``."""
        name = name.strip().removeprefix("<").removesuffix(">")
        return cls(placeholder=f"<{name}>", tokens=(f"<{name}1>", f"<{name}2>"), class_word=class_word, kind=kind)

    @property
    def name(self) -> str:
        """The placeholder without its brackets."""
        return self.placeholder[1:-1]


def check_distinct(concepts: Iterable[Concept]) -> None:
    """Raise one `ConceptError` that lists every name used by more than one concept.

    A concept given twice is listed by its placeholder alone, without its tokens.
    """
    owner: dict[str, str] = {}
    clashes = []
    for concept in concepts:
        whole = owner.get(concept.placeholder) == concept.placeholder
        names = (concept.placeholder, *(() if whole else concept.tokens))
        others = "" if whole else " (of {} and {})"
        clashes += [name + others.format(owner[name], concept.placeholder) for name in names if name in owner]
        owner |= dict.fromkeys((concept.placeholder, *concept.tokens), concept.placeholder)
    if clashes:
        told = ", ".join(dict.fromkeys(clashes))
        raise ConceptError(f"Names used twice: {told}. Give each concept once, or rename one of them.")


def split_prompt(prompt: str, concepts: Iterable[Concept], *, also_known: Collection[str] = ()) -> list[str]:
    """Cut a prompt into plain text and concept tokens, placeholders replaced by their tokens.

    Args:
        prompt: The user's text, e.g. ``"a <potter> at school"``.
        concepts: The loaded concepts.
        also_known: Other bracketed words that are allowed, such as textual-inversion tokens of the tokenizer; they
            stay part of the plain text.

    Returns:
        The pieces in order; a piece is a concept token exactly if it is in `concept_tokens`, e.g.
        ``["a ", "<potter1>", "<potter2>", " at school"]``. Empty pieces are dropped.

    Raises:
        ConceptError: If a bracketed word is unknown; lists the loaded names and the nearest one.
    """
    spelt_out: Mapping[str, tuple[str, ...]] = {
        name: tokens
        for concept in concepts
        for name, tokens in [(concept.placeholder, concept.tokens), *((token, (token,)) for token in concept.tokens)]
    }
    pieces: list[str] = []
    end = 0
    unknown = []
    for match in _BRACKETED.finditer(prompt):
        word = match.group()
        if word in spelt_out:
            pieces += [prompt[end : match.start()], *spelt_out[word]]
            end = match.end()
        elif word not in also_known:
            unknown.append(word)
    if unknown:
        raise ConceptError(_unknown_message(unknown, spelt_out))
    pieces.append(prompt[end:])
    return [piece for piece in pieces if piece]


def mentions_concept(prompt: str, concepts: Iterable[Concept]) -> bool:
    """Whether the prompt names any of the concepts, by placeholder or by token."""
    names = {name for concept in concepts for name in (concept.placeholder, *concept.tokens)}
    return any(match.group() in names for match in _BRACKETED.finditer(prompt))


def _unknown_message(unknown: list[str], known: Mapping[str, tuple[str, ...]]) -> str:
    placeholders = sorted(name for name, tokens in known.items() if tokens != (name,))
    loaded = f"Loaded concepts: {', '.join(placeholders)}." if placeholders else "No concept is loaded."
    hints = []
    for word in dict.fromkeys(unknown):
        nearest = difflib.get_close_matches(word, known, n=1)
        hints.append(f"{word} (did you mean {nearest[0]}?)" if nearest else word)
    return f"Unknown in the prompt: {', '.join(hints)}. {loaded} Load its file first, or check the spelling."


def replace_mention(text: str, concepts: Iterable[Concept], write: Callable[[str, Concept], str]) -> str:
    """Replace the first mention of a concept in a text.

    Args:
        text: A prompt or caption.
        concepts: The concepts to look for.
        write: Called with the article before the name (empty if there is none) and the concept; returns the text
            that replaces article, name and a class word behind it.
    """
    found = [(match, concept) for concept in concepts if (match := _mention_of(concept).search(text))]
    if not found:
        return text
    # <Rex> may be a concept of its own beside <rex>; without one it is a mention of <rex>.
    match, concept = min(found, key=lambda each: (each[0].start(), each[1].placeholder not in each[0][0]))
    return text[: match.start()] + write(match["article"] or "", concept) + text[match.end() :]


def _mention_of(concept: Concept) -> re.Pattern[str]:
    """Pattern of a concept's placeholder, with an optional article before and class word behind."""
    class_word = rf"(?: {re.escape(concept.class_word)}\b)?"
    placeholder = re.escape(concept.placeholder)
    return re.compile(rf"(?P<article>\b(?:an?|the|one) )?{placeholder}{class_word}", re.IGNORECASE)
