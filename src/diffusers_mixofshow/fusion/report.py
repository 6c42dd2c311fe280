"""The report of a fusion, how well every concept is kept: JSON in the pack, a table, a picture."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffusers_mixofshow.atomic import check_outputs, write_picture
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import sanitise
from diffusers_mixofshow.edlora.fusion_record import (
    CARRIED,
    Residuals,
    as_mapping,
    as_number,
    find_layer_residuals,
    find_mean_residuals,
    list_members,
)
from diffusers_mixofshow.edlora.hub import is_repo_id
from diffusers_mixofshow.errors import FusionError
from diffusers_mixofshow.families import family_of_sites
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.fusion.heat_map import Column, draw_heat_map
from diffusers_mixofshow.fusion.solving import Settings, Solution
from diffusers_mixofshow.fusion.sources import Source, shares
from diffusers_mixofshow.interop.trigger_words import TOLD, find_said_words


POOR = 0.95
"""A concept whose mean relative residual is this or higher is named in a warning; 1 is the base without fusion.

A high residual alone says little: fusing eight critters of Toyland leaves 0.84 on average and keeps 90 % of their
looks, because much of the residual is on features that all of them share.
"""

TITLE = "What each concept loses of its features if averaged, and as fused (0: nothing, 1: all of them)"
_MEANING = (
    "The loss, or residual, is about features, not identity: compare 'fused' with 'averaged', what a weighted average "
    "leaves."
)
_MEASURED = (
    "Around 0.6, concepts of 'mixofshow demo' keep nearly all of their looks, and eight of one class at 0.84 still "
    "keep 90 %; what yours keep, 'mixofshow evaluate' measures."
)
_NOT_MEASURED = "By itself it says little: measure the result with 'mixofshow evaluate' or 'mixofshow compare'."
_OVERLAP = (
    "An overlap says how far two of them act on the same directions of the layers' inputs, where one output has to "
    "serve both: 0 on none, 1 on all of them. Compare the pairs with each other."
)
_PAIRS_SHOWN = 3


@dataclass(frozen=True)
class FusionReport:
    """The report of a fused pack; ``training["fusion"]`` of its file is the same thing as JSON.

    Args:
        data: The report, JSON values only.
    """

    data: Mapping[str, Any]

    @classmethod
    def of(cls, edlora: EDLoRA) -> FusionReport:
        """Read the report of an ED-LoRA.

        Raises:
            FusionError: If it was not fused.
        """
        data = edlora.training.get("fusion")
        if not isinstance(data, Mapping):
            raise FusionError("This ED-LoRA was not fused, so there is no report of its fusion.")
        return cls(data)

    @staticmethod
    def record(
        sources: Sequence[Source], settings: Settings, solution: Solution, further: Mapping[str, object]
    ) -> dict[str, object]:
        """Convert the solution of fused sources, with `further` settings and times, to a report of JSON values."""
        solved: dict[str, object] = {name: getattr(settings, name) for name in ("method", "ridge", "max_rank")}
        record = {**solved, **further, **_peak_memory(), "sources": _provenance(sources)}
        record["prompts"] = {name: list(prompts) for source in sources for name, prompts in source.prompts.items()}
        record["layers"] = {
            site: {key: float(f"{value:.4g}") for key, value in numbers.items()}
            for site, numbers in solution.layers.items()
            if numbers
        }
        if solution.residuals:
            record["residuals"] = _residual_report(sources, solution)
            record["overlaps"] = {
                f"{one} {other}": round(value / solution.inputs, 4)
                for (one, other), value in solution.overlaps.items()
            }
        return record

    @property
    def residuals(self) -> Residuals:
        """Source to its mean relative residual over layers, ``average`` and ``fused``; empty if none was measured."""
        return find_mean_residuals(self.data)

    @property
    def poor(self) -> tuple[str, ...]:
        """Sources whose mean residual is `POOR` or higher, the worst first."""
        fused = {name: mean["fused"] or 0.0 for name, mean in self.residuals.items()}
        return tuple(sorted((name for name, value in fused.items() if value >= POOR), key=lambda name: -fused[name]))

    @property
    def conflicts(self) -> tuple[tuple[str, str, float], ...]:
        """Pairs of sources with their mean overlap, 0 to 1, the largest first; see `solvers.overlaps`."""
        found = [(*pair.partition(" ")[::2], as_number(value)) for pair, value in self._mapping("overlaps").items()]
        pairs = [(one, other, value) for one, other, value in found if value is not None]
        return tuple(sorted(pairs, key=lambda pair: -pair[2]))

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for every source in `poor`."""
        return tuple(
            f"{name} is hardly kept (mean residual {self.residuals[name]['fused']}, where 1 is the base alone): give "
            "it a larger weight, fuse fewer concepts, or record prompts that are nearer to its use."
            for name in self.poor
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The table that `print` shows, as strings: the column names, and a row for each concept.

        Kinds of layers have columns of their own if there are several.
        """
        groups = self._groups if len(self._groups) > 1 else {}
        rows = [
            [
                name,
                _number(mean["average"]),
                _number(mean["fused"]),
                *(self._mean(name, sites) for sites in groups.values()),
            ]
            for name, mean in self.residuals.items()
        ]
        return ["concept", "averaged", "fused", *(f"fused: {group}" for group in groups)], rows

    @property
    def meaning(self) -> str:
        """What the table's numbers say, in a few sentences; how much is kept only where that was measured."""
        family = family_of_sites(self._layers)
        is_measured = family is STABLE_DIFFUSION and all(name.startswith("<") for name in self.residuals)
        return f"{_MEANING} {_MEASURED if is_measured else _NOT_MEASURED}"

    @property
    def told_energy(self) -> str:
        """How much of the updates is left where `max_rank` reduced them; empty if it reduced none."""
        found = {site: as_number(as_mapping(one).get("energy_kept")) for site, one in self._mapping("layers").items()}
        kept = {site: energy for site, energy in found.items() if energy is not None}
        if self.data.get("max_rank") is None or not kept:
            return ""
        least, mean = min(kept, key=lambda site: kept[site]), sum(kept.values()) / len(kept)
        return (
            f"Reduced to rank {self.data['max_rank']}, {len(kept)} layers keep {mean:.1%} of "
            f"the energy of their updates (sum of the squares) in the mean, {kept[least]:.1%} at least ({least})."
        )

    @property
    def told_overlaps(self) -> tuple[str, ...]:
        """What an overlap is, and the pairs with the largest; empty if there are none."""
        pairs = [f"{one} and {other} {value:.2f}" for one, other, value in self.conflicts[:_PAIRS_SHOWN]]
        return (_OVERLAP, f"Largest overlaps (0 to 1): {', '.join(pairs)}") if pairs else ()

    def print(self, console: Console | None = None) -> None:
        """Print the residuals of every concept by kind of layer, the pairs with the largest overlap, and the energy.

        Of a fusion that measured nothing, only the energy that `max_rank` left.
        """
        console = console or Console()
        if self.residuals:
            self._print_residuals(console)
        if told := self.told_energy:
            console.print(told, highlight=False, markup=False, soft_wrap=True)

    def _print_residuals(self, console: Console) -> None:
        columns, rows = self.table()
        table = Table(*columns, title=TITLE)
        for name, *numbers in rows:
            table.add_row(escape(sanitise(name)), *numbers)
        console.print(table)
        console.print(self.meaning, highlight=False, markup=False, soft_wrap=True)
        for told in self.told_overlaps:
            console.print(told, highlight=False, markup=False, soft_wrap=True)

    def heat_map(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Draw layers (columns) by concepts (rows) as a PNG with a legend: white is kept, red is lost.

        Args:
            path: The file.
            overwrite: Replace a file that exists.

        Raises:
            FusionError: If the pack was fused without statistics, so that nothing was measured.
            OverwriteError: If the file exists.
        """
        check_outputs(Path(path), overwrite=overwrite)
        if not self._layers:
            raise FusionError("Nothing was measured when this pack was fused, so there is nothing to draw.")
        names = list(self.residuals)
        columns = [
            Column(site, group, [_lost(self._layers[site][name], alone=len(names) == 1) for name in names])
            for group, sites in self._groups.items()
            for site in sites
        ]
        path = Path(path)
        write_picture(path, draw_heat_map(names, columns))
        return path

    @property
    def _groups(self) -> dict[str, list[str]]:
        """Kind of layers to the layers, by name."""
        family = family_of_sites(self._layers)
        groups: dict[str, list[str]] = {}
        for site in self._layers:
            groups.setdefault(family.group_of(site), []).append(site)
        return dict(sorted(groups.items()))

    @property
    def _layers(self) -> dict[str, Residuals]:
        return find_layer_residuals(self.data)

    def _mapping(self, key: str) -> Mapping[str, Any]:
        """An entry of the data, which may come out of a stranger's file; empty if it is no mapping."""
        return as_mapping(self.data.get(key))

    def _mean(self, name: str, sites: Sequence[str]) -> str:
        known = [value for site in sites if (value := self._layers[site][name]["fused"]) is not None]
        return _number(sum(known) / len(known) if known else None)


def _peak_memory() -> dict[str, int]:
    """Peak memory of this process, and on the GPU, in MiB, where the system reports it."""
    peak: dict[str, int] = {}
    if sys.platform == "linux":  # where getrusage also counts the program that started this one
        if found := re.search(rb"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_bytes()):
            peak["peak_memory_mib"] = int(found[1]) // 2**10
    elif sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        peak["peak_memory_mib"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
    if torch.cuda.is_initialized():
        peak["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return peak


def _provenance(sources: Sequence[Source]) -> list[dict[str, object]]:
    """Each source's share, and where it came from; of a pack also what that was fused from."""
    members = [list_members(source.edlora.training) for source in sources]
    return [
        {
            "concepts": list(source.prompts),
            "weight": source.weight,
            "share": share,
            "scale": source.scale,
            # Local paths are private, and a reader must not open paths named in a file.
            "origin": source.origin if is_repo_id(source.origin) else "",
            "revision": source.revision,
            "digest": source.edlora.digest,
            "training": _training_of(source.edlora),
            **({"members": inside} if inside else {}),
        }
        for source, share, inside in zip(sources, shares(sources), members, strict=True)
    ]


def _training_of(edlora: EDLoRA) -> dict[str, object]:
    """The entry `training` of a source; in place of a pack's record the trigger words that files of its LoRAs told."""
    words = [each for told in find_said_words(edlora.training).values() for each in told]
    rest = {key: value for key, value in edlora.training.items() if key not in ("fusion", CARRIED)}
    return rest | ({TOLD: words} if words else {})


def _residual_report(sources: Sequence[Source], solution: Solution) -> dict[str, object]:
    """Residuals by layer and source, and their means; null where fusion changes a layer that the source does not."""

    def rounded(pairs: Collection[tuple[float, float]]) -> dict[str, float | None]:
        means = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
        average, fused = (None if value == float("inf") else round(value, 4) for value in means)
        return {"average": average, "fused": fused}

    layers = solution.residuals
    return {
        "meaning": "|D X_i - dW_i X_i| / |dW_i X_i|: relative output error per source, weighted average and fused",
        "mean": {source.name: rounded([layer[source.name] for layer in layers.values()]) for source in sources},
        "layers": {site: {name: rounded([pair]) for name, pair in layer.items()} for site, layer in layers.items()},
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _lost(residual: Mapping[str, float | None], *, alone: bool) -> float | None:
    """The fused residual of a layer; None if the source does not change the layer's outputs.

    Then the average is as good as its own update; that also holds of a source that is fused alone.
    """
    is_unchanged = residual["average"] == residual["fused"] == 0 and not alone
    return None if is_unchanged else residual["fused"]
