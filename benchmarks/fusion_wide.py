"""LoRAs of FLUX.1's true sizes, fused from published statistics: time and memory of `mixofshow fuse`.

    python benchmarks/fusion_wide.py --work DIR                # 8 LoRAs of rank 16; writes 4 GB of files first, once
    python benchmarks/fusion_wide.py --work DIR --blocks 3     # a quick trial: the first blocks of each kind

Layers and shapes are those of the real class with FLUX.1's configuration, built without weights. LoRAs and factors of
statistics are random; the factors of one set of files stand for all LoRAs. Two inputs are also solved as matrices, as
narrow layers are: that is what the time is to be compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from fusion_files import fuse
from safetensors.torch import save_file

from diffusers_mixofshow.edlora import LowRank
from diffusers_mixofshow.edlora.file import PLAIN_NAME, STATISTICS_KEY
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families.flux1 import FLUX1
from diffusers_mixofshow.fusion.gram import DenseGram
from diffusers_mixofshow.fusion.published import DEFAULT_BYTES, SourceStatistics, statistics_path
from diffusers_mixofshow.fusion.sources import LoRASource, gather
from diffusers_mixofshow.interop.lora_files import write_lora


SOURCES, RANK, DIRECTIONS = 8, 16, 96
DENSE_WIDTHS = (3072,)


def shapes_of(blocks: int | None) -> dict[str, tuple[int, int]]:
    """Site name to (out_features, in_features), of the first so many blocks of each kind."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    layers = {f"transformer.{path}": module for path, module in model.named_modules()}
    return {
        site: (module.out_features, module.in_features)
        for site, module in layers.items()
        if FLUX1.has_site(site) and isinstance(module, torch.nn.Linear)
        if blocks is None or int(re.findall(r"\d+", site)[0]) < blocks
    }


def publish(number: int, shapes: dict[str, tuple[int, int]], folder: Path) -> Path:
    """A random LoRA in a file."""
    path = folder / f"style{number}.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(number)
        lora = {
            site: LowRank(
                down=torch.randn(RANK, narrow, generator=generator).div(narrow**0.5).half(),
                up=torch.randn(wide, RANK, generator=generator).mul(0.02).half(),
                alpha=float(RANK),
            )
            for site, (wide, narrow) in shapes.items()
        }
        write_lora(path, lora)
    return path


def random_statistics(lora: Path, shapes: dict[str, tuple[int, int]], number: int) -> None:
    """Statistics beside a LoRA: random factors, in the format that recording writes."""
    path = statistics_path(lora)
    if path.exists():
        return
    (source,) = gather([LoRASource(lora, prompts=["a picture"])], None, prompts=None)
    generator = torch.Generator().manual_seed(1000 + number)
    tensors, entries = {}, {}
    for name, sites in FLUX1.by_input(shapes).items():
        width = shapes[sites[0]][1]
        strength = torch.arange(1, DIRECTIONS + 1).float().rsqrt()[:, None]
        rows = torch.randn(DIRECTIONS, width, generator=generator) * strength
        tensors[f"{source.name}|fit|{name}|rows"] = rows.half()
        tensors[f"{source.name}|fit|{name}|scale"] = torch.ones(DIRECTIONS)
        entries[name] = {"fit": {"tokens": 1000, "tail": 0.01, "energy": 0.9}}
    header = {
        "format_version": 1,
        "source": source.edlora.digest,
        "base_model": "",
        "recording": {"prompts": {source.name: ["a picture"]}},
        "form": "low-rank",
        "concepts": {source.name: entries},
    }
    save_file(tensors, path, metadata={"format": "pt", STATISTICS_KEY: json.dumps(header)})
    SourceStatistics.load(path)  # checks that it is what recording writes


def seconds_as_matrix(width: int) -> float:
    """Of inverting one input's Gram matrix whole."""
    rows = torch.randn(SOURCES * DIRECTIONS, width, dtype=torch.float64)
    start = time.perf_counter()
    DenseGram(rows.T @ rows).inverse(1e-2)
    return round(time.perf_counter() - start, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the files are written")
    parser.add_argument("--sources", type=int, default=SOURCES, help="how many LoRAs (default: %(default)s)")
    parser.add_argument("--blocks", type=int, help="only the first so many blocks of each kind, for a quick trial")
    parser.add_argument("--record", type=Path, default=Path(__file__).parent / "records" / "fusion-wide-cpu.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shapes = shapes_of(options.blocks)
    loras = []
    for number in range(options.sources):
        loras.append(publish(number, shapes, options.work))
        random_statistics(loras[-1], shapes, number)
    output = options.work / "fused" / PLAIN_NAME
    asked = [part for _ in loras for part in ("--prompts", "a picture")]
    results = fuse([*map(str, loras), *asked, "--output", str(output.parent), "--overwrite"], output)
    print(results)
    content = {
        "run_info": {
            **record.run_info(Path(__file__).parent),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 1),
        },
        "settings": {"sources": options.sources, "rank": RANK, "directions": DIRECTIONS, "blocks": options.blocks},
        "layers": len(shapes),
        "inputs": len(FLUX1.by_input(shapes)),
        "default_statistics_bytes": max(DEFAULT_BYTES, 124 * sum(widths_of(shapes))),
        "results": results,
        "one_input_as_matrix_s": {str(width): seconds_as_matrix(width) for width in DENSE_WIDTHS},
    }
    record.write(options.record, content)
    print(f"Record: {options.record}")


def widths_of(shapes: dict[str, tuple[int, int]]) -> list[int]:
    """Width of every input."""
    return [shapes[sites[0]][1] for sites in FLUX1.by_input(shapes).values()]


if __name__ == "__main__":
    main()
