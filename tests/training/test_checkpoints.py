"""A training that is stopped goes on to the very same weights, and nothing that was good is lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_mixofshow import toyland
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning, OverwriteError
from diffusers_mixofshow.training import EDLoRATrainer, StepReport, TrainingConfig
from diffusers_mixofshow.training.checkpoints import list_checkpoints
from diffusers_mixofshow.training.interruption import notice_interruption
from diffusers_mixofshow.training.learner import Learner
from families.pipelines import tiny_pipeline
from short_training import quick, same


RICH: dict[str, Any] = {
    "max_train_steps": 4,
    "embedding_phase_steps": 2,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "lr_warmup_steps": 1,
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stopped_after(step: int, config: TrainingConfig, pipeline: StableDiffusionPipeline) -> None:
    """Train until the user presses Ctrl-C in a step."""

    def press(report: StepReport) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        # The signal arrives after the report of one step, so that the next one is the last.
        EDLoRATrainer(config, pipeline, on_step=press).train()


STILL = {
    "embedding_phase_steps": 0,
    "max_train_steps": 6,
    "embedding_learning_rate": 0,
    "text_encoder_learning_rate": 0,
}
"""Texts are read once then, and kept."""


@pytest.mark.parametrize(
    ("family", "pressed", "settings"),
    [
        ("Stable Diffusion", 1, RICH),
        ("Stable Diffusion", 2, RICH),
        ("Stable Diffusion", 2, RICH | STILL | {"captions_per_step": 2}),
        ("Stable Diffusion XL", 1, RICH | {"gradient_accumulation_steps": 1, "keep_start_token": True}),
    ],
)
def test_going_on_gives_the_same_bits(
    family: str, photos: Path, tmp_path: Path, pressed: int, settings: dict[str, Any]
) -> None:
    pipeline = tiny_pipeline(family)
    whole = EDLoRATrainer(quick(photos, **settings), pipeline).train()
    handler = signal.getsignal(signal.SIGINT)
    stopped_after(pressed, quick(photos, **settings, output_dir=tmp_path / "out"), pipeline)
    assert signal.getsignal(signal.SIGINT) is handler
    assert names(tmp_path / "out") == [f"checkpoint-{pressed + 1}"]
    torch.manual_seed(99)
    steps: list[int] = []
    resumed = EDLoRATrainer(
        quick(photos, **settings, output_dir=tmp_path / "out", resume_from_checkpoint="latest"),
        pipeline,
        on_step=lambda report: steps.append(report.step),
    ).train()
    assert steps == list(range(pressed + 2, 7))
    assert same(whole, resumed)
    assert resumed.training["final_loss"] == whole.training["final_loss"]


def test_the_newest_are_kept_and_each_is_an_edlora(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    config = quick(photos, max_train_steps=4, output_dir=tmp_path / "out", checkpointing_steps=1)
    edlora = EDLoRATrainer(config, pipeline).train()
    assert names(tmp_path / "out") == ["README.md", "checkpoint-4", "checkpoint-5", "edlora.safetensors"]
    assert same(EDLoRA.from_pretrained(tmp_path / "out" / "checkpoint-5"), edlora)


def test_only_what_is_learnt_has_optimizer_state(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    config = quick(photos, max_train_steps=3, output_dir=tmp_path / "out", checkpointing_steps=3)
    edlora = EDLoRATrainer(config, pipeline).train()
    state = torch.load(tmp_path / "out" / "checkpoint-3" / "state.pt", weights_only=True)
    moments = [entry["exp_avg"] for entry in state["optimizer"]["state"].values()]
    table = pipeline.text_encoder.get_input_embeddings().weight
    learnt = sum(update.down.numel() + update.up.numel() for update in edlora.lora.values())
    assert sum(moment.numel() for moment in moments) == learnt + 2 * 4 * table.shape[1]
    assert table.shape not in {moment.shape for moment in moments}


def test_a_checkpoint_of_another_training_is_refused(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    EDLoRATrainer(quick(photos, output_dir=out, checkpointing_steps=2), pipeline).train()
    (photos / "1.txt").write_text("one <TOK>", encoding="utf-8")
    other = quick(photos, output_dir=out, rank=2, lora_alpha=4, resume_from_checkpoint="checkpoint-2")
    with pytest.raises(ConfigurationError, match=r"rank was 4 and is 2; the photos, captions or masks have changed"):
        EDLoRATrainer(other, pipeline).train()
    (out / "checkpoint-2" / "state.pt").write_bytes(b"damaged")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        EDLoRATrainer(other, pipeline).train()
    missing = quick(photos, output_dir=out, resume_from_checkpoint="checkpoint-9")
    with pytest.raises(ConfigurationError, match=r"no checkpoint.*there are: checkpoint-2"):
        EDLoRATrainer(missing, pipeline).train()


def test_a_checkpoint_from_before_the_start_token_was_kept_says_so(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    earlier = {"output_dir": out, "keep_start_token": False}
    EDLoRATrainer(quick(photos, checkpointing_steps=2, **earlier), pipeline).train()
    file = out / "checkpoint-2" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["settings"]["keep_start_token"]
    torch.save(state, file)
    with pytest.raises(ConfigurationError, match="keep_start_token was False and is True"):
        EDLoRATrainer(quick(photos, output_dir=out, resume_from_checkpoint="checkpoint-2"), pipeline).train()
    EDLoRATrainer(quick(photos, resume_from_checkpoint="checkpoint-2", **earlier), pipeline).train()


def test_latest_begins_anew_where_there_is_none(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    config = quick(photos, output_dir=tmp_path / "out", resume_from_checkpoint="latest")
    with pytest.warns(MixOfShowWarning, match="begins at its start"):
        edlora = EDLoRATrainer(config, pipeline).train()
    assert same(edlora, EDLoRATrainer(quick(photos), pipeline).train())


def test_full_disk_is_noticed_first(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 10**6, 10**6))
    steps: list[StepReport] = []
    config = quick(photos, output_dir=tmp_path / "out", checkpointing_steps=1)
    with pytest.raises(ConfigurationError, match=r"has 1\.0 MB free"):
        EDLoRATrainer(config, pipeline, on_step=steps.append).train()
    assert steps == []


def test_checkpoint_that_cannot_be_written_leaves_the_one_before(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers_mixofshow.training import checkpoints

    def fill(report: StepReport) -> None:
        if report.step == 2:
            monkeypatch.setattr(checkpoints, "write_whole", _no_space)

    config = quick(photos, output_dir=tmp_path / "out", checkpointing_steps=1)
    with pytest.raises(ConfigurationError, match=r"checkpoint of step 2 cannot be written.*No space left"):
        EDLoRATrainer(config, pipeline, on_step=fill).train()
    assert names(tmp_path / "out") == ["checkpoint-1"]


def test_diverging_stops_before_the_step_and_keeps_the_checkpoint(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Learner.forward, []

    def diverging(learner: Learner, batch: Any) -> dict[str, torch.Tensor]:
        calls.append(batch)
        losses = forward(learner, batch)
        # The first and the fourth are trials, at the start and before a checkpoint is written.
        return {name: loss * (float("nan") if len(calls) == 5 else 1) for name, loss in losses.items()}

    monkeypatch.setattr(Learner, "forward", diverging)
    config = quick(photos, output_dir=tmp_path / "out", checkpointing_steps=2)
    with pytest.raises(ConfigurationError, match=r"loss became nan in the joint phase.*lower embedding_learning_rate"):
        EDLoRATrainer(config, pipeline).train()
    assert names(tmp_path / "out") == ["checkpoint-2"]
    kept = EDLoRA.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(rows.isfinite().all() for rows in kept.embeddings.values())


def test_too_little_memory_names_the_settings_that_need_less(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    def exhaust(report: StepReport) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    with pytest.raises(ConfigurationError) as caught:
        EDLoRATrainer(quick(photos, captions_per_step=None), pipeline, on_step=exhaust).train()
    for advice in ("mixed_precision='bf16'", "gradient_checkpointing=True", "captions_per_step=1", "'AdamW8bit'"):
        assert advice in str(caught.value)
    assert "train_batch_size=1 with gradient_accumulation_steps=2" in str(caught.value)


def _no_space(path: Path, content: bytes) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("steps", [1, 4])
def test_weights_that_give_no_number_are_never_saved(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, steps: int
) -> None:
    """The first joint step blows the weights up; no later step tells, if it is the last one."""
    out = tmp_path / "out"
    settings = {"max_train_steps": steps, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    with pytest.raises(ConfigurationError, match=r"diverged.*resume_from_checkpoint='latest'"):
        EDLoRATrainer(quick(photos, learning_rate=1e38, output_dir=out, **settings), pipeline).train()
    assert names(out) == ["checkpoint-1"]
    lower = quick(photos, **settings, output_dir=out, resume_from_checkpoint="latest")
    done: list[int] = []
    with pytest.warns(MixOfShowWarning, match=r"learning_rate was 1e\+38 and is 0\.01"):
        EDLoRATrainer(lower, pipeline, on_step=lambda report: done.append(report.step)).train()
    assert done == list(range(2, steps + 2))


def test_weights_that_predict_nothing_of_use_are_never_saved(tmp_path: Path) -> None:
    """A base whose predictions are good shows a blow-up to finite values."""
    out, rate = tmp_path / "out", 100.0
    pipe = toyland.load_pipeline()
    photos = toyland.write_photos(toyland.CONCEPTS["rex"], tmp_path / "photos")
    few = {"train_batch_size": 2, "captions_per_step": 1, "embedding_phase_steps": 1, "max_train_steps": 3}
    named = {"instance_data_dir": photos, "concept": "potter", "class_word": "critter", "output_dir": out}
    config = TrainingConfig.toyland(
        **named, **few, learning_rate=rate, text_kv_learning_rate=rate, checkpointing_steps=1
    )
    with pytest.raises(ConfigurationError, match=r"first pictures was 0\.\d+ and is now [1-9].*diverged"):
        EDLoRATrainer(config, pipe).train()
    assert names(out) == ["checkpoint-1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_training_takes_the_place_of_one_only_if_it_may(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", {"checkpointing_steps": 1, "num_validation_images": 1}
    first = EDLoRATrainer(quick(photos, **settings, output_dir=out), pipeline).train()
    before = contents(out)
    told = r"edlora\.safetensors, .*checkpoint-2, .*checkpoint-3.* there already, .*resume_from_checkpoint 'latest'"
    with pytest.raises(OverwriteError, match=f"{told}, choose another output_dir, or give overwrite=True"):
        EDLoRATrainer(quick(photos, **settings, output_dir=out, seed=1)).train()  # before its base model is looked for
    assert contents(out) == before

    seen: list[list[str]] = []
    config = quick(photos, **settings, output_dir=out, seed=1, overwrite=True)
    second = EDLoRATrainer(config, pipeline, on_step=lambda report: seen.append(names(out))).train()
    assert seen[0] == ["README.md", "edlora.safetensors", "samples", "validation"]  # until there is a new one
    assert same(EDLoRA.from_pretrained(out), second)
    assert not same(first, second)
    assert "overwrite" not in second.training["settings"]


def test_going_on_needs_no_leave_but_where_another_training_lies(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    settings = {"checkpointing_steps": 1}
    for name in ("one", "other"):
        EDLoRATrainer(quick(photos, **settings, output_dir=tmp_path / name), pipeline).train()
    for wanted in ("latest", "checkpoint-2", tmp_path / "one" / "checkpoint-2"):
        config = quick(photos, **settings, output_dir=tmp_path / "one", resume_from_checkpoint=wanted)
        EDLoRATrainer(config, pipeline).train()
    elsewhere = quick(photos, output_dir=tmp_path / "other", resume_from_checkpoint=tmp_path / "one" / "checkpoint-2")
    with pytest.raises(OverwriteError, match="other/edlora"):
        EDLoRATrainer(elsewhere, pipeline).train()
    for checkpoint in (tmp_path / "one").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    nothing_to_go_on_from = quick(photos, output_dir=tmp_path / "one", resume_from_checkpoint="latest")
    with pytest.raises(OverwriteError, match=r"unasked\. Choose another output_dir, or"):
        EDLoRATrainer(nothing_to_go_on_from, pipeline).train()


def test_going_on_with_other_masks_for_the_regulariser_is_refused(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    settings = {"masked_loss": False, "attn_reg_weight": 0.5, "company": 0.0, "checkpointing_steps": 1}
    config = quick(photos, output_dir=tmp_path / "out", resume_from_checkpoint="latest", **settings)
    stopped_after(1, quick(photos, output_dir=tmp_path / "out", **settings), pipeline)
    mask = photos / "masks" / "0.png"
    Image.open(mask).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(mask)
    with pytest.raises(ConfigurationError, match="the photos, captions or masks have changed"):
        EDLoRATrainer(config, pipeline).train()
    path = list_checkpoints(tmp_path / "out")[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"data": state["data"].partition(" ")[0]}, path)  # as earlier releases wrote it
    EDLoRATrainer(config, pipeline).train()


def test_signals_that_the_process_ignores_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with notice_interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)
