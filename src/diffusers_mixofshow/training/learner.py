"""What is learnt: layer-wise embeddings and LoRA, and the loss of a batch as a function of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.conditioning.encode import encode_layerwise
from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.training.batches import Batch
from diffusers_mixofshow.training.losses import denoising_errors, denoising_target, min_snr_weights


if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def initial_embeddings(
    concept: Concept,
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    *,
    layers: int,
    std: float,
    generator: torch.Generator,
) -> dict[str, nn.Parameter]:
    """Start V_class from the class word and every other token from noise (section 3.3.1), alike in all layers.

    Args:
        concept: Its last token is V_class, the others are V_rand.
        tokenizer: Splits the class word; several pieces are averaged.
        text_encoder: Has the class word's embedding.
        layers: Number of cross-attention layers.
        std: Standard deviation of V_rand.
        generator: Draws V_rand, on the CPU.

    Returns:
        Token to a float32 parameter of shape (layers, dim) on the text encoder's device.

    Raises:
        ConfigurationError: If the tokenizer makes nothing of the class word.
    """
    table = text_encoder.get_input_embeddings().weight.detach().float()
    ids = tokenizer(concept.class_word, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigurationError(f"The tokenizer makes no token of the class word {concept.class_word!r}.")
    *random_tokens, class_token = concept.tokens
    starts = {token: torch.randn(table.shape[1], generator=generator) * std for token in random_tokens}
    starts[class_token] = table[ids].mean(dim=0)
    return {token: nn.Parameter(start.to(table.device).repeat(layers, 1)) for token, start in starts.items()}


class Learner(nn.Module):
    """The loss as one module, so that accelerate can wrap it without touching the borrowed models.

    Args:
        text_encoder: Borrowed, with its trainable LoRA inside.
        unet: Borrowed, with its trainable LoRA and the layer-wise processors inside.
        embeddings: Token to parameter of shape (layers, dim).
        captions: All captions of the data set, tokenised.
        scheduler: Adds noise and says what is predicted.
        snr_gamma: See `TrainingConfig`.
    """

    def __init__(
        self,
        *,
        text_encoder: PreTrainedModel,
        unet: UNet2DConditionModel,
        embeddings: dict[str, nn.Parameter],
        captions: TokenizedPrompts,
        scheduler: DDPMScheduler,
        snr_gamma: float | None,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.tokens = tuple(embeddings)
        self.values = nn.ParameterList(embeddings.values())
        self.captions = captions
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma

    def forward(self, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch (equation 1), a scalar."""
        embeddings = dict(zip(self.tokens, self.values, strict=True))
        layers = self.values[0].shape[0]
        encoded = encode_layerwise(self.text_encoder, self.captions.select(batch.captions), embeddings, layers)
        dtype: torch.dtype = self.unet.dtype
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        prediction = self.unet(
            noisy.to(dtype), batch.timesteps, encoder_hidden_states=encoded[batch.caption_of].to(dtype)
        ).sample
        alphas_cumprod = self.scheduler.alphas_cumprod.to(batch.latents.device)[batch.timesteps]
        kind = self.scheduler.config.prediction_type
        target = denoising_target(kind, batch.latents, batch.noise, alphas_cumprod)
        errors = denoising_errors(prediction, target, batch.mask)
        if self.snr_gamma is not None:
            errors = errors * min_snr_weights(kind, alphas_cumprod, self.snr_gamma)
        return errors.mean()
