"""Train Toyland's bases from nothing: ``python -m benchmarks.toyland_base.train --output DIR``.

The stages are the autoencoder, the text tower, the U-Net, the transformer (the second base, on the same autoencoder
and texts), the Stable Diffusion XL (the third, grown from the first), the names of residents for it, the layout
adapter, the attribute reader and the metric model. All of them checkpoint and continue with ``--resume``; ``torchrun
--nproc_per_node 2 -m benchmarks.toyland_base.train ...`` with ``OMP_NUM_THREADS=1`` averages gradients over processes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_mixofshow.conditioning.tokenize import tokenize_plain
from diffusers_mixofshow.evaluation.record import commit
from diffusers_mixofshow.toyland.layout import Box, draw_places
from diffusers_mixofshow.toyland.reader import ReaderNetwork, to_pixels
from diffusers_mixofshow.toyland.scenes import caption, random_scene
from diffusers_mixofshow.toyland.world import HEIGHT, draw

from .alignment import AlignmentObjective, claim_about, holding
from .autoencoder import (
    AutoencoderObjective,
    build_autoencoder,
    peak_signal_to_noise,
    random_crops,
    reconstruct,
    render_pixels,
    whiten,
)
from .denoiser import (
    SCHEDULE,
    DenoisingObjective,
    LayoutObjective,
    build_layout_adapter,
    build_unet,
)
from .export import (
    assemble,
    copy_pipeline,
    export_metric_model,
    export_pipeline,
    export_reader,
    take_over,
    take_over_xl,
    text_tower,
    trained_unet,
    write_pipeline,
)
from .latent_pool import LatentPool
from .loop import LoopConfig, train_stage
from .named import NamedPool
from .optimiser import Muon
from .reader import (
    UNKNOWN,
    ReaderObjective,
    attribute_vocabulary,
    reader_pool,
    reader_scenes,
    scene_labels,
    soft_round_trip,
)
from .text import (
    ContrastiveObjective,
    build_clip,
    sample_captions,
    tells_looks,
    write_tokenizer,
)
from .transformer import (
    TEXT_TOKENS,
    FlowObjective,
    add_projection,
    build_pipeline,
    build_small_text_encoder,
    build_transformer,
)
from .xl import (
    SIDE,
    XLObjective,
    build_small_tower,
    build_xl_pipeline,
    fit_final_states,
    freeze_unread,
    grow_tower,
    grow_unet,
    list_time_ids,
)


HELD_OUT_SEED = 900_000_000
"""Scenes with seeds from here on are never trained on."""

_NAMES_SEED = 700_000_000
"""Scenes of the stage that teaches names have seeds from here on."""
_WIDE_SHARE = 1 / 4
"""Share of pictures of three things in the U-Net's training."""
XL_SHARES = {"square": 0.65, "wide": 0.25, "enlarged": 0.1}
"""Shares of pictures in the third base's training: of one or two things, of three, and enlarged from the first's size,
which the time ids tell."""
XL_NAMES_SHARES = {"named": 0.55, "square": 0.2, "wide": 0.25}
"""Those of the stage that teaches it names: of one resident called by name, of one or two things, and of three."""
_TEXT_RATE = 0.2
"""Learning rate of the third base's text encoders, as a share of its U-Net's; at equal rates names are forgotten."""
_UNTOLD_SHARE = 0.06
"""Share of pictures in the third base's training whose text is zeros."""
_THINGS_SHARES = torch.tensor([0.25, 0.25, 0.5])
"""Shares of pictures of one, two and three things in the layout adapter's training."""


def joined_processes() -> accelerate.Accelerator:
    """The processes that a launcher started; without a GPU accelerate joins them only when it is told to use CPUs."""
    return accelerate.Accelerator(cpu=not torch.cuda.is_available())


