"""Sample a concept and record statistics of its layer inputs. The only forward hooks of fusion are here.

diffusers and PEFT are imported where a pipeline is sampled: fusing from files needs neither, and loading both takes
seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from diffusers_mixofshow.base_models import guidance_of, name_of
from diffusers_mixofshow.conditioning.encode import concept_positions
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.defects import sanitise
from diffusers_mixofshow.errors import ConceptError, FusionError, first_line
from diffusers_mixofshow.families import family_of
from diffusers_mixofshow.families.layers import components_with_sites, configured_size, linear_layers
from diffusers_mixofshow.fusion.statistics import PARTS, ConceptStatistics, Part
from diffusers_mixofshow.progress import hide_bars


TextTokens = Literal["all", "unpadded", "concept"]

_HELD_OUT_EVERY = 4


class FusablePipeline(Protocol):
    """A pipeline that fusion can use: it has components and samples; some also load concepts, see `borrowing`."""

    scheduler: Any
    vae_scale_factor: int

    @property
    def components(self) -> Mapping[str, Any]:
        """Model components by name."""

    def __call__(self, **arguments: Any) -> Any:
        """Sample pictures, with diffusers' arguments."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """How concepts are sampled while their layer inputs are recorded; see `FusionConfig` for the other fields.

    Args:
        sampler: Class of the scheduler; the family's own when settings are resolved.
    """

    steps: int = 20
    guidance_scale: float | None = None
    negative_prompt: str | None = ""
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 4
    text_tokens: TextTokens = "all"
    height: int | None = None
    width: int | None = None
    sampler: str = ""

    def __post_init__(self) -> None:
        """Check the settings."""
        counts = {"steps": self.steps, "batch_size": self.batch_size, "seeds": len(self.seeds)}
        defects = [
            f"{name} must be a whole number of at least 1, got {value}"
            for name, value in counts.items()
            if not isinstance(value, Integral) or value < 1
        ]
        if strange := [seed for seed in self.seeds if not isinstance(seed, Integral)]:
            defects.append(f"seeds must be whole numbers, got {', '.join(map(repr, strange))}")
        if self.text_tokens not in get_args(TextTokens):
            known = ", ".join(map(repr, get_args(TextTokens)))
            defects.append(f"text_tokens must be one of {known}, got {self.text_tokens!r}")
        if defects:
            raise FusionError("Recording: " + "; ".join(defects))

    def resolve(self, pipe: FusablePipeline) -> Recording:
        """Replace None by the pipeline's own values."""
        family = family_of(pipe.components)
        height, width = (
            None if cells is None else cells * pipe.vae_scale_factor
            for cells in configured_size(pipe.components[family.denoiser]) or (None, None)
        )
        usual = guidance_of(pipe.components, name_of(pipe))
        return replace(
            self,
            guidance_scale=float(usual if self.guidance_scale is None else self.guidance_scale),
            negative_prompt=self.negative_prompt or "",
            sampler=family.sampler or type(pipe.scheduler).__name__,
            height=height if self.height is None else self.height,
            width=width if self.width is None else self.width,
        )

    def as_json(self, prompts: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """The settings that affect the statistics, as JSON values; the batch size does not.

        Args:
            prompts: Prompts by placeholder, to be included.
        """
        values = {name: int(value) if isinstance(value, Integral) else value for name, value in asdict(self).items()}
        del values["batch_size"]
        values |= {"seeds": [int(seed) for seed in self.seeds]}
        return values | (
            {} if prompts is None else {"prompts": {name: list(texts) for name, texts in prompts.items()}}
        )


def find_differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """How the settings of recorded statistics differ from wanted ones; empty if they are equal.

    Args:
        recorded: Settings in a file. Earlier releases wrote None for a size that was not given.
        wanted: `Recording.as_json` of resolved settings, with the prompts.
        own: The same of resolved default settings, which replace None in `recorded`.
    """
    then = {name: own.get(name) if recorded.get(name) is None else recorded[name] for name in wanted}
    return [
        "other prompts" if name == "prompts" else f"{name} {sanitise(repr(then[name]))} instead of {value!r}"
        for name, value in wanted.items()
        if then[name] != value
    ]


def collect(
    pipe: FusablePipeline,
    edlora: EDLoRA | None,
    prompts: Sequence[str],
    sites: Sequence[str],
    recording: Recording,
    advance: Callable[[int], None] = lambda pictures: None,
    *,
    hold_out: bool = False,
) -> ConceptStatistics:
    """Sample a concept from prompts, with its own LoRA, and record the inputs of its layers.

    Args:
        pipe: A pipeline without any concept loaded; it is left unchanged.
        edlora: The concept, already scaled; None records the base.
        prompts: Prompts that name the concept.
        sites: Layers to record, see `families.family`.
        recording: How to sample, resolved.
        advance: Called after each denoising step with the number of pictures in the batch.
        hold_out: Record every fourth prompt, or the last of fewer, as the held-out part.

    Returns:
        The statistics of every input of these layers.

    Raises:
        ConfigurationError: If attention uses fused copies of the weights, so that the layers are never called.
        FusionError: If sampling does not call all layers.
    """
    from diffusers_mixofshow.lora import loaded, refuse_copied

    refuse_copied(pipe.components)
    statistics = ConceptStatistics()
    with loaded(pipe, edlora), _set_up_sampling(pipe), _explain_unknown_words(edlora):
        for part in PARTS:
            with record_inputs(pipe, sites, statistics, recording.text_tokens, part):
                for batch in _batches(_pictures(prompts, recording, part, hold_out=hold_out), recording.batch_size):
                    _sample(pipe, batch, recording, advance)
    missing = sorted(family_of(pipe.components).by_input(sites).keys() - set(statistics.inputs))
    if missing:
        raise FusionError(f"Sampling never used these layers: {', '.join(missing)}. Is the pipeline complete?")
    statistics.offload()
    return statistics


@contextmanager
def record_inputs(
    pipe: FusablePipeline,
    sites: Sequence[str],
    statistics: ConceptStatistics,
    text_tokens: TextTokens = "all",
    part: Part = "fit",
) -> Iterator[None]:
    """Add every input of the layers to the statistics inside the block.

    Args:
        pipe: A pipeline with the LoRA already loaded.
        sites: Layers to record; layers that share an input are recorded once.
        statistics: What to add to.
        text_tokens: See `FusionConfig`.
        part: Part of the statistics.
    """
    modules = linear_layers(pipe.components)
    inputs = family_of(pipe.components).by_input(sites)
    with ExitStack() as hooks:
        counted = {} if text_tokens == "all" else _hook_text_encoders(pipe, hooks, text_tokens)
        for name, (site, *_) in inputs.items():
            positions = counted.get(site.partition(".")[0])
            hook = modules[site].register_forward_pre_hook(
                _make_hook(statistics, name, positions, part), with_kwargs=True
            )
            hooks.callback(hook.remove)
        yield


class _Positions:
    """Mask of the recorded prompt positions in the current forward pass of a text encoder."""

    def __init__(self, end_token: int, text_tokens: TextTokens) -> None:
        self.mask: torch.Tensor | None = None  # (prompts, 77)
        self._end_token, self._text_tokens = end_token, text_tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the text encoder; excludes all positions after the first end token."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        ends = (ids == self._end_token).cumsum(dim=-1)
        end, text = (ends == 1) & (ids == self._end_token), ends == 0
        concepts = concept_positions()
        if self._text_tokens == "concept" and concepts is not None:
            named = text & concepts.to(text.device)
            text = torch.where(named.any(dim=-1, keepdim=True), named, text)
        self.mask = text | end


def _hook_text_encoders(pipe: FusablePipeline, hooks: ExitStack, text_tokens: TextTokens) -> dict[str, _Positions]:
    counted = {}
    models = components_with_sites(pipe.components)
    for component, encoder in family_of(pipe.components).text_encoders.items():
        if component in models:
            counted[component] = _Positions(pipe.components[encoder.tokenizer].eos_token_id, text_tokens)
            hook = models[component].register_forward_pre_hook(counted[component], with_kwargs=True)
            hooks.callback(hook.remove)
    return counted


def _make_hook(
    statistics: ConceptStatistics, name: str, positions: _Positions | None, part: Part
) -> Callable[..., None]:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = args[0] if args else next(iter(kwargs.values()))
        if features.dim() == 4:  # 1 x 1 convolution: (batch, channels, height, width)
            features = features.movedim(1, -1)
        if positions is not None and positions.mask is not None:
            features = features[positions.mask.to(features.device)]
        statistics.add(name, features, part)

    return add


@contextmanager
def _explain_unknown_words(edlora: EDLoRA | None) -> Iterator[None]:
    """Explain inside the block that prompts of a plain LoRA cannot name a concept.

    Raises:
        FusionError: If one does.
    """
    try:
        yield
    except ConceptError as error:
        if edlora is None or edlora.concepts:
            raise
        raise FusionError(
            f"{first_line(error).partition('.')[0]}, which is one of a plain LoRA. Its file has no embeddings, so "
            "that no <name> can call it: write its trigger words as they are, such as 'a photo of sks dog'."
        ) from error


@contextmanager
def _set_up_sampling(pipe: Any) -> Iterator[None]:
    """Use the family's sampler and hide the pipeline's progress bar inside the block."""
    import diffusers

    scheduler, sampler = pipe.scheduler, family_of(pipe.components).sampler
    if sampler:
        pipe.scheduler = getattr(diffusers, sampler).from_config(scheduler.config)
    try:
        with hide_bars(pipe):
            yield
    finally:
        pipe.scheduler = scheduler


def _pictures(
    prompts: Sequence[str], recording: Recording, part: Part, *, hold_out: bool
) -> Iterator[tuple[str, int]]:
    """Prompts of one part, each with its own noise seed."""
    every = min(_HELD_OUT_EVERY, len(prompts))
    for seed in recording.seeds:
        for index, prompt in enumerate(prompts):
            held_out = hold_out and every > 1 and index % every == every - 1
            if held_out == (part == "held_out"):
                yield prompt, 1_000_003 * (1 + seed) + index


def _batches(pictures: Iterator[tuple[str, int]], size: int) -> Iterator[tuple[tuple[str, int], ...]]:
    while batch := tuple(itertools.islice(pictures, size)):
        yield batch


def _sample(
    pipe: FusablePipeline, batch: Sequence[tuple[str, int]], recording: Recording, advance: Callable[[int], None]
) -> None:
    def after_step(_pipe: object, _step: int, _time: object, tensors: dict[str, Any]) -> dict[str, Any]:
        advance(len(batch))
        return tensors

    family = family_of(pipe.components)
    guided = recording.guidance_scale is not None and recording.guidance_scale > family.guidance_off
    negative = [recording.negative_prompt] * len(batch) if guided else None
    pipe(
        prompt=[prompt for prompt, _ in batch],
        num_inference_steps=recording.steps,
        **{family.guidance_argument: recording.guidance_scale},
        **({"negative_prompt": negative} if family.takes_negative_prompt else {}),
        generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
        height=recording.height,
        width=recording.width,
        output_type="latent",
        callback_on_step_end=after_step,
    )
