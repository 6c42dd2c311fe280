"""First values of the concept's embeddings, and the loss of a batch as a function of embeddings and LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.conditioning.attention import SharedTexts
from diffusers_mixofshow.conditioning.encode import Encoded
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.training.attention_maps import AttentionRecord, record_attention
from diffusers_mixofshow.training.batches import Batch
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.losses import (
    attention_outside,
    attention_to_mask,
    denoising_errors,
    denoising_target,
    min_snr_weights,
)
from diffusers_mixofshow.training.reader import TextReader, TokenizedTexts


if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def initialise_embeddings(
    concept: Concept,
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    *,
    layers: int,
    std: float,
    generator: torch.Generator,
    starts_at_class: bool = True,
) -> dict[str, nn.Parameter]:
    """Start V_class from the class word and every other token from noise (section 3.3.1), equal in all layers.

    Args:
        concept: Its last token is V_class, the others are V_rand.
        tokenizer: Splits the class word; embeddings of several pieces are averaged.
        text_encoder: Has the class word's embedding.
        layers: Number of cross-attention layers.
        std: Standard deviation of V_rand.
        generator: Draws V_rand, on the CPU.
        starts_at_class: Whether there is a V_class; else the last token starts from noise as well.

    Returns:
        Token to a float32 parameter of shape (layers, dim) on the text encoder's device.

    Raises:
        ConfigurationError: If the tokenizer finds no token in the class word.
    """
    table = text_encoder.get_input_embeddings().weight.detach().float()
    ids = tokenizer(concept.class_word, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigurationError(f"The tokenizer makes no token of the class word {concept.class_word!r}.")
    starts = {token: torch.randn(table.shape[1], generator=generator) * std for token in concept.tokens}
    if starts_at_class:
        starts[concept.tokens[-1]] = table[ids].mean(dim=0)
    return {token: nn.Parameter(start.to(table.device).repeat(layers, 1)) for token, start in starts.items()}


class Learner(nn.Module):
    """The loss as one module, so that accelerate can wrap it without touching the borrowed models.

    Args:
        reader: Encodes captions with the concept's embeddings.
        unet: The borrowed U-Net, with its trainable LoRA and the layer-wise processors.
        denoiser: The compiled U-Net, to be called in its place; None calls `unet`.
        tokens: The concept's tokens, V_class last.
        captions: All captions of the data set, tokenised.
        scheduler: Adds noise and defines the prediction's target.
        config: Weights of the losses.
        shared: Object by which the attention processors learn which caption each picture reads.
    """

    def __init__(
        self,
        *,
        reader: TextReader,
        unet: UNet2DConditionModel,
        tokens: Sequence[str],
        captions: TokenizedTexts,
        scheduler: DDPMScheduler,
        config: TrainingConfig,
        shared: SharedTexts,
        denoiser: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.unet = unet
        self.denoiser = unet if denoiser is None else denoiser
        self.tokens = tuple(tokens)
        self.captions = captions
        self.scheduler = scheduler
        self.config = config
        self.shared = shared
        self._read: dict[int, Encoded] = {}
        """Row of a caption to its encoding on the CPU, while nothing on the text side learns."""

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch, scalars: ``loss`` is the sum of the others.

        ``denoising`` is equation 1 for the concept's pictures, ``prior`` equation 1 for pictures of the class, if
        there are any, and ``attention`` the attention regulariser, if it has a weight.
        """
        errors, record = self._denoise(batch)
        of_concept, of_class = errors.split([len(errors) - batch.prior_pictures, batch.prior_pictures])
        losses = {"denoising": of_concept.mean()}
        if batch.prior_pictures:
            losses["prior"] = self.config.prior_loss_weight * of_class.mean()
        if record is not None:
            losses["attention"] = self.config.attn_reg_weight * self._attention_loss(record, batch)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _denoise(self, batch: Batch) -> tuple[torch.Tensor, AttentionRecord | None]:
        """Equation 1 for every picture, weighted by timestep, shape (batch,); with attention maps if they count."""
        dtype: torch.dtype = self.unet.dtype
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        conditions = self._make_conditions(batch, dtype)
        self.shared.text_of = batch.caption_of
        with record_attention(self.unet) if self.config.attn_reg_weight else nullcontext() as record:
            prediction = self.denoiser(noisy.to(dtype), batch.timesteps, **conditions).sample
        alphas_cumprod = self.scheduler.alphas_cumprod.to(batch.latents.device)[batch.timesteps]
        kind = self.scheduler.config.prediction_type
        target = denoising_target(kind, batch.latents, batch.noise, alphas_cumprod)
        errors = denoising_errors(prediction, target, batch.mask)
        if self.config.snr_gamma is not None:
            errors = errors * min_snr_weights(kind, alphas_cumprod, self.config.snr_gamma)
        return errors, record

    def _make_conditions(self, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the U-Net: the captions' states; for SDXL also their pooled vectors and the pictures' sizes."""
        encoded = self._encode(batch.captions, batch.latents.device)
        conditions: dict[str, Any] = {"encoder_hidden_states": encoded.states.to(dtype)}
        if encoded.pooled is not None:
            vectors = encoded.pooled.to(dtype)[batch.caption_of]
            conditions["added_cond_kwargs"] = {"text_embeds": vectors, "time_ids": batch.sizes}
        return conditions

    def _encode(self, rows: Sequence[int], device: torch.device) -> Encoded:
        """Encode captions for the U-Net; while nothing on the text side learns, each is encoded once and kept.

        Kept ones are encoded one by one: in other batches, as after a resumption, results would differ in last bits.
        """
        if self.reader.learns:
            self._read.clear()
            return self.reader(self.captions.select(rows))
        for row in rows:
            if row not in self._read:
                self._read[row] = self.reader(self.captions.select([row])).to("cpu")
        return Encoded.join_prompts([self._read[row] for row in rows]).to(device)

    def _attention_loss(self, record: AttentionRecord, batch: Batch) -> torch.Tensor:
        """The attention regulariser, summed over tokens and map sizes.

        Averaged over the pictures that have a mask and a caption that names the concept.
        """
        *_, height, width = batch.latents.shape
        positions = {token: self._find_positions(token, batch) for token in self.tokens}
        is_named = torch.tensor(positions[self.tokens[-1]], device=batch.latents.device) > 0
        counted = (batch.has_subject & is_named).float()
        total = torch.zeros_like(counted)
        for token, places in positions.items():
            full = token == self.tokens[-1] and self.config.reg_full_identity
            form = attention_to_mask if full else attention_outside
            for size, maps in record.maps(places, height, width, batch.caption_of).items():
                subject = F.adaptive_avg_pool2d(batch.subject, size)[:, 0]
                total = total + form(maps, subject)
        return (total * counted).sum() / counted.sum().clamp(min=1.0)

    def _find_positions(self, token: str, batch: Batch) -> list[int]:
        """For every picture, the token's first position in its caption; 0, the start token's, if it is not there."""
        first = [
            next((place for place, name in self.captions.concept_tokens[row].items() if name == token), 0)
            for row in batch.captions
        ]
        return [first[place] for place in batch.caption_of.tolist()]
