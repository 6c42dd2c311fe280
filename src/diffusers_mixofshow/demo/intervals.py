"""How sure the demo's measures are: their 95 % intervals, found by drawing concepts and pictures again and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers_mixofshow.evaluation.identity import Identity, retention
from diffusers_mixofshow.evaluation.intervals import Interval, mean_of_groups_with_interval, mean_with_interval


FUSED_MINUS_AVERAGE = "fused minus average"
"""The difference between what both keep, picture by picture."""

Spread = dict[str, Interval | None]
"""Measure to its interval; None if the measure is not known."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The 95 % intervals of the demo's measures.

    Args:
        mean: Method to the intervals of its mean identity, over concepts and over pictures of them.
        retention: ``average``, ``fused`` and `FUSED_MINUS_AVERAGE` to the intervals of the share of identity kept,
            likewise. What tuning gains over the class word is taken as known.
        regions: Method (``regional``, ``unguided``) to the intervals of its shares in regions, over pictures.
    """

    mean: dict[str, Spread]
    retention: dict[str, Spread]
    regions: dict[str, Spread]


def spread_of_identity(each: Mapping[str, Sequence[Identity]]) -> Spread:
    """Intervals of every measure of identity.

    Args:
        each: Concept name to the identity of each of its pictures.
    """
    return {
        measure: _spread([[getattr(identity, measure) for identity in of_concept] for of_concept in each.values()])
        for measure in ("alignment", "attributes", "nearest")
    }


def spread_of_retention(
    each: Mapping[str, Mapping[str, Sequence[Identity]]], single: Identity, class_word: Identity
) -> dict[str, Spread]:
    """Intervals of the share of identity that ``average`` and ``fused`` keep, and of the difference.

    Args:
        each: Method to concept name to the identity of each picture; the pictures of all methods have the same seeds.
        single: Mean identity of the concepts' own ED-LoRAs, of which all is kept.
        class_word: Mean identity of the class word, of which nothing is kept.
    """
    kept = {
        method: [
            [retention(identity, single, class_word) for identity in of_concept]
            for of_concept in each[method].values()
        ]
        for method in ("average", "fused")
    }
    spreads: dict[str, Spread] = {method: {} for method in (*kept, FUSED_MINUS_AVERAGE)}
    for measure in ("alignment", "attributes"):
        values = {method: [[one[measure] for one in row] for row in rows] for method, rows in kept.items()}
        values[FUSED_MINUS_AVERAGE] = [
            [_subtract(*pair) for pair in zip(*rows, strict=True)]
            for rows in zip(values["fused"], values["average"], strict=True)
        ]
        for method, rows in values.items():
            spreads[method][measure] = _spread(rows)
    return spreads


def spread_of_regions(
    found: Sequence[Sequence[str]], expected: Sequence[Sequence[str]], looks: Sequence[float] | None
) -> Spread:
    """Intervals of the shares of right regions, of pictures without a wrong one, and of looks.

    Args:
        found: For every picture, the name found in each region.
        expected: The right names, likewise.
        looks: For every picture, the share of looks read right in its regions; None if it is not known.
    """
    hits = [[name == right for name, right in zip(*rows, strict=True)] for rows in zip(found, expected, strict=True)]
    return {
        "regions": mean_with_interval([sum(row) / len(row) for row in hits]),
        "whole_pictures": mean_with_interval([float(all(row)) for row in hits]),
        "looks": None if looks is None else mean_with_interval(looks),
    }


def _subtract(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _spread(groups: Sequence[Sequence[float | None]]) -> Interval | None:
    """Interval over the concepts of which the measure is known."""
    known = [values for group in groups if (values := [value for value in group if value is not None])]
    return mean_of_groups_with_interval(known) if known else None
