"""Train Toyland's base from nothing: ``python -m diffusers_mixofshow.toyland.train --output DIR``.

The stages are the autoencoder, the text and metric model, the U-Net and the attribute reader. All of them checkpoint
and continue with ``--resume``; ``accelerate launch --cpu --num_processes 2 -m diffusers_mixofshow.toyland.train ...``
averages gradients over processes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import accelerate
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from diffusers_mixofshow.toyland.autoencoder import (
    AutoencoderObjective,
    build_autoencoder,
    peak_signal_to_noise,
    random_crops,
    reconstruct,
    render_pixels,
    whiten,
)
from diffusers_mixofshow.toyland.denoiser import SCHEDULE, DenoisingObjective, build_unet
from diffusers_mixofshow.toyland.export import export_pipeline, text_tower
from diffusers_mixofshow.toyland.loop import LoopConfig, train_stage
from diffusers_mixofshow.toyland.optimiser import Muon
from diffusers_mixofshow.toyland.text import (
    ContrastiveObjective,
    build_clip,
    encode_prompts,
    sample_captions,
    write_tokenizer,
)
from diffusers_mixofshow.toyland.world import caption, random_scene


HELD_OUT_SEED = 900_000_000
"""Scenes with seeds from here on are never trained on."""


def train_autoencoder(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 1; writes ``output/vae``."""
    accelerator = accelerate.Accelerator()
    torch.manual_seed(config.seed)
    objective = AutoencoderObjective(build_autoencoder())
    first = accelerator.process_index * pool_size
    pool = render_pixels(range(first, first + pool_size))

    def batch(generator: torch.Generator) -> torch.Tensor:
        return random_crops(pool, batch_size, 32, generator).to(accelerator.device)

    held_out = render_pixels(range(HELD_OUT_SEED, HELD_OUT_SEED + 128)).float() / 127.5 - 1

    def report(average: torch.nn.Module) -> None:
        result = reconstruct(average.model, held_out.to(accelerator.device)).cpu()
        print(f"held-out PSNR {peak_signal_to_noise(result, held_out):.2f} dB", flush=True)

    average = train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=Muon(objective.parameters(), learning_rate=config.learning_rate),
        checkpoint=output / "checkpoints" / "autoencoder.pt",
        resume=resume,
        on_checkpoint=report,
    )
    if accelerator.is_main_process:
        model = average.model.cpu()
        whiten(model, pool[:1024].float() / 127.5 - 1)
        report(average)
        model.save_pretrained(output / "vae")


def _squashed(pixels: torch.Tensor) -> torch.Tensor:
    """Wide uint8 pictures resized to squares, still uint8."""
    resized = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="bilinear", antialias=True)
    return resized.round().to(torch.uint8)


def soften(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A third of the pictures as they are, a third noisy, a third blurred."""
    kind = torch.randint(3, (len(pixels), 1, 1, 1), generator=generator)
    strength = 0.15 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    noisy = pixels + strength * torch.randn(pixels.shape, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
    return torch.where(kind == 0, pixels, torch.where(kind == 1, noisy, blurred))


def train_text(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 2; writes ``output/tokenizer`` and ``output/clip``."""
    accelerator = accelerate.Accelerator()
    torch.manual_seed(config.seed)
    with accelerator.main_process_first():
        tokenizer = write_tokenizer(output / "tokenizer", sample_captions(4000, config.seed))
    objective = ContrastiveObjective(build_clip(tokenizer))
    first = accelerator.process_index * pool_size
    wide = pool_size // 8
    seeds = list(range(first, first + pool_size))
    scenes = [random_scene(seed, things=3 if index < wide else None) for index, seed in enumerate(seeds)]
    pool = torch.cat([_squashed(render_pixels(seeds[:wide], things=3)), render_pixels(seeds[wide:])])

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(pool), (batch_size,), generator=generator)
        wordings = torch.randint(2**31, (batch_size,), generator=generator).tolist()
        captions = [caption(scenes[index], seed) for index, seed in zip(chosen.tolist(), wordings, strict=True)]
        pixels = soften(pool[chosen].float() / 127.5 - 1, generator)
        token_ids = encode_prompts(tokenizer, captions)[:, :32]
        return pixels.to(accelerator.device), token_ids.to(accelerator.device)

    average = train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=torch.optim.AdamW(objective.parameters(), lr=config.learning_rate, weight_decay=0.02),
        checkpoint=output / "checkpoints" / "text.pt",
        resume=resume,
    )
    if accelerator.is_main_process:
        average.model.cpu().save_pretrained(output / "clip")


