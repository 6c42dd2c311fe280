"""Figures of fusion: what is kept by which method, against the paper's solver, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from figures.reading import (
    Row,
    Sentence,
    apart_alone,
    decimals,
    decimals_with_interval,
    difference,
    kept_apart,
    mean_kept,
    mean_of,
    over_concepts,
    percent,
    percent_with_interval,
    record,
    table,
)

from diffusers_mixofshow.evaluation.intervals import mean_with_interval


PAGE, METHOD_PAGE, TUNING_PAGE = "docs/benchmarks_fusion.md", "docs/gradient_fusion.md", "docs/ed_lora.md"
HARD_CASE = "toyland"
SSR_AS_PUBLISHED = "ssr:prompts=1,steps=1,ridge=0.001,sequential=false"
METHODS = {
    "closed-form": "closed form",
    "closed-form:without=night": "closed form, no night recorded",
    "lbfgs": "LBFGS, at most 500 / 50 steps",
    "ssr": "SSR-Merge's form",
    SSR_AS_PUBLISHED: "SSR-Merge, one prompt in one step",
    "average": "average",
    "dare": "DARE",
    "svd": "SVD",
    "ties": "TIES",
    "sum": "sum",
}
TUNED_BY = {
    "LoRA": [f"table1-lora-seed{seed}" for seed in range(3)],
    "P+": [f"table1-pplus-seed{seed}" for seed in range(3)],
    "Custom Diffusion": [f"table1-custom-seed{seed}" for seed in range(3)],
    "ED-LoRA": [f"retention-seed{seed}" for seed in range(3)],
}
"""How concepts were tuned, and the records of their tunings."""
FUSED_BY = {"average": "averaged", "closed-form": "gradient fusion"}
"""Methods for concepts of every way of tuning."""
KEPT = {"attributes": "looks", "shapes": "shapes", "alignment": "alignment"}
"""Measures of which a share is kept; records of before 29 November 2026 have no shapes apart from looks."""
OTHER_WAYS = {
    "closed-form:ridge=0.1": "closed form, ridge 0.1",
    "lbfgs": "LBFGS",
    "ssr": "SSR-Merge's form, our recording",
    "ssr:own recording": "SSR-Merge, one prompt in one step",
    "average": "average",
    "svd": "SVD",
    "dare": "DARE",
    "ties": "TIES",
    "sum": "sum",
    "closed-form:weights alone": "weights in place of features",
}
"""Ways of merging beside the closed form, as `benchmarks/rivals.py` names them."""
IN_RETENTION = {
    "ssr:own recording": SSR_AS_PUBLISHED,
    "closed-form:weights alone": "closed-form:features=none",
}
"""The same as `benchmarks/retention.py` names them, where that is not their name here."""
GROUPS = {
    "text q k v": ("text q k v", "text out"),
    "cross k v 320": ("cross k v 320",),
    "cross k v 640": ("cross k v 640",),
    "cross k v 1280": ("cross k v 1280",),
    "self q k v 320": ("self q k v 320", "out, cross q 320"),
    "self q k v 640": ("self q k v 640", "out, cross q 640"),
    "self q k v 1280": ("self q k v 1280", "out, cross q 1280"),
}
"""Layers of SD 1.5 that see the same inputs or inputs of one width, as one row."""
OWN_LAYERS = {
    "closed-form": "nothing",
    "closed-form:own=text-kv": "text keys and values",
    "closed-form:own=text-encoder": "text encoder",
    "closed-form:own=spatial": "queries, outputs, self-attention",
}
RIDGES: dict[str, tuple[str, str]] = {
    "closed-form": ("the fused model, in stages", "1e-3"),
    "closed-form:ridge=0.1": ("", "0.1"),
    "closed-form:ridge=auto": ("", "`auto`"),
    "closed-form:prior=0.1": ("", "1e-3, `prior=0.1`"),
    "closed-form:text_tokens=concept": ("", '1e-3, `text_tokens="concept"`'),
    "closed-form:dtype=float32": ("", "1e-3, pack in float32"),
    "closed-form:sequential=false,ridge=0.001": ("each concept's own model", "1e-3"),
    "closed-form:sequential=false": ("", "0.03"),
    "closed-form:sequential=false,ridge=0.1": ("", "0.1"),
    "closed-form:sequential=false,statistics_bytes=80000": ("", "0.03, statistics cut down to 7 %"),
}
START_TOKEN = {
    "closed-form": "closed form in stages",
    "closed-form:sequential=false": "each concept's own statistics, ridge 0.03",
    "closed-form:sequential=false,ridge=0.001": "the same, ridge 1e-3",
    "average": "average",
}


SEEDS = tuple(f"retention-seed{seed}" for seed in range(3))
"""Records of three tunings of the same concepts."""
XL_TUNINGS = ("retention-xl", "retention-xl-seed1", "retention-xl-seed2")
"""Records of tunings of eight critters on `toyland-xl`; the first one has fourteen concepts as well."""
TRANSFORMER_TUNINGS = ("transformer", "transformer-seed1", "transformer-seed2")
"""Records of tunings of eight plain LoRAs on `toyland-sd3`."""
FIVE_STEPS = tuple(f"retention-steps-seed{seed}" for seed in range(3))
"""Records of the same tunings, recorded in five steps."""


def tables() -> dict[str, str]:
    """Every table by its name."""
    return {
        "hard case": hard_case(),
        "methods, 8 concepts": methods(SEEDS, "8"),
        "methods, 14 concepts": methods(SEEDS, "14"),
        "tuned in four ways, 8 concepts": tuned_in_four_ways("8"),
        "tuned in four ways, 14 concepts": tuned_in_four_ways("14"),
        "methods, 30 concepts": methods(["retention-30"], "30"),
        "methods on Stable Diffusion XL, 8 concepts": methods(XL_TUNINGS, "8"),
        "methods on Stable Diffusion XL, 14 concepts": methods(["retention-xl"], "14"),
        "methods on a transformer": methods(TRANSFORMER_TUNINGS, "8", alone="each concept's own LoRA"),
        "methods on a transformer, names not learnt": methods(
            ["transformer-names-not-learnt"], "8", alone="each concept's own LoRA"
        ),
        "every way of merging": rivals(),
        "own layers": own_layers(),
        "cheats": cheats(),
        "against LBFGS": against_lbfgs(),
        "ridges at true sizes": ridges_at_true_sizes(),
        "ridges on Toyland": ridges_on_toyland(),
        "files": files(),
        "scale": scale(),
        "ridges": ridges(),
        "recording": recording(),
        "start token": start_token(),
    }


def hard_case() -> str:
    of_each, means = (record(HARD_CASE)[key] for key in ("identity", "mean_identity"))
    measures = {"attributes": percent_with_interval, "alignment": decimals_with_interval}
    names = {
        "single": ("each concept's own ED-LoRA", "100 %"),
        "average": ("weight average", ""),
        "closed_form": ("**gradient fusion**", ""),
        "class_word": ("class word alone", "0 %"),
    }
    rows = []
    for key, (name, by_definition) in names.items():
        cells = []
        for measure, word in measures.items():
            shown, own = ([row[measure] for row in of_each[each].values()] for each in (key, "single"))
            gained = means["single"][measure] - means["class_word"][measure]
            # What a concept loses of its own file's, so that what is hard about it for both does not count.
            kept = [1 + (one - other) / gained for one, other in zip(shown, own, strict=True)]
            cells += [
                word(mean_with_interval(shown)),
                by_definition or percent_with_interval(mean_with_interval(kept)),
            ]
        rows.append([name, *cells])
    return table(("", "looks read right", "kept", "like the photos", "kept"), rows)


def results_of(name: str, count: str = "8") -> Mapping[str, Any]:
    """The rows of a record of `benchmarks/retention.py`."""
    results: Mapping[str, Any] = record(name)["results"][count]
    return results


def methods(seeds: Sequence[str], count: str, alone: str = "each concept's own ED-LoRA") -> str:
    """What each method keeps, also minus what the closed form keeps, text-alignment and drift; means over seeds."""
    results = rows_of(seeds, count)
    first = results["closed-form"]
    measures = [each for each in KEPT if each in first[0]["single"]]
    rows = [
        [name, *[share, ""] * len(measures), decimals(mean_of(first, f"text_alignment_of_{which}"), 3), drift]
        for name, share, which, drift in ((alone, "1", "single", ""), ("class word alone", "0", "class_word", "0"))
    ]
    for method, label in METHODS.items():
        if of_method := results.get(method):
            text, drift = mean_of(of_method, "text_alignment"), mean_of(of_method, "drift", "features")
            rows.append([label, *kept_beside(of_method, first, measures), decimals(text, 3), decimals(drift, 3)])
    head = [title for each in measures for title in (f"{KEPT[each]} kept", "minus the closed form's")]
    return table(("", *head, "text-alignment", "drift"), rows)


def rows_of(seeds: Sequence[str], count: str) -> dict[str, list[Row]]:
    """Method to its rows of the records of several seeds."""
    results = [results_of(name, count) for name in seeds]
    return {method: [each[method] for each in results] for method in results[0]}


def kept_beside(
    rows: Sequence[Row], first: Sequence[Row], measures: Sequence[str] = ("attributes", "alignment")
) -> list[str]:
    """What is kept by each measure, behind it what that is apart from the first rows'; nothing in these themselves."""
    cells = []
    for measure in measures:
        apart = "" if rows == first else difference(kept_apart(rows, first, measure))
        cells += [decimals(mean_kept(rows, measure)), apart]
    return cells


