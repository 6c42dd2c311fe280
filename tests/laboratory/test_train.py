"""Training: every stage runs, continues where it stopped, and what it writes can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import load_file

import processes
from benchmarks.toyland_base.autoencoder import build_autoencoder, reconstruct, render_pixels, whiten
from benchmarks.toyland_base.denoiser import velocity_weight
from benchmarks.toyland_base.loop import LoopConfig, learning_rate_factor
from benchmarks.toyland_base.optimiser import orthogonalise
from benchmarks.toyland_base.train import main
from benchmarks.toyland_base.transformer import TEXT_TOKENS, FlowObjective, add_projection
from benchmarks.toyland_base.xl import (
    XLObjective,
    build_small_tower,
    fit_final_states,
    grow_tower,
    grow_unet,
    list_time_ids,
)
from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.evaluation.record import commit
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.base import load_layout_adapter, load_metric_model, load_pipeline, load_reader
from diffusers_mixofshow.toyland.scenes import random_scene
from diffusers_mixofshow.toyland.world import draw


FIRST, SECOND, THIRD = GATHERED = ("weights", "sd3_weights", "xl_weights")


def _run(folder: Path, stage: str, steps: int, *more: str) -> None:
    tiny = ["--batch-size", "2", "--pool-size", "12", "--log-steps", "1000"]
    main(["--output", str(folder), "--stage", stage, "--steps", str(steps), *tiny, *more])


def _state(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"{stage}.pt", weights_only=True)["objective"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every stage trained for a few steps, and its weights gathered."""
    folder = tmp_path_factory.mktemp("training")
    for stage in ("autoencoder", "text", "unet", "transformer", "xl", "layout", "reader", "metric"):
        _run(folder, stage, 2)
    options = ("--weights", "--transformer-weights", "--xl-weights")
    gathered = [part for pair in zip(options, GATHERED, strict=True) for part in (pair[0], str(folder / pair[1]))]
    main(["--output", str(folder), "--stage", "none", *gathered])
    return folder


@pytest.mark.filterwarnings("ignore")
def test_what_training_writes_can_be_loaded_and_sampled(trained: Path) -> None:
    pipeline = load_pipeline(folder=trained / "weights")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a critter", num_inference_steps=2).images[0].size == (64, 64)
    images = [draw(random_scene(seed, things=1)).image for seed in range(3)]
    assert load_metric_model(trained / "weights").image_features(images).shape[0] == 3
    assert load_reader(trained / "weights").read(images)["class"].shape == (3, 6)
    features = load_layout_adapter(folder=trained / "weights")(torch.zeros(1, 1, 64, 96))
    assert [tuple(feature.shape[1:]) for feature in features] == [(32, 8, 12), (96, 8, 12), (128, 4, 6), (128, 4, 6)]


@pytest.mark.filterwarnings("ignore")
def test_the_transformer_is_trained_on_what_its_pipeline_reads(trained: Path) -> None:
    folder = trained / "sd3_weights"
    pipeline = load_base(str(folder), concepts=False)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert pipeline("a critter", num_inference_steps=2).images[0].size == (64, 64)
    prompts = ["a red critter in a meadow", ""]
    states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    objective = FlowObjective(pipeline.transformer, (pipeline.text_encoder, pipeline.text_encoder_2))
    mine, mine_pooled = objective.encode(tokenize_plain(prompts, pipeline.tokenizer)[:, :TEXT_TOKENS])
    torch.testing.assert_close(mine, states[:, : TEXT_TOKENS + 1])
    torch.testing.assert_close(mine_pooled, pooled)
    assert (states[:, TEXT_TOKENS:] == 0).all()
    seen = {"hidden_states": torch.randn(2, 8, 16, 16), "timestep": torch.tensor([300.0, 900.0])}
    short = pipeline.transformer(**seen, encoder_hidden_states=mine, pooled_projections=pooled).sample
    pipeline.transformer.set_attn_processor(JointAttnProcessor2_0())
    whole = pipeline.transformer(**seen, encoder_hidden_states=states, pooled_projections=pooled).sample
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-4)
    told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert told["transformer"]["settings"]["steps"] == 2
    assert told.keys() == {"transformer"}


