"""Figures of tuning: what embeddings and LoRA hold, seeds, one thing changed, company, exports and speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from figures.reading import Sentence, decimals, percent, percent_with_interval, record, table

from diffusers_mixofshow.evaluation.intervals import mean_with_interval


PAGE = "docs/benchmarks_training.md"
METHODS = {
    "class word": "class word, nothing tuned",
    "textual inversion": "textual inversion",
    "P+": "P+",
    "LoRA": "LoRA, all at once",
    "LoRA, embeddings first": "LoRA, embeddings first",
    "ED-LoRA": "ED-LoRA (embeddings first)",
    "ED-LoRA, all at once": "ED-LoRA, all at once",
    "Custom Diffusion": "Custom Diffusion",
}
ABLATIONS = (
    "ED-LoRA",
    "with updates at the start token",
    "without noise offset",
    "without layer-wise embeddings",
    "without the class token",
    "with masks",
    "with the attention regulariser",
    "with masks and the regulariser",
)
ON_XL = {
    "class word": "class word, nothing tuned",
    "textual inversion": "textual inversion",
    "P+": "P+",
    "LoRA": "LoRA, all at once",
    "ED-LoRA": "**ED-LoRA, one for each group of layers** (7)",
    "with embeddings of each layer": "ED-LoRA, one for each layer (10)",
    "without layer-wise embeddings": "ED-LoRA, one for all layers",
}
KEPT_OF_EXPORTS = {
    ("mean", "alignment"): "mean alone: likeness kept",
    ("mean", "attributes"): "looks kept",
    ("with the base", "alignment"): "with the base: likeness kept",
    ("with the base", "attributes"): "looks kept",
}
"""Ways to export a concept, and what is kept of its identity by which measure."""
SEEDS = {"bobo": "bobo, in-domain", "nono": "nono, out-of-domain"}


def tables() -> dict[str, str]:
    """Every table by its name."""
    results = record("training")
    return {
        "tuning": by_domain(results["methods"], METHODS, "in-domain", "out-of-domain"),
        "one thing changed": by_domain(results["ablations"], {name: name for name in ABLATIONS}, "bobo", "nono"),
        "seeds": seeds(results["seeds"]),
        "company": company(),
        "tuning on Stable Diffusion XL": on_xl(),
        "exports": exports(),
    }


def by_domain(lines: Mapping[str, Any], labels: Mapping[str, str], inside: str, outside: str) -> str:
    """Image-alignment and looks at LoRA scale 0 and 1, in and out of domain."""
    rows = [[label, *cells_by_domain(lines[name])] for name, label in labels.items()]
    return table(("", f"{inside}, 0", f"{inside}, 1", f"{outside}, 0", f"{outside}, 1"), rows)


def cells_by_domain(row: Mapping[str, Any]) -> list[str]:
    """A cell for each domain and scale."""
    cells = [row[domain][scale] for domain in ("in", "out") for scale in ("0", "1")]
    return [f"{decimals(each['alignment'], 3)}, {percent(each['attributes'])}%" for each in cells]


def on_xl() -> str:
    """Image-alignment and looks of an in-domain and an out-of-domain concept, and the size of a concept's file."""
    content = record("training-xl")
    sizes = {run["variant"]: f"{run['bytes'] / 1000:.0f} kB" for run in content["runs"] if "bytes" in run}
    rows = [
        [label, *cells_by_domain(content["methods"][variant]), sizes.get(variant, "")]
        for variant, label in ON_XL.items()
    ]
    return table(("", "bobo, 0", "bobo, 1", "nono, 0", "nono, 1", "file"), rows)


def seeds(results: Mapping[str, Any]) -> str:
    rows = []
    for name, label in SEEDS.items():
        row = results[name]
        values = (row["class_word"], row["mean"], row["deviation"], min(row["alignment"].values()))
        rows.append([label, *(decimals(value, 3) for value in values)])
    return table(("", "class word", "mean", "deviation", "least"), rows)


def company() -> str:
    looks = record("company")["looks"]
    rows = [[variant, *map(percent_with_interval, row.values())] for variant, row in looks.items()]
    titles = [
        title.replace("twice, left", "twice: left").replace("twice, ", "") for title in next(iter(looks.values()))
    ]
    return table(("composed pictures show it beside", *titles), rows)


def exports() -> str:
    results = record("exports-toyland")["results"]
    rows = [
        [f"`<{name}>`", *(f"{percent(row['kept'][way][measure])} %" for way, measure in KEPT_OF_EXPORTS)]
        for name, row in results.items()
    ]
    means = (
        mean_with_interval([row["kept"][way][measure] for row in results.values()]) for way, measure in KEPT_OF_EXPORTS
    )
    rows.append([f"all {len(results)}", *map(percent_with_interval, means)])
    return table(("", *KEPT_OF_EXPORTS.values()), rows)


def sentences() -> list[Sentence]:
    """Every sentence."""
    return [*of_observations(), *of_plain_lora(), *of_xl(), *of_seeds(), *of_speed()]


def cell(variant: str, domain: str, scale: str) -> tuple[str, str]:
    """Image-alignment with two digits, and the looks in per cent, of all concepts in a domain."""
    means = record("training")["methods"][variant][domain][scale]
    return decimals(means["alignment"]), percent(means["attributes"])


def alignment(variant: str, concept: str, scale: str) -> list[float]:
    """Image-alignment of one concept by every seed."""
    chosen = [run for run in record("training")["runs"] if (run["variant"], run["concept"]) == (variant, concept)]
    return [run["scales"][scale]["alignment"] for run in sorted(chosen, key=lambda run: run["seed"])]


