"""Regions drawn alone for a few steps, and put into the picture between two steps of a call; see `Draft`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_mixofshow.conditioning.passes import hooked_passes, outside_of_calls
from diffusers_mixofshow.errors import RegionError
from diffusers_mixofshow.regions import Draft, Region
from diffusers_mixofshow.regions.draft import Window, window_of


_OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@contextmanager
def drafts_put_in(
    pipe: Any,
    draft: Draft,
    regions: Sequence[Sequence[Region]],
    weights: Callable[[int, int, int], list[torch.Tensor]],
    arguments: MutableMapping[str, Any],
) -> Iterator[_Drafts]:
    """Let the call inside the block put drafts of its regions into its latents once.

    Args:
        pipe: The pipeline that is called.
        draft: How.
        regions: Of every picture, with the prompts that drafts are drawn from.
        weights: Of every picture's regions, each of shape (regions, cells), on a latent of so many rows and columns,
            at a step.
        arguments: Of the call; its callback is replaced by one that calls it first.

    Yields:
        The drafts, which say whether they are put in.

    Raises:
        RegionError: If the models draw nothing from a text alone.
    """
    _refuse_other_models(pipe)
    fresh: list[Any] = []

    def keep_scheduler(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not fresh:
            fresh.append(copy.deepcopy(pipe.scheduler))
        return inputs, named

    drafts = _Drafts(pipe, draft, regions, weights, arguments)
    theirs, tensors = _callback_of(arguments)

    def on_step_end(called: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        outputs = tensors if theirs is None else theirs(called, step, timestep, tensors)
        if step + 1 == draft.first_step_after(called.num_timesteps, called.scheduler.order):
            _start_again(called.scheduler, fresh[0], step + 1)
            latents = outputs.get("latents", tensors["latents"])
            outputs = {**outputs, "latents": drafts.put_into(latents, step + 1)}
        return outputs

    arguments["callback_on_step_end"] = on_step_end
    arguments["callback_on_step_end_tensor_inputs"] = tensors
    with hooked_passes(pipe.unet, keep_scheduler):
        yield drafts


def _callback_of(arguments: Mapping[str, Any]) -> tuple[_OnStepEnd | None, list[str]]:
    """The caller's callback, and what it is to be given, latents among it."""
    theirs = arguments.get("callback_on_step_end")
    wanted = getattr(theirs, "tensor_inputs", None) or arguments.get("callback_on_step_end_tensor_inputs") or []
    return theirs, list(dict.fromkeys([*wanted, "latents"]))


def _refuse_other_models(pipe: Any) -> None:
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels or config.time_cond_proj_dim is not None:
        raise RegionError(
            "A draft needs a U-Net that draws from a text alone; this one takes a picture, or guidance, as an input. "
            "Leave `draft` out."
        )
    if config.encoder_hid_dim_type is not None:
        raise RegionError("A draft does not see the pictures of an IP-Adapter. Leave `draft` out, or unload it.")


