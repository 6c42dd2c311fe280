"""Tune one concept: photos in, an `EDLoRA` out, and the base model unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler
from PIL import Image

from diffusers_mixofshow.base_models import classes_of, name_of
from diffusers_mixofshow.concepts import SLOT, split_prompt
from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.conditioning.tokenize import tokenize
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import (
    ConfigurationError,
    OverwriteError,
    TrainingDataError,
    first_line,
    list_first,
    warn,
)
from diffusers_mixofshow.families.layers import components_with_sites
from diffusers_mixofshow.notes import write_with_note
from diffusers_mixofshow.progress import progress, tell
from diffusers_mixofshow.sheets import draw_labelled_sheet
from diffusers_mixofshow.training.averaging import MovingAverage
from diffusers_mixofshow.training.base import (
    borrow,
    load_base,
    refuse_untrainable,
    tokenizers_of,
    warn_of_small_pictures,
)
from diffusers_mixofshow.training.batches import RandomBatches, cache_photos
from diffusers_mixofshow.training.checkpoints import (
    CheckpointFolder,
    check_same_training,
    check_space,
    check_writable,
    digest_conditions,
    digest_data,
    find_start,
    refuse_replacing,
    remove_earlier_steps,
)
from diffusers_mixofshow.training.company import compose_company
from diffusers_mixofshow.training.compute import compile_model, recompute_activations, speed_up_updates
from diffusers_mixofshow.training.config import TrainingConfig
from diffusers_mixofshow.training.data import load_photos
from diffusers_mixofshow.training.failures import explain_memory_errors
from diffusers_mixofshow.training.interruption import notice_interruption
from diffusers_mixofshow.training.learner import Learner
from diffusers_mixofshow.training.loop import Position, StepReport, TrainingLoop, final_mean
from diffusers_mixofshow.training.optimisers import MakeOptimizer, find_optimizer
from diffusers_mixofshow.training.pictures import Photo
from diffusers_mixofshow.training.prior import prompt_of_class, read_class_pictures
from diffusers_mixofshow.training.reader import TextReader, TokenizedTexts, tokenize_for
from diffusers_mixofshow.training.samples import SCALES, describe_sheet, draw_rows
from diffusers_mixofshow.training.statistics import record_statistics
from diffusers_mixofshow.training.tracking import check_tracker, log_picture, track
from diffusers_mixofshow.training.trained import initialise
from diffusers_mixofshow.training.trial import Trial
from diffusers_mixofshow.training.words import check_prompts, check_words


if TYPE_CHECKING:
    from diffusers_mixofshow.training.base import TrainablePipeline


_NAMED = 3
"""How many captions an error lists before it says "and N more"."""
_LEAST_SIDE = 192
"""Pixels of a side below which pictures are enlarged on sheets, to be seen without zooming in."""


class EDLoRATrainer:
    """Tunes one concept as an ED-LoRA (arXiv:2305.18292, section 3.3.1), or by another of `TrainingConfig.method`.

    Args:
        config: All settings.
        pipeline: A loaded pipeline of Stable Diffusion or SDXL to train on; it stays on its device and is unchanged
            afterwards. None loads `config.pretrained_model_name_or_path`.
        on_step: Called after every optimiser step; an exception in it ends the training. On a `KeyboardInterrupt`, or
            Ctrl-C, a checkpoint is written first, if there is an output folder.

    Example:
        ```python
        config = TrainingConfig.toyland(instance_data_dir="photos/potter", concept="potter", class_word="critter")
        edlora = EDLoRATrainer(config).train()
        ```
    """

    def __init__(
        self,
        config: TrainingConfig,
        pipeline: TrainablePipeline | None = None,
        *,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self.config = config
        self.pipeline = pipeline
        """The given pipeline, or the one that `train` has loaded."""
        self.saved_to: Path | None = None
        """The folder that `train` has saved the ED-LoRA to."""
        self._on_cpu = pipeline is not None and pipeline.device.type == "cpu"
        self._on_step = on_step

    def train(self) -> EDLoRA:
        """Tune the concept and save it to `config.output_dir`, if that is set, with its fusion statistics beside it.

        Raises:
            TrainingDataError: If photos, captions or masks cannot be used; lists every defect.
            ConceptError: If the concept's names are in the base's vocabulary, or its tokenizer cannot read the class
                word.
            ConfigurationError: If the folder cannot be written or is nearly full, the model cannot be trained, the
                loss diverges, the GPU has too little memory, or a checkpoint is of another training.
            MissingExtraError: If the optimiser's or tracker's package is not installed.
            OverwriteError: If the folder holds an earlier training, see `TrainingConfig.overwrite`.

        Warns:
            MixOfShowWarning: If a validation sheet cannot be drawn, or the folder was filled during the training, so
                that the ED-LoRA is saved beside it.
        """
        config = self.config
        refuse_replacing(config)
        photos = load_photos(config)
        composed = compose_company(photos, config)
        make_optimizer = find_optimizer(config.optimizer)
        check_tracker(config.report_to)
        if config.output_dir is not None:
            check_writable(Path(config.output_dir))
        accelerator = self._make_accelerator()
        start = time.monotonic()
        with explain_memory_errors(config, lambda: self.pipeline.components if self.pipeline else {}):
            self.pipeline = self.pipeline or load_base(config).to(accelerator.device)
            refuse_untrainable(self.pipeline, config)
            drawn = classes_of(name_of(self.pipeline))
            check_words(config.concept_to_learn, *tokenizers_of(self.pipeline), drawn=drawn)
            check_prompts(config, tokenizers_of(self.pipeline))
            warn_of_small_pictures(self.pipeline, config)
            with borrow(self.pipeline):
                tuning = _Tuning(config, self.pipeline, accelerator, self._on_step, start)
                edlora = tuning.run(photos, composed, make_optimizer)
        self.saved_to = tuning.saved_to
        if self.saved_to is not None and config.save_statistics:
            record_statistics(self.pipeline, self.saved_to)
        return edlora

    def _make_accelerator(self) -> Accelerator:
        """Make the accelerator, also after a training of another precision or on another device in this process.

        Raises:
            ConfigurationError: If accelerate refuses, as another precision than that of several processes that run.
        """
        config = self.config
        _forget_other_state(config.mixed_precision, on_cpu=self._on_cpu)
        logs = None if config.output_dir is None else Path(config.output_dir) / "logs"
        try:
            return Accelerator(
                mixed_precision=config.mixed_precision, cpu=self._on_cpu, log_with=config.report_to, project_dir=logs
            )
        except ValueError as error:
            raise ConfigurationError(
                f"accelerate refuses mixed_precision {config.mixed_precision!r} here ({first_line(error)}). Choose "
                "another one, 'no' works everywhere, or start a new process."
            ) from error


def _forget_other_state(precision: str, *, on_cpu: bool) -> None:
    """Reset accelerate's state if it is of this process alone, and of another precision or device.

    accelerate keeps precision and device of the first training for all later ones of a process, such as a notebook's.
    """
    shared = PartialState._shared_state | AcceleratorState._shared_state
    is_other = shared.get("_mixed_precision", precision) != precision or shared.get("_cpu", on_cpu) != on_cpu
    if is_other and shared["num_processes"] == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


class _Tuning:
    """One training while the pipeline is borrowed."""

    def __init__(
        self,
        config: TrainingConfig,
        pipeline: TrainablePipeline,
        accelerator: Accelerator,
        on_step: Callable[[StepReport], None] | None,
        start: float,
    ) -> None:
        self.config, self.pipeline, self.accelerator, self.on_step = config, pipeline, accelerator, on_step
        self.start = start
        self.checkpoints: CheckpointFolder | None = None
        self.samples: dict[str, Image.Image] = {}
        """Caption to the last validation sheet, for the model card."""
        self.saved_to: Path | None = None
        """The folder of the saved ED-LoRA."""
        if config.output_dir is not None:
            self.checkpoints = CheckpointFolder(Path(config.output_dir), config.checkpoints_total_limit, accelerator)

    def run(self, photos: Sequence[Photo], composed: Sequence[Photo], make_optimizer: MakeOptimizer) -> EDLoRA:
        """Train on the photos and the pictures composed of them, from scratch or from a checkpoint."""
        config, pipeline = self.config, self.pipeline
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        pictures = [*_keep_whole_captions(photos, pipeline, config), *_drop_cut_captions(composed, pipeline, config)]
        tokenized, self.batches = self._read_data(pictures, scheduler.config.num_train_timesteps)
        self.photos = len(photos)
        with ExitStack() as stack:
            self.trained = stack.enter_context(initialise(pipeline, config))
            denoiser = stack.enter_context(compile_model(pipeline.unet)) if config.torch_compile else pipeline.unet
            shared = stack.enter_context(layerwise_attention(denoiser, layers=self.trained.layers))
            if self.trained.lora is not None:
                stack.enter_context(speed_up_updates(self.trained.lora))
            if config.gradient_checkpointing:
                stack.enter_context(recompute_activations(*components_with_sites(pipeline.components).values()))
            parameters = self.trained.parameters()
            if config.output_dir is not None:
                check_space(Path(config.output_dir), list(parameters.values()), config)
            self.average = None if config.ema_decay is None else MovingAverage(parameters, config.ema_decay)
            learner = Learner(
                reader=TextReader(pipeline.components, self.trained.embeddings),
                unet=pipeline.unet,
                tokens=config.concept_to_learn.tokens,
                captions=tokenized,
                scheduler=scheduler,
                config=config,
                shared=shared,
                denoiser=denoiser,
            )
            self.trial = Trial(learner, self.batches, self.accelerator, config)
            phases, position = self.trained.phases(config), self._resume()
            self.loop = TrainingLoop(phases, learner, self.batches, self.accelerator, config, make_optimizer, position)
            with track(self.accelerator, config):
                self._take_steps()
                self.trial.check()
                return self._finish()

    def _finish(self) -> EDLoRA:
        """Make the ED-LoRA, and save it before a sheet is drawn, which takes long and may fail; then add the sheet."""
        edlora = self._make_edlora()
        edlora = replace(edlora, training={**edlora.training, "seconds": round(time.monotonic() - self.start, 1)})
        if self.checkpoints is None:
            return edlora
        replaces = self.config.overwrite or self.config.resume_from_checkpoint is not None
        saved_to = [self.checkpoints.folder]
        self.samples = {}
        if self.accelerator.is_main_process:
            saved_to = [_save(edlora, self.checkpoints.folder, overwrite=replaces)]
        self.saved_to = Path(broadcast_object_list(saved_to)[0])
        self._draw_sheet(self.checkpoints.folder)
        if self.samples:
            edlora.save_pretrained(self.saved_to, samples=self.samples, overwrite=True)
        self.accelerator.wait_for_everyone()
        return edlora

    def _read_data(self, photos: Sequence[Photo], timesteps: int) -> tuple[TokenizedTexts, RandomBatches]:
        """Tokenise captions, encode pictures, and make the batches, which each process draws with its own seed."""
        config, accelerator = self.config, self.accelerator
        captions = list(dict.fromkeys(caption for photo in photos for caption in photo.captions))
        of_class: list[Photo] = []
        if config.class_data_dir is not None:
            read_class_pictures(self.pipeline, config, drawing=accelerator.is_main_process)
            accelerator.wait_for_everyone()
            of_class = read_class_pictures(self.pipeline, config, drawing=False)
            captions.append(prompt_of_class(config))
        captions += [""] if config.proportion_empty_prompts else []
        cached = cache_photos(photos, captions, self.pipeline.vae, config)
        prior = cache_photos(of_class, captions, self.pipeline.vae, replace(config, framing="crop"))
        encoded = [*cached, *prior]
        self.data = f"{digest_data(encoded, captions)} {digest_conditions(encoded, config)}"
        seed = config.seed * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        batches = RandomBatches(
            cached,
            config,
            timesteps=timesteps,
            generator=generator,
            prior=prior,
            empty_prompt=captions.index("") if config.proportion_empty_prompts else None,
        )
        return tokenize_for(self.pipeline, captions, config.concept_to_learn), batches

    def _take_steps(self) -> None:
        """Run the loop; between its steps report, draw validation sheets and save checkpoints."""
        config, position, tells = self.config, self.loop.position, self.accelerator.is_main_process
        name = f"Tuning {config.concept_to_learn.placeholder}"
        with (
            progress(name, config.total_steps, done=position.step, pipe=self.pipeline, shown=tells) as bar,
            notice_interruption() as interruption,
        ):
            for report in self.loop.steps(interruption):
                self.trained.keep_inputs()
                if self.average is not None:
                    self.average.update(report.step)
                bar.set_postfix_str(f"{report.phase} loss {final_mean(position.losses):.4f}", refresh=False)
                bar.update()
                self._report_step(report)
                if interruption.everywhere:
                    self._save_checkpoint()
                    if tells:
                        tell(self._describe_stop(report.step))
                    raise KeyboardInterrupt
                if _is_due(report.step, config.checkpointing_steps):
                    self._save_checkpoint()
                if _is_due(report.step, config.validation_steps) and self.checkpoints is not None:
                    self._draw_sheet(self.checkpoints.folder)

    def _describe_stop(self, step: int) -> str:
        if self.checkpoints is None:
            return f"Stopped after step {step}; without output_dir nothing was saved."
        return f"Stopped and saved after step {step}; go on with resume_from_checkpoint 'latest'."

    def _report_step(self, report: StepReport) -> None:
        self.accelerator.log(report.as_scalars(), step=report.step)
        try:
            if self.on_step is not None:
                self.on_step(report)
        except KeyboardInterrupt:
            self._save_checkpoint()
            raise

    def _draw_sheet(self, folder: Path) -> None:
        """Draw a validation sheet in the main process alone; a failure warns, as it must not end the training."""
        if self.config.num_validation_images and self.accelerator.is_main_process:
            try:
                self._write_sheet(folder)
            except Exception as error:
                warn(
                    f"The validation sheet of step {self.loop.position.step} could not be drawn or written "
                    f"({first_line(error)}). What is learnt is unchanged; num_validation_images=0 draws no sheets."
                )
        self.accelerator.wait_for_everyone()

    def _write_sheet(self, folder: Path) -> None:
        """Draw a validation sheet with the present parameters, and write it to its file and the tracker."""
        config, step = self.config, self.loop.position.step
        with self._swap_in_average(), self.accelerator.autocast():
            rows = draw_rows(self.pipeline, self.trained, config)
        prompt = config.validation_prompt.replace(SLOT, config.concept_to_learn.placeholder)
        enlarged = max(1, _LEAST_SIDE // config.resolution)
        sheet = draw_labelled_sheet(rows, title=f"{prompt}, step {step}", scale=enlarged)
        path = folder / "validation" / f"step-{step:06d}.png"
        write_with_note(path, sheet, "PNG", *describe_sheet(self.pipeline, config, prompt, list(rows)))
        scales = " and ".join(f"{scale:g}" for scale in SCALES) if len(rows) > 1 else "1"
        self.samples = {f"{prompt} (LoRA scale {scales}, from top to bottom)": sheet}
        log_picture(self.accelerator, sheet, step)

    def _swap_in_average(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.swap_in()

    def _make_edlora(self) -> EDLoRA:
        """Make an ED-LoRA of the present parameters."""
        with self._swap_in_average():
            embeddings, updates = self.trained.read()
        losses = self.loop.position.losses
        return EDLoRA(
            concepts=(self.config.concept_to_learn,),
            embeddings=embeddings,
            lora=updates,
            base_model=self.config.pretrained_model_name_or_path,
            layers=self.trained.layers,
            training={
                "settings": self.config.as_record(),
                "photos": self.photos,
                "processes": self.accelerator.num_processes,
                "steps": len(losses),
                "final_loss": final_mean(losses),
            },
        )

    def _save_checkpoint(self) -> None:
        """Write a checkpoint if there is an output folder; a diverged training raises instead of replacing one."""
        if self.checkpoints is None:
            return
        self.trial.check()
        position = self.loop.note_state()
        state = {
            "settings": self.config.as_identity(),
            "data": self.data,
            "parameters": {name: value.detach() for name, value in self.trained.parameters().items()},
            "average": {} if self.average is None else self.average.values,
            "losses": position.losses,
            "optimizer": position.optimizer,
            "scaler": position.scaler,
        }
        self.checkpoints.save(position.step, self._make_edlora(), state, {"batches": self.batches.state_dict()})

    def _resume(self) -> Position:
        """Restore the checkpoint that the config asks for, if there is one, and return the position to start at."""
        if self.accelerator.is_main_process:
            remove_earlier_steps(self.config)
        path = find_start(self.config)
        if path is None or self.checkpoints is None:
            return Position()
        state, own = self.checkpoints.load(path)
        check_same_training(path, state, self.config.as_identity(), self.data)
        self.trained.write(state["parameters"])
        if self.average is not None:
            self.average.load(state["average"])
        self.batches.load_state_dict(own["batches"])
        return Position(
            step=state["step"], losses=state["losses"], optimizer=state["optimizer"], scaler=state["scaler"]
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _save(edlora: EDLoRA, folder: Path, *, overwrite: bool) -> Path:
    """Save the ED-LoRA, beside the folder if another one has come there during the training; return its folder."""
    try:
        edlora.save_pretrained(folder, overwrite=overwrite)
    except OverwriteError as error:
        folder = next(free for number in count(2) if not (free := Path(f"{folder.absolute()}-{number}")).exists())
        warn(f"{first_line(error).partition(', and')[0]}, so the new ED-LoRA is saved to {folder}.")
        edlora.save_pretrained(folder)
    return folder


def _keep_whole_captions(
    photos: Sequence[Photo], pipeline: TrainablePipeline, config: TrainingConfig
) -> Sequence[Photo]:
    """Refuse captions whose concept tokens are beyond the text encoder's length, see `_find_cut_captions`.

    Orders of shuffled tags that put them there are dropped; a photo is refused only if no order is left.
    """
    cut = _find_cut_captions(photos, pipeline, config)
    if config.tag_shuffles:
        kept = _drop_cut_captions(photos, pipeline, config)
        left = {photo.path for photo in kept}
        cut, photos = [(photo, caption) for photo, caption in cut if photo.path not in left], kept
    if cut:
        seen = min(words.model_max_length for words in tokenizers_of(pipeline))
        named = list_first([f"{photo.path.name}: {caption}" for photo, caption in cut], _NAMED)
        raise TrainingDataError(
            f"The text encoder sees {seen} tokens. In {len(cut)} captions the concept, "
            f"or a part of it, comes later and is cut off; name it earlier in {named}"
        )
    return photos


def _drop_cut_captions(photos: Sequence[Photo], pipeline: TrainablePipeline, config: TrainingConfig) -> list[Photo]:
    """Drop captions that name the concept too late, and pictures left without a caption."""
    cut = {caption for _, caption in _find_cut_captions(photos, pipeline, config)}
    kept = [
        replace(photo, captions=tuple(caption for caption in photo.captions if caption not in cut)) for photo in photos
    ]
    return [photo for photo in kept if photo.captions]


def _find_cut_captions(
    photos: Sequence[Photo], pipeline: TrainablePipeline, config: TrainingConfig
) -> list[tuple[Photo, str]]:
    """Find captions in which tokens of the concept are cut off, as they lie beyond the text encoder's length."""
    concept = config.concept_to_learn
    captions = [(photo, caption) for photo in photos for caption in photo.captions]
    seen = [
        tokenize([caption for _, caption in captions], words, [concept]).concept_tokens
        for words in tokenizers_of(pipeline)
    ]
    return [
        each
        for each, *kept in zip(captions, *seen, strict=True)
        if min(map(len, kept)) < sum(piece in concept.tokens for piece in split_prompt(each[1], [concept]))
    ]
