"""What can be seen of a training: sheets, curves, the card; and pictures of the class beside those of the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_mixofshow.errors import MissingExtraError
from diffusers_mixofshow.notes import read_note
from diffusers_mixofshow.training import EDLoRATrainer, StepReport, tracking
from infotext import parsed, text_of
from short_training import quick, same


class Notebook(GeneralTracker):
    """A tracker that keeps everything."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)
        self.curves: list[tuple[int | None, dict[str, float]]] = []
        self.pictures: list[int | None] = []
        self.settings: dict[str, Any] = {}
        self.is_finished = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.curves.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.pictures.append(step)

    def finish(self) -> None:
        self.is_finished = True


def test_sheets_are_drawn_and_change_nothing(pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = torch.get_rng_state()
    config = quick(photos, output_dir=out, validation_steps=2, num_validation_images=2, ema_decay=0.5)
    edlora = EDLoRATrainer(config, pipeline).train()
    assert torch.equal(torch.get_rng_state(), state)
    sheets = sorted((out / "validation").iterdir())
    assert [path.name for path in sheets] == ["step-000002.png", "step-000003.png"]
    assert Image.open(out / "samples" / "0.png").tobytes() == Image.open(sheets[1]).tobytes()
    with Image.open(sheets[1]) as last, Image.open(out / "validation" / "step-000002.png") as early:
        assert last.size == early.size
        assert last.size[0] > 2 * 32
        assert last.size[1] > 3 * 32
        assert last.tobytes() != early.tobytes()
    drawn = [{"prompt": "a photo of a <potter>", "seed": config.seed + number} for number in (0, 1)]
    assert read_note(sheets[1])["rows"] == {f"LoRA {scale}": drawn for scale in ("0", "0.7", "1")}
    told = parsed(text_of(sheets[1]))
    assert (told["prompt"], told["Steps"], told["Sampler"]) == ("a photo of a <potter>", "20", "DPM++ 2M")
    assert (told["Size"], told["Seed"], told["CFG scale"]) == ("32x32", str(config.seed), "7.5")
    assert Image.open(out / "samples" / "0.png").text == {}  # what is published is said on the card
    card = (out / "README.md").read_text()
    assert "a photo of a <potter> (LoRA scale 0 and 0.7 and 1, from top to bottom)" in card
    assert '"final_loss"' in card
    assert same(edlora, EDLoRATrainer(quick(photos, ema_decay=0.5), pipeline).train())


def test_every_row_of_a_sheet_is_drawn_at_its_own_scale(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    config = quick(photos, output_dir=tmp_path, num_validation_images=1, learning_rate=0.1)
    EDLoRATrainer(config, pipeline).train()
    with Image.open(tmp_path / "validation" / "step-000003.png") as sheet:
        side = 192  # the pictures of 32 pixels, enlarged to be seen
        places = [(sheet.width - side - 4, 20 + row * (side + 4)) for row in range(3)]
        assert sheet.height == places[-1][1] + side + 4
        rows = [sheet.crop((left, top, left + side, top + side)).tobytes() for left, top in places]
    assert len(set(rows)) == 3


def test_curves_and_sheets_reach_the_tracker(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=notebook)
    trainer = EDLoRATrainer(quick(photos, output_dir=tmp_path / "out", num_validation_images=1), pipeline)
    monkeypatch.setattr(trainer, "_make_accelerator", lambda: accelerator)
    trainer.train()
    assert [step for step, _ in notebook.curves] == [1, 2, 3]
    _, curves = notebook.curves[-1]
    assert curves["loss/total"] == pytest.approx(curves["loss/denoising"])
    assert {"norm/gradient", "norm/embeddings", "learning_rate/unet", "speed/images_per_second"} <= curves.keys()
    assert notebook.pictures == [3]
    assert notebook.settings["rank"] == 4
    assert all(isinstance(value, int | float | str) for value in notebook.settings.values())
    assert notebook.is_finished


def test_missing_tracker_is_named_first(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking._IS_AVAILABLE, "wandb", lambda: False)
    with pytest.raises(MissingExtraError, match=r"diffusers-mixofshow\[wandb\]"):
        EDLoRATrainer(quick(photos, output_dir=tmp_path / "out", report_to="wandb"), pipeline).train()


def test_pictures_of_the_class_are_drawn_once_and_count(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    reports: list[StepReport] = []
    prior = {"class_data_dir": tmp_path / "men", "num_class_images": 3, "prior_loss_weight": 0.5}
    edlora = EDLoRATrainer(quick(photos, **prior), pipeline, on_step=reports.append).train()
    drawn = sorted((tmp_path / "men").iterdir())
    assert [path.name for path in drawn] == ["class-0000.png", "class-0001.png", "class-0002.png"]
    times = [path.stat().st_mtime_ns for path in drawn]
    assert all(report.parts["prior"] > 0 for report in reports)
    assert reports[0].loss == pytest.approx(sum(reports[0].parts.values()))
    again = EDLoRATrainer(quick(photos, **prior), pipeline).train()
    assert [path.stat().st_mtime_ns for path in drawn] == times
    assert same(edlora, again)
    assert not same(edlora, EDLoRATrainer(quick(photos), pipeline).train())


def test_drawn_pictures_of_the_class_take_free_names(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "men").mkdir()
    for name in ("class-0001.png", "class-0002.png"):  # as where somebody has sorted out the first one
        Image.new("RGB", (32, 32), "green").save(tmp_path / "men" / name)
    before = [path.read_bytes() for path in sorted((tmp_path / "men").iterdir())]
    EDLoRATrainer(quick(photos, class_data_dir=tmp_path / "men", num_class_images=4), pipeline).train()
    names = ["class-0000.png", "class-0001.png", "class-0002.png", "class-0003.png"]
    assert sorted(path.name for path in (tmp_path / "men").iterdir()) == names
    assert [(tmp_path / "men" / name).read_bytes() for name in names[1:3]] == before


def test_embeddings_stand_still_once_they_are_long_enough(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    reports: list[StepReport] = []
    config = quick(photos, max_train_steps=6, embedding_norm_threshold=0.2, embedding_learning_rate=0.02)
    EDLoRATrainer(config, pipeline, on_step=reports.append).train()
    norms = [report.embedding_norm for report in reports]
    grown = next(place for place, norm in enumerate(norms) if norm >= 0.2)
    assert 0 < grown < len(norms) - 1
    assert set(norms[grown:]) == {norms[grown]}
    assert reports[-1].learning_rates["embeddings"] == 0.0
    assert reports[-1].learning_rates["unet"] > 0


def test_missing_pictures_of_the_class_are_drawn_beside_those_in_train(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "men" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), "green").save(folder / "own.png")
    config = quick(photos, class_data_dir=tmp_path / "men", num_class_images=2)
    EDLoRATrainer(config, pipeline).train()
    assert sorted(path.name for path in folder.iterdir()) == ["class-0000.png", "own.png"]
    assert list((tmp_path / "men").iterdir()) == [folder]


def test_trackers_learn_no_private_folder(photos: Path, tmp_path: Path) -> None:
    notebook = Notebook()
    base = tmp_path / "private" / "base"
    base.mkdir(parents=True)
    with tracking.track(
        Accelerator(cpu=True, log_with=notebook), quick(photos, pretrained_model_name_or_path=str(base))
    ):
        pass
    assert notebook.settings["pretrained_model_name_or_path"] == "base"