def tuned_in_four_ways(count: str) -> str:
    """Concepts of four ways of tuning, alone, averaged and fused, with intervals over concepts and their tunings."""
    rows = []
    own = {method: found for method in FUSED_BY if (found := rows_of_tunings("ED-LoRA", count, method))}
    for label in TUNED_BY:
        alone = rows_of_tunings(label, count, "closed-form")
        rows.append([f"{label}, alone", *measured_in_four_ways(alone, "of_each_single"), "", ""])
        for method, way in FUSED_BY.items():
            of_way = rows_of_tunings(label, count, method)
            apart = kept_apart(of_way, own[method][: len(of_way)], "attributes")
            cells = [decimals(mean_kept(of_way, "attributes")), "" if label == "ED-LoRA" else difference(apart)]
            rows.append([f"{label}, {way}", *measured_in_four_ways(of_way, "of_each"), *cells])
    head = ("", "looks read right", "shapes", "like the photos", "text-alignment", "looks kept", "minus ED-LoRA's")
    return table(head, rows)


def rows_of_tunings(label: str, count: str, method: str) -> list[Row]:
    """Rows of the tunings by which so many concepts were fused."""
    return [found[method] for name in TUNED_BY[label] if (found := record(name)["results"].get(count))]


def measured_in_four_ways(rows: Sequence[Row], which: str) -> list[str]:
    """Every measure with its interval over concepts and their tunings."""
    shares = [percent_with_interval(over_concepts(rows, which, each)) for each in ("attributes", "shapes")]
    others = [decimals_with_interval(over_concepts(rows, which, each)) for each in ("alignment", "text_alignment")]
    return [*shares, *others]


