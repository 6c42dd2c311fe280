"""The mathematics of tuning: noise, targets and losses as pure functions of tensors.

Notation of the paper (arXiv:2305.18292, equation 1): epsilon is `noise`, epsilon_theta(z_t, c(V), t) is `prediction`;
the concept V enters through the text conditioning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from diffusers_mixofshow.errors import ConfigurationError


def offset_noise(noise: torch.Tensor, channel_noise: torch.Tensor, strength: float) -> torch.Tensor:
    """Add noise that is constant over the picture, so that the model also learns a latent's mean.

    The paper calls the offset crucial for encoding a stable identity (section 6.1).

    Args:
        noise: Standard normal, shape (batch, channels, height, width).
        channel_noise: Standard normal, shape (batch, channels, 1, 1).
        strength: Standard deviation of the added part; 0 adds nothing.

    Returns:
        Shape (batch, channels, height, width).
    """
    return noise + strength * channel_noise


def denoising_target(
    prediction_type: str, latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """The tensor that the denoiser is trained to predict.

    ``epsilon``: the noise (equation 1). ``v_prediction``: a epsilon - s z_0 with a^2 = alphas_cumprod and
    a^2 + s^2 = 1 (arXiv:2202.00512). ``sample``: z_0.

    Args:
        prediction_type: The scheduler's ``prediction_type``.
        latents: z_0, shape (batch, channels, height, width).
        noise: epsilon, same shape.
        alphas_cumprod: Of every picture's timestep, shape (batch,).

    Returns:
        Shape (batch, channels, height, width).

    Raises:
        ConfigurationError: If the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        signal = alphas_cumprod.sqrt().view(-1, 1, 1, 1)
        spread = (1 - alphas_cumprod).sqrt().view(-1, 1, 1, 1)
        return signal * noise - spread * latents
    raise ConfigurationError(
        f"The base model's scheduler predicts {prediction_type!r}; training knows epsilon, v_prediction and sample."
    )


def denoising_errors(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Equation 1 for every picture: the mean squared error, weighted by the mask if there is one.

    Computed in float32. The mask is divided by its own mean, so that a small subject weighs as much as a large one.

    Args:
        prediction: epsilon_theta (or v_theta), shape (batch, channels, height, width).
        target: Same shape.
        mask: Weights in [0, 1], shape (batch, 1, height, width), not all zero in any picture; None weighs every
            position equally.

    Returns:
        Shape (batch,).
    """
    errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if mask is not None:
        errors = errors * (mask / mask.mean(dim=(1, 2, 3), keepdim=True))
    return errors.mean(dim=(1, 2, 3))


def min_snr_weights(prediction_type: str, alphas_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights that keep easy timesteps from dominating (arXiv:2303.09556, section 3.4).

    The weight of the error in z_0 is min(SNR, gamma) with SNR = a^2 / (1 - a^2). The weight of the error in epsilon is
    that divided by SNR, in v that divided by SNR + 1. At SNR = 0, where only noise is left, this is 1 for epsilon and
    0 for v.

    Args:
        prediction_type: The scheduler's ``prediction_type``.
        alphas_cumprod: a^2 of every picture's timestep, shape (batch,).
        gamma: The clamp; the paper recommends 5.

    Returns:
        Shape (batch,).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod).clamp(min=1e-8)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    clamped = snr.clamp(max=gamma)
    return clamped / (snr + 1) if prediction_type == "v_prediction" else clamped


def token_attention(queries: torch.Tensor, keys: torch.Tensor, heads: int, positions: Sequence[int]) -> torch.Tensor:
    """Attention of every place in a picture to one token of its text: the mean over heads of softmax(Q K^T / d^0.5).

    Computed in float32.

    Args:
        queries: Shape (batch, places, heads * head).
        keys: Shape (batch, tokens, heads * head).
        heads: Number of heads.
        positions: For each picture, the token's position in its text.

    Returns:
        Shape (batch, places); one place's values for all tokens of the text add up to 1.
    """
    of_heads = [part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys)]
    scores = of_heads[0] @ of_heads[1].transpose(-1, -2) / of_heads[0].shape[-1] ** 0.5
    chosen = torch.tensor(positions, device=scores.device).view(-1, 1, 1, 1).expand(*scores.shape[:3], 1)
    return (scores.gather(3, chosen).squeeze(3) - scores.logsumexp(dim=3)).exp().mean(dim=1)


def attention_outside(maps: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
    """How much of a token's attention lies outside the subject: the attention regulariser's default form.

    Args:
        maps: Attention to the token, shape (batch, height, width); each is divided by its largest value.
        subject: Share of each place that shows the subject, in [0, 1], same shape.

    Returns:
        Mean of the map outside the subject, shape (batch,); 0 if the subject fills the picture.
    """
    outside = 1 - subject
    weighted = (_divide_by_largest(maps) * outside).sum(dim=(1, 2))
    return weighted / outside.sum(dim=(1, 2)).clamp(min=1.0)


def attention_to_mask(maps: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
    """How far a token's attention is from the subject's mask: the attention regulariser for `reg_full_identity`.

    Args:
        maps: Attention to the token, shape (batch, height, width); each is divided by its largest value.
        subject: Share of each place that shows the subject, in [0, 1], same shape.

    Returns:
        Mean squared difference, shape (batch,).
    """
    return (_divide_by_largest(maps) - subject).square().mean(dim=(1, 2))


def _divide_by_largest(maps: torch.Tensor) -> torch.Tensor:
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-8)
