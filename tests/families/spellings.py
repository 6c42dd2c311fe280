"""LoRA files of every family in the names of every program, and the differences of weights that they mean.

What the names of an original code mean is asked of diffusers, whose converters of whole checkpoints are given the
differences in place of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.loaders import single_file_utils

from diffusers_mixofshow.families import Family
from diffusers_mixofshow.families.layers import linear_layers


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Spelling:
    """How a program spells a layer: what stands before the path, and whether the path is the original code's."""

    prefix: str
    original: bool
    flat: bool = False
    peft: bool = False
    alphas: bool = True

    def names(self, path: str) -> tuple[str, str, str]:
        """Of down, up and alpha."""
        layer = self.prefix + (path.replace(".", "_") if self.flat else path)
        halves = ("lora_A", "lora_B") if self.peft else ("lora_down", "lora_up")
        return f"{layer}.{halves[0]}.weight", f"{layer}.{halves[1]}.weight", f"{layer}.alpha"


SPELLINGS = {
    "kohya": Spelling("lora_unet_", original=True, flat=True),
    "kohya, without alphas": Spelling("lora_unet_", original=True, flat=True, alphas=False),
    "ai-toolkit": Spelling("diffusion_model.", original=True, peft=True, alphas=False),
    "ai-toolkit, with alphas": Spelling("diffusion_model.", original=True, peft=True),
    "ComfyUI": Spelling("diffusion_model.", original=True),
    "original": Spelling("", original=True, peft=True, alphas=False),
    "original under PEFT": Spelling("base_model.model.", original=True, peft=True, alphas=False),
    "LyCORIS, original": Spelling("lycoris_", original=True, flat=True),
    "OneTrainer": Spelling("lora_transformer_", original=False, flat=True),
    "LyCORIS": Spelling("lycoris_", original=False, flat=True),
    "kohya, diffusers' names": Spelling("lora_unet_", original=False, flat=True),
    "ComfyUI, diffusers' names": Spelling("diffusion_model.", original=False),
    "ai-toolkit, diffusers' names": Spelling("diffusion_model.", original=False, peft=True, alphas=False),
    "diffusers": Spelling("transformer.", original=False, peft=True, alphas=False),
}


@dataclass
class Written:
    """A file's tensors, and what they mean: site name to difference of the weight."""

    tensors: Tensors = field(default_factory=dict)
    differences: Tensors = field(default_factory=dict)


def written(
    family: Family,
    pipe: Any,
    spelling: Spelling,
    chosen: Callable[[str], bool] = lambda path: True,
    ranks: tuple[int, ...] = (1, 2, 3),
) -> Written:
    """A file with all layers of the denoiser, of ranks and alphas that differ, in a spelling.

    Args:
        family: The family.
        pipe: A pipeline of it.
        spelling: How names are spelt.
        chosen: Which paths to write, of the original code or of diffusers, as the spelling is.
        ranks: Of the layers, in turn.
    """
    shapes = original_shapes(family, pipe) if spelling.original else shapes_in_diffusers(family, pipe)
    generator, file, whole = torch.Generator().manual_seed(0), Written(), {}
    for number, (path, (out, width)) in enumerate(shapes.items()):
        if not chosen(path):
            continue
        rank, alpha = ranks[number % len(ranks)], (1.0, 4.0, 0.5, 3.0)[number % 4]
        down, up = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        down_name, up_name, alpha_name = spelling.names(path)
        file.tensors |= {down_name: down, up_name: up}
        if spelling.alphas:
            file.tensors[alpha_name] = torch.tensor(alpha)
        whole[path] = (alpha / rank if spelling.alphas else 1.0) * up @ down
    paths = in_diffusers(family, whole) if spelling.original else whole
    file.differences = {f"{family.denoiser}.{path}": difference for path, difference in paths.items()}
    return file


