"""Equation 1 and what surrounds it, against the libraries' own numbers and by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.training.losses import denoising_errors, denoising_target, min_snr_weights, offset_noise


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 4, 5, 6, generator=generator)


def test_offset_adds_to_the_variance_of_whole_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 4, 8, 8, generator=generator)
    shifted = offset_noise(noise, torch.randn(500, 4, 1, 1, generator=generator), 0.5)
    assert torch.allclose(shifted.mean(dim=(2, 3)).var(), torch.tensor(1 / 64 + 0.25), rtol=0.1)
    assert torch.allclose(shifted.var(dim=(2, 3)), noise.var(dim=(2, 3)), atol=1e-5)


def test_targets(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, noise = tensors
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    timesteps = torch.tensor([0, 500, 999])
    alphas_cumprod = scheduler.alphas_cumprod[timesteps]
    assert denoising_target("epsilon", latents, noise, alphas_cumprod) is noise
    assert denoising_target("sample", latents, noise, alphas_cumprod) is latents
    velocity = denoising_target("v_prediction", latents, noise, alphas_cumprod)
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, timesteps))


def test_unknown_target_is_refused(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ConfigurationError, match="'flow'"):
        denoising_target("flow", *tensors, torch.ones(3))


def test_errors_are_the_mean_square(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, target = tensors
    expected = (prediction - target).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(denoising_errors(prediction, target), expected)
    torch.testing.assert_close(denoising_errors(prediction, target, torch.full((3, 1, 5, 6), 0.3)), expected)


def test_masked_error_is_the_mean_inside_the_mask(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, target = tensors
    mask = torch.zeros(3, 1, 5, 6)
    mask[:, :, 1:3, 2:5] = 1
    expected = (prediction - target)[:, :, 1:3, 2:5].square().flatten(1).mean(dim=1)
    torch.testing.assert_close(denoising_errors(prediction, target, mask), expected)


def test_half_precision_is_computed_in_float32(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, target = (tensor.half() * 300 for tensor in tensors)
    assert denoising_errors(prediction, target).isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction_type: str) -> None:
    scheduler = DDPMScheduler()
    timesteps = torch.tensor([1, 100, 500, 900])
    snr = compute_snr(scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[prediction_type]
    expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / divisor
    weights = min_snr_weights(prediction_type, scheduler.alphas_cumprod[timesteps], 5.0)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("prediction_type", "last"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_noise_alone_has_the_weight_that_timesteps_before_it_come_near_to(
    prediction_type: str, last: float, gamma: float
) -> None:
    """With zero terminal SNR the last timestep shows nothing of the picture; no weight is a division of 0 by 0."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    alphas_cumprod = scheduler.alphas_cumprod.double()
    assert float(alphas_cumprod[-1]) < 1e-12
    weights = min_snr_weights(prediction_type, torch.cat([alphas_cumprod, torch.zeros(1)]), gamma)
    assert weights.isfinite().all()
    assert weights[-2:].tolist() == pytest.approx([last, last], abs=1e-8)
    assert float(weights[-3]) == pytest.approx(last, abs=1e-4)
