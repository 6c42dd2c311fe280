"""The figures of README and docs are those of their records, and one that is not is found."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest


ROOT = Path(__file__).parents[1]
END = "<!-- end of figures -->"


@pytest.fixture(scope="module")
def writing() -> ModuleType:
    """`benchmarks/write_figures.py`, whose own imports are those of a script in that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("write_figures")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_pages_have_the_figures_of_their_records(writing: ModuleType) -> None:
    tables, sentences = writing.all_tables(), writing.all_sentences()
    for page in writing.PAGES:
        written = writing.rewrite_page(page, text_of(page), tables, sentences)
        assert written == text_of(page), f"{page} is not what python benchmarks/write_figures.py writes"


def test_every_table_stands_on_one_page_and_is_closed(writing: ModuleType) -> None:
    pages = [text_of(page) for page in writing.PAGES]
    named = [name for text in pages for name in re.findall("<!-- figures: (.+?) -->", text)]
    assert sorted(named) == sorted(writing.all_tables())
    for text in pages:
        assert len(writing.BLOCK.findall(text)) == text.count(END) == text.count("<!-- figures: ")


def test_a_wrong_figure_in_any_table_is_found(writing: ModuleType) -> None:
    tables = writing.all_tables()
    for page in writing.PAGES:
        for block in writing.BLOCK.finditer(text_of(page)):
            number = max(re.finditer(r"\d+", block[3]), key=lambda found: found.start())
            wrong = block[3][: number.start()] + "123" + block[3][number.end() :]
            changed = text_of(page).replace(block[3], wrong)
            assert changed != text_of(page)
            assert writing.write_tables(changed, tables) == text_of(page), block[2]


def test_a_new_table_takes_its_own_place_alone(writing: ModuleType) -> None:
    """One with nothing in it yet, too: what follows it stays."""
    empty = f"<!-- figures: new -->\n\n{END}\n\nWords.\n\n<!-- figures: old -->\n\n| 1 |\n\n{END}\n"
    filled = empty.replace("new -->\n", "new -->\n\n| 2 |\n").replace("| 1 |", "| 3 |")
    assert writing.write_tables(empty, {"new": "| 2 |", "old": "| 3 |"}) == filled


def test_a_wrong_figure_in_any_sentence_is_found(writing: ModuleType) -> None:
    for sentence in writing.all_sentences():
        text = text_of(sentence.page)
        for number in range(len(sentence.figures)):
            figures = tuple("123.4" if place == number else each for place, each in enumerate(sentence.figures))
            changed = writing.write_sentence(text, sentence._replace(figures=figures))
            assert changed != text
            assert writing.write_sentence(changed, sentence) == text


def test_words_that_no_page_has_are_an_error_that_names_them(writing: ModuleType) -> None:
    sentence = writing.Sentence(page="README.md", words="a page with {} of them", figures=("3",))
    with pytest.raises(SystemExit, match=r"README.md has 0 times, expected once.*'a page with \{\} of them'"):
        writing.write_sentence("nothing of it", sentence)
    twice = "a page with\n  4 of them, a page with 5 of them"
    with pytest.raises(SystemExit, match="has 2 times"):
        writing.write_sentence(twice, sentence)
    assert writing.write_sentence("a page with\n  -.25 of them.", sentence) == "a page with\n  3 of them."
    with pytest.raises(SystemExit, match="with 2 figures"):
        writing.write_sentence("a page with 4 of them", sentence._replace(figures=("3", "4")))


def test_no_table_of_a_page_of_benchmarks_is_written_by_hand(writing: ModuleType) -> None:
    """But those of commands."""
    for page in writing.PAGES:
        if page.startswith("docs/benchmarks_"):
            rest = writing.BLOCK.sub("", text_of(page))
            rows = re.findall(r"^\|.*\d.*$", rest, re.MULTILINE)
            assert [row for row in rows if not row.startswith("| `python benchmarks/")] == []


def test_records_that_pages_name_are_there(writing: ModuleType) -> None:
    for page in writing.PAGES:
        for name in re.findall(r"`(?:benchmarks/records/)?([\w.-]+-[\w.-]+\.(?:json|txt))`", text_of(page)):
            if not name.startswith("composlora"):
                assert (ROOT / "benchmarks" / "records" / name).is_file(), (page, name)


# --- what a figure says of a record ---


