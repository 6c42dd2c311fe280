"""Figures of regions: who is found where, what a step costs, and isolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from figures.reading import (
    PLACES,
    Sentence,
    decimals,
    decimals_with_interval,
    percent,
    percent_with_interval,
    record,
    table,
)


PAGE = "docs/benchmarks_regions.md"
RUN, OTHER_TRIPLES = "toyland", "toyland-20261129-094422"
ON_XL = "toyland-xl-regions"
TUNINGS = tuple(f"toyland-tuning{seed}" for seed in range(3))
XL_TUNINGS = (ON_XL, f"{ON_XL}-seed1", f"{ON_XL}-seed2")
HEAD = ("right concept in its region", "right of all eight", "all right in a picture", "looks read right", "likeness")
REFINED = "3, natural, drafts, refined"
WAYS = {
    "3, one prompt": "one prompt, no regions",
    "3, natural": "regions",
    "3, repeated": "regions whose prompts repeat their subject for every place",
    "3, natural, drafts": "regions, drafts",
    REFINED: "**regions, drafts, refined**",
    "3, layout": "layout, no regions",
    "3, layout, natural": "layout, regions",
    "3, layout, repeated": "layout, regions whose prompts repeat their subject",
    "3, layout, natural, drafts, refined": "layout, regions, drafts, refined",
    "3, drawn": "drawn by the world, seen through the autoencoder",
}
FIVE = {"5, natural, drafts, refined": "five, drafts, refined", "5, drawn": "five, drawn by the world"}
OTHERS = {
    REFINED: "regions, drafts, refined",
    "3, natural, each alone": "each drawn alone, pasted",
    "3, drawn": "drawn by the world, seen through the autoencoder",
}
OVERLAPPING = {
    "natural": "regions",
    "natural, drafts, refined": "regions, drafts, refined",
    "drawn": "drawn by the world",
}
ISOLATION = {
    "no regions": "no regions",
    "regions": "regions",
    "isolation, all steps": "isolation, all steps",
    "isolation, first half": "isolation, first half of the steps",
    "isolation, largest maps": "isolation, largest feature maps",
    "regions, half weight": "regions of weight 0.5",
    "regions, half weight, others left out below": "the same, the other things left out below",
    "regions, first half of the steps": "regions in the first half of the steps",
    "regions, first half of the steps, others left out below": "the same, the other things left out below",
}

AUTHORS_WAY = ", authors' way"


def tables() -> dict[str, str]:
    """Every table by its name."""
    run, others = record(RUN)["together"], record(OTHER_TRIPLES)["together"]
    return {
        "three in a picture": in_one_picture(run, WAYS),
        "five in a picture": in_one_picture(run, FIVE),
        "regions on Stable Diffusion XL": in_one_picture(record(ON_XL)["together"], WAYS | FIVE),
        "three tunings": tunings_apart(TUNINGS),
        "tunings on Stable Diffusion XL": tunings_apart(XL_TUNINGS),
        "other triples": other_triples(others),
        "confusion": confusion(others[REFINED]["found_of_all_fused"]),
        "random layouts": random_layouts(),
        "overlaps": overlaps(),
        "steps": steps("toyland"),
        "steps on Stable Diffusion XL": steps("toyland-xl"),
        "isolation": isolation(),
    }


def places(row: Mapping[str, Any]) -> list[str]:
    """Every measure of places with its interval."""
    shares = [percent_with_interval(row[each]) for each in PLACES[:3]]
    return [*shares, decimals_with_interval(row[PLACES[3]])]


def right_of_all(counts: Mapping[str, Mapping[str, int]]) -> float:
    """Share of all places whose concept is found there among all eight, not only among those asked for."""
    return sum(row.get(name, 0) for name, row in counts.items()) / sum(sum(row.values()) for row in counts.values())


def places_and_all(row: Mapping[str, Any]) -> list[str]:
    """Every measure of places with its interval, and behind the first what is right among all eight."""
    first, *rest = places(row)
    return [first, f"{percent(right_of_all(row['found_of_all_fused']))} %", *rest]


def wrong_places(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """In how many places something else was found than the concept that was asked for there, concept by concept."""
    return {name: sum(row.values()) - row.get(name, 0) for name, row in counts.items()}


def other_triples(together: Mapping[str, Any]) -> str:
    rows = []
    for way, label in OTHERS.items():
        rows.append([label, *places_and_all(together[way])])
    for way, label in {
        REFINED: "the {} pictures without `<nono>`: drafts, refined",
        "3, natural, each alone": "the same, each drawn alone, pasted",
    }.items():
        without = together[way]["without_nono"]
        first, *rest = places(without)
        rows.append([label.format(without["right"]["count"]), first, "", *rest])
    head = ("", "right of the three asked for", "right of all eight", "all right in a picture")
    return table((*head, "looks read right", "likeness"), rows)


def in_one_picture(together: Mapping[str, Any], ways: Mapping[str, str]) -> str:
    """Every measure of the ways that were run, and what is right among all eight, by their labels."""
    rows = []
    for way, label in ways.items():
        if way in together:
            rows.append([label, *places_and_all(together[way])])
    return table(("", *HEAD), rows)


def tunings_apart(tunings: Sequence[str]) -> str:
    """The ways that were run on each of several tunings, one row each."""
    rows = []
    for way in ("3, one prompt", "3, natural", REFINED):
        for number, name in enumerate(tunings, 1):
            rows.append([f"{WAYS[way].strip('*')}: tuning {number}", *places_and_all(record(name)["together"][way])])
    return table(("", *HEAD), rows)


def confusion(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Asked for, found and how often; the last column is no critter."""
    names = sorted(counts)
    rows = [[f"`<{name}>`", *(str(counts[name].get(found, "")) for found in (*names, ""))] for name in names]
    return table(("asked for", *(f"`<{name}>`" for name in names), "no critter"), rows)


