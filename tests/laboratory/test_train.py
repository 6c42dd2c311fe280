"""Training: every stage runs, continues where it stopped, and what it writes can be loaded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import load_file

import processes
from benchmarks.toyland_base import train
from benchmarks.toyland_base.autoencoder import build_autoencoder, reconstruct, render_pixels, whiten
from benchmarks.toyland_base.denoiser import velocity_weight
from benchmarks.toyland_base.loop import LoopConfig, _set_rates, learning_rate_factor
from benchmarks.toyland_base.named import NamedPool, call_by_name
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
from diffusers_mixofshow.base_models import location_of
from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.evaluation.record import commit
from diffusers_mixofshow.sampling.loading import load_base
from diffusers_mixofshow.toyland.base import load_layout_adapter, load_metric_model, load_pipeline, load_reader
from diffusers_mixofshow.toyland.scenes import random_scene, residents
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
    for stage in ("autoencoder", "text", "unet", "transformer", "xl", "xl_names", "layout", "reader", "metric"):
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
    assert told["xl"]["settings"]["steps"] == told["xl_names"]["settings"]["steps"] == 2
    assert told.keys() == {"xl", "xl_names"}


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


def test_a_group_of_parameters_learns_at_its_share_of_the_rate() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimiser = torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:], "share": 0.2}], lr=1.0)
    for rate in (0.5, 0.1):  # shares are of the rate, not of the one before
        _set_rates(optimiser, rate)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([rate, 0.2 * rate])


@pytest.fixture(scope="module")
def xl_stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the third base's training is given on top of the shipped first base: batches and optimiser; not begun."""
    given: dict[str, Any] = {}
    folder, shipped = tmp_path_factory.mktemp("xl"), Path(location_of("toyland"))
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(shipped / part)
    (folder / "initial_unet").symlink_to(shipped / "unet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit_final_states", lambda *parts: fit_final_states(*parts, captions=200))
        patch.setattr(train, "train_stage", lambda objective, batch, config, **more: given.update(more, batch=batch))
        patch.setattr(train, "LatentPool", _Pool)
        train.train_xl(folder, LoopConfig(steps=1), batch_size=6, pool_size=1000, resume=False)
    return given


class _Pool(train.LatentPool):
    """Pictures of the right shape that nobody draws."""

    @classmethod
    def encode(cls, vae: Any, seeds: Any, things: Any, device: Any, height: int = 64, enlarged_to: Any = None) -> Any:
        side = enlarged_to or height
        latents = torch.zeros(len(seeds), 8, side // 4, (side * 3 // 2 if things == 3 else side) // 4).half()
        return cls(latents, [random_scene(0, things=1)] * len(seeds))


@pytest.mark.filterwarnings("ignore")
def test_the_third_bases_texts_learn_slower_and_its_pictures_come_in_their_shares(xl_stage: dict[str, Any]) -> None:
    assert [group.get("share") for group in xl_stage["optimiser"].param_groups] == [None, 0.2]
    kinds: Counter[str] = Counter()
    left_out = pictures = 0
    for seed in range(400):
        clean, _, _, token_ids, ids, told, weights = xl_stage["batch"](torch.Generator().manual_seed(seed))
        kind = "wide" if clean.shape[-1] > 24 else "square" if ids.tolist() == [list_time_ids(96, 96)] * 6 else ""
        kinds[kind or "enlarged"] += 1
        assert ids[0].tolist() == list_time_ids(96 if kind else 64, clean.shape[-1] * 4)
        assert torch.equal(weights, torch.ones_like(clean[:, :1]))
        assert len(clean) == len(token_ids) == len(told) == (4 if kind == "wide" else 6)
        left_out, pictures = left_out + int((told == 0).sum()), pictures + len(told)
    for kind, share in {"square": 0.65, "wide": 0.25, "enlarged": 0.1}.items():
        assert kinds[kind] / 400 == pytest.approx(share, abs=0.06)
    assert left_out / pictures == pytest.approx(0.06, abs=0.02)


def test_pools_of_pictures_have_the_shares_that_batches_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LatentPool", _Pool)
    pools = train._encode_xl_pools(None, 5, 1000, torch.device("cpu"))  # type: ignore[arg-type]
    assert {name: len(pool.latents) for name, pool in pools.items()} == {"square": 650, "wide": 250, "enlarged": 100}


@pytest.mark.filterwarnings("ignore")
def test_a_picture_whose_text_is_left_out_is_learnt_without_it() -> None:
    """States and pooled vector both: the loss is the same for any text."""
    pipeline = load_base("toyland-xl", "cpu", "float32")
    objective = XLObjective(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2).eval()
    texts = tokenize_plain(["a red critter in a meadow", "a white cat at night"], pipeline.tokenizer)
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 1, 8, 24, 24, generator=generator)
    at, ids = (torch.tensor([500]),), torch.tensor([list_time_ids(96, 96)])
    with torch.no_grad():
        losses = [
            [float(objective((clean, noise, *at, text[None], ids, told, torch.ones(1, 1, 24, 24)))) for text in texts]
            for told in (torch.zeros(1), torch.ones(1))
        ]
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1]


