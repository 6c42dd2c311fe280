"""From ED-LoRA files to a saved pack with recording, at Stable Diffusion 1.5's true sizes and with random weights.

    python benchmarks/fusion_recording.py --work DIR --device cuda                # 14 concepts, 20 steps at 512 x 512
    python benchmarks/fusion_recording.py --work DIR --concepts 2 --prompts 1 --steps 1 --tiny    # does it run

Times loading the files, sampling every concept, solving and saving; the pipeline is there before. Only what this costs
is measured: random weights draw nothing. For fusing without recording see `fusion_files.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from fusion_files import random_concept
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families.layers import adapted_layers, embedding_layers
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.prompts import RECORDING_PROMPTS
from diffusers_mixofshow.pipelines import MixOfShowPipeline


def random_pipeline(*, tiny: bool) -> MixOfShowPipeline:
    """SD 1.5's classes and configurations with random weights, and a tokenizer of single bytes."""
    torch.manual_seed(0)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*symbols, *(symbol + "</w>" for symbol in symbols)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=1 if tiny else 12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    channels: dict[str, Any] = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1} if tiny else {}
    return MixOfShowPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **channels),
        text_encoder=CLIPTextModel(text),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            latent_channels=4,
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def publish(pipe: MixOfShowPipeline, count: int, folder: Path) -> list[Path]:
    """Random ED-LoRAs for the pipeline."""
    sites: dict[str, Any] = adapted_layers(pipe.components)
    shapes = {site: (layer.out_features, layer.in_features) for site, layer in sites.items()}
    layers = embedding_layers(pipe.components)
    folders = [folder / f"c{number:02}" for number in range(count)]
    for number, target in enumerate(folders):
        random_concept(number, shapes, layers).save_pretrained(target, overwrite=True)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the files are written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--concepts", type=int, default=14)
    parser.add_argument("--prompts", type=int, default=len(RECORDING_PROMPTS["object"]), help="of each concept")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.5, help="1 records the conditional half alone")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--own", action="store_true", help="each concept's own model throughout, not in stages")
    parser.add_argument("--tiny", action="store_true", help="narrow channels, to see that it runs")
    parser.add_argument("--record", type=Path, help="where to write the record")
    options = parser.parse_args()
    pipe = random_pipeline(tiny=options.tiny)
    pipe.to(options.device, torch.float16 if options.device == "cuda" else torch.float32)
    folders = publish(pipe, options.concepts, options.work / ("tiny" if options.tiny else "concepts"))
    for left_over in options.work.rglob("*.statistics.safetensors"):
        left_over.unlink()
    start = time.perf_counter()
    pack = GradientFuser(
        pipe,
        prompts=RECORDING_PROMPTS["object"][: options.prompts],
        steps=options.steps,
        guidance_scale=options.guidance,
        batch_size=options.batch,
        sequential=not options.own,
        device=options.device,
        height=options.size,
        width=options.size,
    ).fuse(folders)
    pack.save_pretrained(options.work / "pack", overwrite=True)
    seconds = time.perf_counter() - start
    names = ("recording_s", "solving_s", "peak_memory_mib", "peak_gpu_memory_mib")
    results = {"seconds": round(seconds, 2)} | {
        name: pack.report.data[name] for name in names if name in pack.report.data
    }
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "record")}
    path = options.record or Path(__file__).parent / "records" / f"fusion-recording-{options.device}.json"
    content = {"run_info": record.run_info(Path(__file__).parent), "settings": settings, "results": results}
    print(results)
    print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