def random_layouts() -> str:
    """Every way on layouts of two to four concepts; the last column is of those with two concepts of one class."""
    rows = []
    for way, row in record("regions")["results"].items():
        shares = ("right", "whole_pictures", "missing", "attributes", "leaked")
        cells = [percent_with_interval(row["all"][each]) for each in shares]
        rows.append([way, *cells, percent_with_interval(row["two of one class"]["right"])])
    head = ("right in its region", "all right in a picture", "missing", "looks read right", "another region's looks")
    return table(("", *head, "right where two are of one class"), rows)


def overlaps() -> str:
    rows = []
    for called, row in record(RUN)["contact"].items():
        overlap, _, way = called.removeprefix("overlap ").partition(", ")
        right, _, looks, likeness = places(row)
        of_all = f"{percent(right_of_all(row['found_of_all_fused']))} %"
        rows.append([f"{overlap.removesuffix('%')} %, {OVERLAPPING[way]}", right, of_all, looks, likeness])
    return table(("overlap", "right of the two asked for", "right of all eight", "looks read right", "likeness"), rows)


def steps(model: str) -> str:
    """What a step and a call cost beside those of diffusers' pipeline; the authors' way where it was measured."""
    results = record(f"attention-{model}-1-cpu")["results"]
    head, rows = ["", "a step", "a whole call of 8 steps"], []
    for name in ("no concept, no region", "one layer-wise concept", "4 disjoint regions", "8 overlapping masks"):
        step = with_quartiles(results[name], "step") + (", bit-identical" if name == "no concept, no region" else "")
        rows.append([name, step, with_quartiles(results[name], "call")])
    if any(name.endswith(AUTHORS_WAY) for name in results):
        head.append("a step the authors' way")
        for row in rows:
            theirs = results.get(f"{row[0]}{AUTHORS_WAY}")
            row.append(with_quartiles(theirs, "step") if theirs else "")
    return table(head, rows)


def with_quartiles(row: Mapping[str, Any], clock: str) -> str:
    """A ratio of times, with the quartiles of all rounds."""
    low, _, high = row[f"{clock}_quartiles"]
    return f"{decimals(row[f'{clock}_ratio'])} ({decimals(low)} to {decimals(high)})"


def isolation() -> str:
    results = record("isolation-3-things")["results"]
    rows = [
        [label, *(percent_with_interval(results[way][each]) for each in ("class", "colour", "leaked"))]
        for way, label in ISOLATION.items()
    ]
    return table(("", "right class", "right colour", "another region's colour"), rows)


def right_in_tunings(tunings: Sequence[str], way: str) -> list[float]:
    """Share of places with the right concept, of each tuning."""
    return [record(name)["together"][way]["right"]["mean"] for name in tunings]


def sentences() -> list[Sentence]:
    """Every sentence."""
    run, others = record(RUN), record(OTHER_TRIPLES)["together"]
    one, refined = (run["together"][way]["right"] for way in ("3, one prompt", REFINED))
    right_of_tunings = right_in_tunings(TUNINGS, REFINED)
    shown = [percent(run["mean_identity"][method]["attributes"]) for method in ("single", "closed_form")]
    wrong = wrong_places(others[REFINED]["found_of_all_fused"])
    nono = record("training")["ablations"]["ED-LoRA"]["out"]["1"]["attributes"]
    leaked = [
        record("isolation-3-things")["results"][way]["leaked"]["mean"]
        for way in ("regions, half weight", "regions, first half of the steps")
    ]
    on_xl = [right_in_tunings(XL_TUNINGS, way) for way in (REFINED, "3, one prompt")]
    step = record("attention-toyland-1-cpu")["results"]["diffusers' pipeline, same LoRA"]["step_s"]
    return [
        Sentence(
            page="README.md",
            words="one prompt {} % ({} to {}), regions with drafts and refining {} % ({} to {}); with three other "
            "tunings {} to {} %, and {} % if chosen among all eight",
            figures=(
                *(percent(value[each]) for value in (one, refined) for each in ("mean", "low", "high")),
                *map(percent, (min(right_of_tunings), max(right_of_tunings))),
                percent(right_of_all(run["together"][REFINED]["found_of_all_fused"])),
            ),
        ),
        Sentence(
            page="README.md",
            words="three side by side, with drafts and refining the right one is in its place in {} to {} %, by one "
            "prompt in {} to {} %",
            figures=tuple(percent(end(shares)) for shares in on_xl for end in (min, max)),
        ),
        Sentence(page=PAGE, words="own ED-LoRA shows {} %, the pack {} %.", figures=tuple(shown)),
        Sentence(page=PAGE, words="With its own ED-LoRA alone, it shows {} % of its looks", figures=(percent(nono),)),
        Sentence(
            page=PAGE,
            words="Of {} places without the one that was asked for, {} asked for `<nono>`.",
            figures=(str(sum(wrong.values())), str(wrong["nono"])),
        ),
        Sentence(page=PAGE, words="A step is {} ms here", figures=(decimals(1000 * step, 0),)),
        Sentence(
            page="docs/regional_sampling.md",
            words="({} and {} % of the regions in the",
            figures=tuple(map(percent, leaked)),
        ),
    ]
