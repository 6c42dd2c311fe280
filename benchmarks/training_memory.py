"""Estimate what tuning a concept on Stable Diffusion XL needs of a GPU's memory, from shapes alone.

    python benchmarks/training_memory.py --preset low-memory
    python benchmarks/training_memory.py --preset low-memory --resolution 768

Models of SDXL's sizes are built without numbers (torch's fake tensors) and a step of the training itself runs on them:
every tensor's size is known, none is computed, and nothing is downloaded. What is added up is what torch allocates at
once; CUDA's own context (half a gigabyte or more), the allocator's gaps and cuDNN's workspaces come on top. So this is
an estimate, and no measurement.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_mixofshow.base_models import TOYLAND
from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts
from diffusers_mixofshow.edlora.embeddings import join_name
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.layers import embedding_layers, unread_layers
from diffusers_mixofshow.families.sdxl import STABLE_DIFFUSION_XL
from diffusers_mixofshow.lora import trainable
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.batches import Batch
from diffusers_mixofshow.training.compute import recompute_activations, speed_up_updates
from diffusers_mixofshow.training.learner import Learner
from diffusers_mixofshow.training.presets import PRESETS
from diffusers_mixofshow.training.reader import TextReader, TokenizedTexts


UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TOKENS = ("<rex1>", "<rex2>")
GIGABYTE = 1e9
SCALE = 8
"""Pixels along a side of a cell of the latent."""


class Allocations(TorchDispatchMode):
    """Adds up what is allocated, and remembers the most that there was at once, in bytes.

    Args:
        there: Models whose weights are there before, so that a view of one is no allocation.
    """

    def __init__(self, there: Iterable[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        weights = (each for model in there for each in (*model.parameters(), *model.buffers()))
        self._known = weakref.WeakKeyDictionary[Any, int]({each.untyped_storage(): 0 for each in weights})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it has made."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, made)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """What autocast does on CUDA and not on CPUs: norms take and give float32."""

    def in_float32(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any, **named: Any) -> torch.Tensor:
            return norm(*tree_map_only(torch.Tensor, torch.Tensor.float, args), **named)

        return run

    with (
        patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        patch.object(F, "group_norm", in_float32(F.group_norm)),
    ):
        yield


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let models be built with weights of this kind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def models(dtype: torch.dtype) -> dict[str, nn.Module]:
    """SDXL's, without numbers."""
    with in_dtype(dtype):
        texts = CLIPTextConfig(**CLIP_L), CLIPTextConfig(**CLIP_G, projection_dim=1280)
        made = {
            "unet": UNet2DConditionModel(**UNET),
            "text_encoder": CLIPTextModel(texts[0]),
            "text_encoder_2": CLIPTextModelWithProjection(texts[1]),
            "vae": AutoencoderKL(**VAE),
        }
    return {name: model.eval().requires_grad_(False) for name, model in made.items()}


def embeddings(layers: int) -> dict[str, nn.Parameter]:
    """A concept's, without numbers."""
    widths = {"text_encoder": CLIP_L["hidden_size"], "text_encoder_2": CLIP_G["hidden_size"]}
    return {
        join_name(token, part): nn.Parameter(torch.zeros(1 if part == POOLED else layers, widths[encoder]))
        for part, encoder in STABLE_DIFFUSION_XL.embedding_parts.items()
        for token in TOKENS
    }


def batch_of(config: TrainingConfig) -> Batch:
    """What a step sees, without numbers; every caption names the concept."""
    pictures, side = config.train_batch_size, config.resolution // SCALE
    captions = min(config.captions_per_step or pictures, pictures)
    cells = torch.zeros(pictures, 1, side, side)
    return Batch(
        latents=cells.expand(-1, 4, -1, -1).clone(),
        noise=cells.expand(-1, 4, -1, -1).clone(),
        timesteps=torch.zeros(pictures, dtype=torch.long),
        mask=cells,
        subject=cells,
        has_subject=torch.zeros(pictures, dtype=torch.bool),
        sizes=torch.zeros(pictures, 6),
        prior_pictures=0,
        captions=tuple(range(captions)),
        caption_of=torch.arange(pictures) % captions,
    )


