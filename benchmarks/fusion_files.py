"""From published files to a saved pack at Stable Diffusion 1.5's true sizes: ``mixofshow fuse`` as its users run it.

    python benchmarks/fusion_files.py --work DIR                     # 14 concepts; writes 170 MB of files first, once
    python benchmarks/fusion_files.py --work DIR --concepts 2 4 8 16 32 64
    python benchmarks/fusion_files.py --work DIR --concepts 8 --methods ssr average ties dare svd sum

Layers and shapes are those of the real classes with SD 1.5's configuration, built without weights. ED-LoRAs are
random, of rank 4 with 16 layers' embeddings; every concept's statistics file holds low-rank factors of the default
10 MB. Their numbers are the same in every file, as decomposing a hundred large matrices for each concept takes long
and changes no time. Each number of concepts is fused by a command in a process of its own, whose time and peak memory
are measured; on a machine that does other work, the processor's time says more than the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.fusion.published import DEFAULT_BYTES, SourceStatistics
from diffusers_mixofshow.fusion.solving import METHODS
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


RANK = 4
ROWS = 2048
STATISTICS = "edlora.statistics.safetensors"
HEADER = "edlora_statistics"


def without_weights() -> dict[str, torch.nn.Module]:
    """SD 1.5's U-Net and text encoder on no device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return {"unet": unet, "text_encoder": text}


def random_concept(number: int, shapes: dict[str, tuple[int, int]], layers: tuple[str, ...]) -> EDLoRA:
    generator = torch.Generator().manual_seed(number)
    concept = Concept.from_name(f"c{number:02}x", "dog")
    lora = {
        site: LowRank(
            down=torch.randn(RANK, narrow, generator=generator) / narrow**0.5,
            up=0.1 * torch.randn(wide, RANK, generator=generator),
            alpha=RANK,
        )
        for site, (wide, narrow) in shapes.items()
    }
    embeddings = {token: 0.02 * torch.randn(len(layers), 768, generator=generator) for token in concept.tokens}
    return EDLoRA(concepts=(concept,), embeddings=embeddings, lora=lora, base_model="synthetic", layers=layers)


def synthetic_statistics(shapes: dict[str, tuple[int, int]], path: Path) -> Path:
    """One concept's statistics of every input, with decaying spectra."""
    if not path.exists():
        generator, concept = torch.Generator().manual_seed(0), ConceptStatistics()
        for name, width in {STABLE_DIFFUSION.input_of(site): shape[1] for site, shape in shapes.items()}.items():
            concept.add(name, torch.randn(ROWS, width, generator=generator) * torch.logspace(0, -2, width))
        path.parent.mkdir(parents=True, exist_ok=True)
        SourceStatistics(digest="", base_model="synthetic", recording={}, concepts={"<c>": concept}).save(path)
    return path


def publish(edlora: EDLoRA, shared: Path, folder: Path) -> Path:
    """An ED-LoRA in a folder with the shared numbers as statistics of its own."""
    placeholder = edlora.concepts[0].placeholder
    if not (folder / STATISTICS).exists():
        edlora.save_pretrained(folder)
        with safe_open(shared, framework="pt") as opened:
            header = json.loads(opened.metadata()[HEADER])
        header |= {"source": edlora.digest, "concepts": {placeholder: header["concepts"]["<c>"]}}
        tensors = {placeholder + name.removeprefix("<c>"): tensor for name, tensor in load_file(shared).items()}
        save_file(tensors, folder / STATISTICS, metadata={"format": "pt", HEADER: json.dumps(header)})
    return folder


def fuse(arguments: list[str], file: Path) -> dict[str, Any]:
    """Run the command and measure it.

    Args:
        arguments: Of ``mixofshow fuse``.
        file: What it leaves.
    """
    # Not ru_maxrss, in which Linux counts the process that started this one.
    code = (
        "import re, sys, time\nfrom diffusers_mixofshow.cli import main\n"
        "try:\n    main()\nfinally:\n    peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "    print('PEAK', peak, time.process_time(), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, "fuse", *arguments]
    start = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if ran.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ... failed:\n{ran.stderr[-3000:]}")
    _, peak, processor = next(line for line in ran.stderr.splitlines() if line.startswith("PEAK")).split()
    return {
        "seconds": round(seconds, 2),
        "processor_s": round(float(processor), 2),
        "peak_memory_mib": int(peak) // 2**10,
        "pack_mb": round(file.stat().st_size / 1e6, 1),
    }


def write_record(path: Path, layers: int, results: dict[str, Any]) -> None:
    """Write what is measured so far."""
    content = {
        "run_info": {
            **record.run_info(Path(__file__).parent),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 1),
        },
        "settings": {"rank": RANK, "layers": layers, "statistics_bytes": DEFAULT_BYTES},
        "results": results,
    }
    record.write(path, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the files are written")
    parser.add_argument("--concepts", type=int, nargs="+", default=[14])
    parser.add_argument("--methods", nargs="+", default=["closed-form"], choices=METHODS)
    parser.add_argument("--blocks", type=int, help="only the first so many sites, for a quick trial")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "fusion-files-cpu.json")
    options = parser.parse_args()
    models = without_weights()
    sites: list[tuple[str, Any]] = list(adapted_layers(models).items())[: options.blocks]
    shapes = {site: (layer.out_features, layer.in_features) for site, layer in sites}
    layers = cross_attention_layers(models["unet"])
    part = "" if options.blocks is None else f"-{options.blocks}"
    shared = synthetic_statistics(shapes, options.work / f"shared{part}.safetensors")
    results: dict[str, Any] = {}
    for count in options.concepts:
        folders = [
            publish(random_concept(number, shapes, layers), shared, options.work / f"c{number:02}{part}")
            for number in range(count)
        ]
        for method in options.methods:
            output = options.work / f"pack{part}-{count}-{method}"
            label = f"{count} concepts" if method == "closed-form" else f"{count} concepts, {method}"
            results[label] = fuse(
                [*map(str, folders), "--method", method, "--output", str(output)], output / "edlora.safetensors"
            )
            print(label, results[label], flush=True)
            write_record(options.record, len(shapes), results)
    print(f"Record: {options.record}")


if __name__ == "__main__":
    main()