def test_a_resident_is_called_by_name_and_counts_more_than_what_is_beside_it() -> None:
    base = load_pipeline()
    pool = NamedPool.encode(base.vae, range(700_000_000, 700_000_040), torch.device("cpu"), 96)
    assert {len(scene.things) for scene in pool.scenes} == {1}
    assert {scene.things[0].class_word for scene in pool.scenes} == {"critter", "dog", "cat"}
    for seed, scene in enumerate(pool.scenes):
        (thing,) = scene.things
        resident = residents()[thing.name]
        assert (thing.colour, thing.attributes) == (resident.colour, resident.attributes)
        assert thing.name in call_by_name(scene, seed).split()
    clean, noise, token_ids, weights = pool.batch(5, base.tokenizer, torch.Generator().manual_seed(0))
    assert clean.shape == noise.shape == (5, 8, 24, 24)
    assert token_ids.shape == (5, 77)
    assert weights.shape == (5, 1, 24, 24)
    assert weights.min() == 1
    assert weights.max() == 5
    assert weights.mean() < 3


def test_an_error_counts_by_the_weight_of_its_place() -> None:
    pipeline = load_base("toyland-xl", "cpu", "float32")
    objective = XLObjective(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2).eval()
    text = tokenize_plain(["a red critter in a meadow"], pipeline.tokenizer)
    clean, noise = torch.randn(2, 1, 8, 24, 24, generator=torch.Generator().manual_seed(1))
    ids, left = torch.tensor([list_time_ids(96, 96)]), torch.zeros(1, 1, 24, 24)
    left[..., :12] = 1

    def lose(weights: torch.Tensor) -> float:
        with torch.no_grad():
            return float(objective((clean, noise, torch.tensor([500]), text, ids, torch.ones(1), weights)))

    whole = lose(torch.ones(1, 1, 24, 24))
    assert lose(torch.full((1, 1, 24, 24), 5.0)) == pytest.approx(whole)
    assert (lose(left) + lose(1 - left)) / 2 == pytest.approx(whole)
    assert lose(left) != pytest.approx(whole)


@pytest.mark.filterwarnings("ignore")
def test_names_are_taught_on_top_of_the_third_base(trained: Path, tmp_path: Path) -> None:
    weights = trained / THIRD
    _run(tmp_path, "xl_names", 1, "--learning-rate", "0", "--xl-start-from", str(weights))
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"):
        now = load_file(tmp_path / "xl_names_pipeline" / f"{part}.safetensors")
        for name, value in load_file(weights / f"{part}.safetensors").items():
            torch.testing.assert_close(now[name], value, msg=name)
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert list(record) == ["xl", "xl_names"]
    assert record["xl"] == json.loads((weights / "training.json").read_text(encoding="utf-8"))["xl"]
