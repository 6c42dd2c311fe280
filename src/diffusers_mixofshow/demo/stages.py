"""Run the demo's six stages: photos, tuning, fusion, sampling, measuring, report."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from diffusers_mixofshow.atomic import refuse_overwriting, write_whole
from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.demo.settings import DemoConcept, DemoSettings
from diffusers_mixofshow.errors import ConfigurationError, FileWriteError
from diffusers_mixofshow.notes import make_sheet_note, write_with_note
from diffusers_mixofshow.progress import progress


if TYPE_CHECKING:
    from diffusers_mixofshow.demo.measuring import Measures
    from diffusers_mixofshow.demo.sampling import Pictures

_MARK = "demo.json"
"""File that holds the settings of the demo in its folder."""
_NO_MATTER = ("folder", "workers", "overwrite")
"""Settings that may differ when a demo is continued, as they do not change its results."""
_FOLDERS = ("photos", "concepts", "average", "fused", "sheets")
"""Subfolders of a demo's folder."""


@dataclass(frozen=True)
class _Stages:
    """Announces each stage and measures its duration."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def __call__(self, name: str, description: str, total: int) -> Iterator[Any]:
        """Show a progress bar of `total` steps for one stage, the block, and record its seconds."""
        self.console.print(f"[bold]{len(self.seconds) + 1}/6[/bold] {description}")
        start = time.monotonic()
        with progress(f"    {name}", total) as bar:
            yield bar
        self.seconds[name] = round(time.monotonic() - start, 1)


def run_demo(settings: DemoSettings, *, console: Console) -> Path:
    """Run the whole demo; finished ED-LoRAs in its folder are used again.

    Args:
        settings: The demo's settings.
        console: Prints stages and a summary.

    Returns:
        The page, ``folder/index.html``.
    """
    from diffusers_mixofshow.demo.photos import read_own

    console.print("[dim]Starting ...[/dim]")
    read_own(settings)  # what is wrong with them is said before anything is written
    _claim_folder(settings)
    stages = _Stages(console)
    concepts = _write_photos(settings, stages)
    singles = _tune(concepts, settings, stages)
    pictures = _fuse_and_sample(concepts, singles, settings, stages)
    measures = _measure(concepts, pictures, stages)
    with stages("report", "Writing the page", 1) as bar:
        page = _write_report(concepts, pictures, measures, settings, stages.seconds)
        bar.update()
    _print_summary(measures, stages, console)
    return page


def _claim_folder(settings: DemoSettings) -> None:
    """Mark the folder as this demo's; refuse one with other content, or remove another demo's if that is allowed."""
    folder, told = settings.folder, asdict(settings)
    identity = json.dumps({name: told[name] for name in told if name not in _NO_MATTER}, sort_keys=True, default=str)
    mark = folder / _MARK
    try:
        earlier = mark.read_text(encoding="utf-8") if mark.is_file() else None
        if earlier != identity:
            refuse_overwriting(*_list_visible(folder), overwrite=settings.overwrite, otherwise="Choose another folder")
        if earlier not in (None, identity):
            for name in _FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
        write_whole(mark, identity.encode())
    except FileWriteError as error:
        raise ConfigurationError(f"The demo's folder {folder} cannot be written ({error}).") from error


def _list_visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _write_photos(settings: DemoSettings, stages: _Stages) -> list[DemoConcept]:
    from diffusers_mixofshow.demo.photos import prepare_photos

    with stages("photos", "Photos of every concept", len(settings.concepts)) as bar:
        concepts = prepare_photos(settings)
        bar.update(len(concepts))
    return concepts


def _tune(concepts: Sequence[DemoConcept], settings: DemoSettings, stages: _Stages) -> dict[str, Path]:
    from diffusers_mixofshow.demo.tuning import tune_all, tuning_config

    totals = {each.name: tuning_config(each, settings).total_steps for each in concepts}
    done, lock = dict.fromkeys(totals, 0), threading.Lock()
    with stages("tuning", "One ED-LoRA for every concept, from its photos alone", sum(totals.values())) as bar:

        def on_step(name: str, step: int, total: int, loss: float) -> None:
            with lock:  # each concept's thread calls this
                before = sum(done.values())
                done[name] = step
                bar.set_postfix_str(", ".join(f"<{each}> {done[each]}/{totals[each]}" for each in done), refresh=False)
                bar.update(sum(done.values()) - before)  # bar.n stays 0 where bars are off

        return tune_all(concepts, settings, on_step)


def _fuse_and_sample(
    concepts: Sequence[DemoConcept], singles: Mapping[str, Path], settings: DemoSettings, stages: _Stages
) -> Pictures:
    from diffusers_mixofshow import toyland
    from diffusers_mixofshow.demo.fusing import METHODS, fuse_all
    from diffusers_mixofshow.demo.sampling import picture_count, sample_all
    from diffusers_mixofshow.pipelines import MixOfShowPipeline

    pipe = toyland.load_pipeline(pipeline_class=MixOfShowPipeline)
    with stages("fusion", "Fusing all ED-LoRAs into one, without any photo", len(METHODS)) as bar:
        packs = {f"single/{name}": folder for name, folder in singles.items()}
        packs |= fuse_all(pipe, list(singles.values()), settings, bar.update)
    with stages("sampling", "Every concept alone, and three together", picture_count(settings)) as bar:
        pictures = sample_all(pipe, concepts, packs, settings, bar.update)
        _write_sheets(concepts, pictures, settings)
    return pictures


def _write_sheets(concepts: Sequence[DemoConcept], pictures: Pictures, settings: DemoSettings) -> None:
    """Write a sheet of each concept (photos, then a row per method), and one of several with and without regions."""
    from diffusers_mixofshow.demo.photos import read_photo_images
    from diffusers_mixofshow.demo.sampling import first_seeds, prompts_alone, prompts_together
    from diffusers_mixofshow.sheets import draw_labelled_sheet

    alone, several = first_seeds(settings)
    sheets = {"together": {"with regions": pictures.regional, "without": pictures.unguided}}
    class_words = {concept.name: concept.class_word for concept in concepts}
    together = _number_prompts(prompts_together(pictures.order, class_words), several)
    asked = {"together": {"with regions": together, "without": together}}
    for concept in concepts:
        rows = {method: of_method[concept.name] for method, of_method in pictures.alone.items()}
        sheets[concept.name] = {"photos": read_photo_images(concept), **rows}
        asked[concept.name] = {
            method: _number_prompts(prompts_alone(method, concept, settings), alone) for method in pictures.alone
        }
    for name, rows in sheets.items():
        note = make_sheet_note(asked[name], base_model=TOYLAND, steps=settings.steps, guidance=settings.guidance_scale)
        write_with_note(settings.folder / "sheets" / f"{name}.png", draw_labelled_sheet(rows, scale=2), "PNG", note)


def _number_prompts(prompts: Sequence[str], first_seed: int) -> list[tuple[str, int]]:
    """Pair prompts with their seeds, each one higher than the last."""
    return [(prompt, first_seed + number) for number, prompt in enumerate(prompts)]


def _measure(concepts: Sequence[DemoConcept], pictures: Pictures, stages: _Stages) -> Measures:
    from diffusers_mixofshow.demo.measuring import measure_all
    from diffusers_mixofshow.evaluation.toyland_judge import ToylandJudge

    with stages("measuring", "Measuring identity, alone and in regions", 1) as bar:
        measures = measure_all(concepts, pictures, ToylandJudge.load())
        bar.update()
    return measures


def _write_report(
    concepts: Sequence[DemoConcept],
    pictures: Pictures,
    measures: Measures,
    settings: DemoSettings,
    seconds: Mapping[str, float],
) -> Path:
    from diffusers_mixofshow.demo.page import write_page
    from diffusers_mixofshow.demo.photos import read_photo_images

    photos = {concept.name: read_photo_images(concept) for concept in concepts}
    report = _make_record(measures, settings, seconds)
    text = json.dumps(report, indent=2, default=str) + "\n"
    (settings.folder / "report.json").write_text(text, encoding="utf-8")
    return write_page(settings.folder / "index.html", concepts, photos, pictures, measures, report)


def _make_record(measures: Measures, settings: DemoSettings, seconds: Mapping[str, float]) -> dict[str, Any]:
    from diffusers_mixofshow.evaluation import record

    return {
        **record.run_info(Path(__file__).parent),
        "settings": _without_folders(asdict(settings)),
        "seconds": dict(seconds),
        **measures.as_record(),
    }


def _without_folders(value: Any) -> Any:
    """Settings with only the last part of every path, as folders are private; of texts, absolute paths are such."""
    if isinstance(value, Mapping):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one) for one in value]
    if isinstance(value, Path) or (isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())):
        return Path(value).resolve().name
    return value


def _print_summary(measures: Measures, stages: _Stages, console: Console) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    table = Table("identity, mean over concepts", "like the photos", "looks read right", "nearest photos its own")
    for method, identity in measures.mean.items():
        table.add_row(method, f"{identity.alignment:.3f}", percent(identity.attributes), percent(identity.nearest))
    console.print(table)
    for method, kept in measures.retention.items():
        console.print(
            f"Identity kept by {method}: {percent(kept['attributes'])} (looks), "
            f"{percent(kept['alignment'])} (like the photos)"
        )
    for name, measure in (("Right concept in its region", "regions"), ("Looks read right there", "looks")):
        shares = [percent(measures.regions[method][measure]) for method in ("regional", "unguided")]
        console.print(f"{name}: {shares[0]} with regions, {shares[1]} without")
    console.print(f"[dim]How sure each number is stands on the page. {sum(stages.seconds.values()):.0f} s[/dim]")
