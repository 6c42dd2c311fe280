"""Pictures a second of our trainer beside a DreamBooth-LoRA training with text encoder, in one run.

    python benchmarks/training_speed.py                                    # Toyland on a CPU, about two minutes
    python benchmarks/training_speed.py --compile                          # and once more, both U-Nets compiled
    python benchmarks/training_speed.py --model sd15 --device cuda         # SD 1.5's true sizes, random weights

The other training is written here, as diffusers' train_dreambooth_lora.py computes a step with --train_text_encoder:
pixels through the VAE, the captions of the batch through the text encoder, LoRA of the same rank on the same layers
of text encoder and U-Net, gradients clipped, AdamW. Its pictures lie in memory, cut to size and normalised, so that
it reads no files. Ours encodes every distinct caption of a step once for each cross-attention layer and learns
embeddings besides.

Both take turns, one step each, and the ratio is the median over pairs of steps without the first ones. On a CPU it is
processor time of one thread, which other work on the machine disturbs little. On a GPU the peak of memory of each
alone is measured too, also of a few steps with the preset low-memory. Writes one JSON record to
benchmarks/records/.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from attention import sd15_components
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch.nn import functional

from diffusers_mixofshow import EDLoRATrainer, MixOfShowWarning, toyland
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers
from diffusers_mixofshow.training import TrainingConfig


RECORDS = Path(__file__).parent / "records"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_PREFIX, UNET_PREFIX = "text_encoder.", "unet."
BEFORE = "ours before the first step"
LEFT_OUT = 3
"""First steps, in which caches and optimiser states are made."""


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def sd15() -> StableDiffusionPipeline:
    """Random weights in the true sizes of Stable Diffusion 1.5, with Toyland's small tokenizer."""
    torch.manual_seed(0)
    components = sd15_components(vae_channels=(128, 256, 512, 512), vae_layers=2)
    return StableDiffusionPipeline(**components, requires_safety_checker=False)


def load(model: str, device: str, precision: str) -> Any:
    pipe = toyland.load_pipeline() if model == "toyland" else sd15()
    return pipe.to(device, DTYPES[precision])


def write_photos(folder: Path, resolution: int, count: int = 12) -> Path:
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((resolution, resolution)).save(folder / f"{number}.png")
    return folder


def config_of(options: argparse.Namespace, photos: Path, **settings: Any) -> TrainingConfig:
    """Our settings: the joint phase alone, nothing drawn or saved."""
    usual: dict[str, Any] = {"resolution": options.size, "mixed_precision": options.mixed_precision}
    usual |= {"train_batch_size": options.batch, "captions_per_step": options.captions, "masked_loss": False}
    if options.model == "toyland":
        usual |= {"preset": "toyland"}
    only = {"embedding_phase_steps": 0, "checkpointing_steps": None, "num_validation_images": 0}
    named = {"instance_data_dir": photos, "concept": "benchmark", "class_word": "critter"}
    return TrainingConfig.from_mapping({**usual, **named, **only, "max_train_steps": options.steps, **settings})


def our_steps(
    pipe: Any, config: TrainingConfig, device: str, between: Callable[[], Any] = lambda: None
) -> tuple[list[float], float]:
    """Seconds of every step, and of what comes before the first; between two steps something else may be done."""
    begun = [now(device)]
    seconds: list[float] = []

    def note(_report: object) -> None:
        seconds.append(now(device) - begun[0])
        between()
        begun[0] = now(device)

    EDLoRATrainer(config, pipe, on_step=note).train()
    return seconds[1:], seconds[0]


