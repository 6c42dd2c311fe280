"""Writes the files of the compatibility gate that are not there yet, and what reading each must give.

    python tests/compatibility/generate.py

A file that is there is never written again: it stands for all those that people have. Add a function for a new format
version or program, run this once, and commit what it wrote. Numbers are random with fixed seeds; sizes are made up
where no program looks at them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file


FOLDER = Path(__file__).parent / "files"
EXPECTED = Path(__file__).parent / "expected.json"
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

MID = "mid_block.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0.self_attn"


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(0.1).half()


def _pack(*names: str, seed: int = 0):
    import packs
    import tiny

    return packs.random_pack(
        tiny.components(), *names, ranks=(1, 2), alphas=(1.0, 2.0, 0.5), dtype=torch.float16, seed=seed
    )


def _save(pack, path: Path) -> None:
    """The file alone, without the card beside it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(pack.save_pretrained(folder), path)


def format_1_edlora(path: Path) -> None:
    _save(_pack("rex"), path)


def format_1_fused(path: Path) -> None:
    from diffusers_mixofshow import GradientFuser

    _save(GradientFuser(max_rank=1).fuse([_pack("rex"), _pack("kit", seed=1)], method="average"), path)


def format_2_edlora(path: Path) -> None:
    import packs
    from families.pipelines import tiny_pipeline

    components = tiny_pipeline("Stable Diffusion XL").components
    _save(packs.random_pack(components, "rex", ranks=(1, 2), alphas=(1.0, 0.5), dtype=torch.float16), path)


def format_1_statistics(path: Path) -> None:
    from diffusers_mixofshow.fusion.published import SourceStatistics
    from diffusers_mixofshow.fusion.statistics import ConceptStatistics

    pack = _pack("rex")
    statistics = ConceptStatistics()
    site = next(iter(pack.lora))
    statistics.add(site, values(5, 9, pack.lora[site].down.shape[1]).float(), "fit")
    SourceStatistics(
        digest=pack.digest, base_model=pack.base_model, recording={"steps": 1}, concepts={"<rex>": statistics}
    ).save(path, max_bytes=4096)


def format_1_layout(path: Path) -> None:
    from diffusers_mixofshow import Layout, Region

    Layout((Region("a <rex>", box=(0, 0, 0.5, 1), feather=0.1),), prompt="two pets", width=64, height=32).save(path)


def _original(path: Path, half: str, entry: str) -> None:
    """Layers of Stable Diffusion 1.x; the authors' files are float32."""
    from diffusers_mixofshow.families.stable_diffusion import SD1

    params: dict = {
        entry: {f"<potter{n}>": values(n, 16, 8).float() for n in (1, 2)},
        "text_encoder": {},
        "unet": {},
    }
    layers = [("text_encoder", f"{TEXT}.q_proj"), *(("unet", f"{layer}.to_k") for layer in SD1.layers)]
    for number, (part, layer) in enumerate([*layers, ("unet", f"{MID}.attn1.to_out.0")]):
        params[part][f"{layer}{half}down.weight"] = values(number, 1, 8).float()
        params[part][f"{layer}{half}up.weight"] = values(number + 50, 6, 1).float()
    torch.save({"params": params}, path)


def mix_of_show_released(path: Path) -> None:
    _original(path, ".lora_", "new_concept_embedding")


def mix_of_show_research(path: Path) -> None:
    _original(path, "_lora.", "new_concept_token")


def _flat(layers: dict[str, tuple[int, int]], alpha: float) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, (layer, (wide, narrow)) in enumerate(layers.items()):
        convolution = (1, 1) if layer.endswith(("proj_in", "skip_connection")) else ()
        tensors[f"{layer}.lora_down.weight"] = values(number, 2, narrow, *convolution)
        tensors[f"{layer}.lora_up.weight"] = values(number + 50, wide, 2, *convolution)
        tensors[f"{layer}.alpha"] = torch.tensor(alpha * (number + 1)).half()
    return tensors


_SD1 = {
    f"lora_te_{TEXT}_q_proj".replace(".", "_"): (768, 768),
    f"lora_unet_{MID}_attn2_to_k".replace(".", "_"): (8, 768),
    "lora_unet_mid_block_attentions_0_proj_in": (8, 8),
}


def kohya_sd15(path: Path) -> None:
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_base_model_version": "sd_v1"}
    save_file(_flat(_SD1, 1.0), path, metadata=metadata)


def kohya_sdxl(path: Path) -> None:
    layers = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 768),
        "lora_te2_text_model_encoder_layers_31_self_attn_k_proj": (8, 1280),
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (8, 2048),
        "lora_unet_middle_block_1_proj_in": (8, 8),
        "lora_unet_output_blocks_4_0_skip_connection": (8, 8),
    }
    save_file(_flat(layers, 1.0), path, metadata={"ss_base_model_version": "sdxl_base_v1-0"})


def a1111_bundle(path: Path) -> None:
    save_file(_flat(_SD1, 0.5) | {"bundle_emb.potter.string_to_param.*": values(9, 2, 768)}, path)


def comfyui_saved(path: Path) -> None:
    layers = {
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k": (8, 768),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (8, 768),
    }
    save_file({name: tensor for name, tensor in _flat(layers, 1.0).items() if ".alpha" not in name}, path)


