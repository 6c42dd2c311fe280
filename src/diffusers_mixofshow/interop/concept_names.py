"""Name the concepts of other programs' files, which have tokens but no placeholders."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass

from diffusers_mixofshow.atomic import portable_name
from diffusers_mixofshow.concepts import Concept


UNKNOWN_CLASS = "thing"
"""Class word if a file does not name one."""

_NUMBERED = re.compile(r"(?P<stem>.*?\D)(?P<number>\d+)")
_LONGEST = 64


@dataclass(frozen=True)
class Meaning:
    """What a file tells of a concept: the plain word for what it is, and its kind."""

    class_word: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Naming:
    """User's settings for the concepts in a file; empty ones are taken from the file.

    Args:
        name: If given, all tokens become one concept of this name.
        class_word: The plain word for what the concepts are.
        kind: One of ``character``, ``pet``, ``object``, ``scene``; ``object`` if the file does not tell it either.
        base_model: Base model that they were tuned on.
    """

    name: str = ""
    class_word: str = ""
    kind: str = ""
    base_model: str = ""

    def concept(self, name: str, tokens: Iterable[str], meaning: Meaning | None = None) -> Concept:
        """Make a concept of this name and these tokens; `meaning` is what the file tells of it."""
        told = meaning or Meaning(UNKNOWN_CLASS, "object")
        class_word, kind = self.class_word or told.class_word, self.kind or told.kind
        return Concept(placeholder=f"<{name}>", tokens=tuple(tokens), class_word=class_word, kind=kind)


def plain_name(text: str) -> str:
    """Reduce a text to a valid concept name without brackets: letters, digits, '_', '.' and '-'."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text.strip().removeprefix("<").removesuffix(">"))
    return name[:_LONGEST].strip("-_.") or "concept"


def distinct_names(words: Iterable[str], *, of_files: bool = True) -> dict[str, str]:
    """Give every word a unique plain name; deterministic for the same words in the same order.

    Args:
        words: Each once.
        of_files: Whether files are named so: names then differ in more than case, and every system takes them.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for word in words:
        plain = name = portable_name(plain_name(word)) if of_files else plain_name(word)
        number = 1
        while (same := name.lower() if of_files else name) in taken:
            number += 1
            name = f"{plain[: _LONGEST - len(str(number)) - 1]}-{number}"
        taken.add(same)
        names[word] = name
    return names


def group_tokens(tokens: Iterable[str], naming: Naming) -> dict[Hashable, tuple[Concept, str]]:
    """Group the tokens of a file into concepts: ``<potter1>`` and ``<potter2>`` belong to one.

    Tokens keep their names if these are valid and unique; with `Naming.name` they are renumbered.

    Args:
        tokens: As the file spells them.
        naming: The user's settings.

    Returns:
        Token as the file spells it to (concept, name of the token in the concept).
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


def name_words(
    words: Mapping[str, int], naming: Naming, meanings: Mapping[str, Meaning]
) -> dict[Hashable, tuple[Concept, str]]:
    """Make a concept of every word with one token for each of its vectors: ``<potter1>``, ``<potter2>``, ...

    Args:
        words: Word as the file spells it to its number of vectors.
        naming: The user's settings.
        meanings: Word to what the file tells of it.

    Returns:
        (Word, number of the vector) to (concept, name of the token in the concept).
    """
    names = dict.fromkeys(words, plain_name(naming.name)) if naming.name else distinct_names(words, of_files=False)
    groups: dict[str, list[tuple[str, int]]] = {}
    for word, count in words.items():
        group = groups.setdefault(names[word], [])
        group += [(word, number) for number in range(1, count + 1)]
    found: dict[Hashable, tuple[Concept, str]] = {}
    taken = {f"<{name}>" for name in groups}
    for name, members in groups.items():
        spelt = _number_freely(name, len(members), taken)
        taken |= {*spelt}
        concept = naming.concept(name, spelt, meanings.get(members[0][0]))
        found |= {member: (concept, token) for member, token in zip(members, spelt, strict=True)}
    return found


def _number_freely(name: str, count: int, taken: Collection[str]) -> list[str]:
    """Tokens ``<name1>``, ``<name2>``, ... with underscores before the number until none of them is taken."""
    spelt = [f"<{name}{number}>" for number in range(1, count + 1)]
    return spelt if {*spelt}.isdisjoint(taken) else _number_freely(f"{name}_", count, taken)
