"""A short training of a tiny model: it learns, is repeatable, and hands the model back as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import nn

import tiny
from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, MixOfShowWarning, TrainingDataError
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers, embedding_layers
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.training import EDLoRATrainer, StepReport, TrainingConfig, trainer
from diffusers_mixofshow.training.batches import RandomBatches, cache_photos
from diffusers_mixofshow.training.config import LR_SCHEDULERS
from diffusers_mixofshow.training.data import read_photos
from diffusers_mixofshow.training.learner import Learner, initialise_embeddings
from diffusers_mixofshow.training.loop import learning_rate_factor
from diffusers_mixofshow.training.reader import TextReader, tokenize_for
from short_training import quick, same, tensors


CAPTION = "a <TOK>"


def fingerprint(pipeline: Any) -> dict[str, object]:
    """Everything that a training could leave behind in a pipeline."""
    models = {name: model for name, model in pipeline.components.items() if isinstance(model, nn.Module)}
    state: dict[str, object] = {"vocabulary": len(pipeline.tokenizer), "scheduler": id(pipeline.scheduler)}
    for name, model in models.items():
        digest = hashlib.sha256()
        for key, value in model.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
        state[f"{name} weights"] = digest.hexdigest()
        state[f"{name} modules"] = [(path, id(module), module.training) for path, module in model.named_modules()]
        state[f"{name} gradients"] = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        state[f"{name} hooks"] = sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
        )
        state[f"{name} attributes"] = sorted(vars(model))
    state["processors"] = [id(processor) for processor in pipeline.unet.attn_processors.values()]
    return state


def fixed_loss(
    pipeline: StableDiffusionPipeline, config: TrainingConfig, embeddings: dict[str, torch.Tensor]
) -> float:
    """Loss of one large batch that never changes."""
    photos = read_photos(config.instance_data_dir, config.concept_to_learn)
    table = sorted({caption for photo in photos for caption in photo.captions})
    wide = quick(Path(config.instance_data_dir), train_batch_size=16)
    generator = torch.Generator().manual_seed(99)
    batch = next(
        RandomBatches(cache_photos(photos, table, pipeline.vae, wide), wide, timesteps=1000, generator=generator)
    )
    with torch.no_grad(), layerwise_attention(pipeline.unet) as shared:
        learner = Learner(
            reader=TextReader(pipeline.components, {name: nn.Parameter(rows) for name, rows in embeddings.items()}),
            unet=pipeline.unet,
            tokens=config.concept_to_learn.tokens,
            captions=tokenize_for(pipeline, table, config.concept_to_learn),
            scheduler=DDPMScheduler.from_config(pipeline.scheduler.config),
            config=config,
            shared=shared,
        )
        return float(learner(batch)["loss"])


def test_training_lowers_the_loss_on_a_fixed_batch(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    config = quick(photos, max_train_steps=40, embedding_phase_steps=5, train_batch_size=4)
    start = initialise_embeddings(
        config.concept_to_learn,
        pipeline.tokenizer,
        pipeline.text_encoder,
        layers=len(cross_attention_layers(pipeline.unet)),
        std=config.initializer_std,
        generator=torch.Generator().manual_seed(0),
    )
    before = fixed_loss(pipeline, config, {token: value.detach() for token, value in start.items()})
    edlora = EDLoRATrainer(config, pipeline).train()
    with merged(pipeline.components, edlora):
        after = fixed_loss(pipeline, config, dict(edlora.embeddings))
    assert after < 0.95 * before


def test_result_covers_the_model(either: Any, photos: Path) -> None:
    edlora = EDLoRATrainer(quick(photos, rank=3, lora_alpha=6), either).train()
    edlora.check_fits(either.components)
    layers = embedding_layers(either.components)
    assert edlora.layers == layers
    widths = {"": (len(layers), 32)}
    adapted = set(adapted_layers(either.components))
    if "text_encoder_2" in either.components:
        widths |= {"text_encoder_2.": (len(layers), 48), "pooled.": (1, 48)}
        unread = {site for site in adapted if site.startswith("text_encoder.text_model.encoder.layers.2.")}
        assert len(unread) == 4  # nothing reads the last of three layers
        adapted -= unread
    assert {name: value.shape for name, value in edlora.embeddings.items()} == {
        f"{part}{token}": shape for part, shape in widths.items() for token in ("<potter1>", "<potter2>")
    }
    assert set(edlora.lora) == adapted
    assert {(update.rank, update.alpha) for update in edlora.lora.values()} == {(3, 6)}
    assert all(update.up.any() for update in edlora.lora.values())
    assert edlora.training["settings"]["rank"] == 3  # type: ignore[index]
    assert isinstance(edlora.training["final_loss"], float)


def test_embeddings_start_from_noise_and_class_word(pipeline: StableDiffusionPipeline) -> None:
    concept = TrainingConfig(instance_data_dir="photos", concept="potter", class_word="man").concept_to_learn
    start = initialise_embeddings(
        concept,
        pipeline.tokenizer,
        pipeline.text_encoder,
        layers=3,
        std=0.013,
        generator=torch.Generator().manual_seed(0),
    )
    ids = pipeline.tokenizer("man", add_special_tokens=False).input_ids
    assert len(ids) == 3
    expected = pipeline.text_encoder.get_input_embeddings().weight[ids].mean(dim=0)
    torch.testing.assert_close(start["<potter2>"], expected.repeat(3, 1))
    assert torch.equal(start["<potter1>"][0], start["<potter1>"][2])
    assert 0.5 * 0.013 < start["<potter1>"].std() < 2 * 0.013


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "method": "custom-diffusion"}])
def test_pipeline_comes_back_as_it_was(either: Any, photos: Path, settings: dict[str, Any]) -> None:
    either.unet.train()
    either.text_encoder.requires_grad_(False)
    # Asked for hidden states for the first time, transformers hooks its encoders for ever.
    either.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    before = fingerprint(either)
    random_state = torch.get_rng_state()
    EDLoRATrainer(quick(photos, **settings), either).train()
    assert fingerprint(either) == before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("at_step", [1, 2])
def test_pipeline_comes_back_after_an_exception(pipeline: StableDiffusionPipeline, photos: Path, at_step: int) -> None:
    before = fingerprint(pipeline)

    def stop(report: StepReport) -> None:
        if report.step == at_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EDLoRATrainer(quick(photos), pipeline, on_step=stop).train()
    assert fingerprint(pipeline) == before


def test_same_seed_same_result(photos: Path) -> None:
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))
        pipeline = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
        torch.manual_seed(100 + len(results))
        results.append(tensors(EDLoRATrainer(quick(photos, seed=seed), pipeline).train()))
    first, again, other = results
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_only_the_concept_and_its_lora_get_gradients(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    seen: list[tuple[str, set[str]]] = []

    def look(report: StepReport) -> None:
        models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
        named = {
            f"{component}.{name}"
            for component, model in models.items()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        seen.append((report.phase, named))

    EDLoRATrainer(quick(photos), pipeline, on_step=look).train()
    assert seen[0] == ("embeddings", set())
    phase, named = seen[-1]
    assert phase == "joint"
    assert len(named) == 2 * len(adapted_layers(pipeline.components))
    assert all(".lora_" in name for name in named)


def test_rate_of_zero_leaves_its_part_alone(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    edlora = EDLoRATrainer(quick(photos, text_encoder_learning_rate=0.0, embedding_phase_steps=0), pipeline).train()
    moved = {site.partition(".")[0] for site, update in edlora.lora.items() if update.up.any()}
    assert moved == {"unet"}


def test_text_keys_and_values_may_have_a_rate_of_their_own(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    rates = {
        "text_encoder_learning_rate": 0.0,
        "learning_rate": 0.0,
        "text_kv_learning_rate": 1e-2,
        "embedding_phase_steps": 0,
    }
    edlora = EDLoRATrainer(quick(photos, **rates), pipeline).train()
    moved = {site for site, update in edlora.lora.items() if update.up.any()}
    assert moved == {site for site in edlora.lora if site.startswith("unet.") and ".attn2.to_k" in site} | {
        site for site in edlora.lora if site.startswith("unet.") and ".attn2.to_v" in site
    }


def test_steps_are_reported_in_order(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    reports: list[StepReport] = []
    EDLoRATrainer(quick(photos), pipeline, on_step=reports.append).train()
    assert [(r.step, r.total_steps, r.phase) for r in reports] == [
        (1, 3, "embeddings"),
        (2, 3, "joint"),
        (3, 3, "joint"),
    ]


def test_result_is_saved_and_read_back(pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path) -> None:
    edlora = EDLoRATrainer(quick(photos, output_dir=tmp_path / "out"), pipeline).train()
    read = EDLoRA.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, tensors(read)[name]) for name, value in tensors(edlora).items())
    assert read.training == edlora.training


def test_folder_that_cannot_be_written_is_noticed_first(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    reports: list[StepReport] = []
    trainer = EDLoRATrainer(quick(photos, output_dir=tmp_path / "taken"), pipeline, on_step=reports.append)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        trainer.train()
    assert reports == []


def test_divergence_is_an_error_and_restores(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    before = fingerprint(pipeline)
    with pytest.raises(ConfigurationError, match="diverged"):
        EDLoRATrainer(quick(photos, learning_rate=1e25, max_train_steps=4), pipeline).train()
    assert fingerprint(pipeline) == before


def test_concept_behind_the_end_of_a_caption_is_refused(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    (photos / "0.txt").write_text("long " * 40 + CAPTION, encoding="utf-8")
    with pytest.raises(TrainingDataError, match="cut off"):
        EDLoRATrainer(quick(photos), pipeline).train()


def test_a_part_of_the_concept_behind_the_end_is_refused(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    concept = quick(photos).concept_to_learn
    captions = [f"{'a ' * count}{concept.placeholder}" for count in range(100)]
    seen = [len(names) for names in tokenize(captions, pipeline.tokenizer, [concept]).concept_tokens]
    caption = captions[seen.index(1)]  # the first token is the last that the text encoder sees
    (photos / "0.txt").write_text(f"{CAPTION}\n{caption}", encoding="utf-8")
    with pytest.raises(TrainingDataError, match=r"In 1 captions .* is cut off; name it earlier in 0\.png: a a "):
        EDLoRATrainer(quick(photos), pipeline).train()


def test_pipeline_that_cannot_be_trained_is_refused(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    pipeline.unet.half()
    pipeline.text_encoder._hf_hook = object()
    with pytest.raises(ConfigurationError) as caught:
        EDLoRATrainer(quick(photos), pipeline).train()
    assert "text_encoder are offloaded" in str(caught.value)
    assert "unet are in half precision" in str(caught.value)


def test_base_model_that_does_not_exist_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        EDLoRATrainer(quick(photos, pretrained_model_name_or_path=str(tmp_path / "nowhere"))).train()


def test_learning_rates_warm_up_and_decay(photos: Path) -> None:
    config = quick(photos, lr_warmup_steps=2)
    factors = [learning_rate_factor(step, 6, config) for step in range(6)]
    assert factors[0] == pytest.approx(1 / 3)
    assert factors[2:] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert learning_rate_factor(5, 6, quick(photos, lr_scheduler="constant")) == 1
    assert learning_rate_factor(3, 6, quick(photos, lr_scheduler="cosine")) == pytest.approx(0.5)


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_curves_are_those_of_diffusers(photos: Path, name: str) -> None:
    config = quick(photos, lr_scheduler=name, lr_num_cycles=2, lr_power=1.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=8, num_cycles=2, power=1.5)
    if name == "cosine":
        theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=8)
    for step in range(8):
        assert learning_rate_factor(step, 8, config) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        theirs.step()


@pytest.mark.slow
def test_compiled_unet_learns_the_same(
    pipeline: StableDiffusionPipeline, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_with(module, backend="eager"))
    before = fingerprint(pipeline)
    compiled = tensors(EDLoRATrainer(quick(photos, torch_compile=True), pipeline).train())
    assert fingerprint(pipeline) == before
    for name, value in tensors(EDLoRATrainer(quick(photos), pipeline).train()).items():
        torch.testing.assert_close(value, compiled[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_sheet_that_cannot_be_written_loses_nothing(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "validation").write_text("a file where sheets' folder would be")
    config = quick(photos, output_dir=tmp_path, num_validation_images=1, validation_steps=2)
    with pytest.warns(MixOfShowWarning, match=r"validation sheet of step [23] could not be drawn or written"):
        edlora = EDLoRATrainer(config, pipeline).train()
    assert same(EDLoRA.from_pretrained(tmp_path), edlora)


def test_the_result_is_saved_before_its_sheet_is_drawn(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "draw_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        EDLoRATrainer(quick(photos, output_dir=tmp_path, num_validation_images=1), pipeline).train()
    assert EDLoRA.from_pretrained(tmp_path).training["steps"] == 3


def test_a_result_that_came_meanwhile_is_kept_and_ours_saved_beside_it(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "out-2").mkdir()

    def write_another(_report: StepReport) -> None:
        (out / "edlora.safetensors").write_bytes(b"another's")

    config = quick(photos, output_dir=out, num_validation_images=1)
    with pytest.warns(MixOfShowWarning, match=r"is there already, so the new ED-LoRA is saved to .*out-3\."):
        edlora = EDLoRATrainer(config, pipeline, on_step=write_another).train()
    assert (out / "edlora.safetensors").read_bytes() == b"another's"
    assert same(EDLoRA.from_pretrained(tmp_path / "out-3"), edlora)
    assert (tmp_path / "out-3" / "samples" / "0.png").is_file()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"validation_prompt": "a <TOK> next to <ron>", "num_validation_images": 1}, r"validation_prompt is .*<ron>"),
        ({"class_prompt": "a photo of <ron>", "num_class_images": 1}, r"class_prompt is .*<ron>"),
    ],
)
def test_prompts_with_unknown_names_are_refused_before_anything_is_drawn(
    pipeline: StableDiffusionPipeline, photos: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    classes = {"class_data_dir": tmp_path / "class"} if "class_prompt" in settings else {}
    config = quick(photos, output_dir=tmp_path / "out", **settings, **classes)
    with pytest.raises(ConceptError, match=told):
        EDLoRATrainer(config, pipeline).train()
    assert not (tmp_path / "class").exists()


def test_a_process_trains_in_one_precision_after_another(
    pipeline: StableDiffusionPipeline, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("no", "bf16", "no"):
        accelerator = EDLoRATrainer(quick(photos, mixed_precision=precision), pipeline)._make_accelerator()
        assert accelerator.mixed_precision == precision
    monkeypatch.setitem(AcceleratorState._shared_state, "num_processes", 2)  # those would wait for each other
    with pytest.raises(ConfigurationError, match="accelerate refuses mixed_precision 'bf16' here"):
        EDLoRATrainer(quick(photos, mixed_precision="bf16"), pipeline)._make_accelerator()


def test_orders_of_tags_that_hide_the_concept_are_left_out(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    tags = ", ".join(f"tag {'a ' * 3}{number}" for number in range(12))
    (photos / "0.txt").write_text(f"1girl, <TOK>, {tags}", encoding="utf-8")
    EDLoRATrainer(quick(photos, tag_shuffles=8, company=0.0), pipeline).train()
    (photos / "0.txt").write_text(f"{tags}, {'long ' * 40}, <TOK>".replace(", ", " "), encoding="utf-8")
    with pytest.raises(TrainingDataError, match=r"In 1 captions .* name it earlier in 0\.png: tag"):
        EDLoRATrainer(quick(photos, tag_shuffles=8, company=0.0), pipeline).train()