def rivals() -> str:
    """What every way of merging misses of held-out outputs, what it keeps of looks, and what it costs."""
    ways, costs = record("rivals-toyland")["results"]["ways"], record("fusion-files-methods-cpu")["results"]
    kept = [rows_of(SEEDS, count) for count in ("8", "14")]
    groups = ("text", "cross k v", "cross q out", "self", "all")
    rows = []
    for way, label in {"closed-form": "**closed form**", **OTHER_WAYS}.items():
        missed = residuals(ways[way]["held_out"], groups)
        looks = [decimals(mean_kept(results[IN_RETENTION.get(way, way)], "attributes")) for results in kept]
        cost = costs.get("8 concepts" if way == "closed-form" else f"8 concepts, {way}")
        spent = (
            [f"{decimals(cost['processor_s'], 0)} s", f"{cost['peak_memory_mib']} MiB", f"{cost['pack_mb']:.0f} MB"]
            if cost
            else [""] * 3
        )
        rows.append([label, *missed, *looks, *spent])
    head = ("", *(f"misses: {group}" for group in groups), "looks kept of 8", "of 14")
    return table((*head, "time", "peak memory", "pack"), rows)


def own_layers() -> str:
    results = results_of("retention-8")
    first = [results["closed-form"]]
    rows = [[label, *kept_beside([results[method]], first)] for method, label in OWN_LAYERS.items()]
    return table(
        (
            "the concept's own in place of the fused",
            "looks kept",
            "minus the fused",
            "alignment kept",
            "minus the fused",
        ),
        rows,
    )


