"""Tuning one concept: photos in, `EDLoRA` out, the base model as it was."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.conditioning.tokenize import TokenizedPrompts, tokenize
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConfigurationError, TrainingDataError
from diffusers_mixofshow.lora import TrainableLoRA, trainable
from diffusers_mixofshow.sites import cross_attention_layers, reads_text
from diffusers_mixofshow.training.base import borrowed, load_base, refuse_untrainable
from diffusers_mixofshow.training.batches import Batch, cache_photos, random_batches
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.data import load_photos
from diffusers_mixofshow.training.learner import Learner, initial_embeddings
from diffusers_mixofshow.training.pictures import Photo
from diffusers_mixofshow.training.words import check_words


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_FINAL_SHARE = 0.1
"""The final loss is the mean over this share of the last steps; single steps are noisy."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What `on_step` is told after every optimiser step.

    Args:
        step: Steps done, from 1.
        total_steps: Steps in all.
        phase: ``embeddings`` or ``joint``.
        loss: The batch's loss.
    """

    step: int
    total_steps: int
    phase: str
    loss: float


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """A number of steps with one optimiser; parameters that are in no group stand still."""

    name: str
    steps: int
    groups: Sequence[dict[str, Any]]


class EDLoRATrainer:
    """Tunes one concept as an ED-LoRA (arXiv:2305.18292, section 3.3.1).

    Args:
        config: All settings.
        pipeline: A loaded Stable Diffusion pipeline to borrow, which stays where it is and comes back as it was;
            None loads `config.pretrained_model_name_or_path`.
        on_step: Called after every optimiser step; what it raises ends the training.

    Example:
        ```python
        config = TrainingConfig.toyland(instance_data_dir="photos/potter", concept="potter", class_word="critter")
        edlora = EDLoRATrainer(config).train()
        ```
    """

    def __init__(
        self,
        config: TrainingConfig,
        pipeline: StableDiffusionPipeline | None = None,
        *,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self.config = config
        self._given_pipeline = pipeline
        self._on_step = on_step

    def train(self) -> EDLoRA:
        """Tune the concept and save it to `config.output_dir`, if that is set.

        Raises:
            TrainingDataError: If photos, captions or masks cannot be used; lists every defect.
            ConceptError: If the base's tokenizer knows the concept's names already, or cannot read its class word.
            ConfigurationError: If the folder cannot be written, the model cannot be trained, or the loss diverges.
        """
        config = self.config
        photos = load_photos(config)
        if config.output_dir is not None:
            _check_writable(Path(config.output_dir))
        accelerator = self._accelerator()
        pipeline = self._given_pipeline or load_base(config).to(accelerator.device)
        refuse_untrainable(pipeline, config)
        check_words(config.concept_to_learn, pipeline.tokenizer)
        start = time.monotonic()
        with borrowed(pipeline):
            edlora = self._tune(pipeline, accelerator, photos)
        edlora = replace(edlora, training={**edlora.training, "seconds": round(time.monotonic() - start, 1)})
        if config.output_dir is not None and accelerator.is_main_process:
            edlora.save_pretrained(config.output_dir)
        accelerator.wait_for_everyone()
        return edlora

    def _accelerator(self) -> Accelerator:
        on_cpu = self._given_pipeline is not None and self._given_pipeline.device.type == "cpu"
        return Accelerator(mixed_precision=self.config.mixed_precision, cpu=on_cpu)

    def _tune(self, pipeline: StableDiffusionPipeline, accelerator: Accelerator, photos: Sequence[Photo]) -> EDLoRA:
        """Everything that happens while the pipeline is borrowed."""
        config, concept = self.config, self.config.concept_to_learn
        layers = cross_attention_layers(pipeline.unet)
        captions = list(dict.fromkeys(caption for photo in photos for caption in photo.captions))
        captions += [""] if config.proportion_empty_prompts else []
        tokenized = _tokenize_captions(captions, pipeline, config)
        cached = cache_photos(photos, captions, pipeline.vae, config)
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        embeddings = initial_embeddings(
            concept,
            pipeline.tokenizer,
            pipeline.text_encoder,
            layers=len(layers),
            std=config.initializer_std,
            generator=torch.Generator().manual_seed(config.seed),
        )
        draws = torch.Generator().manual_seed(config.seed * accelerator.num_processes + accelerator.process_index)
        batches = random_batches(
            cached,
            config,
            timesteps=scheduler.config.num_train_timesteps,
            generator=draws,
            empty_prompt=captions.index("") if "" in captions else None,
        )
        with ExitStack() as stack:
            lora = stack.enter_context(_seeded_lora(pipeline, config))
            stack.enter_context(layerwise_attention(pipeline.unet))
            learner = Learner(
                text_encoder=pipeline.text_encoder,
                unet=pipeline.unet,
                embeddings=embeddings,
                captions=tokenized,
                scheduler=scheduler,
                snr_gamma=config.snr_gamma,
            )
            losses = self._run(_phases(config, embeddings, lora), learner, batches, accelerator)
            return EDLoRA(
                concepts=(concept,),
                embeddings={token: value.detach().cpu().clone() for token, value in embeddings.items()},
                lora=lora.read(),
                base_model=config.pretrained_model_name_or_path,
                layers=layers,
                training={
                    "settings": config.as_record(),
                    "photos": len(photos),
                    "processes": accelerator.num_processes,
                    "final_loss": _final_mean(losses),
                },
            )

    def _run(
        self, phases: Sequence[_Phase], learner: Learner, batches: Iterator[Batch], accelerator: Accelerator
    ) -> list[float]:
        """Run all phases and return the loss of every step."""
        losses: list[float] = []
        with _progress(accelerator.is_main_process) as progress:
            bar = progress.add_task(self.config.concept_to_learn.placeholder, total=self.config.total_steps, loss="")
            for phase in phases:
                for loss in _run_phase(phase, learner, batches, accelerator, self.config):
                    losses.append(loss)
                    progress.update(bar, advance=1, loss=f"{phase.name} loss {_final_mean(losses):.4f}")
                    if self._on_step is not None:
                        self._on_step(
                            StepReport(
                                step=len(losses), total_steps=self.config.total_steps, phase=phase.name, loss=loss
                            )
                        )
        return losses


def learning_rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """Share of the full learning rate at a step of a phase, counted from 0; above 0 at every step that is taken."""
    if step < config.lr_warmup_steps:
        return (step + 1) / (config.lr_warmup_steps + 1)
    progress = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
    if config.lr_scheduler == "linear":
        return max(0.0, 1 - progress)
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def _run_phase(
    phase: _Phase, learner: Learner, batches: Iterator[Batch], accelerator: Accelerator, config: TrainingConfig
) -> Iterator[float]:
    """Take the phase's steps, one for each value asked of the iterator; yields the loss before the step."""
    optimized = _thaw_only(phase, learner)
    optimizer = torch.optim.AdamW(phase.groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, phase.steps, config)
    )
    model, prepared = accelerator.prepare(learner, optimizer)
    try:
        for _ in range(phase.steps):
            loss = model(next(batches).to(accelerator.device))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(optimized, config.max_grad_norm)
            prepared.step()
            prepared.zero_grad()
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            value = float(accelerator.reduce(loss.detach(), reduction="mean"))
            if not math.isfinite(value):
                raise ConfigurationError(
                    f"The loss became {value} in the {phase.name} phase, so the training diverged. "
                    "Lower the learning rates, or use mixed_precision='no' or 'bf16'."
                )
            yield value
    finally:
        accelerator.free_memory()


