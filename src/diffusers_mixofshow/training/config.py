"""Every setting of tuning one concept, checked as a whole before anything is loaded."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Container, Mapping
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import TOYLAND, embedded_base, normalise_name
from diffusers_mixofshow.concepts import SLOT, Concept, mentions_concept
from diffusers_mixofshow.errors import ConceptError, ConfigurationError
from diffusers_mixofshow.training.captions import TEMPLATES
from diffusers_mixofshow.training.config_files import read_settings
from diffusers_mixofshow.training.methods import METHODS
from diffusers_mixofshow.training.presets import layer_presets
from diffusers_mixofshow.training.renamed import use_new_names
from diffusers_mixofshow.training.settings import settings_of


FRAMINGS = ("crop", "place", "buckets")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("tensorboard", "wandb")
CHOICES: dict[str, Collection[str]] = {
    "framing": FRAMINGS,
    "lr_scheduler": LR_SCHEDULERS,
    "mixed_precision": PRECISIONS,
    "method": METHODS,
    "report_to": TRACKERS,
}
"""Settings that are one of a few names."""
PRODIGY = "prodigy"

_REFUSAL = "Training cannot start with these settings: "
_UNRECORDED = (
    "instance_data_dir",
    "dataset_name",
    "output_dir",
    "latents_dir",
    "class_data_dir",
    "resume_from_checkpoint",
    "overwrite",
)
"""Settings left out of records: folders are private, and the others do not change what is learnt."""
_WITHOUT_EFFECT = (
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "validation_prompt",
    "validation_steps",
    "num_validation_images",
    "save_statistics",
)
"""Settings that may differ when a training is resumed, as they do not change what is learnt."""
_AT_LEAST_ONE = (
    "resolution",
    "train_batch_size",
    "max_train_steps",
    "captions_per_step",
    "crop_variants",
    "rank",
    "gradient_accumulation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "num_class_images",
    "lr_num_cycles",
)
RATES = ("embedding_learning_rate", "text_encoder_learning_rate", "learning_rate", "text_kv_learning_rate")
"""Learning rates, which may be lowered when a training is resumed."""
_NOT_NEGATIVE = (
    *RATES,
    "company",
    "tag_shuffles",
    "proportion_empty_prompts",
    "embedding_phase_steps",
    "adam_weight_decay",
    "lr_warmup_steps",
    "noise_offset",
    "initializer_std",
    "seed",
    "attn_reg_weight",
    "prior_loss_weight",
    "num_validation_images",
)
_SEEDS = 2**63
"""A seed is below this: torch's generators take 64 bits, and some seeds are derived by adding to it."""
_LARGEST_ON_EMBEDDED = 2
"""Largest resolution on an embedded base, as a multiple of its own."""
_POSITIVE = ("lora_alpha", "max_grad_norm", "snr_gamma", "embedding_norm_threshold", "lr_power")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to tune one concept as an ED-LoRA (arXiv:2305.18292, sections 3.3.1 and 6.1).

    Names follow diffusers' training scripts where they have one. "Paper" is section 6.1, "reference" the authors'
    code, "ours" a choice of this package.

    Args:
        instance_data_dir: Folder with the concept's photos; optional are captions (``NAME.txt``, one a line,
            ``<TOK>`` stands for the concept; or ``metadata.jsonl`` or ``metadata.csv``) and masks (``masks/NAME.png``,
            white is the concept; or the photos' alpha channels).
        dataset_name: Data set of photos on the Hub, ``user/name``, in place of `instance_data_dir`.
        concept: The concept's name: ``potter`` or ``<potter>``; prompts say ``<potter>`` either way.
        class_word: Plain word for what the concept is. V_class starts from its embedding (paper), or from the mean of
            several if it has several tokens.
        kind: One of ``character``, ``pet``, ``object``, ``scene``.
        pretrained_model_name_or_path: Base model: Hub id, folder, or ``toyland`` for the embedded base.
        output_dir: Folder that receives the ED-LoRA; None does not save. The command line takes a folder named after
            the concept where none is given.
        overwrite: Whether an earlier training in `output_dir` may be replaced: its ED-LoRA, checkpoints and sheets.
            Not needed to resume it from a checkpoint.
        seed: Seed of every random number of the tuning.
        resolution: Side of the square training picture, in pixels (512, paper; `from_mapping` and the command line
            take 1024 for a base that they recognise as SDXL).
        center_crop: Whether photos that are not square are cropped at the centre; else at random places (reference).
        crop_variants: How many random crops of a photo are encoded and cached (ours); 1 is enough for square photos.
        framing: How photos become training pictures: ``crop`` takes squares at random places, ``place`` puts the whole
            photo at random places on black, which the loss leaves out (reference), ``buckets`` keeps about the photo's
            shape, with about as many pixels as the square.
        latents_dir: Folder that keeps the crops' latents for the next training with the same photos, framing, seed and
            autoencoder; what has changed is encoded anew. The photos can be decoded from it with the base model. None
            keeps latents in memory only.
        random_flip: Whether mirrored photos are trained as well; wrong for anything whose left and right differ, such
            as faces or writing (no, reference).
        caption_column: The column of captions in ``metadata.jsonl`` or ``metadata.csv``; None ignores them.
        instance_prompt: Captions of photos that have none, one of them drawn at each step (after arXiv:2208.01618).
        company: Share of training pictures that show the concept twice, side by side. They are composed of the photos
            by their masks; without masks, or for a scene, there are none (ours; not in ``paper``). Without them a
            concept half loses its looks where a prompt names it second.
        tag_shuffles: In how many random orders a caption's comma-separated tags are trained; the first tag stays
            first. 0: as written.
        proportion_empty_prompts: Share of captions replaced by the empty prompt, for classifier-free guidance (0.1,
            arXiv:2207.12598); one caption of each step always stays. What is learnt without a caption is in the LoRA
            alone, so that fusion keeps it badly (0, reference).
        train_batch_size: Pictures per step and process (2 GPUs x 2 in the reference, so 4).
        captions_per_step: Largest number of distinct captions per step. The batch repeats photos with other noise and
            timesteps, so that fewer layer-wise encodings are computed. None: one caption for every picture.
        max_train_steps: Optimiser steps with embeddings and LoRA together (800 of batch 4: about 250 repeats of a
            dozen photos, reference).
        embedding_phase_steps: Optimiser steps with embeddings alone, before `max_train_steps` (0, reference).
        embedding_learning_rate: Learning rate of the layer-wise embeddings (1e-3, paper).
        text_encoder_learning_rate: Learning rate of the text encoder's LoRA (1e-5, paper).
        learning_rate: Learning rate of the U-Net's LoRA (1e-4, paper).
        text_kv_learning_rate: Learning rate of the LoRA on the U-Net's text keys and values; None: learning_rate
            (paper). Fusion keeps better what is learnt there, as prompts tell concepts apart better than pictures do;
            but at many times learning_rate a concept loses its class in pictures with others (ours).
        lr_scheduler: Learning rate over the steps of each phase: ``linear`` decay to 0 (reference), ``cosine``,
            ``cosine_with_restarts``, ``polynomial``, ``constant`` or ``constant_with_warmup``.
        lr_warmup_steps: Optimiser steps of linear warm-up in each phase (0, reference).
        adam_weight_decay: AdamW's decoupled weight decay of the LoRA (0.01, reference); embeddings have none.
        max_grad_norm: Gradients are scaled down to this norm (1.0, diffusers' scripts).
        rank: Rank of every LoRA layer (4, paper).
        lora_alpha: The LoRA is scaled by lora_alpha / rank (4, so that the scale is 1 as in the reference).
        keep_start_token: Whether the LoRA leaves the outputs for a prompt's start token unchanged. That token is the
            same in every prompt, so that fusion cannot keep a change of each concept there (ours; not in ``paper``).
        noise_offset: Strength of the noise added to whole channels (0.01, paper: crucial for a stable identity).
        snr_gamma: Clamp of the min-SNR loss weights (arXiv:2303.09556); None: equal weights (paper).
        masked_loss: Whether the loss counts only the concept's mask, for photos that have one (reference).
        initializer_std: Standard deviation of V_rand's first values, in embedding units (0.013, reference).
        mixed_precision: ``no``, ``fp16`` or ``bf16``, as accelerate understands it.
        method: What is learnt: ``ed-lora`` (paper), or one of `training.methods.METHODS` to compare it with.
        optimizer: Class of `torch.optim`, of bitsandbytes (``AdamW8bit``) or ``Prodigy`` (AdamW, reference).
        lr_num_cycles: Restarts of ``cosine_with_restarts`` (1, diffusers' scripts).
        lr_power: Power of ``polynomial`` decay (1.0, diffusers' scripts).
        gradient_accumulation_steps: Batches whose gradients are added up for one optimiser step (1, reference).
        ema_decay: Decay of a moving average of everything that is learnt, which is saved in place of the last values;
            None saves the last values (reference).
        embedding_norm_threshold: Embeddings are frozen once the mean norm of the concept's reaches this, in embedding
            units (reference: 0.55 on Stable Diffusion 1.5, whose words have about 0.4); None: never.
        attn_reg_weight: Weight of the attention regulariser, for photos with a mask: the attention to the concept's
            tokens outside the mask, each map divided by its largest value (reference: 0.01); 0 leaves it out.
        reg_full_identity: Whether the regulariser fits V_class's map to the whole mask, inside as well (reference).
        class_data_dir: Folder of pictures of the class for prior preservation (arXiv:2208.12242); up to
            `num_class_images`, missing ones are sampled from the base model into it. None: no prior preservation
            (reference).
        class_prompt: Prompt of the pictures of the class; None: ``a photo of a`` and the class word.
        num_class_images: Number of pictures of the class (100, diffusers' scripts).
        prior_loss_weight: Weight of the loss on pictures of the class (1.0, diffusers' scripts).
        gradient_checkpointing: Whether activations are computed again for the gradients: less memory, a third slower.
        torch_compile: Whether the U-Net is compiled with `torch.compile`: faster after a minute or more.
        checkpointing_steps: Optimiser steps between two checkpoints in `output_dir`; None writes none.
        checkpoints_total_limit: How many checkpoints are kept, the newest (2, ours).
        resume_from_checkpoint: ``latest``, or the folder of a checkpoint, to resume the training from.
        report_to: ``tensorboard`` or ``wandb`` for curves and pictures, in ``output_dir/logs``; None keeps no curves.
        validation_prompt: Prompt of the validation sheets; ``<TOK>`` stands for the concept.
        validation_steps: Optimiser steps between two validation sheets: pictures at LoRA scale 0, 0.7 and 1, always of
            the same seeds. None draws only the sheet at the end.
        num_validation_images: Pictures of each scale on a sheet (4, ours); 0 draws no sheets.
        save_statistics: Whether fusion statistics are recorded beside the ED-LoRA at the end, so that it can be fused
            without the base model (ours).

    Raises:
        ConfigurationError: Lists every value that is out of range or contradicts another.
    """

    instance_data_dir: str | Path | None = None
    dataset_name: str | None = None
    concept: str
    class_word: str
    kind: str = "object"
    pretrained_model_name_or_path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    output_dir: str | Path | None = None
    overwrite: bool = False
    seed: int = 0
    resolution: int = 512
    center_crop: bool = False
    crop_variants: int = 4
    framing: str = "crop"
    latents_dir: str | Path | None = None
    random_flip: bool = False
    caption_column: str | None = "text"
    instance_prompt: tuple[str, ...] = TEMPLATES
    company: float = 0.4
    tag_shuffles: int = 0
    proportion_empty_prompts: float = 0.0
    train_batch_size: int = 4
    captions_per_step: int | None = None
    max_train_steps: int = 800
    embedding_phase_steps: int = 0
    embedding_learning_rate: float = 1e-3
    text_encoder_learning_rate: float = 1e-5
    learning_rate: float = 1e-4
    text_kv_learning_rate: float | None = None
    lr_scheduler: str = "linear"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    rank: int = 4
    lora_alpha: float = 4.0
    keep_start_token: bool = True
    noise_offset: float = 0.01
    snr_gamma: float | None = None
    masked_loss: bool = True
    initializer_std: float = 0.013
    mixed_precision: str = "no"
    method: str = "ed-lora"
    optimizer: str = "AdamW"
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    gradient_accumulation_steps: int = 1
    ema_decay: float | None = None
    embedding_norm_threshold: float | None = None
    attn_reg_weight: float = 0.0
    reg_full_identity: bool = False
    class_data_dir: str | Path | None = None
    class_prompt: str | None = None
    num_class_images: int = 100
    prior_loss_weight: float = 1.0
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    checkpointing_steps: int | None = 250
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | Path | None = None
    report_to: str | None = None
    validation_prompt: str = "a photo of a <TOK>"
    validation_steps: int | None = None
    num_validation_images: int = 4
    save_statistics: bool = True

    def __post_init__(self) -> None:
        """Report every defect at once, make numbers Python's own, and spell the embedded base's name in lower case."""
        defects = self._list_defects()
        if defects:
            raise ConfigurationError(_REFUSAL + "; ".join(defects))
        for name, setting in settings_of(type(self)).items():
            object.__setattr__(self, name, setting.to_plain(getattr(self, name)))
        object.__setattr__(self, "pretrained_model_name_or_path", normalise_name(self.pretrained_model_name_or_path))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> TrainingConfig:
        """Build a config from names and values, for instance those of a parsed file.

        Args:
            settings: Any fields, and as ``preset`` the name of a set of defaults for the others (see
                `presets.PRESETS`). The embedded base (``toyland``) has a preset of its own. A rank without lora_alpha
                sets lora_alpha to the same number.

        Raises:
            ConfigurationError: Lists all unknown and missing names, and every value that cannot be used.
        """
        known = settings_of(cls)
        values, defects = layer_presets(use_new_names(settings))
        values = {name: known[name].normalise(value) if name in known else value for name, value in values.items()}
        defects += [_describe_unknown(name, value, known) for name, value in values.items() if name not in known]
        missing = [name for name, setting in known.items() if setting.is_required and name not in values]
        defects += [f"{name!r} is missing" for name in missing]
        if defects:
            values |= dict.fromkeys(missing, "missing")
            defaults = {name: setting.default for name, setting in known.items()}
            judged = _make_unchecked(cls, defaults | {name: values[name] for name in values if name in known})
            raise ConfigurationError(_REFUSAL + "; ".join([*defects, *judged._list_defects()]))
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> TrainingConfig:
        """Build a config from a TOML or YAML file with any of `from_mapping`'s names, one setting a line.

        Args:
            path: Ends in ``.toml``, ``.yaml`` or ``.yml``. Folders in it are relative to the current folder.
            settings: Settings that replace the file's.

        Raises:
            ConfigurationError: If the file cannot be read; else as `from_mapping`.
        """
        return cls.from_mapping(read_settings(path, settings_of(cls)) | settings)

    @classmethod
    def toyland(cls, **settings: Any) -> TrainingConfig:
        """Settings for the embedded base, found by measurement; `settings` replaces single ones.

        The base is small, so that rates are larger and steps fewer than for Stable Diffusion. The loss counts the
        whole picture: with a loss on tight masks alone the concept spreads over the background, as nothing in the loss
        says where it ends. One concept takes some two minutes of a CPU core.
        """
        return cls.from_mapping({"preset": TOYLAND} | settings)

    @property
    def concept_to_learn(self) -> Concept:
        """The concept with its tokens, V_rand and V_class; some methods have one token alone."""
        concept = Concept.from_name(self.concept, self.class_word, kind=self.kind)
        return replace(concept, tokens=concept.tokens[: METHODS[self.method].tokens])

    @property
    def total_steps(self) -> int:
        """Optimiser steps of both phases."""
        return self.embedding_phase_steps + self.max_train_steps

    def as_record(self) -> dict[str, Any]:
        """The settings as JSON values, without private folders and without settings about files."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in _UNRECORDED
        }

    def as_identity(self) -> dict[str, Any]:
        """The settings that decide what is learnt; a training is resumed only if they are equal (but see `RATES`)."""
        return {name: value for name, value in self.as_record().items() if name not in _WITHOUT_EFFECT}

    def _list_defects(self) -> list[str]:
        """List everything that is wrong; values are checked only if their types are right."""
        wrong = self._wrong_types()
        defects = [*wrong.values(), *self._below_limits(wrong), *self._unknown_choices(wrong)]
        if (self.instance_data_dir is None) == (self.dataset_name is None):
            defects.append("one of instance_data_dir and dataset_name is needed: the photos")
        if not wrong:
            defects += [*self._contradictions(), *self._concept_defects()]
        return defects

    def _wrong_types(self) -> dict[str, str]:
        values = {name: getattr(self, name) for name in settings_of(type(self))}
        return {
            name: f"{name} is {values[name]!r}, expected {setting.expected}"
            for name, setting in settings_of(type(self)).items()
            if not setting.accepts(values[name])
        }

    def _below_limits(self, unjudged: Container[str]) -> list[str]:
        limits = [
            (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
            (_POSITIVE, lambda value: value > 0, "above 0"),
            (
                (*_NOT_NEGATIVE, *_POSITIVE),
                lambda value: value != math.inf,
                "a finite number (for no limit a large one)",
            ),
            (("seed",), lambda value: value < _SEEDS, "below 2**63"),
        ]
        return [
            f"{name} is {value}, expected {expected}"
            for names, accepts, expected in limits
            for name in names
            if name not in unjudged and (value := getattr(self, name)) is not None and not accepts(value)
        ]

    def _unknown_choices(self, unjudged: Container[str]) -> list[str]:
        return [
            f"{name} is {value!r}, expected one of {', '.join(known)}"
            for name, known in CHOICES.items()
            if name not in unjudged and (value := getattr(self, name)) is not None and value not in known
        ]

    def _contradictions(self) -> list[str]:
        defects = []
        rates = [getattr(self, name) for name in RATES]
        if not any(rates):
            defects.append("all learning rates are 0, so nothing would be learnt")
        if self.embedding_phase_steps and not self.embedding_learning_rate:
            defects.append("embedding_phase_steps is set but embedding_learning_rate is 0")
        if self.class_data_dir is not None and self.framing == "buckets":
            defects.append("framing is 'buckets' but class_data_dir is set: pictures of the class are square")
        if self.center_crop and self.framing == "place":
            defects.append("center_crop is set but framing is 'place', which crops nothing")
        if not self.instance_prompt:
            defects.append("instance_prompt is empty; give a caption such as 'a photo of a <TOK>'")
        defects += [
            f"{name} is {value}, expected less than 1"
            for name in ("company", "proportion_empty_prompts")
            if (value := getattr(self, name)) >= 1
        ]
        if self.proportion_empty_prompts and 1 in (self.captions_per_step, self.train_batch_size):
            defects.append(
                "proportion_empty_prompts is set but a step has a single caption; raise captions_per_step or "
                "train_batch_size"
            )
        if self.resolution % 8:
            defects.append(f"resolution is {self.resolution}, expected a multiple of 8")
        return defects + self._contradictions_of_base() + self._contradictions_of_method() + self._missing_output()

    def _contradictions_of_base(self) -> list[str]:
        embedded = embedded_base(self.pretrained_model_name_or_path)
        if embedded is None or self.resolution <= _LARGEST_ON_EMBEDDED * embedded.least_resolution:
            return []
        return [
            f"resolution is {self.resolution}, but the embedded base draws pictures of {embedded.least_resolution} "
            "pixels; TrainingConfig.toyland(...) has the settings it needs"
        ]

    def _contradictions_of_method(self) -> list[str]:
        defects = []
        method = METHODS.get(self.method)
        if method is not None and method.adapts == "nothing" and not self.embedding_learning_rate:
            defects.append(f"{self.method} learns embeddings alone, but embedding_learning_rate is 0")
        of_text = self.learning_rate if self.text_kv_learning_rate is None else self.text_kv_learning_rate
        if (
            method is not None
            and method.adapts == "text keys and values"
            and not self.embedding_learning_rate + of_text
        ):
            defects.append(
                f"{self.method} learns embeddings and the U-Net's text keys and values, but embedding_learning_rate "
                "and learning_rate (or text_kv_learning_rate) are 0"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            defects.append(f"ema_decay is {self.ema_decay}, expected a number between 0 and 1")
        rates = {getattr(self, name) for name in RATES} - {0, None}
        if self.optimizer.lower() == PRODIGY and len(rates) > 1:
            defects.append("Prodigy finds its own rates: set all learning rates that are not 0 to one number, 1.0")
        if self.reg_full_identity and not self.attn_reg_weight:
            defects.append("reg_full_identity is set but attn_reg_weight is 0")
        if self.torch_compile and self.attn_reg_weight:
            defects.append("torch_compile does not let the attention be recorded that attn_reg_weight asks for")
        if SLOT not in self.validation_prompt:
            defects.append(f"validation_prompt {self.validation_prompt!r} does not name the concept, {SLOT}")
        if self.validation_steps is not None and not self.num_validation_images:
            defects.append("validation_steps is set but num_validation_images is 0, so no sheet would be drawn")
        return defects

    def _missing_output(self) -> list[str]:
        needing = ("resume_from_checkpoint", "report_to", "validation_steps")
        if self.output_dir is not None:
            return []
        return [f"{name} is set but output_dir is not" for name in needing if getattr(self, name) is not None]

    def _concept_defects(self) -> list[str]:
        if self.method not in METHODS:
            return []
        if self.concept.startswith("<") != self.concept.endswith(">"):
            return [f"concept is {self.concept!r}, which has one bracket; expected a name such as potter or <potter>"]
        try:
            concept = self.concept_to_learn
        except ConceptError as error:
            return [str(error)]
        if self.class_prompt and (SLOT in self.class_prompt or mentions_concept(self.class_prompt, [concept])):
            return [f"class_prompt {self.class_prompt!r} names the concept; write the plain class word there"]
        return [
            f"instance_prompt has {prompt!r}, which does not name the concept; write {SLOT} or {concept.placeholder}"
            for prompt in self.instance_prompt
            if SLOT not in prompt and not mentions_concept(prompt, [concept])
        ]


_initialise = TrainingConfig.__init__


@wraps(_initialise)
def _initialise_by_any_name(self: TrainingConfig, **settings: Any) -> None:
    _initialise(self, **use_new_names(settings))


TrainingConfig.__init__ = _initialise_by_any_name  # type: ignore[method-assign]


def _describe_unknown(name: str, value: object, known: Collection[str]) -> str:
    if isinstance(value, Mapping):
        return f"unknown table {name!r} (settings stand at the top of the file, in no table)"
    nearest = difflib.get_close_matches(name, [*known, "preset"], n=1)
    return f"unknown setting {name!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")


def _make_unchecked(kind: type[TrainingConfig], values: Mapping[str, Any]) -> TrainingConfig:
    """Make a config without checks, so that its defects can be listed together with others."""
    config = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(config, name, value)
    return config
