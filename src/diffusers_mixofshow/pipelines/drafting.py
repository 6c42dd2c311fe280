"""Draw regions alone for a few steps, and put them into the picture between two steps of a call; see `Draft`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LMSDiscreteScheduler, PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffusers_mixofshow.conditioning.attention import layerwise_attention
from diffusers_mixofshow.conditioning.passes import hook_passes, start_call
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.families.layers import default_size
from diffusers_mixofshow.regions import Draft, Region
from diffusers_mixofshow.regions.draft import Window, find_window


_OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@contextmanager
def insert_drafts(
    pipe: Any,
    draft: Draft,
    regions: Sequence[Sequence[Region]],
    weights: Callable[[int, int, int], list[torch.Tensor]],
    arguments: MutableMapping[str, Any],
) -> Iterator[_Drafts]:
    """Let the call inside the block put drafts of its regions into its latents once.

    Args:
        pipe: The pipeline that is called.
        draft: Its settings.
        regions: Each picture's regions, with the prompts that drafts are drawn from.
        weights: Function of a latent's rows, its columns and a step: the weights of each picture's regions, each of
            shape (regions, cells).
        arguments: The call's arguments; its callback is replaced by one that first runs it.

    Yields:
        The drafts, whose `are_put_in` says afterwards whether they were put in.

    Raises:
        RegionError: If the U-Net needs more than a text to draw, or the scheduler cannot go on from new latents.
    """
    _refuse_other_models(pipe)
    _refuse_other_schedulers(pipe.scheduler)
    initial: list[Any] = []  # the scheduler as it was before the call's first step

    def keep_scheduler(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not initial:
            initial.append(copy.deepcopy(pipe.scheduler))
        return inputs, named

    drafts = _Drafts(pipe, draft, regions, weights, arguments)
    theirs, tensors = _find_callback(arguments)

    def on_step_end(called: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        outputs = tensors if theirs is None else theirs(called, step, timestep, tensors)
        begin = _choose_step(draft, called.num_timesteps, called.scheduler)
        if step + 1 == begin:
            _forget_steps(called.scheduler, initial[0], begin)
            latents = outputs.get("latents", tensors["latents"])
            outputs = {**outputs, "latents": drafts.put_into(latents, begin)}
        elif step == begin:
            _skip_repeated_step(called.scheduler)
        return outputs

    arguments["callback_on_step_end"] = on_step_end
    arguments["callback_on_step_end_tensor_inputs"] = tensors
    with hook_passes(pipe.unet, keep_scheduler):
        yield drafts


def _find_callback(arguments: Mapping[str, Any]) -> tuple[_OnStepEnd | None, list[str]]:
    """The caller's callback, and the names of the tensors that it gets, latents always among them."""
    theirs = arguments.get("callback_on_step_end")
    wanted = getattr(theirs, "tensor_inputs", None) or arguments.get("callback_on_step_end_tensor_inputs") or []
    return theirs, list(dict.fromkeys([*wanted, "latents"]))


def _refuse_other_models(pipe: Any) -> None:
    config = pipe.unet.config
    if config.in_channels != config.out_channels or config.time_cond_proj_dim is not None:
        raise RegionError(
            "A draft needs a U-Net that draws from a text alone; this one takes a picture, or guidance, as an input. "
            "Leave `draft` out."
        )
    if config.encoder_hid_dim_type is not None:
        raise RegionError("A draft does not see the pictures of an IP-Adapter. Leave `draft` out, or unload it.")


def _refuse_other_schedulers(scheduler: Any) -> None:
    """Raise for schedulers without a schedule in timesteps, and for those that go wrong without their history.

    LMS takes its order from the number of the step, and PNDM after Runge-Kutta steps needs what these computed.
    """
    repeats = isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps
    if repeats or isinstance(scheduler, LMSDiscreteScheduler) or not hasattr(scheduler, "alphas_cumprod"):
        kind = f"{type(scheduler).__name__}(skip_prk_steps=False)" if repeats else type(scheduler).__name__
        raise RegionError(
            f"A draft cannot be put between two steps of {kind}. Leave `draft` out, or take another scheduler, such "
            "as DPMSolverMultistepScheduler."
        )


def _choose_step(draft: Draft, steps: int, scheduler: Any) -> int:
    """The step before which drafts are put in; not PNDM's second one, which takes the first one again."""
    wanted = draft.first_step_after(steps, scheduler.order)
    return max(wanted, 2) if isinstance(scheduler, PNDMScheduler) else wanted