def shapes_in_diffusers(family: Family, pipe: Any) -> dict[str, tuple[int, int]]:
    """Path of every linear layer of the denoiser to (out, in)."""
    layers = linear_layers({family.denoiser: pipe.components[family.denoiser]})
    return {site.partition(".")[2]: tuple(layer.weight.shape) for site, layer in layers.items()}


def times_in_original(family: Family, pipe: Any) -> dict[str, int]:
    """Path of every layer of the denoiser to how many layers of the original code say that they are it."""
    layers = [family.original_layer(name) for name in original_shapes(family, pipe)]
    counts = Counter(path for layer in layers if layer for path in layer.paths)
    return {path: counts[path] for path in shapes_in_diffusers(family, pipe)}


def original_shapes(family: Family, pipe: Any) -> dict[str, tuple[int, int]]:
    """Path of every layer in the original code to (out, in): rows one below the other."""
    ours, found = shapes_in_diffusers(family, pipe), {}
    numbers = range(max(int(part) for path in ours for part in path.split(".") if part.isdecimal()) + 1)
    for name in family.original:
        for number in numbers if "N" in name.split(".") else (0,):
            path = ".".join(str(number) if part == "N" else part for part in name.split("."))
            parts = [ours[each] for each in family.original_layer(path).paths if each in ours]
            if parts:
                found[path] = (sum(out for out, _ in parts), parts[0][1])
    return found


class _Filled(dict):
    """A checkpoint in which nothing is missing."""

    def pop(self, key: str, *default: Any) -> Any:
        rows = 21504 if "linear1." in key else 6
        return super().pop(key) if key in self else torch.zeros(rows)


def _flux1(differences: Tensors) -> Tensors:
    """The converter splits `linear1` by FLUX.1's own widths; here it is split by those of these layers."""
    first = {name: value for name, value in differences.items() if name.endswith("linear1.weight")}
    others = {name: value for name, value in differences.items() if name not in first}
    stand_in = {name: torch.zeros(21504, 1) for name in first}
    found = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(_Filled(others | stand_in))
    for name, value in first.items():
        block, width = f"single_transformer_blocks.{name.split('.')[1]}", value.shape[1]
        parts = value.split([width, width, width, 4 * width])
        paths = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        found |= {f"{block}.{path}.weight": part for path, part in zip(paths, parts, strict=True)}
    return found


def _sd3(differences: Tensors) -> Tensors:
    width = differences["joint_blocks.0.x_block.attn.proj.weight"].shape[1]
    filled = _Filled({**differences, "context_embedder.weight": torch.zeros(width, 1)})
    return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(filled)


_CONVERTERS: Mapping[str, Callable[[Tensors], Tensors]] = {
    "FLUX.1": _flux1,
    "FLUX.2 klein": lambda found: single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(found),
    "Stable Diffusion 3": _sd3,
    "Qwen-Image": lambda found: found,  # whose names are diffusers'
    "Z-Image": lambda found: single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(found),
    "Krea 2": lambda found: single_file_utils.convert_krea2_transformer_checkpoint_to_diffusers(found),
    "Anima": lambda found: single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(found),
}


def in_diffusers(family: Family, differences: Mapping[str, torch.Tensor]) -> Tensors:
    """Differences by the original code's paths, by those of diffusers."""
    named = {f"{path}.weight": difference for path, difference in differences.items()}
    converted = _CONVERTERS[family.name](named)
    return {
        name.removesuffix(".weight"): value
        for name, value in converted.items()
        if name.endswith(".weight")
        and family.has_site(f"{family.denoiser}.{name.removesuffix('.weight')}")
        and value.dim() == 2
        and value.any()
    }


def differences_of(pipe: Any) -> dict[str, torch.Tensor]:
    """What the adapters that diffusers has loaded add to the weights, by site."""
    layers = {site: layer for site, layer in linear_layers(pipe.components).items() if hasattr(layer, "lora_A")}
    return {site: layer.get_delta_weight(layer.active_adapters[0]) for site, layer in layers.items()}
