"""Records as numbers, numbers as words, and rows as tables."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_mixofshow.evaluation.intervals import mean_of_groups_with_interval
from diffusers_mixofshow.evaluation.metrics import identity_retention


RECORDS = Path(__file__).resolve().parents[1] / "records"
PLACES = ("right", "whole_pictures", "looks", "likeness")
"""What is measured of pictures with several concepts, in the order of the tables."""

Row = Mapping[str, Any]
"""One method under one number of concepts, as `benchmarks/retention.py` writes it."""


class Sentence(NamedTuple):
    """Words of a page with figures in them.

    Args:
        page: Path of the page from the root of the repository.
        words: The words, with ``{}`` for each figure; on the page they may be broken into lines anywhere.
        figures: What the record says.
    """

    page: str
    words: str
    figures: tuple[str, ...]


@cache
def record(name: str) -> Any:
    """A record in JSON, by its name without the ending."""
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def percent(share: float) -> str:
    """A share as whole per cent, without the sign; never minus zero."""
    return decimals(100 * share, 0)


def decimals(value: float, digits: int = 2) -> str:
    """A number with a fixed count of digits; never minus zero."""
    text = f"{value:.{digits}f}"
    return text[1:] if float(text) == 0 and text.startswith("-") else text


def percent_with_interval(value: Mapping[str, float]) -> str:
    """For example 41 % (36 to 45)."""
    return f"{percent(value['mean'])} % ({percent(value['low'])} to {percent(value['high'])})"


def decimals_with_interval(value: Mapping[str, float]) -> str:
    """For example 0.53 (0.52 to 0.54)."""
    mean, low, high = (decimals(value[each]) for each in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def difference(value: Mapping[str, float]) -> str:
    """A difference with its interval; where that has 0 in it, as it is printed, it is called noise."""
    noise = round(value["low"], 2) <= 0 <= round(value["high"], 2)
    return decimals_with_interval(value) + (", noise" if noise else "")


def kept_apart(ones: Sequence[Row], others: Sequence[Row], measure: str) -> dict[str, float]:
    """What one method keeps of the identity minus what another keeps, with its 95 % interval.

    Rows are those of `benchmarks/retention.py`, one for each seed of tuning. A concept's values under both methods
    belong together, so that what is hard about a concept for both does not count. The interval is over concepts and
    their seeds; what tuning gains is taken as known.
    """
    apart: dict[str, list[float]] = {}
    for one, other in zip(ones, others, strict=True):
        for concept, identity in one["of_each"].items():
            left, right = (
                identity_retention(each[measure], row["single"][measure], row["class_word"][measure])
                for row, each in ((one, identity), (other, other["of_each"][concept]))
            )
            apart.setdefault(concept, []).append(left - right)
    return mean_of_groups_with_interval(list(apart.values()))


def apart_alone(ones: Sequence[Row], others: Sequence[Row], measure: str) -> dict[str, float]:
    """What concepts' own files show in one way of tuning minus in another, paired and with an interval as above."""
    alone = [(one["of_each_single"], other["of_each_single"]) for one, other in zip(ones, others, strict=True)]
    apart = [[one[name][measure] - other[name][measure] for one, other in alone] for name in alone[0][0]]
    return mean_of_groups_with_interval(apart)


def mean_kept(rows: Sequence[Row], measure: str) -> float:
    """What a method keeps of what tuning gains over the class word, mean over seeds."""
    means = [[row[each][measure] for each in ("identity", "single", "class_word")] for row in rows]
    return statistics.fmean(identity_retention(*each) for each in means)


def over_concepts(rows: Sequence[Row], which: str, measure: str) -> dict[str, float]:
    """Mean of a measure over concepts and their tunings, with its 95 % interval over both.

    Args:
        rows: One for each tuning.
        which: ``"of_each"`` under the method, or ``"of_each_single"`` with each concept's own file.
        measure: Of identity or beside it.
    """
    return mean_of_groups_with_interval([[row[which][one][measure] for row in rows] for one in rows[0][which]])


def mean_of(rows: Sequence[Row], *keys: str) -> float:
    """Mean over rows of a number that lies under these keys."""
    found: list[Any] = [reduce(getitem, keys, row) for row in rows]
    return statistics.fmean(found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the head has a title for every column, that of names included."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return re.sub(r"\|  (?=\|)", "| ", "\n".join(lines))