def _phases(config: TrainingConfig, embeddings: Mapping[str, nn.Parameter], lora: TrainableLoRA) -> list[_Phase]:
    """Embeddings alone, then everything; a rate of 0 leaves its parameters out."""
    decay = config.adam_weight_decay
    of_embeddings = {
        "params": list(embeddings.values()),
        "lr": config.embedding_learning_rate,
        "weight_decay": 0.0,
    }
    rates: list[tuple[Callable[[str], bool], float]] = [
        (lambda site: site.startswith("text_encoder."), config.text_encoder_lr),
        (reads_text, config.learning_rate if config.text_kv_lr is None else config.text_kv_lr),
        (lambda site: site.startswith("unet.") and not reads_text(site), config.learning_rate),
    ]
    of_lora = [{"params": lora.parameters(wanted), "lr": rate, "weight_decay": decay} for wanted, rate in rates]
    joint = [group for group in (of_embeddings, *of_lora) if group["lr"]]
    phases = [
        _Phase(name="embeddings", steps=config.embedding_phase_steps, groups=[of_embeddings]),
        _Phase(name="joint", steps=config.max_train_steps, groups=joint),
    ]
    return [phase for phase in phases if phase.steps]


def _thaw_only(phase: _Phase, learner: Learner) -> list[nn.Parameter]:
    """Let exactly the phase's parameters require gradients, and return them."""
    for parameter in learner.parameters():
        parameter.requires_grad_(False)
    parameters: list[nn.Parameter] = [parameter for group in phase.groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


@contextmanager
def _seeded_lora(pipeline: StableDiffusionPipeline, config: TrainingConfig) -> Iterator[TrainableLoRA]:
    """Fresh LoRA layers whose first values depend on the seed alone; the global random state stays."""
    with ExitStack() as stack:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            lora = stack.enter_context(trainable(pipeline.components, config.rank, config.lora_alpha))
        yield lora


def _tokenize_captions(
    captions: Sequence[str], pipeline: StableDiffusionPipeline, config: TrainingConfig
) -> TokenizedPrompts:
    tokenized = tokenize(captions, pipeline.tokenizer, [config.concept_to_learn])
    cut = [caption for caption, names in zip(captions, tokenized.concept_tokens, strict=True) if caption and not names]
    if cut:
        raise TrainingDataError(
            f"In {len(cut)} captions the concept comes too late and is cut off; name it earlier: {'; '.join(cut)}"
        )
    return tokenized


def _check_writable(folder: Path) -> None:
    """Notice a folder that cannot be written before the training, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"output_dir {str(folder)!r} cannot be written ({error}). Choose another folder, or None not to save."
        ) from error


def _progress(shown: bool) -> Progress:
    """A bar with the loss on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


def _final_mean(losses: Sequence[float]) -> float:
    last = losses[-max(1, round(len(losses) * _FINAL_SHARE)) :]
    return sum(last) / len(last)
