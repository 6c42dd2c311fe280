"""What is learnt leaves the start token, the same in every prompt, as the base has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.layers import adapted_layers
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.training import EDLoRATrainer
from diffusers_mixofshow.training.start_token import remove_direction, start_token_inputs
from families.pipelines import tiny_pipeline
from short_training import quick


reads_text = STABLE_DIFFUSION.reads_text


ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Of sums over some dozens of features."""


@torch.no_grad()
def encoded(pipeline: Any, prompt: str) -> torch.Tensor:
    """As the pipeline itself makes it, shape (tokens, dim)."""
    states: torch.Tensor = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                                  do_classifier_free_guidance=False)[0]  # fmt: skip
    return states[0]


def changes(pipeline: Any, edlora: EDLoRA) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Relative change of every position's encoding, shape (tokens,); and of keys and values, a layer each.

    Of these it is relative to what the update could do at most to an input of that length.
    """
    before = encoded(pipeline, "a man")
    with merged(pipeline.components, edlora):
        after = encoded(pipeline, "a man")
    updates = [low_rank_delta(update) for site, update in edlora.lora.items() if reads_text(site)]
    lengths = before.norm(dim=1)
    at_most = [lengths * torch.linalg.matrix_norm(update, ord=2) for update in updates]
    return (after - before).norm(dim=1) / lengths, [
        (before @ update.T).norm(dim=1) / most for update, most in zip(updates, at_most, strict=True)
    ]


def trained(pipeline: Any, photos: Path, **settings: Any) -> EDLoRA:
    return EDLoRATrainer(quick(photos, **{"max_train_steps": 4} | settings), pipeline).train()


@pytest.mark.parametrize("settings", [{}, {"method": "lora"}, {"ema_decay": 0.9}, {"optimizer": "SGD"}])
def test_updates_leave_the_start_token_alone(settings: dict[str, Any], either: Any, photos: Path) -> None:
    encodings, keys_and_values = changes(either, trained(either, photos, **settings))
    assert encodings[0] < ROUNDING < encodings[1:].max()
    assert all(change[0] < ROUNDING < change[1:].max() for change in keys_and_values)


def test_whole_matrices_leave_the_start_token_alone(either: Any, photos: Path) -> None:
    _, keys_and_values = changes(either, trained(either, photos, method="custom-diffusion"))
    assert all(change[0] < ROUNDING < change[1:].max() for change in keys_and_values)


def test_without_the_setting_the_start_token_changes(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    encodings, keys_and_values = changes(pipeline, trained(pipeline, photos, keep_start_token=False))
    assert encodings[0] > ROUNDING
    assert all(change[0] > ROUNDING for change in keys_and_values)


def test_a_direction_is_taken_out_of_a_matrix_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, other = torch.randn(4, 16, generator=generator), torch.randn(16, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    other = other - (other @ direction) * direction
    left = remove_direction(matrix, direction)
    torch.testing.assert_close(left @ direction, torch.zeros(4))
    torch.testing.assert_close(left @ other, matrix @ other)


def test_what_does_not_learn_stays_bit_for_bit(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    still = {"text_encoder_learning_rate": 0.0, "text_kv_learning_rate": 0.0}
    short, long = (trained(pipeline, photos, max_train_steps=steps, **still) for steps in (1, 4))
    sites = [site for site in long.lora if reads_text(site) or site.startswith("text_encoder.")]
    assert sites
    assert all(torch.equal(short.lora[site].down, long.lora[site].down) for site in sites)


@pytest.mark.parametrize("leaking", ["text_encoder", "text_encoder_2"])
def test_a_base_without_a_start_of_its_own_is_refused(leaking: str, photos: Path) -> None:
    pipeline = tiny_pipeline("Stable Diffusion XL" if leaking.endswith("2") else "Stable Diffusion")
    embeddings = getattr(pipeline, leaking).get_input_embeddings()

    def leak(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + output.sum(dim=1, keepdim=True)  # every position sees all others

    with embeddings.register_forward_hook(leak), pytest.raises(ConfigurationError, match="Set keep_start_token"):
        trained(pipeline, photos)


@pytest.mark.parametrize("whose", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_start_or_end_is_refused(missing: str, whose: str) -> None:
    pipeline = tiny_pipeline("Stable Diffusion XL" if whose.endswith("2") else "Stable Diffusion")
    setattr(getattr(pipeline, whose), missing, None)
    with pytest.raises(ConfigurationError, match=r"no token for the start or the end.*Set keep_start_token to False"):
        start_token_inputs(pipeline, adapted_layers(pipeline.components))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_keeps_its_start_token(dtype: torch.dtype, either: Any) -> None:
    either.text_encoder.to(dtype)
    inputs = start_token_inputs(either, adapted_layers(either.components))
    assert set(inputs) == {
        site for site in adapted_layers(either.components) if reads_text(site) or not site.startswith("unet.")
    }
    assert all(value.dtype is torch.float32 and abs(value.norm() - 1) < ROUNDING for value in inputs.values())
