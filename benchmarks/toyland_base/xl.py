"""The third base: a Stable Diffusion XL for pictures of 96 x 96, grown from the first base.

Its second text encoder starts as the first base's text tower, with one more layer, and its U-Net as the first base's
U-Net: what is new adds nothing at first. So training begins with a model that draws, and has to learn the larger size,
the first encoder, the pooled vector and the time ids.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain

from .denoiser import SCHEDULE, build_unet, velocity_weight
from .text import SMALL_WIDTH, configure_small_encoder, sample_captions


SIDE = 96
"""Pixels of the side of a square picture."""
_TIME_ID_WIDTH = 16
"""Channels of each of the six time ids."""
_LAYERS = (1, 2, 1)
"""Transformer layers of a group in each block of the U-Net; the first block has no attention."""


def build_small_tower(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained first text encoder of two layers, of which the U-Net reads the first one's output."""
    model = CLIPTextModel(configure_small_encoder(tokenizer, heads=4, ratio=4))
    freeze_unread(model)
    return model


def freeze_unread(model: CLIPTextModel) -> None:
    """Leave out of training what comes after the penultimate layer's states, which nothing reads."""
    text_model = getattr(model, "text_model", model)
    for unread in (text_model.encoder.layers[-1], text_model.final_layer_norm):
        unread.requires_grad_(False)


@torch.no_grad()
def grow_tower(tower: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """`tower` with one more layer, which changes nothing yet: so the last layer becomes the penultimate one."""
    layers = tower.config.num_hidden_layers
    grown = CLIPTextModelWithProjection(CLIPTextConfig(**tower.config.to_dict() | {"num_hidden_layers": layers + 1}))
    grown.load_state_dict(tower.state_dict(), strict=False)
    for name, weight in grown.named_parameters():
        if f"layers.{layers}." in name and any(part in name for part in ("out_proj", "fc2")):
            weight.zero_()
    return grown.float()


@torch.no_grad()
def fit_final_states(
    tower: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: int = 2000
) -> torch.Tensor:
    """The matrix M (width, width) for which ``M @ penultimate`` is nearest to the tower's final states of captions.

    The first base's U-Net reads final states, Stable Diffusion XL those of the penultimate layer, without the last
    norm.
    """
    token_ids = tokenize_plain(sample_captions(captions, seed=1)[:captions], tokenizer)
    states = tower(token_ids, output_hidden_states=True)
    before, after = (each.flatten(0, 1).double() for each in (states.hidden_states[-2], states.last_hidden_state))
    return torch.linalg.lstsq(before, after).solution.T.float()


def build_xl_unet(text_width: int, pooled_width: int) -> UNet2DConditionModel:
    """An untrained U-Net of Stable Diffusion XL's class.

    Args:
        text_width: Summed widths of both text encoders.
        pooled_width: Of the second one's pooled vector.
    """
    return build_unet(
        text_width,
        sample_size=SIDE // 4,
        transformer_layers_per_block=_LAYERS,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + pooled_width,
    )


@torch.no_grad()
def grow_unet(small: UNet2DConditionModel, final_states: torch.Tensor) -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion XL's class that predicts what `small` does, as far as `final_states` is exact.

    Args:
        small: The first base's U-Net.
        final_states: What `fit_final_states` returns.
    """
    pooled_width = len(final_states)
    grown = build_xl_unet(SMALL_WIDTH + pooled_width, pooled_width)
    known = small.state_dict()
    for name, weight in grown.named_parameters():
        if name in known:
            weight.copy_(_fit_text_width(known[name], final_states, weight).reshape(weight.shape))
        elif name.startswith("add_embedding.linear_2") or (".transformer_blocks." in name and _ends_branch(name)):
            weight.zero_()
    return grown


def _ends_branch(name: str) -> bool:
    return any(f".{part}." in name for part in ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"))


def _fit_text_width(weight: torch.Tensor, final_states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Keys and values of the text read the second encoder, which comes last; all other weights stay."""
    if weight.numel() == wanted.numel():
        return weight
    return torch.nn.functional.pad(weight @ final_states, (SMALL_WIDTH, 0))


class XLObjective(torch.nn.Module):
    """Weighted squared error of the predicted velocity; the U-Net and both text encoders are trained."""

    def __init__(
        self,
        model: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.model, self.text_encoder, self.text_encoder_2 = model, text_encoder, text_encoder_2
        self._scheduler = DDPMScheduler(**SCHEDULE)

    def encode(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (n, L, text width) and pooled vectors (n, pooled width) of token ids (n, L), as the pipeline's."""
        first = self.text_encoder(token_ids, output_hidden_states=True)
        second = self.text_encoder_2(token_ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of a batch.

        Args:
            batch: Latents (n, 8, h, w), noise of the same shape, timesteps (n,), token ids (n, L), time ids (n, 6),
                1 or 0 (n,): where 0, states and pooled vector are zeros, as the pipeline makes them of a negative
                prompt that is not given; and weights (n, 1, h, w): how much each place of a latent counts, relative
                to the others of its picture.
        """
        latents, noise, timesteps, token_ids, time_ids, told, weights = batch
        states, pooled = self.encode(token_ids)
        predicted = self.model(
            self._scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            states * told[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * told[:, None], "time_ids": time_ids},
        ).sample
        squares = (predicted - self._scheduler.get_velocity(latents, noise, timesteps)).square()
        error = (weights * squares).mean(dim=(1, 2, 3)) / weights.mean(dim=(1, 2, 3))
        return (velocity_weight(self._scheduler.alphas_cumprod.to(latents.device)[timesteps]) * error).mean()


def build_xl_pipeline(
    objective: XLObjective, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionXLPipeline:
    """The pipeline of trained parts."""
    return StableDiffusionXLPipeline(
        unet=objective.model,
        vae=vae,
        text_encoder=objective.text_encoder,
        text_encoder_2=objective.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE),
        add_watermarker=False,
    )


def list_time_ids(original: int, width: int, height: int = SIDE) -> list[int]:
    """Time ids of a whole picture: height and width before it was enlarged, top and left of its crop, its size now.

    Args:
        original: Height in pixels in which it was drawn.
        width: Of the picture.
        height: Of the picture.
    """
    return [original, original * width // height, 0, 0, height, width]