def train_autoencoder(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 1; writes ``output/vae``."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    objective = AutoencoderObjective(build_autoencoder())
    first = accelerator.process_index * pool_size
    pool = render_pixels(range(first, first + pool_size))

    def batch(generator: torch.Generator) -> torch.Tensor:
        return random_crops(pool, batch_size, 32, generator).to(accelerator.device)

    held_out = render_pixels(range(HELD_OUT_SEED, HELD_OUT_SEED + min(128, pool_size))).float() / 127.5 - 1

    def report(average: AutoencoderObjective) -> None:
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
    """Stage 2; writes ``output/tokenizer`` and ``output/text_encoder``."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    if accelerator.is_main_process:
        write_tokenizer(output / "tokenizer", sample_captions(4000, config.seed))
    accelerator.wait_for_everyone()
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    sizes = [len(values) for values in attribute_vocabulary().values()]
    objective = ContrastiveObjective(build_clip(tokenizer), sizes)
    first = accelerator.process_index * pool_size
    wide = pool_size // 8
    seeds = list(range(first, first + pool_size))
    scenes = [random_scene(seed, things=3 if index < wide else None) for index, seed in enumerate(seeds)]
    labels = scene_labels(scenes)
    pool = torch.cat([_squashed(render_pixels(seeds[:wide], things=3)), render_pixels(seeds[wide:])])

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        chosen = torch.randint(len(pool), (batch_size,), generator=generator)
        wordings = torch.randint(2**31, (batch_size,), generator=generator).tolist()
        captions = [caption(scenes[index], seed) for index, seed in zip(chosen.tolist(), wordings, strict=True)]
        pixels = soften(pool[chosen].float() / 127.5 - 1, generator)
        token_ids = tokenize_plain(captions, tokenizer)[:, :32]
        told = [tells_looks(words, scenes[index]) for index, words in zip(chosen.tolist(), captions, strict=True)]
        said = torch.where(torch.tensor(told)[:, None], labels[chosen], UNKNOWN)
        return tuple(part.to(accelerator.device) for part in (pixels, token_ids, labels[chosen], said))

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
        text_tower(average.model.cpu()).save_pretrained(output / "text_encoder")


def _earlier_parts(output: Path, device: torch.device) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """What stages 1 and 2 have written."""
    vae = AutoencoderKL.from_pretrained(output / "vae").to(device)
    text_encoder = CLIPTextModel.from_pretrained(output / "text_encoder").float().to(device)
    return vae, text_encoder, CLIPTokenizer.from_pretrained(output / "tokenizer")


def _adam(parameters: Iterable[Any], config: LoopConfig) -> torch.optim.Optimizer:
    """The optimiser of all denoisers, of parameters or groups of them."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)


def train_unet(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 3; needs stages 1 and 2 and writes ``output/pipeline`` at every checkpoint."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    device = accelerator.device
    vae, text_encoder, tokenizer = _earlier_parts(output, device)
    initial = output / "initial_unet"
    unet = UNet2DConditionModel.from_pretrained(initial) if initial.exists() else build_unet()
    objective = DenoisingObjective(unet, text_encoder)
    first = accelerator.process_index * pool_size
    wide = list(range(first, first + int(pool_size * _WIDE_SHARE)))
    square = list(range(first + len(wide), first + pool_size))
    pools = {
        "square": LatentPool.encode(vae, square, None, device),
        "wide": LatentPool.encode(vae, wide, 3, device),
    }
    accelerator.print(f"encoded {pool_size} pictures on each process", flush=True)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        is_wide = float(torch.rand((), generator=generator)) < _WIDE_SHARE
        count = max(1, batch_size * 2 // 3) if is_wide else batch_size
        _, clean, noise, token_ids = pools["wide" if is_wide else "square"].batch(count, tokenizer, generator)
        timesteps = torch.randint(SCHEDULE["num_train_timesteps"], (count,), generator=generator)
        return tuple(part.to(device) for part in (clean, noise, timesteps, token_ids))

    def export(average: DenoisingObjective) -> None:
        parts = {"unet": average.model, "vae": vae, "text_encoder": text_encoder}
        copies = {name: copy.deepcopy(part).cpu() for name, part in parts.items()}
        export_pipeline(output / "pipeline", tokenizer_folder=output / "tokenizer", **copies)

    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=_adam(objective.parameters(), config),
        checkpoint=output / "checkpoints" / "unet.pt",
        resume=resume,
        on_checkpoint=export,
    )


def train_transformer(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """The second base; needs stages 1 and 2 and writes ``output/transformer_pipeline`` at every checkpoint."""
    accelerator = joined_processes()
    device = accelerator.device
    vae, tower, tokenizer = _earlier_parts(output, device)
    encoders = [add_projection(tower.cpu()).to(device), build_small_text_encoder(tokenizer).to(device)]
    torch.manual_seed(config.seed)
    text_width = sum(encoder.config.hidden_size for encoder in encoders)
    objective = FlowObjective(build_transformer(text_width), encoders)
    first = accelerator.process_index * pool_size
    pool = LatentPool.encode(vae, range(first, first + pool_size), None, device)
    accelerator.print(f"encoded {pool_size} pictures on each process", flush=True)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        _, clean, noise, token_ids = pool.batch(batch_size, tokenizer, generator)
        levels = torch.randn(batch_size, generator=generator).sigmoid()
        return tuple(part.to(device) for part in (clean, noise, levels, token_ids[:, :TEXT_TOKENS]))

    def export(average: FlowObjective) -> None:
        parts = copy.deepcopy([average.model, vae, *encoders, tokenizer])
        pipeline = build_pipeline(*parts).to("cpu")
        write_pipeline(output / "transformer_pipeline", pipeline, output / "tokenizer", TEXT_TOKENS)

    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=_adam(objective.parameters(), config),
        checkpoint=output / "checkpoints" / "transformer.pt",
        resume=resume,
        on_checkpoint=export,
    )


def train_xl(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """The third base; needs stages 1 to 3 and writes ``output/xl_pipeline`` at every checkpoint."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    device = accelerator.device
    vae, tower, tokenizer = _earlier_parts(output, torch.device("cpu"))
    second = grow_tower(add_projection(tower))
    final_states = fit_final_states(second, tokenizer)
    unet = grow_unet(UNet2DConditionModel.from_pretrained(trained_unet(output)).float(), final_states)
    objective = XLObjective(unet, build_small_tower(tokenizer), second.requires_grad_(True).train())
    pools = _encode_xl_pools(vae.to(device), accelerator.process_index * pool_size, pool_size, device)
    accelerator.print(f"encoded {pool_size} pictures on each process", flush=True)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return _batch_of_xl(pools, XL_SHARES, batch_size, tokenizer, generator, device)

    def export(average: XLObjective) -> None:
        pipeline = build_xl_pipeline(*copy.deepcopy((average, vae, tokenizer))).to("cpu")
        write_pipeline(output / "xl_pipeline", pipeline, output / "tokenizer")

    _train_xl_stage(objective, batch, config, accelerator, output / "checkpoints" / "xl.pt", resume, export)


def _batch_of_xl(
    pools: Mapping[str, LatentPool | NamedPool],
    shares: Mapping[str, float],
    batch_size: int,
    tokenizer: CLIPTokenizer,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:
    """A batch of `XLObjective`, all of one kind of pictures, which is drawn by its share."""
    name = list(shares)[int(torch.multinomial(torch.tensor(list(shares.values())), 1, generator=generator))]
    count, pool = max(1, batch_size * 2 // 3) if name == "wide" else batch_size, pools[name]
    if isinstance(pool, NamedPool):
        clean, noise, token_ids, weights = pool.batch(count, tokenizer, generator)
    else:
        _, clean, noise, token_ids = pool.batch(count, tokenizer, generator, uncaptioned=0.06)
        weights = torch.ones_like(clean[:, :1])
    timesteps = torch.randint(SCHEDULE["num_train_timesteps"], (count,), generator=generator)
    ids = list_time_ids(HEIGHT if name == "enlarged" else SIDE, clean.shape[-1] * 4)
    told = (torch.rand(count, generator=generator) > _UNTOLD_SHARE).float()
    parts = (clean, noise, timesteps, token_ids, torch.tensor([ids] * count), told, weights)
    return tuple(part.to(device) for part in parts)


def _train_xl_stage(
    objective: XLObjective,
    batch: Callable[[torch.Generator], Any],
    config: LoopConfig,
    accelerator: accelerate.Accelerator,
    checkpoint: Path,
    resume: bool,
    export: Callable[[XLObjective], None],
) -> None:
    """Run the loop with text encoders that learn slower than the U-Net."""
    texts = [*objective.text_encoder.parameters(), *objective.text_encoder_2.parameters()]
    groups = [{"params": objective.model.parameters()}, {"params": texts, "share": _TEXT_RATE}]
    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=_adam(groups, config),
        checkpoint=checkpoint,
        resume=resume,
        on_checkpoint=export,
    )


def train_xl_names(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Teach the third base what residents look like; writes ``output/xl_names_pipeline`` at every checkpoint."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    device = accelerator.device
    base = StableDiffusionXLPipeline.from_pretrained(output / "xl_pipeline", torch_dtype=torch.float32)
    vae, tokenizer = base.vae.to(device), base.tokenizer
    objective = XLObjective(base.unet, base.text_encoder, base.text_encoder_2).requires_grad_(True).train()
    freeze_unread(objective.text_encoder)
    sizes = {name: int(pool_size * share) for name, share in XL_NAMES_SHARES.items()}
    first = _NAMES_SEED + accelerator.process_index * pool_size
    pools: dict[str, LatentPool | NamedPool] = {
        "named": NamedPool.encode(vae, range(first, first + sizes["named"]), device, SIDE),
        "square": LatentPool.encode(vae, range(first, first + sizes["square"]), None, device, SIDE),
        "wide": LatentPool.encode(vae, range(first, first + sizes["wide"]), 3, device, SIDE),
    }
    accelerator.print(f"encoded {pool_size} pictures on each process", flush=True)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return _batch_of_xl(pools, XL_NAMES_SHARES, batch_size, tokenizer, generator, device)

    def export(average: XLObjective) -> None:
        pipeline = build_xl_pipeline(*copy.deepcopy((average, vae, tokenizer))).to("cpu")
        write_pipeline(output / "xl_names_pipeline", pipeline, output / "xl_pipeline" / "tokenizer")

    _train_xl_stage(objective, batch, config, accelerator, output / "checkpoints" / "xl_names.pt", resume, export)


def _encode_xl_pools(vae: AutoencoderKL, first: int, size: int, device: torch.device) -> dict[str, LatentPool]:
    """Pictures of each kind of `XL_SHARES`, together `size`, from the seed `first` on."""
    pools: dict[str, LatentPool] = {}
    for name, share in XL_SHARES.items():
        seeds = range(first, first + int(size * share))
        first = seeds.stop
        height, enlarged_to = (HEIGHT, SIDE) if name == "enlarged" else (SIDE, None)
        pools[name] = LatentPool.encode(vae, seeds, 3 if name == "wide" else None, device, height, enlarged_to)
    return pools


def _jittered(boxes: Sequence[Box], generator: torch.Generator) -> list[Box]:
    """Boxes whose sides moved by up to a tenth of their size: a layout need not be exact."""
    moved: list[Box] = []
    for left, top, right, bottom in boxes:
        wide, high = 0.1 * (right - left), 0.1 * (bottom - top)
        a, b, c, d = (2 * torch.rand(4, generator=generator) - 1).tolist()
        moved.append((left + a * wide, top + b * high, right + c * wide, bottom + d * high))
    return moved


def train_layout(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 4; needs stages 1 to 3 and writes ``output/layout_adapter``, which sees where things stand."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    device = accelerator.device
    vae, text_encoder, tokenizer = _earlier_parts(output, device)
    unet = UNet2DConditionModel.from_pretrained(trained_unet(output)).float().to(device)
    objective = LayoutObjective(build_layout_adapter(), unet, text_encoder)
    first = accelerator.process_index * pool_size
    seeds = list(range(first, first + pool_size))
    thirds = {things: seeds[things - 1 :: 3] for things in (1, 2, 3)}
    pools = {things: LatentPool.encode(vae, part, things, device) for things, part in thirds.items()}
    boxes = {id(scene): draw(scene).boxes for pool in pools.values() for scene in pool.scenes}
    accelerator.print(f"encoded {pool_size} pictures on each process", flush=True)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        things = 1 + int(torch.multinomial(_THINGS_SHARES, 1, generator=generator))
        scenes, clean, noise, token_ids = pools[things].batch(batch_size, tokenizer, generator, uncaptioned=0.3)
        # Where things stand is decided while noise dominates: the density of t grows linearly.
        timesteps = (torch.rand(batch_size, generator=generator).sqrt() * SCHEDULE["num_train_timesteps"]).long()
        places = [draw_places(_jittered(boxes[id(scene)], generator), scene.width) for scene in scenes]
        condition = torch.from_numpy(np.stack([np.asarray(place) for place in places]))[:, None] / 255
        return tuple(part.to(device) for part in (clean, noise, timesteps, token_ids, condition))

    def export(average: LayoutObjective) -> None:
        copy.deepcopy(average.model).cpu().half().save_pretrained(output / "layout_adapter")

    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=torch.optim.AdamW(objective.parameters(), lr=config.learning_rate, betas=(0.9, 0.99)),
        checkpoint=output / "checkpoints" / "layout.pt",
        resume=resume,
        on_checkpoint=export,
    )


def train_reader(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 5; needs stage 1 and writes ``output/reader``."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    vae = AutoencoderKL.from_pretrained(output / "vae")
    vocabulary = attribute_vocabulary()
    sizes = [len(values) for values in vocabulary.values()]
    objective = ReaderObjective(ReaderNetwork(sum(sizes)), sizes)
    pool = reader_pool(pool_size, config.seed * 64 + accelerator.process_index, vae)
    held_out = reader_pool(min(512, pool_size), HELD_OUT_SEED, vae)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(pool.pixels), (batch_size,), generator=generator)
        pixels = soften(pool.pixels[chosen].float() / 127.5 - 1, generator)
        return pixels.to(accelerator.device), pool.labels[chosen].to(accelerator.device)

    @torch.no_grad()
    def report(average: ReaderObjective) -> None:
        scores = average.model(held_out.pixels.to(accelerator.device).float() / 127.5 - 1).cpu().split(sizes, dim=1)
        for kind, rows in (("renders", slice(1, None, 2)), ("round trips", slice(0, None, 2))):
            figures = []
            for column, name in enumerate(vocabulary):
                labels = held_out.labels[rows, column]
                right = (scores[column][rows].argmax(dim=1) == labels)[labels >= 0]
                figures.append(f"{name} {float(right.float().mean()):.2f}")
            print(f"held-out accuracy on {kind}: {', '.join(figures)}", flush=True)
        export_reader(output / "reader", average.model, vocabulary)

    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=Muon(objective.parameters(), learning_rate=config.learning_rate, weight_decay=0.01),
        checkpoint=output / "checkpoints" / "reader.pt",
        resume=resume,
        on_checkpoint=report,
    )


def train_metric(output: Path, config: LoopConfig, *, batch_size: int, pool_size: int, resume: bool) -> None:
    """Stage 6; needs stages 1 and 2, writes ``output/metric``."""
    accelerator = joined_processes()
    torch.manual_seed(config.seed)
    vae = AutoencoderKL.from_pretrained(output / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    sizes = [len(values) for values in attribute_vocabulary().values()]
    objective = AlignmentObjective(CLIPTextModel.from_pretrained(output / "text_encoder").float(), sizes)
    first = 100_000_000 + accelerator.process_index * pool_size
    scenes = reader_scenes(pool_size * 3 // 4, first) + [
        random_scene(seed, things=2) for seed in range(first, first + pool_size // 4)
    ]
    labels = scene_labels(scenes)
    pool = ((to_pixels([draw(scene).image for scene in scenes]) + 1) * 127.5).round().to(torch.uint8)
    pool[::2] = soft_round_trip(vae, pool[::2], first)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        chosen = torch.randint(len(pool), (batch_size,), generator=generator)
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        shown = [scenes[index] for index in chosen.tolist()]
        claims = [claim_about(scene, rng) for scene in shown]
        pixels = soften(pool[chosen].float() / 127.5 - 1, generator)
        token_ids = tokenize_plain([claim.text for claim in claims], tokenizer)[:, :32]
        parts = (pixels, token_ids, holding(claims, shown), labels[chosen])
        return tuple(part.to(accelerator.device) for part in parts)

    def export(average: AlignmentObjective) -> None:
        export_metric_model(output / "metric", average.model)

    train_stage(
        objective,
        batch,
        config,
        accelerator=accelerator,
        optimiser=Muon(
            [parameter for parameter in objective.parameters() if parameter.requires_grad],
            learning_rate=config.learning_rate,
            weight_decay=0.01,
        ),
        checkpoint=output / "checkpoints" / "metric.pt",
        resume=resume,
        on_checkpoint=export,
    )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage with the settings that the shipped base was trained with; the command line overrides them."""

    train: Callable[..., None]
    config: LoopConfig
    batch_size: int
    pool_size: int


_LATER_BASE = LoopConfig(
    minutes=90, learning_rate=1e-3, warm_up_steps=300, decay_from=0.5, average_decay=0.999, checkpoint_minutes=6
)
"""How the third base is trained, and but for rate and time the second."""

STAGES: dict[str, Stage] = {
    "autoencoder": Stage(
        train=train_autoencoder,
        config=LoopConfig(minutes=9, learning_rate=1.5e-2),
        batch_size=16,
        pool_size=8000,
    ),
    "text": Stage(train=train_text, config=LoopConfig(minutes=4, learning_rate=1.5e-3), batch_size=64, pool_size=6000),
    "unet": Stage(
        train=train_unet,
        config=LoopConfig(
            minutes=90,
            learning_rate=1e-3,
            warm_up_steps=200,
            decay_from=0.65,
            average_decay=0.999,
            checkpoint_minutes=4,
        ),
        batch_size=16,
        pool_size=18000,
    ),
    "transformer": Stage(
        train=train_transformer,
        config=dataclasses.replace(_LATER_BASE, minutes=75, learning_rate=2e-3),
        batch_size=16,
        pool_size=18000,
    ),
    "xl": Stage(train=train_xl, config=_LATER_BASE, batch_size=16, pool_size=18000),
    "xl_names": Stage(
        train=train_xl_names,
        config=dataclasses.replace(_LATER_BASE, minutes=60, learning_rate=6e-4, warm_up_steps=100, decay_from=0.4),
        batch_size=16,
        pool_size=6000,
    ),
    "layout": Stage(
        train=train_layout,
        config=LoopConfig(minutes=20, learning_rate=1e-3, decay_from=0.5),
        batch_size=16,
        pool_size=9000,
    ),
    "reader": Stage(
        train=train_reader,
        config=LoopConfig(minutes=9, learning_rate=1e-2, decay_from=0.3),
        batch_size=48,
        pool_size=14000,
    ),
    "metric": Stage(
        train=train_metric,
        config=LoopConfig(minutes=9, learning_rate=1e-2, decay_from=0.3),
        batch_size=64,
        pool_size=12000,
    ),
}
"""All stages in the order in which they need each other."""


def _record(output: Path, name: str, config: LoopConfig, minutes: float, batch_size: int, pool_size: int) -> None:
    """Add to ``output/training.json`` how a stage was trained."""
    path = output / "training.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    earlier = {"continues": record[name]} if name == "unet" and (output / "initial_unet").exists() else {}
    record[name] = earlier | {
        "settings": dataclasses.asdict(config),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "hardware": f"{device}, {platform.machine()}",
        "torch": torch.__version__,
        "minutes": round(minutes, 1),
        "batch_size": batch_size,
        "pool_size": pool_size,
        "commit": commit(Path(__file__).parent) or "unknown",
    }
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toyland_base.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and trained parts")
    parser.add_argument("--stage", choices=("all", *STAGES, "none"), default="all")
    parser.add_argument("--weights", type=Path, help="afterwards, gather all parts here in diffusers' layout")
    parser.add_argument("--transformer-weights", type=Path, help="afterwards, copy the second base here")
    parser.add_argument("--xl-weights", type=Path, help="afterwards, copy the third base here")
    parser.add_argument(
        "--start-from", type=Path, metavar="WEIGHTS", help="take all parts over from here first; the U-Net trains on"
    )
    parser.add_argument(
        "--xl-start-from", type=Path, metavar="WEIGHTS", help="take the third base over from here first, for xl_names"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the stage's checkpoint")
    parser.add_argument("--batch-size", type=int, help="pictures a step on every process")
    parser.add_argument("--pool-size", type=int, help="pictures drawn in advance on every process")
    for field in dataclasses.fields(LoopConfig):
        kind = int if field.name in ("steps", "seed", "warm_up_steps", "log_steps") else float
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, help="see LoopConfig")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that the command line asks for."""
    options = vars(_parser().parse_args(arguments))
    chosen = {"all": list(STAGES), "none": []}.get(options["stage"], [options["stage"]])
    names = [field.name for field in dataclasses.fields(LoopConfig)]
    given = {name: options[name] for name in names if options[name] is not None}
    main_process = int(os.environ.get("RANK", "0")) == 0
    if options["start_from"] is not None and main_process and not (options["output"] / "initial_unet").exists():
        take_over(options["start_from"], options["output"])
    if options["xl_start_from"] is not None and main_process and not (options["output"] / "xl_pipeline").exists():
        take_over_xl(options["xl_start_from"], options["output"])
    joined_processes().wait_for_everyone()
    for name in chosen:
        config = dataclasses.replace(STAGES[name].config, **given)
        sizes = {size: options[size] or getattr(STAGES[name], size) for size in ("batch_size", "pool_size")}
        started = time.monotonic()
        STAGES[name].train(options["output"], config, **sizes, resume=options["resume"])
        if main_process:
            _record(options["output"], name, config, (time.monotonic() - started) / 60, **sizes)
        accelerate.PartialState().wait_for_everyone()
    if options["weights"] is not None and main_process:
        assemble(options["output"], options["weights"])
    for stage in ("transformer", "xl"):
        if options[f"{stage}_weights"] is not None and main_process:
            copy_pipeline(options["output"], stage, options[f"{stage}_weights"])


if __name__ == "__main__":
    main()