def _halves(layer: str, down: str, up: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"{layer}{down}.weight": values(seed, 2, 768), f"{layer}{up}.weight": values(seed + 50, 8, 2)}


def diffusers_attention_processors(path: Path) -> None:
    save_file(
        _halves(f"unet.{MID}.attn2.processor.to_k_lora", ".down", ".up")
        | _halves(f"unet.{MID}.attn1.processor.to_out_lora", ".down", ".up", 1)
        | _halves(f"text_encoder.{TEXT}.to_out_lora", ".down", ".up", 2),
        path,
    )


def diffusers_linear_layers(path: Path) -> None:
    save_file(
        _halves(f"unet.{MID}.attn2.to_k.lora", ".down", ".up")
        | _halves(f"text_encoder.{TEXT}.q_proj.lora_linear_layer", ".down", ".up", 2),
        path,
    )


def diffusers_peft_names(path: Path) -> None:
    """As diffusers 0.35 and later write it, with PEFT's settings in the header."""
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_k"], "unet.use_rslora": False}
    tensors = _halves(f"unet.{MID}.attn2.to_k", ".lora_A", ".lora_B")
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)})


def peft_adapter(path: Path) -> None:
    path.mkdir()
    tensors = _halves(f"base_model.model.{MID}.attn2.to_k", ".lora_A", ".lora_B")
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": true}')


def diffusers_pivotal(path: Path) -> None:
    """What diffusers' advanced training script leaves in its output folder."""
    path.mkdir()
    save_file(_halves(f"unet.{MID}.attn2.to_k.lora", ".down", ".up"), path / "pytorch_lora_weights.safetensors")
    save_file({"clip_l": values(7, 2, 768)}, path / "potter_emb.safetensors")


def a1111_inversion(path: Path) -> None:
    parameter = torch.nn.Parameter(values(7, 2, 768))
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "run-1", "step": 500}
    torch.save(content | {"sd_checkpoint": "0123abcd", "sd_checkpoint_name": "model"}, path)


def a1111_inversion_safetensors(path: Path) -> None:
    save_file({"emb_params": values(7, 2, 768)}, path)


def diffusers_inversion(path: Path) -> None:
    torch.save({"<potter>": values(7, 768)}, path)


def diffusers_inversion_safetensors(path: Path) -> None:
    save_file({"<potter>": values(7, 2, 768)}, path)


def diffusers_inversion_first_script(path: Path) -> None:
    save_file({"text_encoders_0": values(7, 2, 768)}, path)


FILES: dict[str, Callable[[Path], None]] = {
    "format-1/edlora.safetensors": format_1_edlora,
    "format-1/fused.safetensors": format_1_fused,
    "format-1/edlora.statistics.safetensors": format_1_statistics,
    "format-1/layout.json": format_1_layout,
    "format-2/edlora.safetensors": format_2_edlora,
    "mix-of-show/released.pth": mix_of_show_released,
    "mix-of-show/research.pth": mix_of_show_research,
    "kohya/sd15.safetensors": kohya_sd15,
    "kohya/sdxl.safetensors": kohya_sdxl,
    "a1111/bundle.safetensors": a1111_bundle,
    "comfyui/saved.safetensors": comfyui_saved,
    "diffusers/attention-processors.safetensors": diffusers_attention_processors,
    "diffusers/linear-layers.safetensors": diffusers_linear_layers,
    "diffusers/peft-names.safetensors": diffusers_peft_names,
    "diffusers/pivotal": diffusers_pivotal,
    "peft/adapter": peft_adapter,
    "a1111/potter.pt": a1111_inversion,
    "a1111/potter.safetensors": a1111_inversion_safetensors,
    "diffusers/learned_embeds.bin": diffusers_inversion,
    "diffusers/learned_embeds.safetensors": diffusers_inversion_safetensors,
    "diffusers/potter_emb.safetensors": diffusers_inversion_first_script,
}


def told(path: Path) -> dict:
    """What reading a file gives, as JSON values."""
    from diffusers_mixofshow import EDLoRA, Layout
    from diffusers_mixofshow.fusion.published import SourceStatistics
    from diffusers_mixofshow.interop import read_as_edlora

    if path.suffix == ".json":
        layout = Layout.load(path)
        return {"prompt": layout.prompt, "boxes": [list(region.box) for region in layout], "width": layout.width}
    if path.name.endswith(".statistics.safetensors"):
        statistics = SourceStatistics.load(path)
        tokens = {name: one.tokens(name) for one in statistics.concepts.values() for name in one.inputs}
        return {"source": statistics.digest, "tokens": tokens}
    pack = EDLoRA.from_pretrained(path) if path.parent.name.startswith("format-") else read_as_edlora(path)
    return {
        "concepts": {concept.placeholder: list(concept.tokens) for concept in pack.concepts},
        "layers": len(pack.layers),
        "scalings": {site: round(update.scaling, 6) for site, update in pack.lora.items()},
        "digest": pack.digest,
    }


def main() -> None:
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for name, write in FILES.items():
        if not (FOLDER / name).exists():
            (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
            write(FOLDER / name)
            expected[name] = told(FOLDER / name)
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