class DreamBooth:
    """A step of the other training at a time.

    Args:
        pipe: Whose models are trained, by LoRA; they stay changed.
        photos: Folder of pictures.
        options: Batch size and precision.
        rank: Of every LoRA.
    """

    def __init__(self, pipe: Any, photos: Path, options: argparse.Namespace, rank: int) -> None:
        self.pipe, self.batch, self.device = pipe, options.batch, options.device
        self.unet = pipe.unet
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=options.device == "cpu")
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.pixels = torch.stack([self._pixels(path) for path in sorted(photos.glob("*.png"))])
        prompt = pipe.tokenizer("a photo of a critter", padding="max_length", max_length=77, return_tensors="pt")
        self.ids = prompt.input_ids.repeat(self.batch, 1)
        for model, prefix in ((pipe.text_encoder, TEXT_PREFIX), (pipe.unet, UNET_PREFIX)):
            model.requires_grad_(False)
            modules = {id(layer): name for name, layer in model.named_modules()}
            chosen = [
                modules[id(layer)]
                for site, layer in adapted_layers(pipe.components).items()
                if site.startswith(prefix)
            ]
            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen))
            model.train()
        pipe.vae.requires_grad_(False)
        self.learnt = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if p.requires_grad]
        for parameter in self.learnt:
            parameter.data = parameter.data.float()
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(self.learnt, lr=1e-4))

    def compile(self) -> None:
        """Let the next steps run with the U-Net compiled, as ours with `torch_compile`."""
        self.unet = torch.compile(self.pipe.unet)

    def step(self) -> float:
        """Returns the loss."""
        pipe, count = self.pipe, self.batch
        pixels = self.pixels[torch.randint(len(self.pixels), (count,))].to(self.device, pipe.vae.dtype)
        with self.accelerator.autocast():
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (count,), device=self.device)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            text = pipe.text_encoder(self.ids.to(self.device))[0]
            prediction = self.unet(noisy, timesteps, encoder_hidden_states=text).sample
            of_velocity = self.scheduler.config.prediction_type == "v_prediction"
            target = self.scheduler.get_velocity(latents, noise, timesteps) if of_velocity else noise
            loss = functional.mse_loss(prediction.float(), target.float())
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def seconds(self) -> float:
        """Of one step."""
        start = now(self.device)
        if not math.isfinite(self.step()):
            raise SystemExit("The other training diverged, so its time says nothing.")
        return now(self.device) - start

    @staticmethod
    def _pixels(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1


def with_peak(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the most memory that torch held on the GPU meanwhile, in GB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    return result, round(torch.cuda.max_memory_reserved() / 1e9, 3)


def measure(options: argparse.Namespace, photos: Path) -> dict[str, Any]:
    """A step of ours, one of theirs, and so on; then the memory of each alone."""
    config = config_of(options, photos)
    pipe, other = (load(options.model, options.device, options.mixed_precision) for _ in range(2))
    training = DreamBooth(other, photos, options, config.rank)
    found = compared(pipe, config, training)
    if options.compile:
        training.compile()
        found["both U-Nets compiled"] = compared(pipe, replace(config, torch_compile=True), training)
    if options.device == "cuda":
        del pipe
        _, peak = with_peak(lambda: [training.step() for _ in range(LEFT_OUT)])
        found["DreamBooth-LoRA"]["peak_gb"] = peak
        del training, other
        found["ours"]["peak_gb"] = our_peak(options, photos, config)
    return found


def compared(pipe: Any, config: TrainingConfig, training: DreamBooth) -> dict[str, Any]:
    """Steps of both, and the median ratio over pairs of them."""
    theirs: list[float] = []
    ours, before = our_steps(pipe, config, training.device, lambda: theirs.append(training.seconds()))
    ratios = [their / our for our, their in zip(ours[LEFT_OUT:], theirs[LEFT_OUT:], strict=False)]
    return {
        "ours": _speed(ours, training.batch),
        "DreamBooth-LoRA": _speed(theirs, training.batch),
        "ratio": {"median": round(statistics.median(ratios), 3), "quartiles": _quartiles(ratios)},
        BEFORE: round(before, 3),
    }


def our_peak(options: argparse.Namespace, photos: Path, config: TrainingConfig) -> float:
    few = replace(config, max_train_steps=LEFT_OUT)
    pipe = load(options.model, options.device, config.mixed_precision)
    return with_peak(lambda: our_steps(pipe, few, options.device))[1]


def _speed(seconds: list[float], batch: int) -> dict[str, float]:
    step = statistics.median(seconds[LEFT_OUT:])
    return {"step_s": round(step, 5), "pictures_per_s": round(batch / step, 3)}


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def low_memory(options: argparse.Namespace, photos: Path) -> dict[str, Any]:
    """Steps and memory with the preset low-memory, its own batch and precision."""
    named = {"instance_data_dir": photos, "concept": "benchmark", "class_word": "critter", "preset": "low-memory"}
    only = {"max_train_steps": 6, "checkpointing_steps": None, "num_validation_images": 0}
    config = TrainingConfig.from_mapping(named | only)
    pipe = load(options.model, options.device, config.mixed_precision)
    (seconds, _), peak = with_peak(lambda: our_steps(pipe, config, options.device))
    return {"step_s": round(statistics.median(seconds), 4), "peak_gb": peak}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("toyland", "sd15"), default="toyland")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=tuple(DTYPES), help="default: no on a CPU, bf16 on a GPU")
    parser.add_argument("--batch", type=int, help="pictures of a step; Toyland's preset has 12, else 2")
    parser.add_argument("--captions", type=int, help="distinct captions of a step; Toyland's preset has 3, else batch")
    parser.add_argument("--steps", type=int, default=60, help="of each, the first ones left out")
    parser.add_argument("--compile", action="store_true", help="also with both U-Nets compiled")
    parser.add_argument("--record", type=Path, help="where to write the record")
    options = parser.parse_args()
    is_toyland = options.model == "toyland"
    options.mixed_precision = options.mixed_precision or ("no" if options.device == "cpu" else "bf16")
    options.batch = options.batch or (12 if is_toyland else 2)
    options.captions = options.captions or (3 if is_toyland else None)
    options.size = 64 if is_toyland else 512
    return options


def main() -> None:
    options = parse_arguments()
    warnings.simplefilter("ignore", MixOfShowWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), options.size)
        results = measure(options, photos)
        if options.device == "cuda" and options.model == "sd15":
            results["low-memory"] = low_memory(options, photos)
    for name, values in results.items():
        print(f"{name:30} {values}")
    settings = {name: value for name, value in vars(options).items() if name != "record"}
    layers = len(cross_attention_layers(load(options.model, "cpu", "no").unet)) if options.model == "toyland" else 16
    content = {
        "run": {**record.run_info(Path(__file__).parent), "load": os.getloadavg()[0]},
        "settings": {**settings, "threads": torch.get_num_threads(), "cross_attention_layers": layers},
        "results": results,
    }
    path = options.record or RECORDS / f"training-speed-{options.model}-{options.device}.json"
    print(f"Record: {record.write(path, content)}")


if __name__ == "__main__":
    main()
