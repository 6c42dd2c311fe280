"""Write the figures of README and docs from `benchmarks/records/`: ``python benchmarks/write_figures.py``.

A table stands on its page between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` and is written whole. In
sentences only the figures are written, where the words are those of `figures/`. Nothing is measured. After a
measurement: put its record where the old one was, run this, and read what changed. A test fails where a page has other
figures than its record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from figures import demo, fusion, regions, saving, tuning
from figures.reading import Sentence


ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PARTS = (demo, fusion, regions, saving, tuning)
BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n\n)((?:(?!<!--).)*?)\n*(<!-- end of figures -->)", re.DOTALL)
NUMBER = r"(-?\d*\.?\d+)"


def write_tables(text: str, tables: Mapping[str, str]) -> str:
    """The text of a page with its tables as the records have them."""
    return BLOCK.sub(lambda block: f"{block[1]}{tables[block[2]]}\n\n{block[4]}", text)


def write_sentence(text: str, sentence: Sentence) -> str:
    """The text of a page with a sentence's figures as the record has them.

    Raises:
        SystemExit: If the words do not stand on the page, or more than once.
    """
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in sentence.words.split("{}")]
    found = [*re.finditer(NUMBER.join(parts), text)]
    if len(found) != 1 or len(found[0].groups()) != len(sentence.figures):
        raise SystemExit(
            f"{sentence.page} has {len(found)} times, expected once, these words with {len(sentence.figures)} "
            f"figures: {sentence.words!r}. Mend the page, or the words in benchmarks/figures."
        )
    for number in range(len(sentence.figures), 0, -1):
        start, end = found[0].span(number)
        text = text[:start] + sentence.figures[number - 1] + text[end:]
    return text


def rewrite_page(page: str, text: str, tables: Mapping[str, str], sentences: Sequence[Sentence]) -> str:
    """The text of a page with all of its figures as the records have them."""
    text = write_tables(text, tables)
    for sentence in sentences:
        if sentence.page == page:
            text = write_sentence(text, sentence)
    return text


def all_tables() -> dict[str, str]:
    """Every table by its name."""
    return {name: each for part in PARTS for name, each in part.tables().items()}


def all_sentences() -> list[Sentence]:
    """Every sentence."""
    return [sentence for part in PARTS for sentence in part.sentences()]


def main() -> None:
    tables, sentences = all_tables(), all_sentences()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if (written := rewrite_page(page, text, tables, sentences)) != text:
            (ROOT / page).write_text(written, encoding="utf-8")
            print(f"{page} has new figures.")


if __name__ == "__main__":
    main()
