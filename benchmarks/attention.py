"""What a step of regional sampling costs, beside the plain pipeline and the authors' way, all in one run.

    python benchmarks/attention.py                                  # Toyland on a CPU, under a minute
    python benchmarks/attention.py --model toyland-xl               # a small SDXL, without the authors' way
    python benchmarks/attention.py --model sd15 --device cuda       # SD 1.5's true sizes, random weights, 512 x 512
    python benchmarks/attention.py --model sd15 --device cuda --batch 4

Every case is sampled in turn, round after round. A case's step is the median of a call's steps, the first one, in
which keys and values are made, left out. Its ratio is the median over rounds of its step beside the step of diffusers'
pipeline with the same LoRA in the same round, and so holds on a machine that is busy now and then. On a CPU steps are
processor time, which other work disturbs little; ratios of the clock on the wall stand beside it. The authors' way, as
docs/benchmarks_regions.md describes it, runs the global prompt's attention everywhere, then every region's on its
slice of the same queries, with keys, values and softmax made anew in each layer and step. Writes one JSON record to
benchmarks/records/.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_mixofshow import (
    Concept,
    EDLoRA,
    Isolation,
    MixOfShowPipeline,
    MixOfShowWarning,
    MixOfShowXLPipeline,
    Region,
)
from diffusers_mixofshow.base_models import TOYLAND, TOYLAND_XL
from diffusers_mixofshow.conditioning.canvas import Canvas, RegionPlan
from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.embeddings import join_name
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.family import POOLED
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers, embedding_layers
from diffusers_mixofshow.toyland import path as toyland_path


RECORDS = Path(__file__).parent / "records"
Place = tuple[slice, slice] | tuple[torch.Tensor, torch.Tensor]
COLUMNS = [(0.02 + 0.24 * i, 0.1, 0.02 + 0.24 * (i + 1), 0.9) for i in range(4)]

PLAIN, PLAIN_WITH_LORA = "diffusers' pipeline", "diffusers' pipeline, same LoRA"
CLASSES: dict[str, tuple[Any, Any]] = {
    TOYLAND: (StableDiffusionPipeline, MixOfShowPipeline),
    TOYLAND_XL: (StableDiffusionXLPipeline, MixOfShowXLPipeline),
    "sd15": (StableDiffusionPipeline, MixOfShowPipeline),
}
"""Diffusers' class of pipeline and ours, by model."""


