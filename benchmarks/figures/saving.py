"""Figures of saving: what is left of a file whose writing process is killed."""

from __future__ import annotations

from figures.reading import Sentence, record


def tables() -> dict[str, str]:
    """Every table by its name: none."""
    return {}


def sentences() -> list[Sentence]:
    """Every sentence."""
    counts = record("killed-200")["results"]
    return [
        Sentence(
            page="docs/security.md",
            words="Killed {} times at random points while saving, {} times of them in the middle of writing, the old "
            "file was there {} times and the new one {} times, and never half of one",
            figures=tuple(str(counts[name]) for name in ("kills", "killed while writing", "old", "new")),
        ),
    ]