def cheats() -> str:
    rows = []
    for way, row in record("cheats")["results"].items():
        shares = [percent_with_interval(row[each]) for each in ("looks", "colours", "shapes")]
        texts = [decimals_with_interval(row["likeness"]), decimals_with_interval(row["text_alignment"])]
        rows.append([way, *shares, *texts])
    return table(("", "looks read right", "colours", "shapes", "like the photos", "text-alignment"), rows)


def against_lbfgs() -> str:
    results, rows = record("fusion-layers-cpu")["results"], []
    for label, groups in GROUPS.items():
        of_group = [results[group] for group in groups]
        training, validation = of_group[0]["training"], of_group[0]["validation"]
        times = " / ".join(decimals(each["time_ratio"], 0) for each in of_group)
        fitted = f"{decimals(training['LBFGS'], 3)} / {decimals(training['ridge 0'], 3)}"
        tried = ("LBFGS", "ridge 0", "ridge 1e-3", "ridge 1e-2", "ridge 1e-1", "usual in stages", "ridge chosen")
        rows.append([label, times, fitted, *(decimals(validation[each], 3) for each in tried)])
    head = ("layers", "times faster (q k v / single)", "training: LBFGS / no ridge", "validation: LBFGS", "no ridge")
    return table((*head, "ridge 1e-3", "ridge 1e-2", "ridge 0.1", "default in stages", "ridge chosen"), rows)


def ridges_at_true_sizes() -> str:
    results = record("fusion-layers-ridges-cpu")["results"]
    names = {
        "ridge 0": "no ridge",
        "ridge 1e-3": "1e-3",
        "ridge 1e-2": "1e-2",
        "ridge 3e-2": "3e-2",
        "ridge 1e-1": "0.1",
        "usual in stages": "default in stages",
        "usual of own features": "default, own model",
        "ridge chosen": "chosen",
    }
    rows = [
        [label, *(decimals(results[members[0]]["validation"][name], 3) for name in names)]
        for label, members in GROUPS.items()
    ]
    return table(("layers", *names.values()), rows)


def ridges_on_toyland() -> str:
    names = {
        "closed-form": "default in stages (.0024 to .0032)",
        "closed-form:ridge=0.01": "1e-2",
        "closed-form:ridge=0.1": "0.1",
        "closed-form:sequential=false": "default, own model (.024 to .032)",
        "average": "average",
    }
    counts = ("4", "8", "14")
    rows = []
    for method, label in names.items():
        cells: list[str] = []
        for of_count in (rows_of(SEEDS, count) for count in counts):
            cells += kept_beside(of_count[method], of_count["closed-form"])[:2]
        rows.append([label, *cells])
    heads = [head for count in counts for head in (f"{count} concepts: looks kept", "minus the default's")]
    return table(("ridge", *heads), rows)


def files() -> str:
    rows = [
        [
            name.split()[0],
            f"{decimals(row['processor_s'], 1)} s",
            f"{row['peak_memory_mib']} MiB",
            f"{decimals(row['pack_mb'], 1)} MB",
        ]
        for name, row in record("fusion-files-cpu")["results"].items()
    ]
    return table(("concepts", "processor time", "peak memory of the process", "pack"), rows)


def scale() -> str:
    results = record("fusion-scale-cpu")["results"]
    rows = [
        ["processor time", *(f"{decimals(row['cpu_s'], 1)} s" for row in results.values())],
        ["for each concept", *(f"{decimals(row['cpu_s_a_concept'])} s" for row in results.values())],
        ["peak memory", *(f"{decimals(row['peak_rss_mib'], 0)} MiB" for row in results.values())],
    ]
    return table(("concepts", *(name.split()[0] for name in results)), rows)


def kept_and_drift(row: Mapping[str, Any] | None, digits: int) -> list[str]:
    if row is None:
        return [""] * 3
    kept = [decimals(row["retention"][measure]) for measure in ("attributes", "alignment")]
    return [*kept, decimals(row["drift"]["features"], digits)]


def ridges() -> str:
    usual, fast = results_of("retention-8"), dict(results_of("retention-8-settings"))
    # In that record's time each concept's own model had another default.
    fast["closed-form:sequential=false"] = fast["closed-form:sequential=false,ridge=0.03"]
    rows = [
        [*labels, *kept_and_drift(usual[method], 2), *kept_and_drift(fast.get(method), 2)]
        for method, labels in RIDGES.items()
    ]
    head = ("recorded with", "ridge", "looks kept", "alignment kept", "drift")
    return table((*head, "too fast: looks", "alignment", "drift"), rows)


