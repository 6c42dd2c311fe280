"""Pictures a second of our trainer beside a DreamBooth-LoRA training with text encoder, in one run.

    python benchmarks/training_speed.py                                    # Toyland on a CPU, about two minutes
    python benchmarks/training_speed.py --model sd15 --device cuda         # SD 1.5's true sizes, random weights

The other training is written here, as diffusers' train_dreambooth_lora.py computes a step with --train_text_encoder:
pixels through the VAE, the captions of the batch through the text encoder, LoRA of the same rank on the same layers
of text encoder and U-Net, gradients clipped, AdamW. Its pictures lie in memory, cut to size and normalised, so that
it reads no files. Ours encodes every distinct caption of a step once for each cross-attention layer and learns
embeddings besides.

Both take turns, round after round; a step's time is the median of a round's steps without the first ones, and of
rounds the shortest. On a CPU it is processor time of one thread, which other work on the machine disturbs little. On a
GPU the peak of memory is measured too, also of a few steps with the preset low-memory. Writes one JSON record to
benchmarks/records/.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_mixofshow import EDLoRATrainer, MixOfShowWarning, toyland
from diffusers_mixofshow.evaluation import record
from diffusers_mixofshow.sites import adapted_layers, cross_attention_layers
from diffusers_mixofshow.training import TrainingConfig


RECORDS = Path(__file__).parent / "records"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_PREFIX, UNET_PREFIX = "text_encoder.", "unet."
BEFORE = "ours before the first step"
LEFT_OUT = 3
"""First steps of a round, in which caches and optimiser states are made."""


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def sd15() -> StableDiffusionPipeline:
    """Random weights in the true sizes of Stable Diffusion 1.5, with Toyland's small tokenizer."""
    tokenizer = toyland.load_pipeline().tokenizer
    text = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, max_position_embeddings=77, projection_dim=768,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        latent_channels=4)  # fmt: skip
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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


def our_steps(pipe: Any, config: TrainingConfig, device: str) -> tuple[list[float], float]:
    """Seconds of every step, and of what comes before the first."""
    ends: list[float] = [now(device)]
    EDLoRATrainer(config, pipe, on_step=lambda _report: ends.append(now(device))).train()
    return np.diff(ends[1:]).tolist(), ends[1] - ends[0]


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
            prediction = pipe.unet(noisy, timesteps, encoder_hidden_states=text).sample
            of_velocity = self.scheduler.config.prediction_type == "v_prediction"
            target = self.scheduler.get_velocity(latents, noise, timesteps) if of_velocity else noise
            loss = functional.mse_loss(prediction.float(), target.float())
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @staticmethod
    def _pixels(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 127.5 - 1


def their_steps(training: DreamBooth, count: int, device: str) -> list[float]:
    ends = [now(device)]
    for _ in range(count):
        if not math.isfinite(training.step()):
            raise SystemExit("The other training diverged, so its time says nothing.")
        ends.append(now(device))
    return np.diff(ends).tolist()


def with_peak(work: Callable[[], Any], device: str) -> tuple[Any, float | None]:
    """What it gives, and the most memory that torch held on the GPU meanwhile, in GB."""
    if device != "cuda":
        return work(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    return result, round(torch.cuda.max_memory_reserved() / 1e9, 3)


def one_round(options: argparse.Namespace, photos: Path) -> dict[str, tuple[list[float], float | None]]:
    """Both trainings in turn: name to the seconds of the steps and GB."""
    config = config_of(options, photos)
    pipe = load(options.model, options.device, options.mixed_precision)
    (ours, before), our_peak = with_peak(lambda: our_steps(pipe, config, options.device), options.device)
    training = DreamBooth(pipe, photos, options, config.rank)
    theirs, their_peak = with_peak(lambda: their_steps(training, options.steps, options.device), options.device)
    return {
        "ours": (ours, our_peak),
        BEFORE: ([before], None),
        "DreamBooth-LoRA": (theirs, their_peak),
    }


def measure(options: argparse.Namespace, photos: Path) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    before = math.inf
    for _ in range(options.rounds):
        measured = one_round(options, photos)
        before = min(before, *measured.pop(BEFORE)[0])
        for name, (seconds, peak) in measured.items():
            known = found.setdefault(name, {"step_s": math.inf, "peak_gb": None})
            known["step_s"] = min(known["step_s"], statistics.median(seconds[LEFT_OUT:]))
            known["peak_gb"] = max(filter(None, (known["peak_gb"], peak)), default=None)
    for values in found.values():
        values["pictures_per_s"] = round(options.batch / values["step_s"], 3)
        values["step_s"] = round(values["step_s"], 5)
    ratio = found["ours"]["pictures_per_s"] / found["DreamBooth-LoRA"]["pictures_per_s"]
    return {**found, "ratio": round(ratio, 3), "ours_before_the_first_step_s": round(before, 3)}


def low_memory(options: argparse.Namespace, photos: Path) -> dict[str, Any]:
    """Steps and memory with the preset low-memory, its own batch and precision."""
    named = {"instance_data_dir": photos, "concept": "benchmark", "class_word": "critter", "preset": "low-memory"}
    only = {"max_train_steps": 6, "checkpointing_steps": None, "num_validation_images": 0}
    config = TrainingConfig.from_mapping(named | only)
    pipe = load(options.model, options.device, config.mixed_precision)
    (seconds, _), peak = with_peak(lambda: our_steps(pipe, config, options.device), options.device)
    return {"step_s": round(statistics.median(seconds), 4), "peak_gb": peak}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("toyland", "sd15"), default="toyland")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=tuple(DTYPES), help="default: no on a CPU, bf16 on a GPU")
    parser.add_argument("--batch", type=int, help="pictures of a step; Toyland's preset has 12, else 2")
    parser.add_argument("--captions", type=int, help="distinct captions of a step; Toyland's preset has 3, else batch")
    parser.add_argument("--steps", type=int, default=13, help="of a round, the first three left out")
    parser.add_argument("--rounds", type=int, default=3)
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