def first(variant: str, concept: str, digits: int = 2, scale: str = "0") -> str:
    """Image-alignment of one concept by the first seed."""
    return decimals(alignment(variant, concept, scale)[0], digits)


def span(concept: str, digits: int = 2, scale: str = "0") -> tuple[str, str]:
    """The least and the largest image-alignment of ED-LoRA by all seeds."""
    values = alignment("ED-LoRA", concept, scale)
    return decimals(min(values), digits), decimals(max(values), digits)


def of_observations() -> list[Sentence]:
    outside, whole = cell("ED-LoRA", "out", "0"), cell("ED-LoRA", "out", "1")
    inside, at_once = cell("ED-LoRA", "in", "0"), cell("ED-LoRA, all at once", "in", "0")
    looks = [record("training")["methods"]["ED-LoRA"]["in"][scale]["attributes"] for scale in ("1", "0")]
    plain = cell("LoRA", "out", "0")
    together = "ED-LoRA", "ED-LoRA, all at once"
    return [
        Sentence(
            page=PAGE,
            words="the LoRA raises ED-LoRA from {} to {} and from {} % to {} % of the attributes; in-domain its "
            "embeddings alone are as like the photos as with the LoRA ({}), but lack {} points of the attributes",
            figures=(outside[0], whole[0], outside[1], whole[1], inside[0], percent(looks[0] - looks[1])),
        ),
        Sentence(
            page=PAGE,
            words="ED-LoRA's embeddings without the LoRA have {} of it ({} to {} by five seeds), those of LoRA {}, "
            "and {} where they are trained first. Of rex it is {} against {},",
            figures=(
                first("ED-LoRA", "bobo"),
                *span("bobo"),
                first("LoRA", "bobo"),
                first("LoRA, embeddings first", "bobo"),
                first("ED-LoRA", "rex"),
                first("LoRA", "rex"),
            ),
        ),
        Sentence(
            page=PAGE,
            words="LoRA's are no worse ({} and {}, {} % and {} %)",
            figures=(plain[0], outside[0], plain[1], outside[1]),
        ),
        Sentence(
            page=PAGE,
            words="at scale 0, ED-LoRA has {} and {} % in-domain with this phase, {} and {} % without (bobo {} and "
            "{}, rex {} and {})",
            figures=(*inside, *at_once, *(first(way, name) for name in ("bobo", "rex") for way in together)),
        ),
    ]


def of_plain_lora() -> list[Sentence]:
    methods = record("training")["methods"]
    both = [methods[way]["in"]["1"] for way in ("LoRA", "ED-LoRA")]
    outside = [decimals(methods[way]["out"]["1"]["alignment"], 3) for way in ("LoRA", "ED-LoRA")]
    compared = tuple(text for row in both for text in (decimals(row["alignment"], 3), percent(row["attributes"])))
    return [
        Sentence(
            page=PAGE,
            words="beats ED-LoRA in-domain**: {} and {} % against {} and {} %. The likeness is bobo's ({}; ED-LoRA by "
            "five seeds {} to {}); of rex ({} and {}), of the attributes and out-of-domain ({} and {}), the",
            figures=(
                *compared,
                first("LoRA", "bobo", 3, "1"),
                *span("bobo", 3, "1"),
                first("LoRA", "rex", 3, "1"),
                first("ED-LoRA", "rex", 3, "1"),
                *outside,
            ),
        ),
    ]


def of_xl() -> list[Sentence]:
    lines = record("training-xl")["methods"]

    def looks(variant: str) -> str:
        return percent(lines[variant]["in"]["0"]["attributes"])

    variants = ("without layer-wise embeddings", "ED-LoRA", "with embeddings of each layer")
    return [
        Sentence(
            page=PAGE,
            words="ED-LoRA's embeddings show {} % of bobo's looks, a LoRA's {} %",
            figures=(looks("ED-LoRA"), looks("LoRA")),
        ),
        Sentence(
            page=PAGE,
            words="one embedding for all layers shows {} % of bobo's looks, groups {} % and layers {} %; textual "
            "inversion {} %, P+ {} %",
            figures=tuple(map(looks, (*variants, "textual inversion", "P+"))),
        ),
    ]


def of_seeds() -> list[Sentence]:
    ablations = record("training")["ablations"]
    usual, without = (ablations[name]["in"]["0"] for name in ("ED-LoRA", "without the class token"))
    return [
        Sentence(
            page=PAGE,
            words="which the base nearly knows ({} and {} points at scale 0)",
            figures=(
                decimals(usual["alignment"] - without["alignment"]),
                percent(usual["attributes"] - without["attributes"]),
            ),
        ),
        Sentence(
            page=PAGE,
            words="Five seeds of bobo lie between {} and {} at scale 0, of nono between {} and {}",
            figures=(*span("bobo"), *span("nono")),
        ),
    ]


def of_speed() -> list[Sentence]:
    results = record("training-speed-toyland-cpu")["results"]
    plain, compiled = results["ratio"], results["both U-Nets compiled"]["ratio"]
    figures = (decimals(value) for each in (plain, compiled) for value in (each["median"], *each["quartiles"][::2]))
    return [
        Sentence(
            page="docs/ed_lora.md",
            words="layer-wise texts included, {} times as fast (median of 147 pairs of steps on one thread, quartiles "
            "{} and {}; record in `benchmarks/records/training-speed-toyland-cpu.json`), and with both U-Nets "
            "compiled (`--compile`) {} times (quartiles {} and {}).",
            figures=tuple(figures),
        ),
    ]
