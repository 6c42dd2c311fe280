"""What decides whether a training may begin, go on or be kept, at the very bounds; and what is told then."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.families.stable_diffusion import SD1
from diffusers_mixofshow.training import StepReport, TrainingConfig
from diffusers_mixofshow.training.base import borrow, load_base, refuse_untrainable
from diffusers_mixofshow.training.batches import CachedPhoto
from diffusers_mixofshow.training.checkpoints import (
    CheckpointFolder,
    check_same_training,
    check_space,
    digest_data,
    find_checkpoint,
    list_checkpoints,
)
from diffusers_mixofshow.training.failures import explain_memory_errors, list_memory_savings, make_divergence_error
from diffusers_mixofshow.training.interruption import notice_interruption
from diffusers_mixofshow.training.learner import initialise_embeddings
from diffusers_mixofshow.training.loop import final_mean
from diffusers_mixofshow.training.trial import Trial
from families.pipelines import tiny_pipeline


def config_of(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**{"instance_data_dir": "photos", "concept": "potter", "class_word": "man", **settings})


# --- whether weights are worth keeping ---


class Batches:
    """Numbers in place of batches."""

    def __init__(self) -> None:
        self.place = 0

    def __next__(self) -> torch.Tensor:
        self.place += 1
        return torch.tensor(self.place)

    def state_dict(self) -> int:
        return self.place

    def load_state_dict(self, place: int) -> None:
        self.place = place


@pytest.mark.parametrize(
    ("start", "now", "kept"),
    [
        (0.4, 0.4, True),
        (0.4, 0.85, True),
        (0.4, 0.95, False),
        (0.0, 0.099, True),
        (0.0, 0.11, False),
        (0.4, float("nan"), False),
        (0.4, float("inf"), False),
        (float("inf"), float("inf"), False),
    ],
)
def test_a_loss_may_grow_to_twice_that_of_the_start_and_a_tenth(start: float, now: float, kept: bool) -> None:
    losses, seen = [start, now], []

    def learner(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(int(batch))
        return {"denoising": torch.tensor(losses[len(seen) - 1]), "loss": torch.tensor(99.0)}

    batches = Batches()
    trial = Trial(learner, batches, Accelerator(cpu=True), config_of())  # type: ignore[arg-type]
    assert (batches.place, trial.loss_at_start) == (0, pytest.approx(start))
    if kept:
        trial.check()
    else:
        with pytest.raises(ConfigurationError, match=f"first pictures was {start:.3g} and is now {now:.3g}, so the"):
            trial.check()
    assert seen == [1, 1]


LOWER = "lower embedding_learning_rate, learning_rate and text_encoder_learning_rate to a third"
WARM_UP = "set lr_warmup_steps, for example to a tenth of the steps"
KEPT = (
    "Checkpoints in out are from before that; with lower rates and nothing else changed, "
    "resume_from_checkpoint='latest' goes on from the newest. "
)


@pytest.mark.parametrize(
    ("settings", "kept", "advice"),
    [
        ({}, "", [LOWER, WARM_UP]),
        ({"output_dir": "out"}, KEPT, [LOWER, WARM_UP]),
        ({"output_dir": "out", "checkpointing_steps": None}, "", [LOWER, WARM_UP]),
        ({"lr_warmup_steps": 1}, "", [LOWER]),
        ({"mixed_precision": "fp16"}, "", [LOWER, "use mixed_precision='bf16' or 'no'", WARM_UP]),
        ({"mixed_precision": "bf16"}, "", [LOWER, WARM_UP]),
        (
            {"text_kv_learning_rate": 1e-3},
            "",
            [
                "lower embedding_learning_rate, learning_rate, text_encoder_learning_rate and "
                "text_kv_learning_rate to a third",
                WARM_UP,
            ],
        ),
    ],
)
def test_what_helps_against_divergence(settings: dict[str, Any], kept: str, advice: list[str]) -> None:
    told = str(make_divergence_error("It broke", config_of(**settings)))
    assert told == f"It broke, so the training diverged. {kept}To get through it: {'; '.join(advice)}."


HALF = "mixed_precision='bf16' (or 'fp16' on older GPUs) halves the model"
AGAIN = "gradient_checkpointing=True, a third slower"
ONE_TEXT = "captions_per_step=1, so that one caption a step is encoded for all layers"
EIGHT = "optimizer='{}8bit' (bitsandbytes)"


@pytest.mark.parametrize(
    ("settings", "less"),
    [
        (
            {},
            [
                HALF,
                AGAIN,
                ONE_TEXT,
                "train_batch_size=1 with gradient_accumulation_steps=4, the same gradients",
                EIGHT.format("AdamW"),
            ],
        ),
        (
            {"train_batch_size": 2, "gradient_accumulation_steps": 3, "mixed_precision": "bf16", "optimizer": "adam"},
            [
                AGAIN,
                ONE_TEXT,
                "train_batch_size=1 with gradient_accumulation_steps=6, the same gradients",
                EIGHT.format("adam"),
            ],
        ),
        (
            {"train_batch_size": 1, "gradient_checkpointing": True, "optimizer": "SGD", "resolution": 520},
            [HALF, "resolution=512"],
        ),
        (
            {"train_batch_size": 2, "captions_per_step": 2, "gradient_checkpointing": True, "optimizer": "SGD"},
            [HALF, "train_batch_size=1 with gradient_accumulation_steps=2, the same gradients"],
        ),
        (
            {
                "train_batch_size": 1,
                "mixed_precision": "fp16",
                "gradient_checkpointing": True,
                "optimizer": "AdamW8bit",
            },
            [],
        ),
    ],
)
def test_what_needs_less_memory_in_its_order(settings: dict[str, Any], less: list[str]) -> None:
    config = config_of(**settings)
    assert list_memory_savings(config, SD1) == less
    with pytest.raises(ConfigurationError) as caught, explain_memory_errors(config, dict):
        raise torch.OutOfMemoryError("CUDA: 2 GiB\nand more")
    advice = "; ".join(less) or "train on a GPU with more memory, or on the CPU"
    assert str(caught.value) == (
        f"The GPU's memory does not suffice for these settings (CUDA: 2 GiB). Try, in this order: {advice}."
    )


# --- where it is kept ---


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, 1 + 3 * 5),
        ({"checkpoints_total_limit": 1}, 1 + 2 * 5),
        ({"checkpointing_steps": None}, 1),
    ],
)
def test_room_for_every_copy_is_wanted(
    settings: dict[str, Any], copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 4 * 1_500_000 * copies + 1_000_000
    parameters = [torch.zeros(1_000_000), torch.zeros(500, 1000)]
    for free, suffices in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(10**12, 0, free))
        if suffices:
            check_space(tmp_path, parameters, config_of(**settings))
        else:
            with pytest.raises(ConfigurationError) as caught:
                check_space(tmp_path, parameters, config_of(**settings))
            told = f"{free / 1e6:.1f} MB free, but the ED-LoRA and {(copies - 1) // 5} checkpoints need"
            assert f"{told} {needed / 1e6:.1f} MB" in str(caught.value)


def checkpoint(folder: Path, name: str, *, whole: bool = True, time: int = 0) -> None:
    (folder / name).mkdir(parents=True)
    if whole:
        torch.save({"step": 1}, folder / name / "state.pt")
        os.utime(folder / name / "state.pt", ns=(time, time))


def test_the_newest_checkpoint_is_the_last_that_was_written(tmp_path: Path) -> None:
    for name, time in (("checkpoint-9", 10), ("checkpoint-10", 10), ("checkpoint-2", 20), ("checkpoint-100", 5)):
        checkpoint(tmp_path, name, time=time)
    checkpoint(tmp_path, "checkpoint-300", whole=False)
    checkpoint(tmp_path, "checkpoint-x", time=99)
    checkpoint(tmp_path, ".checkpoint-400.tmp", time=99)
    names = ["checkpoint-100", "checkpoint-9", "checkpoint-10", "checkpoint-2"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "elsewhere", tmp_path / "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "elsewhere", "latest") is None
    with pytest.raises(ConfigurationError, match=f"there are: {', '.join(names)}"):
        find_checkpoint(tmp_path, "checkpoint-300")
    with pytest.raises(ConfigurationError, match="there are: none"):
        find_checkpoint(tmp_path / "elsewhere", "checkpoint-1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "was written by another release"),
        ({"processes": 2}, "was written by 2 processes, this training has 1"),
        ({}, ""),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(change: dict[str, int], words: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({"format_version": 1, "processes": 1, **change}, tmp_path / "checkpoint-1" / "state.pt")
    torch.save({"mine": 3}, tmp_path / "checkpoint-1" / "process-0.pt")
    folder = CheckpointFolder(tmp_path, 2, Accelerator(cpu=True))
    if words:
        with pytest.raises(ConfigurationError, match=words):
            folder.load(tmp_path / "checkpoint-1")
    else:
        assert folder.load(tmp_path / "checkpoint-1")[1] == {"mine": 3}
    torch.save([1], tmp_path / "checkpoint-1" / "state.pt")
    with pytest.raises(ConfigurationError, match="is no checkpoint of this package"):
        folder.load(tmp_path / "checkpoint-1")


def test_rates_may_be_lowered_and_nothing_else() -> None:
    settings = config_of(text_kv_learning_rate=1e-3).as_identity()
    state = {"settings": settings, "data": "same"}
    check_same_training(Path("c"), state, settings, "same")
    for name in ("embedding_learning_rate", "text_encoder_learning_rate", "learning_rate", "text_kv_learning_rate"):
        with pytest.warns(MixOfShowWarning, match=f"with other rates: {name} was .* and is 1e-07"):
            check_same_training(Path("c"), state, settings | {name: 1e-7}, "same")
        for before, now in ((settings[name], 0.0), (0.0, settings[name]), (settings[name], None)):
            old = {"settings": settings | {name: before}, "data": "same"}
            with pytest.raises(ConfigurationError, match=f"another training: {name} was {before} and is {now}"):
                check_same_training(Path("c"), old, settings | {name: now}, "same")
    with pytest.raises(ConfigurationError, match=r"training: noise_offset was 0\.01 and is 0\.02; the photos, capt"):
        check_same_training(Path("c"), state, settings | {"noise_offset": 0.02, "learning_rate": 1e-7}, "other")
    without = {name: value for name, value in settings.items() if name != "keep_start_token"}
    with pytest.raises(ConfigurationError, match="keep_start_token was False and is True"):
        check_same_training(Path("c"), {"settings": without, "data": "same"}, settings, "same")


def test_the_digest_of_the_data_tells_every_change() -> None:
    def photo(**changes: Any) -> CachedPhoto:
        values = {"mean": torch.zeros(1, 4, 2, 2), "deviation": torch.ones(1, 4, 2, 2), "subject": None}
        values |= {"sizes": torch.zeros(1, 6)}
        return CachedPhoto(**{**values, "mask": torch.ones(1, 1, 2, 2), "captions": (0, 1), **changes})

    digests = {
        digest_data([photo()], ["a", "b"]),
        digest_data([photo()], ["a", "c"]),
        digest_data([photo(), photo()], ["a", "b"]),
        digest_data([photo(mean=torch.ones(1, 4, 2, 2))], ["a", "b"]),
        digest_data([photo(deviation=torch.zeros(1, 4, 2, 2))], ["a", "b"]),
        digest_data([photo(mask=torch.zeros(1, 1, 2, 2))], ["a", "b"]),
        digest_data([photo(captions=(0,))], ["a", "b"]),
    }
    assert len(digests) == 7
    assert digest_data([photo()], ["a", "b"]) == digest_data([photo()], ["a", "b"])


# --- the base ---


@pytest.mark.parametrize(
    ("change", "words"),
    [({name: None}, f"it has no {name}") for name in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")]
    + [
        (
            {"text_encoder_2": object()},
            "it has no tokenizer_2; its U-Net's addition_embed_type is None, but 'text_time' ",
        ),
    ],
)
def test_a_pipeline_that_lacks_a_part_is_refused(change: dict[str, Any], words: str) -> None:
    pipeline = SimpleNamespace(components={**tiny.components(), **change})
    with pytest.raises(ConfigurationError, match=f"cannot be trained: {words}"):
        refuse_untrainable(pipeline, config_of())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["unet", "text_encoder", "vae"])
def test_half_precision_is_refused_unless_it_is_trained_in(
    pipeline: StableDiffusionPipeline, name: str, dtype: torch.dtype
) -> None:
    getattr(pipeline, name).to(dtype)
    refuse_untrainable(pipeline, config_of(mixed_precision="bf16"))
    if name == "vae":
        refuse_untrainable(pipeline, config_of())
    else:
        with pytest.raises(ConfigurationError, match=f"{name} are in half precision"):
            refuse_untrainable(pipeline, config_of())


def test_a_unet_of_other_channels_is_refused(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.register_to_config(in_channels=9)
    with pytest.raises(ConfigurationError, match=r"its U-Net takes 9 channels \(an inpainting model\?\)"):
        refuse_untrainable(pipeline, config_of())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_base_is_loaded_in_the_precision_it_trains_in(
    pipeline: StableDiffusionPipeline, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = load_base(config_of(pretrained_model_name_or_path=str(tmp_path), mixed_precision=precision))
    assert {loaded.unet.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {dtype}
    assert loaded.safety_checker is None


def test_borrowed_models_are_frozen_and_come_back(pipeline: StableDiffusionPipeline) -> None:
    models = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    pipeline.unet.train()
    pipeline.vae.encoder.conv_in.weight.requires_grad_(False)

    def state() -> list[bool]:
        return [p.requires_grad for m in models for p in m.parameters()] + [
            module.training for m in models for module in m.modules()
        ]

    before = state()
    with pytest.raises(KeyError), borrow(pipeline):  # noqa: PT012
        assert not any(state())
        raise KeyError
    assert state() == before


# --- where it starts, and when it stops ---


def test_first_embeddings(pipeline: StableDiffusionPipeline) -> None:
    table = pipeline.text_encoder.get_input_embeddings().weight
    words = pipeline.tokenizer("red dog", add_special_tokens=False).input_ids
    concept = Concept(placeholder="<p>", tokens=("<p1>", "<p2>", "<p3>"), class_word="red dog", kind="pet")

    def start(seed: int, std: float, **settings: Any) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = initialise_embeddings(
            concept, pipeline.tokenizer, pipeline.text_encoder, layers=5, std=std, generator=generator, **settings
        )
        assert all(value.shape == (5, 32) and value.requires_grad for value in found.values())
        assert all(torch.equal(value, value[:1].expand(5, -1)) for value in found.values())
        return {token: value[0].detach() for token, value in found.items()}

    first, wide, other = start(0, 0.5), start(0, 2.0), start(1, 0.5)
    drawn = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert list(first) == ["<p1>", "<p2>", "<p3>"]
    torch.testing.assert_close(torch.stack([first["<p1>"], first["<p2>"]]), 0.5 * drawn)
    torch.testing.assert_close(wide["<p1>"], 4 * first["<p1>"])
    assert not torch.equal(first["<p1>"], other["<p1>"])
    mean = sum(table[word] for word in words) / len(words)
    torch.testing.assert_close(first["<p3>"], mean.detach())
    noise = start(0, 0.5, starts_at_class=False)
    assert torch.equal(noise["<p1>"], first["<p1>"])
    assert not torch.equal(noise["<p3>"], first["<p3>"])
    assert 0.3 < float(noise["<p3>"].std()) < 0.7


@pytest.mark.parametrize(
    ("losses", "mean"),
    [
        ([3.0], 3.0),
        ([5.0, 1.0], 1.0),
        ([9.0] * 14 + [2.0], 5.5),
        ([9.0] * 18 + [2.0, 4.0], 3.0),
        ([1.0] * 5 + [2.0], 2),
    ],
)
def test_the_final_loss_is_the_mean_of_the_last_tenth(losses: list[float], mean: float) -> None:
    assert final_mean(losses) == mean


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_press_ends_at_once(number: signal.Signals) -> None:
    """SIGTERM is what `timeout` and the schedulers of clusters send."""
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), notice_interruption() as interruption:  # noqa: PT012
        assert (interruption.requested, interruption.everywhere) == (False, False)
        os.kill(os.getpid(), number)
        assert interruption.requested
        assert not interruption.everywhere
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is handler


def test_outside_the_main_thread_nothing_is_noticed() -> None:
    handler, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with notice_interruption() as interruption:
            seen.extend([interruption.requested, signal.getsignal(signal.SIGINT) is handler])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_curves_have_every_number_of_a_report() -> None:
    report = StepReport(
        step=3,
        total_steps=9,
        phase="joint",
        loss=0.5,
        parts={"denoising": 0.3, "prior": 0.2},
        gradient_norm=7.0,
        embedding_norm=0.4,
        learning_rates={"unet": 1e-4},
        images_per_second=2.5,
        gpu_memory=3_000_000_000,
    )
    assert report.as_scalars() == {
        "loss/total": 0.5,
        "loss/denoising": 0.3,
        "loss/prior": 0.2,
        "norm/gradient": 7.0,
        "norm/embeddings": 0.4,
        "learning_rate/unet": 1e-4,
        "speed/images_per_second": 2.5,
        "memory/gpu_gigabytes": 3.0,
    }


def test_a_base_of_another_family_is_refused_by_its_name() -> None:
    """Loaded as a pipeline of Stable Diffusion it has one text encoder, but its U-Net reads two."""
    components = {
        name: part for name, part in tiny_pipeline("Stable Diffusion XL").components.items() if "_2" not in name
    }
    with pytest.raises(ConfigurationError, match="cannot be trained: it has no text_encoder_2; it has no tokenizer_2"):
        refuse_untrainable(SimpleNamespace(components=components), config_of())  # type: ignore[arg-type]