def row(single: float, floor: float, **of_each: float) -> dict[str, object]:
    return {
        "single": {"attributes": single},
        "class_word": {"attributes": floor},
        "of_each": {name: {"attributes": value} for name, value in of_each.items()},
    }


def test_what_is_kept_is_compared_concept_by_concept(writing: ModuleType) -> None:
    reading = importlib.import_module("figures.reading")
    one, other = row(0.7, 0.2, bobo=0.7, kiki=0.45), row(0.7, 0.2, bobo=0.6, kiki=0.35)
    # Concepts differ by a half of what is kept, the methods by a fifth in each.
    assert reading.kept_apart([one], [other], "attributes") == {"mean": 0.2, "low": 0.2, "high": 0.2, "count": 2}
    assert reading.kept_apart([other], [one], "attributes")["mean"] == -0.2
    uneven = reading.kept_apart([one], [row(0.7, 0.2, bobo=0.6, kiki=0.55)], "attributes")
    assert (uneven["mean"], uneven["low"], uneven["high"]) == (0.0, -0.2, 0.2)
    # Where single or class word are others, each method has its own scale.
    assert reading.kept_apart([one], [row(1.2, 0.2, bobo=0.7, kiki=0.45)], "attributes")["mean"] == 0.375


def test_seeds_of_a_concept_belong_together(writing: ModuleType) -> None:
    """Two concepts by three seeds are two independent values, each the mean of three, and not six."""
    reading = importlib.import_module("figures.reading")
    ones, others = [row(0.7, 0.2, bobo=0.7, kiki=0.45)] * 3, [row(0.7, 0.2, bobo=0.6, kiki=0.45)] * 3
    apart = reading.kept_apart(ones, others, "attributes")
    assert (apart["mean"], apart["low"], apart["high"], apart["count"]) == (0.1, 0.0, 0.2, 6)
    seeds = [row(0.7, 0.2, bobo=value) for value in (0.2, 0.5, 0.8)]
    assert reading.mean_of(seeds, "of_each", "bobo", "attributes") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.01, 0.03, "0.01 (-0.01 to 0.03), noise"),
        (0.004, 0.03, "0.01 (0.00 to 0.03), noise"),
        (0.006, 0.03, "0.01 (0.01 to 0.03)"),
        (-0.03, -0.001, "0.01 (-0.03 to 0.00), noise"),
    ],
)
def test_a_difference_whose_interval_has_0_in_it_is_noise(
    writing: ModuleType, low: float, high: float, said: str
) -> None:
    assert importlib.import_module("figures.reading").difference({"mean": 0.01, "low": low, "high": high}) == said


def test_all_places_count_where_any_concept_may_be_found(writing: ModuleType) -> None:
    regions = importlib.import_module("figures.regions")
    counts = {"bobo": {"bobo": 3, "": 1}, "kiki": {"bobo": 2}}
    assert regions.right_of_all(counts) == 0.5
    assert regions.confusion(counts).splitlines()[2:] == [
        "| `<bobo>` | 3 | | 1 |",
        "| `<kiki>` | 2 | | |",
    ]


def test_places_without_the_one_that_was_asked_for_are_counted(writing: ModuleType) -> None:
    counts = {"bobo": {"bobo": 3, "": 1}, "kiki": {"bobo": 2}}
    assert importlib.import_module("figures.regions").wrong_places(counts) == {"bobo": 1, "kiki": 2}


def test_a_concept_of_the_demo_is_sought_where_its_picture_asked_for_it(writing: ModuleType) -> None:
    """Concepts move on by one place from picture to picture, so that each stands everywhere."""
    found = [["bobo", "kiki", "rex"], ["kiki", "", "bobo"], ["rex", "bobo", "kiki"], ["rex", "rex", "kiki"]]
    content = {
        "settings": {"concepts": ["bobo", "kiki", "rex", "ming"]},
        "concepts_found_in_regions": {"regional": found},
    }
    demo = importlib.import_module("figures.demo")
    assert demo.places_of(content, "rex") == (2, 4)
    assert demo.places_of(content, "kiki") == (3, 4)


def test_no_share_is_minus_nothing(writing: ModuleType) -> None:
    reading = importlib.import_module("figures.reading")
    assert [reading.percent(share) for share in (-0.004, 0.004, -0.006, 0.985)] == ["0", "0", "-1", "98"]
