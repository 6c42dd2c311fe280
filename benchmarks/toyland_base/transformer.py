"""The second base: a flow-matching transformer of Stable Diffusion 3's class on the first base's latents and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .autoencoder import LATENT_CHANNELS
from .text import configure_small_encoder


TEXT_TOKENS = 32
"""Positions of a prompt; the longest caption of the drawn world has 25."""
ABSENT_TOKENS = 256
"""Positions of zeros that the pipeline puts after the prompt's where there is no T5 (its `max_sequence_length`)."""
_SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}


def add_projection(tower: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The first base's text tower with a pooled vector that is its own, projected by the identity."""
    config = CLIPTextConfig(**tower.config.to_dict() | {"projection_dim": tower.config.hidden_size})
    model = CLIPTextModelWithProjection(config)
    missing, unexpected = model.load_state_dict(_spell_text(tower.state_dict(), model), strict=False)
    if unexpected or list(missing) != ["text_projection.weight"]:
        raise ValueError(f"The text tower does not fit: {missing} missing, {unexpected} unexpected.")
    torch.nn.init.eye_(model.text_projection.weight)
    return model.float().eval().requires_grad_(False)


def _spell_text(state: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`state` with the names that this transformers release gives the tower's weights in `model`."""
    prefix = "text_model."
    bare = {name.removeprefix(prefix): value for name, value in state.items()}
    wanted = {name.removeprefix(prefix): name for name in model.state_dict()}
    return {wanted.get(name, name): value for name, value in bare.items()}


def build_small_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The second text encoder, which the class demands: small, and random for ever.

    Different words have different vectors in it, which is all that the transformer learns to use.
    """
    torch.manual_seed(0)
    more = {"max_position_embeddings": TEXT_TOKENS, "initializer_factor": 10.0}
    config = configure_small_encoder(tokenizer, heads=2, ratio=2, **more)
    return CLIPTextModelWithProjection(config).eval().requires_grad_(False)


def build_transformer(text_width: int) -> SD3Transformer2DModel:
    """An untrained transformer for 16 x 16 latents in patches of 2 x 2.

    Args:
        text_width: Summed widths of both text encoders.
    """
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=text_width,
        caption_projection_dim=160,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def build_pipeline(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModelWithProjection,
    small_text_encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
) -> StableDiffusion3Pipeline:
    """The pipeline of the parts; without T5, in whose place it puts as many zeros as a prompt has positions."""
    tokenizer.model_max_length = TEXT_TOKENS
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=small_text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


class RepeatedTokenAttention:
    """The joint attention of Stable Diffusion 3 in which the last token of the text stands for many equal ones.

    Equal tokens stay equal in every block, as nothing tells their positions: a key that is seen n times counts as one
    whose logit is larger by log n. So the zeros in place of T5's states cost one token instead of 256.
    """

    def __init__(self, times: int) -> None:
        self._bias = math.log(times)

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over tokens (n, pictures, width) and (n, texts, width); returns both, changed."""

        def heads(project: Any, norm: Any, states: torch.Tensor) -> torch.Tensor:
            projected = project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return projected if norm is None else norm(projected)

        pairs = (
            (attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
            (attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
            (attn.to_v, attn.add_v_proj, None, None),
        )
        query, key, value = (
            torch.cat([heads(to, norm, hidden_states), heads(add, added_norm, encoder_hidden_states)], dim=2)
            for to, add, norm, added_norm in pairs
        )
        bias = torch.zeros(key.shape[2]).to(key)
        bias[-1] = self._bias
        joined = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias[None, None, None])
        pictures, texts = (
            joined.transpose(1, 2).flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        )
        return attn.to_out[0](pictures), texts if attn.context_pre_only else attn.to_add_out(texts)


class FlowObjective(torch.nn.Module):
    """Squared error of the predicted velocity from picture to noise, under frozen text encoders.

    The noise level is drawn from a logit-normal distribution (arXiv:2403.03206, section 3.1).
    """

    def __init__(self, model: SD3Transformer2DModel, text_encoders: Sequence[CLIPTextModelWithProjection]) -> None:
        super().__init__()
        self.model = model
        self.model.set_attn_processor(RepeatedTokenAttention(ABSENT_TOKENS))
        self._text_encoders = tuple(text_encoders)

    @torch.no_grad()
    def encode(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (n, L + 1, text width) and pooled vectors (n, text width) of token ids (n, L).

        They are the pipeline's, but for the zeros at the end: one position for all.
        """
        results = [encoder(token_ids, output_hidden_states=True) for encoder in self._text_encoders]
        states = torch.cat([result.hidden_states[-2] for result in results], dim=-1)
        pooled = torch.cat([result.text_embeds for result in results], dim=-1)
        return torch.nn.functional.pad(states, (0, 0, 0, 1)), pooled

    def forward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of latents (n, 8, 16, 16), noise of the same shape, noise levels (n,) in (0, 1), token ids (n, L)."""
        latents, noise, levels, token_ids = batch
        states, pooled = self.encode(token_ids)
        weight = levels[:, None, None, None]
        predicted = self.model(
            (1 - weight) * latents + weight * noise,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=levels * _SCHEDULER["num_train_timesteps"],
        ).sample
        return (predicted - (noise - latents)).square().mean()
