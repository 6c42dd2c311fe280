"""What recording keeps in memory of bases that are wider than SD 1.5, and what it adds to a step.

    python benchmarks/statistics_wide.py --device cuda                    # both bases whole, in bfloat16: 33 GB
    python benchmarks/statistics_wide.py --blocks 1 --tokens 256 64       # the first block of each kind, on a CPU

The denoisers are of the true classes and sizes, with random weights; one call on random latents of 1024 x 1024 pixels
and 512 positions of text stands for a denoising step, which is the same for every prompt. It is run plain and watched,
in turn. The sums' size is counted from the tensors that there are afterwards. Those of the whole base are counted from
its shapes, in the dtype of the sums; beside them stands what they would be as matrices. Prints a Markdown
table and writes one JSON record to benchmarks/records/.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.fusion.collection import record_inputs
from diffusers_mixofshow.fusion.sketch import count_stored_values
from diffusers_mixofshow.fusion.statistics import ConceptStatistics


def flux1(blocks: int | None) -> torch.nn.Module:
    return FluxTransformer2DModel(
        guidance_embeds=True, **({} if blocks is None else {"num_layers": blocks, "num_single_layers": blocks})
    )


def klein(blocks: int | None) -> torch.nn.Module:
    return Flux2Transformer2DModel(
        num_layers=blocks or 5,
        num_single_layers=blocks or 20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


BASES: dict[str, Callable[[int | None], torch.nn.Module]] = {"FLUX.1": flux1, "FLUX.2 klein 4B": klein}


def step_inputs(model: Any, tokens: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call, for so many positions of the picture and of the text."""
    picture, text = tokens
    config, axes = model.config, len(model.config.axes_dims_rope)
    given = {
        "hidden_states": torch.randn(1, picture, config.in_channels, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "img_ids": torch.zeros(picture, axes, device=device),
        "txt_ids": torch.zeros(text, axes, device=device),
    }
    if config.guidance_embeds:
        given["guidance"] = torch.full((1,), 3.5, device=device, dtype=dtype)
    if "pooled_projection_dim" in config:
        given["pooled_projections"] = torch.randn(1, config.pooled_projection_dim, device=device, dtype=dtype)
    return given


def timed(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def tensor_bytes() -> int:
    """Bytes of all tensors that there are, each storage once."""
    storages = [each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def widths_of(model: torch.nn.Module) -> list[int]:
    """Width of every input."""
    components = {"transformer": model}
    layers: dict[str, Any] = linear_layers(components)
    return [layers[sites[0]].in_features for sites in family_of(components).by_input(layers).values()]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        model = BASES[name](options.blocks).eval()
    torch.set_default_dtype(torch.float32)
    pipe: Any = SimpleNamespace(components={"transformer": model})
    layers = linear_layers(pipe.components)
    with torch.device("meta"):
        widths = widths_of(BASES[name](None))
    given, statistics = step_inputs(model, tuple(options.tokens), options.device, dtype), ConceptStatistics()
    held, plain, with_hooks = tensor_bytes(), [], []
    for _ in range(options.rounds):
        plain.append(timed(lambda: model(**given), options.device))
        with record_inputs(pipe, tuple(layers), statistics):
            with_hooks.append(timed(lambda: model(**given), options.device))
    result = {
        "layers": len(layers),
        "inputs": len(widths_of(model)),
        "sums_gb": round((tensor_bytes() - held) / 1e9, 3),
        "inputs_of_the_whole_base": len(widths),
        "its_sums_gb": round((8 if options.device == "cpu" else 4) * sum(map(count_stored_values, widths)) / 1e9, 2),
        "as_matrices_gb": round(8 * sum(width * width for width in widths) / 1e9, 1),
        "step_s": round(min(plain), 3),
        "watched_step_s": round(min(with_hooks), 3),
    }
    if options.device == "cuda":
        result["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--blocks", type=int, help="only the first so many blocks of each kind, for a quick trial")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(4096, 512), help="positions of the picture and of text"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", type=Path, help="where to write the record")
    options = parser.parse_args()
    results = {}
    titles = ("base", "layers", "inputs", "sums", "of the whole base", "as matrices", "step", "watched")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name in options.bases:
        found = results[name] = measure(name, options)
        cells = [name, str(found["layers"]), str(found["inputs"])]
        cells += [f"{found[key]} GB" for key in ("sums_gb", "its_sums_gb", "as_matrices_gb")]
        cells += [f"{found['step_s']} s", f"{found['watched_step_s']} s"]
        print(f"| {' | '.join(cells)} |", flush=True)
        gc.collect()
    settings = {key: value for key, value in vars(options).items() if key != "record"}
    path = options.record or Path(__file__).parent / "records" / f"statistics-wide-{options.device}.json"
    content = {"run_info": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
