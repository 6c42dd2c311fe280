"""Steps of a training are, number for number, those of a slow one that is written out (`slow_training.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffusers_mixofshow.training import EDLoRATrainer, StepReport, TrainingConfig
from diffusers_mixofshow.training.batches import Batch
from diffusers_mixofshow.training.learner import Learner
from diffusers_mixofshow.training.trained import initialise
from families.pipelines import tiny_pipeline
from short_training import quick, tensors
from slow_training import SlowTraining, in_float64


CLOSE = {"rtol": 2e-4, "atol": 2e-5}
"""float32 beside float64, over some steps."""
CLOSE_BY_ADAM = {"rtol": 2e-4, "atol": 5e-5}
"""AdamW divides a gradient by its own size: where there is nearly none, float32's noise is a hundredth of a step."""


SD, XL = "Stable Diffusion", "Stable Diffusion XL"


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """They come back from every training as they were, which `test_trainer.py` looks at."""
    return {name: tiny_pipeline(name) for name in (SD, XL)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos with captions of their own, one with a mask and one wide, and two pictures of the class."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("masks", "men"):
        (folder / name).mkdir()
    shades, wide = (Image.linear_gradient("L").resize((width, 32)) for width in (32, 48))
    for number, (caption, colour) in enumerate({"a <TOK>": "red", "my <TOK> man, sitting": "blue"}.items()):
        light = (shades, wide)[number]
        picture = Image.composite(Image.new("RGB", light.size, colour), Image.new("RGB", light.size), light)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
        Image.new("RGB", (32, 32), ("green", "grey")[number]).save(folder / "men" / f"{number}.png")
    shades.transpose(Image.Transpose.ROTATE_90).save(folder / "masks" / "0.png")
    return folder


@pytest.fixture(scope="module")
def bases(pipelines: dict[str, Any]) -> dict[str, SimpleNamespace]:
    return {name: in_float64(pipeline) for name, pipeline in pipelines.items()}


@pytest.fixture(scope="module")
def start_of(pipelines: dict[str, Any]) -> Callable[[str, TrainingConfig], dict[str, torch.Tensor]]:
    """First values of everything that is learnt."""
    kept: dict[tuple[str, int, bool], dict[str, torch.Tensor]] = {}

    def start(family: str, config: TrainingConfig) -> dict[str, torch.Tensor]:
        key = family, config.rank, config.keep_start_token
        if key not in kept:
            with initialise(pipelines[family], config) as trained:
                kept[key] = {name: value.detach().clone() for name, value in trained.parameters().items()}
        return kept[key]

    return start


CAPTIONS = ["a <potter>", "my <potter> man, sitting"]
PLAIN: dict[str, Any] = {
    "company": 0.0,
    "captions_per_step": None,
    "optimizer": "SGD",
    "adam_weight_decay": 0.0,
    "keep_start_token": False,
    "max_grad_norm": 1e6,
    "embedding_learning_rate": 0.3,
    "text_encoder_learning_rate": 20.0,
    "learning_rate": 0.5,
    "lr_scheduler": "constant",
    "embedding_phase_steps": 0,
}


def config_of(photos: Path, settings: dict[str, Any]) -> TrainingConfig:
    prior = {"class_data_dir": photos / "men", "num_class_images": 2} if "prior_loss_weight" in settings else {}
    return quick(photos, **{**PLAIN, **prior, **settings})


def trained_and_seen(
    config: TrainingConfig, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[StepReport], list[Batch], float]:
    """What a training learns and reports, the batches of its steps, and its final loss."""
    reports: list[StepReport] = []
    batches: list[Batch] = []
    forward = Learner.forward

    def noting(learner: Learner, batch: Batch) -> dict[str, torch.Tensor]:
        batches.append(batch)
        return forward(learner, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "forward", noting)
        edlora = EDLoRATrainer(config, pipeline, on_step=reports.append).train()
    first, *steps, last = batches  # the trial's batch, which the first step has as well
    assert first is last
    assert torch.equal(first.latents, steps[0].latents)
    assert torch.equal(first.noise, steps[0].noise)
    return tensors(edlora), reports, steps, edlora.training["final_loss"]  # type: ignore[return-value]


SETTINGS: dict[str, dict[str, Any]] = {
    "two phases": {"embedding_phase_steps": 1},
    "rates of their own": {
        "text_kv_learning_rate": 2.0,
        "text_encoder_learning_rate": 10.0,
        "embedding_learning_rate": 0.6,
    },
    "a rate of 0": {"learning_rate": 0.0, "text_kv_learning_rate": 0.3},
    "no rate for keys and values": {"text_kv_learning_rate": 0.0},
    "no mask": {"masked_loss": False},
    "noise offset": {"noise_offset": 0.8},
    "min-SNR": {"snr_gamma": 0.5},
    "min-SNR for v": {"snr_gamma": 0.5, "prediction_type": "v_prediction"},
    "zero terminal SNR": {"snr_gamma": 0.5, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "min-SNR for z": {"snr_gamma": 0.5, "prediction_type": "sample"},
    "texts that stand still": {"embedding_learning_rate": 0.0, "text_encoder_learning_rate": 0.0},
    "prior preservation": {"prior_loss_weight": 0.3},
    "fewer captions than pictures": {"train_batch_size": 3, "captions_per_step": 2, "prior_loss_weight": 2.0},
    "empty prompts": {"proportion_empty_prompts": 0.6, "train_batch_size": 3},
    "attention": {"attn_reg_weight": 0.5},
    "attention to the whole": {"attn_reg_weight": 0.5, "reg_full_identity": True, "train_batch_size": 3},
    "attention beside the class": {"attn_reg_weight": 2.0, "prior_loss_weight": 0.5, "captions_per_step": 1},
    "clipping": {"max_grad_norm": 0.02},
    "clipped sums": {"max_grad_norm": 0.02, "gradient_accumulation_steps": 2, "prior_loss_weight": 1.0},
    "moving average": {"ema_decay": 0.2, "max_train_steps": 3},
    "moving average at its start": {
        "ema_decay": 0.99,
        "optimizer": "AdamW",
        "embedding_learning_rate": 0.004,
        "learning_rate": 0.004,
        "text_encoder_learning_rate": 0.004,
    },
    "long embeddings": {"embedding_norm_threshold": 0.2, "embedding_learning_rate": 20.0, "max_train_steps": 3},
    "warm-up": {"lr_warmup_steps": 2, "lr_scheduler": "linear", "max_train_steps": 4, "embedding_phase_steps": 2},
    "cosine": {"lr_scheduler": "cosine", "max_train_steps": 3},
    "polynomial": {"lr_scheduler": "polynomial", "lr_power": 2.0},
    "rank and alpha": {"rank": 3, "lora_alpha": 1.0},
    "decay of SGD": {"adam_weight_decay": 0.5},
    "AdamW": {
        "optimizer": "adamw",
        "embedding_learning_rate": 0.01,
        "learning_rate": 0.003,
        "text_encoder_learning_rate": 0.002,
    },
    "decay of AdamW": {
        "optimizer": "AdamW",
        "adam_weight_decay": 5.0,
        "embedding_learning_rate": 0.01,
        "learning_rate": 0.003,
        "text_encoder_learning_rate": 0.002,
    },
    "start token": {"keep_start_token": True, "max_train_steps": 3},
    "recomputed": {"gradient_checkpointing": True, "attn_reg_weight": 0.5},
}


OF_BOTH = {
    "rates of their own": 2,
    "zero terminal SNR": 2,
    "texts that stand still": 2,
    "empty prompts": 1,
    "attention beside the class": 1,
    "start token": 1,
    "recomputed": 1,
}
"""Settings that meet what SDXL has of its own (two text encoders, a vector of the whole text, sizes), and steps."""


@pytest.mark.parametrize(("family", "name"), [*((SD, name) for name in SETTINGS), *((XL, name) for name in OF_BOTH)])
def test_a_training_is_the_one_written_out(
    family: str,
    name: str,
    pipelines: dict[str, Any],
    bases: dict[str, SimpleNamespace],
    start_of: Callable[[str, TrainingConfig], dict[str, torch.Tensor]],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, pipeline, base = dict(SETTINGS[name]), pipelines[family], bases[family]
    kind, zero_snr = settings.pop("prediction_type", "epsilon"), settings.pop("rescale_betas_zero_snr", False)
    noise = {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **noise)
    if family == XL:
        settings["max_train_steps"] = OF_BOTH[name]
    config = config_of(photos, settings)
    start = start_of(family, config)
    learnt, reports, batches, final_loss = trained_and_seen(config, pipeline, monkeypatch)
    texts = [*CAPTIONS, *(["a photo of a man"] if "prior_loss_weight" in settings else []), ""]
    slow = SlowTraining(base, start, texts, config, kind, zero_snr=zero_snr)
    slow.run(iter(batches))

    assert len(batches) == config.total_steps * config.gradient_accumulation_steps
    for told, expected in zip(reports, slow.reports, strict=True):
        numbers = {"loss": told.loss, "gradient_norm": told.gradient_norm, "embedding_norm": told.embedding_norm}
        assert told.phase == expected.pop("phase")
        assert told.learning_rates == pytest.approx(expected.pop("rates"))
        assert {**numbers, **told.parts} == pytest.approx(expected, rel=2e-4)
    assert final_loss == reports[-1].loss
    changed = set()
    for parameter, expected in slow.average.items():
        called = parameter.removeprefix("embedding ").replace(" ", ".")
        close = CLOSE if config.optimizer == "SGD" else CLOSE_BY_ADAM
        torch.testing.assert_close(learnt.pop(called).double(), expected, **close)
        if float((expected - start[parameter].double()).abs().max()) > 5 * CLOSE["atol"]:
            changed.add(slow.rate(parameter))
    assert learnt == {}
    assert changed == {slow.rate(parameter) for parameter in start if slow.rate(parameter)[1]}