def captions_of(count: int) -> TokenizedTexts:
    """Captions that name the concept."""
    ids = torch.zeros(count, 77, dtype=torch.long)
    tokens = TokenizedPrompts(ids, torch.ones_like(ids), tuple({5: TOKENS[0], 6: TOKENS[1]} for _ in range(count)))
    return TokenizedTexts(of_encoder=dict.fromkeys(STABLE_DIFFUSION_XL.text_encoders, tokens), there=(True,) * count)


def peak_of(work: Callable[[], object], *there: nn.Module) -> int:
    """The most bytes that are allocated at once while something runs, beside the models that were there before."""
    with Allocations(there) as allocations:
        work()
    return allocations.peak


def step(parts: Mapping[str, Any], config: TrainingConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of what is learnt, with gradients and Adam's moments; and what a step needs besides, gradients counted."""
    unread, layers = unread_layers(parts), embedding_layers(parts)
    with ExitStack() as stack:
        # Modules without numbers cannot be cast. LoRA layers, the only ones that would be, are made in float32.
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *_, **__: module))
        lora = stack.enter_context(
            trainable(parts, config.rank, config.lora_alpha, wanted=lambda site: site not in unread)
        )
        shared = stack.enter_context(layerwise_attention(parts["unet"], layers=layers))
        stack.enter_context(speed_up_updates(lora))
        if config.gradient_checkpointing:
            encoders = (parts[name] for name in STABLE_DIFFUSION_XL.text_encoders)
            stack.enter_context(recompute_activations(parts["unet"], *encoders))
        reader = TextReader(parts, embeddings(len(layers)))
        learner = Learner(
            reader=reader,
            unet=parts["unet"],
            tokens=TOKENS,
            captions=captions_of(config.train_batch_size),
            scheduler=DDPMScheduler(),
            config=config,
            shared=shared,
        )
        batch = batch_of(config)
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32))
        learnt = sum(each.numel() for each in learner.parameters() if each.requires_grad)
        if dtype != torch.float32:
            stack.enter_context(norms_in_float32())
        needed = peak_of(lambda: learner(batch)["loss"].backward(), learner)
    moments = 2 if config.optimizer.lower().endswith("8bit") else 8
    return learnt * (4 + moments), needed


@torch.no_grad()
def pictures(parts: Mapping[str, Any], config: TrainingConfig, dtype: torch.dtype) -> tuple[int, int]:
    """What encoding a photo and drawing a picture of a sheet need besides the models, the autoencoder in float32."""
    side = config.resolution
    with in_dtype(torch.float32):
        vae = AutoencoderKL(**VAE).eval()
    upcast = sum(4 * weights.numel() for weights in vae.parameters()) if dtype != torch.float32 else 0
    encoding = peak_of(lambda: vae.encode(torch.zeros(1, 3, side, side)), vae)
    cells = side // SCALE
    decoding = peak_of(lambda: vae.decode(torch.zeros(1, 4, cells, cells)), vae)
    return upcast + encoding, upcast + decoding


def main() -> None:
    """Print the estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS.keys() - {TOYLAND, "paper"}), default="low-memory")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of TrainingConfig")
    arguments = parser.parse_args()
    config = TrainingConfig.from_mapping(
        {"instance_data_dir": "photos", "concept": "rex", "class_word": "dog", "preset": arguments.preset}
        | {"resolution": arguments.resolution, "keep_start_token": False}
        | {name: int(value) for name, _, value in (each.partition("=") for each in arguments.set)}
    )
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = models(dtype)
        weights = {name: sum(w.numel() * w.element_size() for w in part.parameters()) for name, part in parts.items()}
        held = sum(weights.values())
        encoding, decoding = pictures(parts, config, dtype)
        learnt, needed = step(parts, config, dtype)
    told = {
        **{f"weights of {name}": size for name, size in weights.items()},
        "what is learnt, with Adam's moments": learnt,
        f"a step of {config.train_batch_size} at {config.resolution} pixels": needed,
        "all while a photo is encoded": held + encoding,
        "all in a step": held + learnt + needed,
        "all while a sheet's picture is decoded": held + learnt + decoding,
    }
    for name, size in told.items():
        print(f"{name:<45} {size / GIGABYTE:6.2f} GB (estimated)")


if __name__ == "__main__":
    main()