def _start_again(scheduler: Any, fresh: Any, step: int) -> None:
    """Forget the steps of a scheduler that looks back at them: they led to other latents."""
    vars(scheduler).update(vars(copy.deepcopy(fresh)))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(step)


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
        self.are_put_in = False
        self.multiple = 2 ** (len(pipe.unet.config.block_out_channels) - 1)

    def put_into(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Latents (pictures, channels, height, width) before a step, with the drafts where regions hold mostly."""
        self.are_put_in = True
        height, width = latents.shape[-2:]
        shares = [each.unflatten(1, (height, width)) for each in self.weights(height, width, step)]
        shares = shares * len(latents) if len(shares) == 1 else shares
        clean = latents.new_zeros(latents.shape, dtype=torch.float32)
        for picture, number, drawn, window in self._drawn(shares, latents, step):
            share = shares[picture][number].to(clean)
            clean[picture] += share * window.placed(drawn, height, width)[0]
        total = torch.stack([each.sum(dim=0) for each in shares])[:, None].to(clean)
        noise = randn_tensor(latents.shape, self.arguments.get("generator"), latents.device, torch.float32)
        at = self.pipe.scheduler.timesteps[step : step + 1]
        noisy = self.pipe.scheduler.add_noise(clean / total.clamp(min=0.5), noise, at)
        return torch.where(total > 0.5, noisy, latents.float()).to(latents)

    def _drawn(
        self, shares: Sequence[torch.Tensor], latents: torch.Tensor, step: int
    ) -> Iterator[tuple[int, int, torch.Tensor, Window]]:
        """Every region that holds somewhere: its picture, number, draft (1, channels, height, width) and window."""
        generators = self.arguments.get("generator")
        size = self.pipe.unet.config.sample_size
        for picture, own in enumerate(shares):
            for number, share in enumerate(own):
                if not (share > 0).any():
                    continue
                window = window_of(share > 0, size, self.multiple)
                shape = (1, latents.shape[1], window.draft_height, window.draft_width)
                generator = generators[picture] if isinstance(generators, list) else generators
                noise = randn_tensor(shape, generator=generator, device=latents.device, dtype=torch.float32)
                yield picture, number, self._draw(self.regions[picture][number], picture, noise, step), window

    def _draw(self, region: Region, picture: int, noise: torch.Tensor, step: int) -> torch.Tensor:
        """What the model expects behind the noise after the draft's steps, of its shape, float32."""
        own = outside_of_calls(self._denoise)
        return own(noise, self._conditioning(region, picture), self._guidance(region), self._timesteps(step))

    def _timesteps(self, step: int) -> list[int]:
        """Of the draft's steps: from the call's first on, equally far apart, to where the call goes on."""
        known = self.pipe.scheduler.timesteps
        return [round(float(each)) for each in torch.linspace(known[0], known[step], self.draft.steps + 1)[:-1]]

    def _guidance(self, region: Region) -> float:
        whole = self.pipe._guidance_scale
        return whole if region.guidance_scale is None or whole <= 1 else region.guidance_scale

    def _conditioning(self, region: Region, picture: int) -> torch.Tensor:
        """The region's text, behind the negative one where there is guidance, shape (1 or 2, tokens, dim)."""
        pipe, given = self.pipe, self.arguments
        negative = given.get("negative_prompt") or ""
        if isinstance(negative, list):
            negative = negative[picture * len(negative) // len(self.regions)]
        scale = (pipe.cross_attention_kwargs or {}).get("scale")
        texts = {"negative_prompt": negative if region.negative_prompt is None else region.negative_prompt}
        texts |= {"lora_scale": scale, "clip_skip": given.get("clip_skip")}
        with pipe._without_regions():
            text, without = pipe.encode_prompt(
                region.prompt, pipe._execution_device, 1, pipe._guidance_scale > 1, **texts
            )
        return text if without is None else torch.cat([without, text])

    def _denoise(
        self, noisy: torch.Tensor, text: torch.Tensor, guidance: float, timesteps: Sequence[int]
    ) -> torch.Tensor:
        """DDIM without added noise (arXiv:2010.02502, equation 12), up to the last estimate of the clean latent."""
        alphas = self.pipe.scheduler.alphas_cumprod
        clean = noise = noisy
        for number, timestep in enumerate(timesteps):
            alpha = float(alphas[timestep])
            if number:
                noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
            prediction = self._predict(noisy, text, guidance, timestep)
            clean, noise = _clean_and_noise(noisy, prediction, alpha, self.pipe.scheduler.config.prediction_type)
        return clean

    def _predict(self, noisy: torch.Tensor, text: torch.Tensor, guidance: float, timestep: int) -> torch.Tensor:
        unet = self.pipe.unet
        output = unet(
            noisy.repeat(len(text), 1, 1, 1).to(text.dtype),
            torch.tensor(timestep, device=noisy.device),
            encoder_hidden_states=text,
            cross_attention_kwargs=self.pipe.cross_attention_kwargs,
            return_dict=False,
        )[0].float()
        if len(text) == 1:
            return output
        without, given = output.chunk(2)
        return without + guidance * (given - without)


def _clean_and_noise(
    noisy: torch.Tensor, prediction: torch.Tensor, alpha: float, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a noisy latent, sqrt(alpha) clean + sqrt(1 - alpha) noise, apart by what the model predicts of it.

    Args:
        noisy: Any shape.
        prediction: Same shape.
        alpha: The schedule's cumulative product at the latent's timestep.
        kind: ``epsilon``, ``v_prediction`` or ``sample``, as schedulers call what is predicted.
    """
    signal, deviation = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "epsilon":
        return (noisy - deviation * prediction) / max(signal, 1e-4), prediction
    if kind == "sample":
        return prediction, (noisy - signal * prediction) / max(deviation, 1e-4)
    return signal * noisy - deviation * prediction, deviation * noisy + signal * prediction