def test_the_second_base_has_the_text_encoder_of_the_first(trained: Path) -> None:
    first, second = (load_file(trained / name / "text_encoder" / "model.safetensors") for name in (FIRST, SECOND))
    projection = second.pop("text_projection.weight")
    assert (projection == torch.eye(len(projection))).all()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_the_stable_diffusion_xl_is_trained_on_what_its_pipeline_reads(trained: Path) -> None:
    folder = trained / THIRD
    pipeline = load_base(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "MixOfShowXLPipeline"
    assert pipeline("a critter", num_inference_steps=2).images[0].size == (96, 96)
    prompts = ["a red critter in a meadow", ""]
    states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    objective = XLObjective(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    mine, mine_pooled = objective.encode(tokenize_plain(prompts, pipeline.tokenizer))
    torch.testing.assert_close(mine, states)
    torch.testing.assert_close(mine_pooled, pooled)
    ids = pipeline._get_add_time_ids((64, 96), (0, 0), (96, 144), torch.float32, len(pooled[0]))
    assert ids.tolist() == [list_time_ids(64, 144)]
    told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert told["xl"]["settings"]["steps"] == 2
    assert told.keys() == {"xl"}


def test_a_grown_unet_predicts_what_the_first_bases_does() -> None:
    first = load_pipeline()
    second = grow_tower(add_projection(first.text_encoder))
    final_states = fit_final_states(second, first.tokenizer, captions=200)
    grown = XLObjective(grow_unet(first.unet, final_states), build_small_tower(first.tokenizer), second)
    token_ids = tokenize_plain(["a red critter in a meadow", "a white cat in the snow"], first.tokenizer)
    noisy, timesteps = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])
    with torch.no_grad():
        states, pooled = grown.encode(token_ids)
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([list_time_ids(64, 64, 64)] * 2)}
        mine = grown.model(noisy, timesteps, states, added_cond_kwargs=conditions).sample
        wanted = first.unet(noisy, timesteps, first.text_encoder(token_ids).last_hidden_state).sample
    assert (mine - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_training_equals_one_without_a_break(trained: Path, tmp_path: Path) -> None:
    stage = "unet"
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(trained / part)
    _run(tmp_path, stage, 5, "--learning-rate", "1e-3", "--decay-from", "0.999")
    whole = _state(tmp_path, stage)
    _run(tmp_path, stage, 3, "--learning-rate", "1e-3", "--decay-from", "0.999")
    _run(tmp_path, stage, 5, "--learning-rate", "1e-3", "--decay-from", "0.999", "--resume")
    for name, value in _state(tmp_path, stage).items():
        torch.testing.assert_close(value, whole[name], msg=name)


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_the_weights_of_an_earlier_one(trained: Path, tmp_path: Path) -> None:
    start = ("--start-from", str(trained / "weights"))
    _run(tmp_path, "unet", 1, "--learning-rate", "0", *start)
    now = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in load_file(trained / "weights" / "unet" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(now[name], value, msg=name)
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["unet"]["continues"]["settings"]["steps"] == 2


def test_the_record_names_the_commit_that_the_checkout_stands_at(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text(encoding="utf-8"))
    here = commit(Path(__file__).parent) or "unknown"
    assert {stage["commit"].rstrip("+") for stage in record.values()} == {here.rstrip("+")}


def test_processes_on_cpus_train_one_model_together(tmp_path: Path) -> None:
    code = "import sys; from benchmarks.toyland_base.train import main; main(sys.argv[1:])"
    sizes = ["--steps", "1", "--batch-size", "2", "--pool-size", "4"]
    printed = processes.run_two(code, "--output", str(tmp_path), "--stage", "autoencoder", *sizes)
    assert ["held-out PSNR" in text for text in printed] == [True, False]


def test_whitening_changes_latents_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = build_autoencoder().eval()
    pixels = render_pixels(range(8)).float() / 127.5 - 1
    before = reconstruct(model, pixels)
    whiten(model, pixels)
    torch.testing.assert_close(reconstruct(model, pixels), before, atol=1e-4, rtol=0)
    latents = model.encode(pixels).latent_dist.mean.detach()
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)


def test_the_schedule_warms_up_stays_and_falls() -> None:
    config = LoopConfig(warm_up_steps=10, decay_from=0.5)
    assert learning_rate_factor(0, 0.0, config) == pytest.approx(0.1)
    assert learning_rate_factor(50, 0.4, config) == pytest.approx(1.0)
    assert learning_rate_factor(90, 1.0, config) == pytest.approx(0.01)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(24, 40, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_velocity_weights_are_one_in_noise_and_limited_in_clean_pictures() -> None:
    signal = torch.tensor([0.0, 0.5, 0.99])
    torch.testing.assert_close(velocity_weight(signal), torch.tensor([1.0, 1.0, 0.05]))
