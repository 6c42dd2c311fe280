"""What a training leaves: its record, its checkpoints, what was drawn on the way, and what it told."""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import tiny
from diffusers_mixofshow import MixOfShowPipeline
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, MissingExtraError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.notes import read_note
from diffusers_mixofshow.training import EDLoRATrainer, StepReport, loop, statistics, tracking
from diffusers_mixofshow.training.batches import Batch
from diffusers_mixofshow.training.checkpoints import CheckpointFolder
from diffusers_mixofshow.training.learner import Learner
from diffusers_mixofshow.training.prior import read_class_pictures
from short_training import quick, same, tensors


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """It comes back from every training as it was, which `test_trainer.py` looks at."""
    return StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)


def test_the_record_and_the_checkpoints_say_what_was_done(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = count(step=0.5)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    reports: list[StepReport] = []
    config = quick(
        photos,
        output_dir=tmp_path,
        max_train_steps=4,
        checkpointing_steps=2,
        checkpoints_total_limit=2,
        ema_decay=0.3,
        gradient_accumulation_steps=3,
        pretrained_model_name_or_path="someone/tiny",
        kind="pet",
        seed=5,
    )
    edlora = EDLoRATrainer(config, pipeline, on_step=reports.append).train()
    record = dict(edlora.training)
    assert 0 < record.pop("seconds") < 600
    losses = [report.loss for report in reports]
    assert record == {
        "settings": config.as_record(),
        "photos": 2,
        "processes": 1,
        "steps": 5,
        "final_loss": losses[-1],
    }
    assert (edlora.concepts, edlora.base_model) == ((config.concept_to_learn,), "someone/tiny")
    assert edlora.layers == cross_attention_layers(pipeline.unet)
    assert [(report.images_per_second, report.gpu_memory) for report in reports] == [(2 * 3 / 0.5, 0)] * 5
    assert [report.total_steps for report in reports] == [5] * 5

    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        state = torch.load(folder / "state.pt", weights_only=True)
        assert (state["format_version"], state["step"], state["processes"]) == (1, step, 1)
        assert (state["settings"], state["losses"]) == (config.as_identity(), losses[:step])
        assert state["parameters"].keys() == state["average"].keys()
        assert state["optimizer"]["state"].keys() == set(range(len(state["parameters"])))
        kept = tensors(EDLoRA.from_pretrained(folder))
        for name, value in state["average"].items():
            assert torch.equal(kept[name.removeprefix("embedding ").replace(" ", ".")], value)
        assert any(not torch.equal(value, state["average"][name]) for name, value in state["parameters"].items())


@pytest.mark.parametrize("saves", [True, False])
def test_a_press_is_answered(
    pipeline: StableDiffusionPipeline,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    saves: bool,
) -> None:
    def press(report: StepReport) -> None:
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    config = quick(photos, output_dir=tmp_path if saves else None)
    with pytest.raises(KeyboardInterrupt):
        EDLoRATrainer(config, pipeline, on_step=press).train()
    said = "Stopped and saved after step 2; go on with resume_from_checkpoint 'latest'."
    assert (said if saves else "Stopped after step 2; without output_dir nothing was saved.") in (
        capsys.readouterr().err.splitlines()
    )
    assert [path.name for path in tmp_path.glob("check*")] == (["checkpoint-2"] if saves else [])


def test_what_on_step_interrupts_is_saved_and_what_it_breaks_is_not(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    for error, kept in ((KeyboardInterrupt, ["checkpoint-2"]), (ValueError, [])):

        def stop(report: StepReport, error: type[BaseException] = error) -> None:
            if report.step == 2:
                raise error

        out = tmp_path / error.__name__
        with pytest.raises(error):
            EDLoRATrainer(quick(photos, output_dir=out), pipeline, on_step=stop).train()
        assert [path.name for path in out.iterdir()] == kept


def cells(sheet: Path, size: int) -> list[Image.Image]:
    """The last picture of every row of a sheet."""
    with Image.open(sheet) as opened:
        tops = [20 + row * (size + 4) for row in range(3)]
        return [opened.crop((opened.width - size - 4, top, opened.width - 4, top + size)) for top in tops]


def test_rows_of_a_sheet_are_what_the_pack_draws_at_their_strength(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    config = quick(
        photos,
        output_dir=tmp_path,
        num_validation_images=2,
        validation_prompt="my <TOK>, red",
        ema_decay=0.3,
        learning_rate=0.1,
        seed=3,
    )
    edlora = EDLoRATrainer(config, pipeline).train()
    drawing = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
    drawing.scheduler = DPMSolverMultistepScheduler.from_config(drawing.scheduler.config)
    drawing.set_progress_bar_config(disable=True)
    drawing.load_edlora(edlora)
    for scale, cell in zip((0.0, 0.7, 1.0), cells(tmp_path / "validation" / "step-000003.png", 192), strict=True):
        picture = drawing(
            "my <potter>, red",
            cross_attention_kwargs={"scale": scale},
            num_inference_steps=20,
            guidance_scale=7.5,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(4),
        ).images[0]
        picture = picture.resize((192, 192), Image.Resampling.LANCZOS)  # small pictures are enlarged on sheets
        assert np.abs(np.asarray(picture, dtype=int) - np.asarray(cell, dtype=int)).max() <= 3
    assert Path(tmp_path, "README.md").read_text().count("my <potter>, red (LoRA scale 0 and 0.7 and 1") > 0


def test_a_method_without_updates_has_one_row_and_draws_in_silence(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick(photos, output_dir=tmp_path, num_validation_images=1, method="p-plus", max_train_steps=1)
    EDLoRATrainer(config, pipeline).train()
    assert "(LoRA scale 1, from top to bottom)" in (tmp_path / "README.md").read_text()
    with Image.open(tmp_path / "validation" / "step-000002.png") as sheet:
        assert sheet.height < 2 * 192
    assert read_note(tmp_path / "validation" / "step-000002.png")["rows"].keys() == {"LoRA 1"}
    assert "20/20" not in capsys.readouterr().err


def test_pictures_of_the_class_are_whole_however_photos_are_framed(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "men").mkdir()
    Image.new("RGB", (32, 32), "green").save(tmp_path / "men" / "0.png")
    (photos / "masks" / "0.png").unlink()
    batches = []
    forward = Learner.forward

    def noting(learner: Learner, batch: Batch) -> dict[str, torch.Tensor]:
        batches.append(batch)
        return forward(learner, batch)

    monkeypatch.setattr(Learner, "forward", noting)
    prior = {"class_data_dir": tmp_path / "men", "num_class_images": 1}
    config = quick(photos, framing="place", max_train_steps=1, embedding_phase_steps=0, **prior)
    EDLoRATrainer(config, pipeline).train()
    for batch in batches:
        assert batch.prior_pictures == 2
        assert all(mask.min() < 0.5 for mask in batch.mask[:2])
        assert (batch.mask[2:] == 1).all()


def test_gradients_that_are_no_numbers_end_a_training(
    pipeline: StableDiffusionPipeline, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Learner.forward

    def steep(learner: Learner, batch: Batch) -> dict[str, torch.Tensor]:
        losses = forward(learner, batch)
        rows = learner.reader.values[0]
        return {**losses, "loss": losses["loss"] + (rows - rows.detach()).abs().sqrt().sum()}

    monkeypatch.setattr(Learner, "forward", steep)
    seen: list[StepReport] = []
    with pytest.raises(ConfigurationError, match=r"The loss became \d.* in the embeddings phase, or its gradients"):
        EDLoRATrainer(quick(photos), pipeline, on_step=seen.append).train()
    assert seen == []


def test_a_training_that_goes_on_tells_from_where(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick(photos, output_dir=tmp_path, checkpointing_steps=2)
    EDLoRATrainer(config, pipeline).train()
    capsys.readouterr()
    again = quick(photos, output_dir=tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    EDLoRATrainer(again, pipeline).train()
    told = [line.partition(" [")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("Tuning")]
    assert told == ["Tuning <potter>: 2/3", "Tuning <potter>: 3/3"]


def test_a_checkpoint_takes_the_place_of_what_is_half_there(pack: EDLoRA, tmp_path: Path) -> None:
    for name in ("checkpoint-3", ".checkpoint-3.tmp", "checkpoint-9"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "junk").write_text("x")
    folder = CheckpointFolder(tmp_path, 2, Accelerator(cpu=True))
    for step in (1, 2, 3):
        assert folder.save(step, pack, {"of": step}, {"own": step}) == tmp_path / f"checkpoint-{step}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-9"]
    names = sorted(path.name for path in (tmp_path / "checkpoint-3").iterdir())
    assert names == ["README.md", "edlora.safetensors", "process-0.pt", "state.pt"]
    state, own = folder.load(tmp_path / "checkpoint-3")
    assert state == {"format_version": 1, "step": 3, "of": 3, "processes": 1}
    assert own == {"own": 3}


@pytest.mark.parametrize(
    ("settings", "prompt", "number"),
    [({}, "a photo of a man", 3), ({"class_prompt": "people, old"}, "people, old", 1)],
)
def test_pictures_of_the_class_are_those_of_the_base(
    pipeline: StableDiffusionPipeline, tmp_path: Path, settings: dict[str, str], prompt: str, number: int
) -> None:
    config = quick(tmp_path, class_data_dir=tmp_path / "men", num_class_images=number, **settings)
    photos = read_class_pictures(pipeline, config, drawing=True)
    assert [(photo.path.name, photo.captions, photo.mask) for photo in photos] == [
        (f"class-000{seed}.png", (prompt,), None) for seed in range(number)
    ]
    stock = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    for seed in {0, number - 1}:
        expected = stock(
            prompt,
            num_inference_steps=20,
            guidance_scale=7.5,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        difference = np.asarray(photos[seed].image, dtype=int) - np.asarray(expected, dtype=int)
        assert np.abs(difference).max() <= 2
    assert [len(read_class_pictures(None, config, drawing=drawing)) for drawing in (True, False)] == [number, number]


def test_settings_reach_a_tracker_as_what_it_takes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[object, ...]] = []
    finished: list[str] = []

    class Counting(Accelerator):
        log_with = ("something",)
        logging_dir = tmp_path / "logs"
        trackers = (SimpleNamespace(finish=lambda: finished.append("one")),)

        def __init__(self) -> None: ...

        def init_trackers(self, project: str, config: dict[str, object], init_kwargs: dict[str, object]) -> None:
            begun.append((project, config, init_kwargs, (tmp_path / "logs").is_dir()))

    config = quick(photos, output_dir=tmp_path, report_to="tensorboard", ema_decay=0.5)
    with pytest.raises(KeyError), tracking.track(Counting(), config):
        raise KeyError
    ((project, told, init, made),) = begun
    assert (project, init, made, finished) == ("mixofshow", {}, False, ["one"])
    assert told.keys() == config.as_record().keys()  # type: ignore[attr-defined]
    assert told["instance_prompt"] == "; ".join(config.instance_prompt)  # type: ignore[index]
    assert [told[name] for name in ("ema_decay", "snr_gamma", "masked_loss", "framing")] == [  # type: ignore[index]
        0.5,
        "none",
        True,
        "crop",
    ]
    with tracking.track(Counting(), quick(photos, output_dir=tmp_path, report_to="wandb")):
        assert finished == ["one"]
    assert begun[1][2:] == ({"wandb": {"dir": str(tmp_path / "logs")}}, True)
    assert finished == ["one", "one"]


def test_pictures_reach_trackers_that_take_them() -> None:
    sent: list[tuple[object, ...]] = []

    def tracker(name: str) -> SimpleNamespace:
        def log_images(values: dict[str, np.ndarray], step: int, **options: str) -> None:
            sent.append((name, {key: value.shape for key, value in values.items()}, step, options))

        return SimpleNamespace(name=name, log_images=log_images)

    trackers = [tracker("tensorboard"), SimpleNamespace(name="texts"), tracker("wandb")]
    tracking.log_picture(SimpleNamespace(trackers=trackers), Image.new("RGB", (8, 5)), 7)  # type: ignore[arg-type]
    assert sent == [
        ("tensorboard", {"samples": (1, 5, 8, 3)}, 7, {"dataformats": "NHWC"}),
        ("wandb", {"samples": (1, 5, 8, 3)}, 7, {}),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in ("tensorboard", "wandb"):
        monkeypatch.setitem(tracking._IS_AVAILABLE, installed, lambda installed=installed: installed != name)
    tracking.check_tracker(None)
    tracking.check_tracker({"tensorboard": "wandb", "wandb": "tensorboard"}[name])
    with pytest.raises(MissingExtraError, match=rf"report_to is '{name}', which .*diffusers-mixofshow\[{name}\]"):
        tracking.check_tracker(name)


def test_curves_and_pictures_lie_in_the_output_folder(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    for precision in ("bf16", "no"):
        config = quick(photos, output_dir=tmp_path / "out", mixed_precision=precision)
        accelerator = EDLoRATrainer(config, pipeline)._make_accelerator()
        assert (Path(accelerator.project_dir), accelerator.mixed_precision) == (tmp_path / "out" / "logs", precision)
        assert accelerator.device.type == "cpu"
    assert EDLoRATrainer(quick(photos), pipeline)._make_accelerator().project_dir is None


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, MixOfShowPipeline])
def test_statistics_are_recorded_with_the_pipeline_that_trained(
    kind: type, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[object, ...]] = []

    class Recorder:
        def __init__(self, pipeline: object) -> None:
            self.pipeline = pipeline

        def record(self, source: Path) -> None:
            recorded.append((self.pipeline, source))

    monkeypatch.setattr(statistics, "GradientFuser", Recorder)
    pipeline = kind(**tiny.components(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    reports: list[int] = []

    def note(report: StepReport) -> None:
        reports.append(report.step)

    wanted = quick(photos, output_dir=tmp_path / "a", save_statistics=True)
    edlora = EDLoRATrainer(wanted, pipeline, on_step=note).train()
    assert reports == [1, 2, 3]
    ((used, source),) = recorded
    assert source == tmp_path / "a"
    assert (used is pipeline) is (kind is MixOfShowPipeline)
    assert isinstance(used, MixOfShowPipeline)
    assert used._progress_bar_config == {"disable": True, "desc": "mine"}
    for name in ("unet", "text_encoder", "vae", "tokenizer", "scheduler"):
        assert getattr(used, name) is getattr(pipeline, name)
    assert same(EDLoRATrainer(quick(photos, save_statistics=True), pipeline).train(), edlora)
    EDLoRATrainer(quick(photos, output_dir=tmp_path / "b", save_statistics=False), pipeline).train()
    assert len(recorded) == 1
