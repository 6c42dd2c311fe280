"""The U-Net and the layout adapter, their noise schedule, and the objectives that they are trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, T2IAdapter, UNet2DConditionModel
from transformers import CLIPTextModel

from .autoencoder import LATENT_CHANNELS


SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
"""Noise schedule of training and sampling; its last step keeps 1.5 % of the signal's amplitude."""

_WIDTHS = (32, 96, 128)
"""Channels of the U-Net's blocks."""


def build_unet(text_width: int = 128, sample_size: int = 16, **fields: Any) -> UNet2DConditionModel:
    """An untrained U-Net with cross-attention everywhere but at full resolution; `fields` are further ones of it."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=_WIDTHS,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
        **fields,
    )


def build_layout_adapter() -> T2IAdapter:
    """An untrained adapter for `build_unet`.

    The U-Net's first block has halved its feature map when the adapter's first features are added, and the middle
    block takes the fourth: so diffusers' layout of SDXL's adapters fits.
    """
    return T2IAdapter(
        in_channels=1,
        channels=[*_WIDTHS, _WIDTHS[-1]],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter_xl",
    )


def velocity_weight(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error of v: min(SNR + 1, 5) / (SNR + 1).

    Min-SNR for v-prediction (arXiv:2303.09556), but even where noise dominates: the class, the background and the
    layout are decided there.
    """
    signal_plus_noise = 1 / (1 - alphas_cumprod)
    return signal_plus_noise.clamp(max=5.0) / signal_plus_noise


def velocity_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDPMScheduler,
    batch: Sequence[torch.Tensor],
    **conditions: Any,
) -> torch.Tensor:
    """Weighted squared error of the predicted velocity, under a frozen text tower.

    Args:
        unet: Predicts the velocity.
        text_encoder: Encodes the captions.
        scheduler: Adds the noise.
        batch: Latents (n, 8, h, w), noise of the same shape, timesteps (n,) and token ids (n, 77).
        conditions: Further arguments of the U-Net.
    """
    latents, noise, timesteps, token_ids = batch
    with torch.no_grad():
        states = text_encoder(input_ids=token_ids).last_hidden_state
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    error = (unet(noisy, timesteps, states, **conditions).sample - target).square().mean(dim=(1, 2, 3))
    weight = velocity_weight(scheduler.alphas_cumprod.to(latents.device)[timesteps])
    return (weight * error).mean()


class DenoisingObjective(torch.nn.Module):
    """`velocity_loss` of the U-Net that it trains."""

    def __init__(self, model: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.model = model
        self._text_encoder = [text_encoder.requires_grad_(False).eval()]
        self._scheduler = DDPMScheduler(**SCHEDULE)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of a batch as `velocity_loss` takes it."""
        return velocity_loss(self.model, self._text_encoder[0], self._scheduler, batch)


class LayoutObjective(torch.nn.Module):
    """`velocity_loss` of a frozen U-Net that the adapter it trains tells where things stand."""

    def __init__(self, model: T2IAdapter, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.model = model
        self._frozen = (unet.requires_grad_(False).eval(), text_encoder.requires_grad_(False).eval())
        self._scheduler = DDPMScheduler(**SCHEDULE)

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of a batch as `velocity_loss` takes it, with condition images (n, 1, 4 h, 4 w) in [0, 1] at its end."""
        *pictures, places = batch
        features = self.model(places)
        return velocity_loss(
            *self._frozen, self._scheduler, pictures, down_intrablock_additional_residuals=list(features)
        )