def recording() -> str:
    results = record("recording-curve-toyland-cpu")["results"]
    groups = ("text", "cross k v", "cross q out", "self", "all")
    rows = [["average, nothing recorded", "0", *residuals(results["average"], groups)]]
    for row in results["closed_form"]:
        if row["seeds"] == 1:
            label = f"{row['prompts']} x {row['steps']}"
            rows.append([label, str(row["evaluations"]), *residuals(row["residual"], groups)])
    return table(("prompts x steps", "evaluations a concept", *groups), rows)


def residuals(row: Mapping[str, Mapping[str, float]], groups: Sequence[str]) -> list[str]:
    """What is missed in each group of layers, with its interval over concepts in the last, which has all layers."""
    means = [decimals(row[group]["mean"], 3).removeprefix("0") for group in groups]
    low, high = (decimals(row[groups[-1]][end], 3).removeprefix("0") for end in ("low", "high"))
    return [*means[:-1], f"{means[-1]} ({low} to {high})"]


def start_token() -> str:
    kept, changed = results_of("retention-8"), results_of("retention-8-changed-start-token")
    rows = []
    for method, label in START_TOKEN.items():
        apart = difference(kept_apart([kept[method]], [changed[method]], "attributes"))
        rows.append([label, *kept_and_drift(kept[method], 3), *kept_and_drift(changed[method], 3), apart])
    head = ("fused by", "start token kept: looks kept", "alignment kept", "drift")
    changed_head = ("changed: looks kept", "alignment kept", "drift", "looks: difference")
    return table((*head, *changed_head), rows)


def sentences() -> list[Sentence]:
    """Every sentence."""
    return [
        *of_the_page(),
        *of_tunings(),
        *of_methods(),
        *of_recording(),
        *of_start_tokens(),
        *of_size(),
        *of_readme(),
    ]


def kept_percent(rows: Sequence[Row]) -> tuple[str, str]:
    """Looks and alignment kept, in per cent, mean over seeds."""
    looks, alignment = (mean_kept(rows, measure) for measure in ("attributes", "alignment"))
    return percent(looks), percent(alignment)


def parts(
    ones: Sequence[Row], others: Sequence[Row], measure: str, word: Callable[[float], str] = decimals
) -> list[str]:
    """A difference and the ends of its interval."""
    apart = kept_apart(ones, others, measure)
    return [word(apart[each]) for each in ("mean", "low", "high")]


def of_the_page() -> list[Sentence]:
    fourteen, small = rows_of(SEEDS, "14"), results_of("retention-8")["closed-form:ridge=0.0001"]["retention"]
    of_xl = rows_of(XL_TUNINGS, "8")["closed-form"]
    totals = record("fusion-layers-cpu")["totals"]
    return [
        Sentence(
            page=PAGE,
            words="gradient fusion keeps **{} %** of the looks and {} % of the likeness, the average {} % and {} %; "
            "LBFGS, the paper's solver, {} % and {} %",
            figures=(
                *kept_percent(fourteen["closed-form"]),
                *kept_percent(fourteen["average"]),
                *kept_percent(fourteen["lbfgs"]),
            ),
        ),
        Sentence(
            page=PAGE,
            words="With their own ED-LoRA the eight show {} % of their looks",
            figures=(percent(mean_of(of_xl, "single", "attributes")),),
        ),
        Sentence(
            page=PAGE,
            words="a smaller ridge (1e-4: {}, {})",
            figures=(decimals(small["attributes"]), decimals(small["alignment"])),
        ),
        Sentence(
            page=PAGE,
            words="the closed form takes {} s against {} s, {} times faster; with a ridge chosen for every layer, {} "
            "times.",
            figures=tuple(
                decimals(value, 0)
                for value in (
                    totals["closed form"],
                    totals["LBFGS"],
                    totals["time ratio"],
                    totals["time ratio, ridge chosen"],
                )
            ),
        ),
    ]


