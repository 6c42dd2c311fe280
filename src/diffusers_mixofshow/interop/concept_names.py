"""Concepts for tokens of other programs' files, which know no placeholders."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from diffusers_mixofshow.concepts import Concept


UNKNOWN_CLASS = "thing"
"""Class word where a file does not tell it."""

_NUMBERED = re.compile(r"(?P<stem>.*?\D)(?P<number>\d+)")
_LONGEST = 64


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a user says of the concepts in a file; what is not given is taken from the file.

    Args:
        name: Makes one concept of all its tokens, under this name.
        class_word: The plain word for what the concepts are.
        kind: One of ``character``, ``pet``, ``object``, ``scene``.
        base_model: What they were tuned on.
    """

    name: str = ""
    class_word: str = ""
    kind: str = "object"
    base_model: str = ""

    def concept(self, name: str, tokens: Iterable[str]) -> Concept:
        """A concept of the given name and tokens."""
        class_word = self.class_word or UNKNOWN_CLASS
        return Concept(placeholder=f"<{name}>", tokens=tuple(tokens), class_word=class_word, kind=self.kind)


def plain_name(text: str) -> str:
    """What concepts can be called: letters, digits, '_', '.' and '-', without brackets."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text.strip().removeprefix("<").removesuffix(">"))
    return name[:_LONGEST].strip("-_.") or "concept"


def distinct_names(words: Iterable[str], *, ignoring_case: bool = True) -> dict[str, str]:
    """Word to a plain name of its own; the same words in the same order get the same names.

    Args:
        words: Each once.
        ignoring_case: Whether names must differ in more than case, as file names must.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for word in words:
        plain = name = plain_name(word)
        number = 1
        while (same := name.lower() if ignoring_case else name) in taken:
            number += 1
            name = f"{plain[: _LONGEST - len(str(number)) - 1]}-{number}"
        taken.add(same)
        names[word] = name
    return names


def grouped(tokens: Iterable[str], naming: Naming) -> dict[Hashable, tuple[Concept, str]]:
    """Make concepts of the tokens in a file: ``<potter1>`` and ``<potter2>`` are of one concept.

    Tokens keep their names where concepts may have them; with `Naming.name` they are numbered anew.

    Args:
        tokens: As the file spells them.
        naming: What is known of them.

    Returns:
        Token as the file spells it to its concept, and to its name there.
    """
    groups: dict[str, list[str]] = {}
    for token in tokens:
        name = plain_name(token)
        numbered = _NUMBERED.fullmatch(name)
        stem = plain_name(numbered["stem"]) if numbered else name
        groups.setdefault(plain_name(naming.name) if naming.name else stem, []).append(token)
    found: dict[Hashable, tuple[Concept, str]] = {}
    for stem, members in groups.items():
        spelt = [f"<{plain_name(member)}>" for member in members]
        if naming.name or f"<{stem}>" in spelt or len(set(spelt)) < len(spelt):
            spelt = [f"<{stem}{number}>" for number in range(1, len(members) + 1)]
        concept = naming.concept(stem, spelt)
        found |= {member: (concept, name) for member, name in zip(members, spelt, strict=True)}
    return found


def name_words(words: Mapping[str, int], naming: Naming) -> dict[Hashable, tuple[Concept, str]]:
    """Make concepts of words that stand for vectors: ``<potter>`` for ``<potter1>``, ``<potter2>``, ...

    Args:
        words: As the file spells them, and for how many vectors each stands.
        naming: What is known of them.

    Returns:
        Word and number of the vector to its concept, and to its name there.
    """
    names = (
        dict.fromkeys(words, plain_name(naming.name)) if naming.name else distinct_names(words, ignoring_case=False)
    )
    groups: dict[str, list[tuple[str, int]]] = {}
    for word, count in words.items():
        group = groups.setdefault(names[word], [])
        group += [(word, number) for number in range(1, count + 1)]
    found: dict[Hashable, tuple[Concept, str]] = {}
    for name, members in groups.items():
        spelt = [f"<{name}{number}>" for number in range(1, len(members) + 1)]
        concept = naming.concept(name, spelt)
        found |= {member: (concept, token) for member, token in zip(members, spelt, strict=True)}
    return found