def _forget_steps(scheduler: Any, initial: Any, step: int) -> None:
    """Clear a multistep scheduler's history, which belongs to latents that drafts have replaced."""
    vars(scheduler).update(vars(initial))
    if hasattr(scheduler, "set_begin_index"):
        # The copy was made in the first pass, after `scale_model_input`, in which some schedulers set the index.
        scheduler._step_index = None
        scheduler.set_begin_index(step)


def _skip_repeated_step(scheduler: Any) -> None:
    """Let PNDM go on after the step that follows the drafts; it would repeat it, as it does the first of a call."""
    if isinstance(scheduler, PNDMScheduler):
        scheduler.counter = 2


@dataclass(frozen=True, eq=False)
class _Planned:
    """A draft to draw: number of the picture and of the region in it, where the draft goes, and its noise."""

    picture: int
    number: int
    window: Window
    noise: torch.Tensor


class _Drafts:
    """The drafts of one call."""

    def __init__(
        self,
        pipe: Any,
        draft: Draft,
        regions: Sequence[Sequence[Region]],
        weights: Callable[[int, int, int], list[torch.Tensor]],
        arguments: Mapping[str, Any],
    ) -> None:
        self.pipe, self.draft, self.regions, self.weights = pipe, draft, regions, weights
        self.arguments = arguments
        self.embeddings: dict[str, list[torch.Tensor]] = pipe._list_negative_embeddings(arguments)
        self.are_put_in = False
        self.multiple = 2 ** (len(pipe.unet.config.block_out_channels) - 1)

    def put_into(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Replace latents (pictures, channels, height, width) by noised drafts where regions weigh above one half."""
        self.are_put_in = True
        height, width = latents.shape[-2:]
        shares = [each.unflatten(1, (height, width)) for each in self.weights(height, width, step)]
        shares = shares * len(latents) if len(shares) == 1 else shares
        clean = latents.new_zeros(latents.shape, dtype=torch.float32)
        for planned, drawn in self._draw_alone(self._plan_drafts(shares, latents), latents, step):
            share = shares[planned.picture][planned.number].to(clean)
            clean[planned.picture] += share * planned.window.place(drawn[None], height, width)[0]
        total = torch.stack([each.sum(dim=0) for each in shares])[:, None].to(clean)
        noise = randn_tensor(latents.shape, self.arguments.get("generator"), latents.device, torch.float32)
        at = self.pipe.scheduler.timesteps[step : step + 1]
        noisy = self.pipe.scheduler.add_noise(clean / total.clamp(min=0.5), noise, at)
        return torch.where(total > 0.5, noisy, latents.float()).to(latents)

    def _plan_drafts(self, shares: Sequence[torch.Tensor], latents: torch.Tensor) -> list[_Planned]:
        """Plan a draft for every region with a weight above 0 in some cell."""
        generators, size = self.arguments.get("generator"), min(default_size(self.pipe.unet))
        planned = []
        for picture, own in enumerate(shares):
            for number, share in enumerate(own):
                if not (share > 0).any():
                    continue
                window = find_window(share > 0, size, self.multiple)
                shape = (latents.shape[1], window.draft_height, window.draft_width)
                generator = generators[picture] if isinstance(generators, list) else generators
                noise = randn_tensor(shape, generator=generator, device=latents.device, dtype=torch.float32)
                planned.append(_Planned(picture, number, window, noise))
        return planned

    def _draw_alone(
        self, planned: Sequence[_Planned], latents: torch.Tensor, step: int
    ) -> Iterator[tuple[_Planned, torch.Tensor]]:
        """Draw drafts (channels, height, width), in batches of one size with no more cells than the call's latents."""
        own = {each: self.regions[each.picture][each.number].negative_prompt is not None for each in planned}
        kinds = {each: (each.noise.shape, bool(self.embeddings) and not own[each]) for each in planned}
        for kind in dict.fromkeys(kinds.values()):
            alike, (shape, reads_embeddings) = [each for each in planned if kinds[each] == kind], kind
            batch_size = max(1, latents.numel() // shape.numel())
            for start in range(0, len(alike), batch_size):
                batch = alike[start : start + batch_size]
                with start_call(), layerwise_attention(self.pipe.unet, self.pipe._tokens, self.pipe._layer_names):
                    drawn = self._draw(batch, step, reads_embeddings=reads_embeddings)
                yield from zip(batch, drawn, strict=True)

    def _draw(self, planned: Sequence[_Planned], step: int, *, reads_embeddings: bool) -> torch.Tensor:
        """Draw the clean latents of drafts of one size, shape (drafts, channels, height, width), float32.

        Args:
            planned: The drafts.
            step: The call's step before which they are put in.
            reads_embeddings: Whether they read the call's negative embeddings, not a negative prompt.
        """
        regions = [self.regions[each.picture][each.number] for each in planned]
        noise = torch.stack([each.noise for each in planned])
        guidance = torch.tensor([self._choose_guidance(region) for region in regions]).to(noise)
        pictures = [each.picture for each in planned]
        given = self.embeddings if reads_embeddings else {}
        embeddings = {name: torch.stack([rows[picture] for picture in pictures]) for name, rows in given.items()}
        conditions = self._encode_conditions(regions, pictures, embeddings, noise.shape[-2:])
        return self._denoise(noise, conditions, guidance[:, None, None, None], self._choose_timesteps(step))

    def _choose_timesteps(self, step: int) -> list[int]:
        """The drafts' timesteps: evenly spaced from the call's first one to that of the step at which it goes on."""
        known = self.pipe.scheduler.timesteps
        return [round(float(each)) for each in torch.linspace(known[0], known[step], self.draft.steps + 1)[:-1]]

    def _choose_guidance(self, region: Region) -> float:
        whole = self.pipe._guidance_scale
        return whole if region.guidance_scale is None or whole <= 1 else region.guidance_scale

    def _encode_conditions(
        self,
        regions: Sequence[Region],
        pictures: Sequence[int],
        embeddings: Mapping[str, torch.Tensor],
        cells: Sequence[int],
    ) -> dict[str, Any]:
        """The U-Net's arguments for regions; with guidance the rows of the negative prompts come first."""
        pipe, given = self.pipe, self.arguments
        shared = pipe._list_negatives(given)
        negatives = [
            pipe._choose_negative(region, shared[picture]) for region, picture in zip(regions, pictures, strict=True)
        ]
        height, width = (side * pipe.vae_scale_factor for side in cells)
        with pipe._hide_regions():
            conditions: dict[str, Any] = pipe._encode_conditions(
                [region.prompt for region in regions], negatives, embeddings, (height, width), given
            )
        return conditions

    def _denoise(
        self, noisy: torch.Tensor, conditions: Mapping[str, Any], guidance: torch.Tensor, timesteps: Sequence[int]
    ) -> torch.Tensor:
        """DDIM without added noise (arXiv:2010.02502, equation 12); returns the last estimate of the clean latents."""
        scheduler = self.pipe.scheduler
        clean = noise = noisy
        for number, timestep in enumerate(timesteps):
            alpha = float(scheduler.alphas_cumprod[timestep])
            if number:
                noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
            prediction = self._predict(noisy, conditions, guidance, timestep)
            clean, noise = _split_prediction(noisy, prediction, alpha, scheduler.config.prediction_type)
        return clean

    def _predict(
        self, noisy: torch.Tensor, conditions: Mapping[str, Any], guidance: torch.Tensor, timestep: int
    ) -> torch.Tensor:
        text = conditions["encoder_hidden_states"]
        halves = len(text) // len(noisy)
        output = self.pipe.unet(
            noisy.repeat(halves, 1, 1, 1).to(text.dtype),
            torch.tensor(timestep, device=noisy.device),
            **conditions,
            cross_attention_kwargs=self.pipe.cross_attention_kwargs,
            return_dict=False,
        )[0].float()
        if halves == 1:
            return output
        without, given = output.chunk(2)
        return without + guidance * (given - without)


def _split_prediction(
    noisy: torch.Tensor, prediction: torch.Tensor, alpha: float, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the clean latent and the noise in noisy = sqrt(alpha) clean + sqrt(1 - alpha) noise.

    Args:
        noisy: Any shape.
        prediction: What the model predicts of it, same shape.
        alpha: The schedule's cumulative product at the latent's timestep.
        kind: The scheduler's ``prediction_type``: ``epsilon``, ``v_prediction`` or ``sample``.
    """
    signal, deviation = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "epsilon":
        return (noisy - deviation * prediction) / max(signal, 1e-4), prediction
    if kind == "sample":
        return prediction, (noisy - signal * prediction) / max(deviation, 1e-4)
    return signal * noisy - deviation * prediction, deviation * noisy + signal * prediction