def of_tunings() -> list[Sentence]:
    starts = {"8": "Eight critters; tunings of each", "14": "Fourteen concepts; tunings"}
    plain, own = ([rows_of_tunings(label, "8", method) for method in FUSED_BY] for label in ("LoRA", "ED-LoRA"))
    kept_of_each = [percent(mean_kept(rows, "attributes")) for pair in zip(own, plain, strict=True) for rows in pair]
    apart = parts(own[0][: len(plain[0])], plain[0], "attributes", percent)
    return [
        Sentence(
            page="README.md",
            words="averaged, ED-LoRAs keep {} % of their looks, plain LoRAs {} %, which is {} points less ({} to {}); "
            "fused, {} % and {} %",
            figures=(*kept_of_each[:2], *apart, *kept_of_each[2:]),
        ),
        of_one_concept(),
        *(
            Sentence(
                page=PAGE,
                words=start + ": " + ", ".join(f"{label} {{}}" for label in TUNED_BY) + ":",
                figures=tuple(str(len(rows_of_tunings(label, count, "average"))) for label in TUNED_BY),
            )
            for count, start in starts.items()
        ),
    ]


def of_one_concept() -> Sentence:
    plain, own = (rows_of_tunings(label, "14", "closed-form") for label in ("LoRA", "ED-LoRA"))
    apart = apart_alone(plain, own, "attributes")
    looks, likeness = (
        [over_concepts(rows, "of_each_single", measure)["mean"] for rows in (own, plain)]
        for measure in ("attributes", "alignment")
    )
    return Sentence(
        page="README.md",
        words="no: it shows {} % of the looks, a plain LoRA {} %, {} points more ({} to {}), which may be chance; "
        "like the photos {} and {}",
        figures=(
            *map(percent, looks),
            *(percent(apart[each]) for each in ("mean", "low", "high")),
            *map(decimals, likeness),
        ),
    )


def of_methods() -> list[Sentence]:
    eight = results_of("retention-8")
    whole, cut = ([eight[f"closed-form:sequential=false{more}"]] for more in ("", ",statistics_bytes=80000"))
    return [
        Sentence(
            page=PAGE,
            words="costs {} ({} to {}) of the looks and {} ({} to {}) of the alignment, for a fourteenth",
            figures=(*parts(whole, cut, "attributes"), *parts(whole, cut, "alignment")),
        ),
        Sentence(
            page=METHOD_PAGE,
            words="a share that costs {} of the looks on Toyland",
            figures=(parts(whole, cut, "attributes")[0],),
        ),
    ]


def of_recording() -> list[Sentence]:
    rows = record("recording-curve-toyland-cpu")["results"]["closed_form"]
    missed = {
        (row["prompts"], row["steps"], row["seeds"]): decimals(row["residual"]["all"]["mean"], 3) for row in rows
    }
    return [
        Sentence(
            page=METHOD_PAGE,
            words="Five steps of every prompt do as well as twenty ({} and {} of all layers with eight prompts) at a "
            "quarter of the time, and a second seed adds as little ({}).",
            figures=(missed[8, 5, 1], missed[8, 20, 1], missed[8, 20, 2]),
        ),
        Sentence(
            page=METHOD_PAGE,
            words="the looks that are kept differ by {} ({} to {}) of eight critters and by {} ({} to {}) of fourteen "
            "concepts from those of twenty steps",
            figures=tuple(figure for count in ("8", "14") for figure in lost_with_five_steps(count)),
        ),
    ]


def lost_with_five_steps(count: str) -> list[str]:
    """How the looks kept by five steps of recording differ from those by twenty, and the ends of the interval."""
    rows = rows_of(FIVE_STEPS, count)
    return parts(rows["closed-form:steps=5"], rows["closed-form"], "attributes", partial(decimals, digits=3))


def of_start_tokens() -> list[Sentence]:
    longer = results_of("retention-8-changed-start-token")["closed-form"]
    shorter = results_of("retention-8-short-embedding-phase")["closed-form"]
    alone = [row["single"]["attributes"] for row in (results_of("retention-8")["closed-form"], longer)]
    if decimals(alone[0]) != decimals(alone[1]):
        raise SystemExit(f"{TUNING_PAGE} says that concepts alone show as much either way, but records say {alone}.")
    return [
        Sentence(
            page=TUNING_PAGE,
            words="with 200 of 400 steps {} of the looks and {} of the alignment are kept and other prompts drift "
            "by {}; with 100 of 350, {}, {} and {}.",
            figures=(*kept_and_drift(longer, 2), *kept_and_drift(shorter, 2)),
        ),
        Sentence(
            page=TUNING_PAGE,
            words="The looks differ by {} ({} to {}), the alignment by {} ({} to {}).",
            figures=(*parts([longer], [shorter], "attributes"), *parts([longer], [shorter], "alignment")),
        ),
        Sentence(
            page=TUNING_PAGE,
            words="Drawn alone, concepts show as much either way ({} of the looks).",
            figures=(decimals(alone[0]),),
        ),
    ]


