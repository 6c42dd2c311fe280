"""Figures of the demo: what one run of `mixofshow demo` wrote into its report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from figures.reading import Sentence, decimals, percent, percent_with_interval, record, table


PAGE = "docs/demo.md"
METHODS = {
    "photos": "photos",
    "single": "each concept's own ED-LoRA",
    "average": "weight average",
    "fused": "**gradient fusion**",
    "class word": "class word alone",
}
ENDS = {"single": "100 %", "class word": "0 %"}
"""What is kept of the identity by the methods between which the others stand."""


def tables() -> dict[str, str]:
    """Every table by its name."""
    return {"demo": methods()}


def methods() -> str:
    """Looks and likeness of every method, and what is kept of them."""
    intervals = record("demo")["intervals"]
    rows = []
    for method, label in METHODS.items():
        identity, kept = intervals["mean_identity"][method], intervals["identity_retention"].get(method)
        looks, likeness = (
            percent_with_interval(kept[measure]) if kept else ENDS.get(method, "")
            for measure in ("attributes", "alignment")
        )
        rows.append(
            [label, percent_with_interval(identity["attributes"]), looks, three(identity["alignment"]), likeness]
        )
    return table(("", "looks read right", "kept", "like the photos", "kept"), rows)


def three(value: Mapping[str, float]) -> str:
    """A number with its interval, three digits each."""
    mean, low, high = (decimals(value[each], 3) for each in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def ends(value: Mapping[str, float]) -> tuple[str, ...]:
    """A share and the ends of its interval, in per cent."""
    return tuple(percent(value[each]) for each in ("mean", "low", "high"))


def places_of(content: Mapping[str, Any], name: str) -> tuple[int, int]:
    """In how many places of the pictures with regions a concept was found, of those that asked for it."""
    asked = content["settings"]["concepts"][:3]
    found = content["concepts_found_in_regions"]["regional"]
    seen = [row[(asked.index(name) - number) % 3] for number, row in enumerate(found)]
    return seen.count(name), len(seen)


def sentences() -> list[Sentence]:
    """Every sentence."""
    content = record("demo")
    intervals = content["intervals"]
    places = intervals["right_concept_in_region"]
    more = intervals["identity_retention"]["fused minus average"]
    right, asked = places_of(content, "rex")
    compared = [ends(places[way][measure]) for measure in ("regions", "looks") for way in ("regional", "unguided")]
    return [
        Sentence(
            page=PAGE,
            words="one tuning of seed 0, in {} s on two cores",
            figures=(decimals(sum(content["seconds"].values()), 0),),
        ),
        Sentence(
            page=PAGE,
            words="Gradient fusion keeps {} points more of the looks than the average ({} to {}), and {} more of the "
            "likeness ({} to {})",
            figures=(*ends(more["attributes"]), *ends(more["alignment"])),
        ),
        Sentence(
            page=PAGE,
            words="in {} % of {} places ({} to {}) against {} % ({} to {}), and {} % of the looks read right there "
            "({} to {}) against {} % ({} to {}).",
            figures=(
                compared[0][0],
                str(3 * places["regional"]["regions"]["count"]),
                *compared[0][1:],
                *(figure for share in compared[1:] for figure in share),
            ),
        ),
        Sentence(
            page="docs/ed_lora.md",
            words="`<rex>` is found in {} of its {} places",
            figures=(str(right), str(asked)),
        ),
    ]