@torch.no_grad()
def _encode_pool(vae: AutoencoderKL, seeds: Sequence[int], things: int | None, device: torch.device) -> torch.Tensor:
    """Latents (n, 8, 16, width / 4) of random scenes, in half precision on the CPU."""
    parts = []
    for start in range(0, len(seeds), 256):
        pixels = render_pixels(seeds[start : start + 256], things=things).to(device).float() / 127.5 - 1
        parts.append(vae.encode(pixels).latent_dist.sample().half().cpu())
    return torch.cat(parts)


def train_unet(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 3; needs stages 1 and 2 and writes ``output/pipeline`` at every checkpoint."""
    accelerator = accelerate.Accelerator()
    torch.manual_seed(config.seed)
    device = accelerator.device
    vae = AutoencoderKL.from_pretrained(output / "vae").to(device)
    clip = CLIPModel.from_pretrained(output / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    objective = DenoisingObjective(build_unet(), text_tower(clip).to(device))
    first = accelerator.process_index * pool_size
    wide = list(range(first, first + pool_size // 6))
    square = list(range(first + len(wide), first + pool_size))
    pools = {
        "square": (_encode_pool(vae, square, None, device), [random_scene(seed) for seed in square]),
        "wide": (_encode_pool(vae, wide, 3, device), [random_scene(seed, things=3) for seed in wide]),
    }
    accelerator.print(f"encoded {pool_size} pictures on each process", flush=True)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        is_wide = float(torch.rand((), generator=generator)) < 1 / 6
        latents, scenes = pools["wide" if is_wide else "square"]
        count = max(1, batch_size * 2 // 3) if is_wide else batch_size
        chosen = torch.randint(len(latents), (count,), generator=generator)
        wordings = torch.randint(2**31, (count,), generator=generator).tolist()
        dropped = (torch.rand(count, generator=generator) < 0.1).tolist()
        captions = [
            "" if drop else caption(scenes[index], seed)
            for index, seed, drop in zip(chosen.tolist(), wordings, dropped, strict=True)
        ]
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(SCHEDULE["num_train_timesteps"], (count,), generator=generator)
        parts = (clean, noise, timesteps, encode_prompts(tokenizer, captions))
        return tuple(part.to(device) for part in parts)

    def export(average: torch.nn.Module) -> None:
        parts = {"unet": average.model, "vae": vae, "clip": clip}
        copies = {name: copy.deepcopy(part).cpu() for name, part in parts.items()}
        export_pipeline(output / "pipeline", tokenizer_folder=output / "tokenizer", **copies)

    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=torch.optim.AdamW(
            objective.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        ),
        checkpoint=output / "checkpoints" / "unet.pt",
        resume=resume,
        on_checkpoint=export,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m diffusers_mixofshow.toyland.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=("all", "autoencoder", "text", "unet", "reader"), default="all")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pool-size", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up-steps", type=int, default=100)
    parser.add_argument("--decay-from", type=float, default=0.0)
    parser.add_argument("--average-decay", type=float, default=0.998)
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    names = [field.name for field in dataclasses.fields(LoopConfig) if hasattr(options, field.name)]
    config = LoopConfig(**{name: getattr(options, name) for name in names})
    stage = {"autoencoder": train_autoencoder, "text": train_text, "unet": train_unet}[options.stage]
    stage(
        options.output, config, batch_size=options.batch_size, pool_size=options.pool_size, resume=options.resume
    )


if __name__ == "__main__":
    main()