class AuthorsProcessor:
    """One cross-attention layer as the authors' sampler computes it.

    Queries are projected once, and a box is a slice of them. A mask, which the authors' sampler does not know, is the
    indices of its cells. Where a region lies in a feature map is looked up once a call, as theirs is some roundings.
    """

    def __init__(self, layer: int, layers: int, regions: Sequence[Region], size: tuple[int, int]) -> None:
        self.layer, self.layers, self.regions, self.size = layer, layers, regions, size
        self.places: dict[tuple[int, int], list[Place]] = {}

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> torch.Tensor:
        texts = encoder_hidden_states.flatten(1, -2)  # a call with concepts hands over (batch, 1, tokens, dim)
        stacks = texts.unflatten(1, (1 + len(self.regions), self.layers, -1))[:, :, self.layer]
        shrink = math.isqrt(math.prod(self.size) // hidden_states.shape[1])
        grid = (self.size[0] // shrink, self.size[1] // shrink)
        if grid not in self.places:
            self.places[grid] = [place_of(region, grid) for region in self.regions]
        query = attn.to_q(hidden_states)
        output = self.attend(attn, query, stacks[:, 0]).unflatten(1, grid)
        count = torch.zeros(grid, device=output.device, dtype=output.dtype)
        for place in self.places[grid]:
            count[place] += 1
        blended = output * (count == 0)[:, :, None]
        for number, (rows, columns) in enumerate(self.places[grid], start=1):
            asked = query.unflatten(1, grid)[:, rows, columns]
            drawn = self.attend(attn, asked.flatten(1, -2), stacks[:, number]).view(asked.shape)
            blended[:, rows, columns] += drawn / count[rows, columns][..., None]
        return attn.to_out[1](attn.to_out[0](blended.flatten(1, 2)))

    def attend(self, attn: Any, query: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """What queries read of a text, whose keys and values are made anew, shape (batch, queries, channels)."""
        split = [
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, attn.to_k(text), attn.to_v(text))
        ]
        return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def place_of(region: Region, grid: tuple[int, int]) -> Place:
    """Rows and columns of a region in a feature map: slices of a box, indices of a mask's cells."""
    rows, columns = (RegionPlan([region]).weights(*grid)[1].view(grid) > 0).nonzero(as_tuple=True)
    if region.box is None:
        return rows, columns
    return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)


class AuthorsWay(MixOfShowPipeline):
    """The same pipeline with the authors' attention in place of ours; the encoding is ours."""

    def _install_regions(self, stack: ExitStack, isolation: Isolation | None, arguments: Mapping[str, Any]) -> Canvas:
        size = (arguments["height"] // self.vae_scale_factor, arguments["width"] // self.vae_scale_factor)
        (unet,) = self._denoisers()
        paths = cross_attention_layers(unet)
        for number, path in enumerate(paths):
            layer = unet.get_submodule(path)
            wrapper = layer.processor
            layer.processor = AuthorsProcessor(number, len(paths), self._regions[0], size)
            stack.callback(restore, layer, wrapper)
        return Canvas([RegionPlan(self._regions[0])])  # no pass prepares it, so that it has no effect


def restore(layer: Any, wrapper: Any) -> None:
    layer.processor = wrapper


def sd15_components(*, vae_channels: Sequence[int] = (32,) * 4, vae_layers: int = 1) -> dict[str, Any]:
    """Random weights in the true sizes of Stable Diffusion 1.5, with Toyland's small tokenizer.

    Args:
        vae_channels: Of the autoencoder's blocks; its own are 128, 256, 512 and 512.
        vae_layers: In each of the blocks; its own has 2.
    """
    toyland = StableDiffusionPipeline.from_pretrained(toyland_path())
    text = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
                          bos_token_id=toyland.tokenizer.bos_token_id, eos_token_id=toyland.tokenizer.eos_token_id,
                          pad_token_id=toyland.tokenizer.pad_token_id)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=tuple(vae_channels), layers_per_block=vae_layers,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        latent_channels=4)  # fmt: skip
    return {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval(),
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": toyland.tokenizer,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }


def random_concept(components: dict[str, Any]) -> EDLoRA:
    """A concept of rank 4 on every site; it need not look like anything."""
    random = torch.Generator().manual_seed(0)
    layers = embedding_layers(components)
    adapted: dict[str, Any] = adapted_layers(components)
    concept = Concept.from_name("benchmark", "man")
    lora = {
        site: LowRank(
            down=0.01 * torch.randn(4, layer.in_features, generator=random),
            up=0.01 * torch.randn(layer.out_features, 4, generator=random),
            alpha=4.0,
        )
        for site, layer in adapted.items()
    }
    rows: dict[str, torch.Tensor] = {}
    for part, encoder in family_of(components).embedding_parts.items():
        shape = (1 if part == POOLED else len(layers), components[encoder].get_input_embeddings().embedding_dim)
        rows |= {join_name(token, part): 0.02 * torch.randn(shape, generator=random) for token in concept.tokens}
    return EDLoRA(concepts=(concept,), embeddings=rows, lora=lora, base_model="random", layers=layers)


def circles(count: int) -> list[np.ndarray]:
    """Masks of discs in a row, each overlapping its neighbours."""
    rows, columns = np.mgrid[:256, :256] / 256
    centres = np.linspace(0.2, 0.8, count)
    return [(columns - centre) ** 2 + (rows - 0.5) ** 2 < 0.15**2 for centre in centres]


def cases(pipes: dict[str, DiffusionPipeline]) -> dict[str, tuple[DiffusionPipeline, dict[str, Any]]]:
    """What is sampled: name to pipeline and arguments."""
    four = {"prompt": "four", "regions": [Region("a <benchmark>", box=box) for box in COLUMNS]}
    eight = {"prompt": "eight", "regions": [Region("a <benchmark>", mask=mask) for mask in circles(8)]}
    found: dict[str, tuple[DiffusionPipeline, dict[str, Any]]] = {
        PLAIN: (pipes["parent"], {"prompt": "a dog"}),
        "no concept, no region": (pipes["ours"], {"prompt": "a dog"}),
        PLAIN_WITH_LORA: (pipes["parent"], {"prompt": "a man", "lora": True}),
        "one layer-wise concept": (pipes["ours"], {"prompt": "a <benchmark>", "lora": True}),
    }
    for name, asked in {"4 disjoint regions": four, "8 overlapping masks": eight}.items():
        found[name] = (pipes["ours"], asked | {"lora": True})
        if "authors" in pipes:
            found[f"{name}, authors' way"] = (pipes["authors"], asked | {"lora": True})
    return found


@dataclass(frozen=True)
class Timing:
    """Seconds of one call and of its median step without the first, and of that step on the wall's clock."""

    call: float
    step: float
    step_wall: float


def sample(pipe: DiffusionPipeline, settings: dict[str, Any], device: str) -> tuple[Timing, torch.Tensor]:
    """One call's timing and latents."""
    ends = [now(device)]

    def note(_pipe: object, _step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(now(device))
        return tensors

    random = torch.Generator().manual_seed(0)
    result = pipe(**settings, generator=random, output_type="latent", callback_on_step_end=note).images
    call = now(device)[0] - ends[0][0]
    step, step_wall = np.median(np.diff(ends[1:], axis=0), axis=0).tolist()
    return Timing(call, step, step_wall), result


def now(device: str) -> tuple[float, float]:
    """The clock that counts, and that on the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter(), time.perf_counter()
    return time.process_time(), time.perf_counter()


def build(arguments: argparse.Namespace) -> dict[str, DiffusionPipeline]:
    """The pipelines, which share their components."""
    torch.manual_seed(0)
    if arguments.model == "sd15":
        components, keywords = sd15_components(), {"requires_safety_checker": False}
    else:
        pipe = DiffusionPipeline.from_pretrained(toyland_path(arguments.model))
        components, keywords = dict(pipe.components), {}
    plain, own = CLASSES[arguments.model]
    dtype = torch.float16 if arguments.device == "cuda" else torch.float32
    pipes = {"ours": own(**components, **keywords).to(arguments.device, dtype)}
    pipes["parent"] = plain(**components, **keywords)
    if own is MixOfShowPipeline:
        pipes["authors"] = AuthorsWay(**components, **keywords)
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def measure(pipes: dict[str, DiffusionPipeline], arguments: argparse.Namespace) -> dict[str, list[Timing]]:
    """Each case's rounds, one after another; first the cases without a concept, then those with one."""
    call = {"num_inference_steps": arguments.steps, "num_images_per_prompt": arguments.batch}
    call |= {"height": arguments.size, "width": arguments.size}
    found: dict[str, list[Timing]] = {}
    pictures: dict[str, torch.Tensor] = {}
    for with_lora in (False, True):
        if with_lora:
            pack = random_concept(pipes["ours"].components)
            pipes["ours"].load_edlora(pack)
            if "authors" in pipes:
                pipes["authors"]._edloras = pipes["ours"]._edloras
        chosen = {name: case for name, case in cases(pipes).items() if case[1].get("lora", False) is with_lora}
        for number in range(-1, arguments.rounds):
            for name, (pipe, settings) in chosen.items():
                given = {key: value for key, value in settings.items() if key != "lora"}
                timing, pictures[name] = sample(pipe, {**given, **call}, arguments.device)
                if number >= 0:
                    found.setdefault(name, []).append(timing)
    check(pictures)
    return found


def check(pictures: dict[str, torch.Tensor]) -> None:
    """The comparison is one only if both ways draw the same."""
    if not torch.equal(pictures["no concept, no region"], pictures[PLAIN]):
        raise SystemExit("Without concept and region the result is not bit-identical.")
    for name in (name for name in pictures if f"{name}, authors' way" in pictures):
        one, other = pictures[name].double().flatten(), pictures[f"{name}, authors' way"].double().flatten()
        if functional.cosine_similarity(one, other, dim=0) < 0.999:
            raise SystemExit(f"{name}: the two ways draw different pictures.")


def with_ratios(found: dict[str, list[Timing]]) -> dict[str, dict[str, Any]]:
    """Each case's seconds, shortest of its rounds, and ratios to the plain pipeline, with the same LoRA or without.

    A ratio is the median of those of all rounds; beside those of processor time stand their quartiles.
    """
    results = {}
    for name, rounds in found.items():
        beside = found[PLAIN if name in (PLAIN, "no concept, no region") else PLAIN_WITH_LORA]

        ratios = {
            clock: [getattr(a, clock) / getattr(b, clock) for a, b in zip(rounds, beside, strict=True)]
            for clock in ("step", "step_wall", "call")
        }
        row = {"call_s": min(one.call for one in rounds), "step_s": min(one.step for one in rounds)}
        row |= {f"{clock}_ratio": statistics.median(values) for clock, values in ratios.items()}
        results[name] = {key: round(value, 5) for key, value in row.items()} | {
            f"{clock}_quartiles": [round(value, 5) for value in statistics.quantiles(ratios[clock], n=4)]
            for clock in ("step", "call")
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(CLASSES), default=TOYLAND)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, help="pixels of a side; the model's own by default")
    parser.add_argument("--batch", type=int, default=1, help="pictures in one call")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="of every case, at least 2")
    parser.add_argument("--record", type=Path, help="where to write the record")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: quartiles need at least 2")
    warnings.simplefilter("ignore", MixOfShowWarning)
    pipes = build(arguments)
    unet = pipes["ours"].unet
    arguments.size = arguments.size or unet.config.sample_size * pipes["ours"].vae_scale_factor
    results = with_ratios(measure(pipes, arguments))
    settings = {name: getattr(arguments, name) for name in ("model", "device", "size", "batch", "steps", "rounds")}
    settings |= {"dtype": str(unet.dtype), "threads": torch.get_num_threads()}
    settings |= {"cross_attention_layers": len(cross_attention_layers(unet))}
    run = {**record.run_info(Path(__file__).parent), "load": os.getloadavg()[0]}
    for name, row in results.items():
        print(f"{name:36}", "  ".join(f"{key} {row[key]:.4g}" for key in row if "quartiles" not in key))
    path = arguments.record or RECORDS / f"attention-{arguments.model}-{arguments.batch}-{arguments.device}.json"
    print(f"Record: {record.write(path, {'run': run, 'settings': settings, 'results': results})}")


if __name__ == "__main__":
    main()