def of_size() -> list[Sentence]:
    wide, sums = record("fusion-wide-cpu"), record("statistics-wide-cpu")["results"]
    flux, klein = sums["FLUX.1"], sums["FLUX.2 klein 4B"]
    files = record("fusion-files-cpu")["results"]["14 concepts"]
    return [
        Sentence(
            page=METHOD_PAGE,
            words="need gigabytes of Gram matrices: {} GB for FLUX.1",
            figures=(decimals(flux["as_matrices_gb"], 0),),
        ),
        Sentence(
            page=METHOD_PAGE,
            words="hold {} GB for FLUX.1 and {} GB for FLUX.2 klein 4B",
            figures=(decimals(flux["its_sums_gb"]), decimals(klein["its_sums_gb"])),
        ),
        Sentence(
            page=METHOD_PAGE,
            words="by its shapes {} MB for FLUX.1 with all {} layers",
            figures=(decimals(wide["default_statistics_bytes"] / 1e6, 0), str(wide["layers"])),
        ),
        Sentence(
            page=METHOD_PAGE,
            words="two cores: {} s and at most {} GB, in one run",
            figures=(
                decimals(wide["results"]["seconds"], 0),
                decimals(wide["results"]["peak_memory_mib"] * 2**20 / 1e9, 1),
            ),
        ),
        Sentence(
            page=METHOD_PAGE,
            words="The result is {} GB, as its rank is 128",
            figures=(decimals(wide["results"]["pack_mb"] / 1000, 1),),
        ),
        Sentence(
            page="README.md",
            words="layer sizes in {} s of one CPU thread and {} MiB",
            figures=(decimals(files["processor_s"], 0), str(files["peak_memory_mib"])),
        ),
    ]


def of_readme() -> list[Sentence]:
    fourteen, eight = rows_of(SEEDS, "14"), rows_of(SEEDS, "8")
    of_transformer, of_xl = rows_of(TRANSFORMER_TUNINGS, "8"), rows_of(XL_TUNINGS, "8")
    return [
        Sentence(
            page="README.md",
            words="closed form {} %, SSR-Merge's form {} %, TIES {} %, average {} %: with nothing but the words",
            figures=tuple(
                kept_percent(of_transformer[method])[0] for method in ("closed-form", "ssr", "ties", "average")
            ),
        ),
        Sentence(
            page="README.md",
            words="closed form {} %, average {} %, which is {} points less ({} to {}); "
            "LBFGS, the paper's solver, {} %; SSR-Merge {} %, TIES {} %",
            figures=(
                kept_percent(fourteen["closed-form"])[0],
                kept_percent(fourteen["average"])[0],
                *parts(fourteen["closed-form"], fourteen["average"], "attributes", percent),
                *(kept_percent(fourteen[method])[0] for method in ("lbfgs", SSR_AS_PUBLISHED, "ties")),
            ),
        ),
        Sentence(
            page="README.md",
            words="of the looks {} % kept, average {} %, which is {} points less ({} to {}); "
            "of the likeness to the photos {} % and {} %",
            figures=(
                kept_percent(eight["closed-form"])[0],
                kept_percent(eight["average"])[0],
                *parts(eight["closed-form"], eight["average"], "attributes", percent),
                kept_percent(eight["closed-form"])[1],
                kept_percent(eight["average"])[1],
            ),
        ),
        Sentence(
            page="README.md",
            words="of the looks {} % kept, average {} %, which is {} points less ({} to {}); three side by side",
            figures=(
                kept_percent(of_xl["closed-form"])[0],
                kept_percent(of_xl["average"])[0],
                *parts(of_xl["closed-form"], of_xl["average"], "attributes", percent),
            ),
        ),
    ]
