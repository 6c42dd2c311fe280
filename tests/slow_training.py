"""Tuning a concept, written out: one picture, one layer and one head after the other, in float64.

No PEFT, no accelerate, no processors of ours, no shared texts: a layer's weight is W + alpha / rank * up @ down, every
cross-attention layer is handed the text that was encoded with its own embeddings, and parameters are plain tensors.
What a step sees (`Batch`) and what is learnt at the start are given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch.func import functional_call

from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.batches import Batch


TOKENS = ("<potter1>", "<potter2>")
PARTS = {"text_encoder": "", "text_encoder_2": "text_encoder_2."}
"""Text encoder to what stands before a token's name in front of its embeddings."""


class SlowTraining:
    """The same training as `EDLoRATrainer`'s, for the concept potter.

    Args:
        pipeline: The base model, see `in_float64`; of SDXL with two text encoders.
        start: Every parameter at its start: ``embedding TOKEN``, ``SITE down``, ``SITE up``.
        captions: The texts that batches number.
        config: All settings.
        prediction_type: What the denoiser predicts.
        zero_snr: Whether the last timestep is noise alone.
    """

    def __init__(
        self,
        pipeline: Any,
        start: Mapping[str, torch.Tensor],
        captions: Sequence[str],
        config: TrainingConfig,
        prediction_type: str = "epsilon",
        *,
        zero_snr: bool = False,
    ) -> None:
        self.config, self.captions, self.tokenizer = config, captions, pipeline.tokenizer
        self.prediction_type = prediction_type
        self.signals = signals(zero_snr)
        self.unet, self.encoders = pipeline.unet, pipeline.encoders
        self.values = {name: value.detach().clone().double().requires_grad_() for name, value in start.items()}
        self.average = {name: value.detach().clone() for name, value in self.values.items()}
        self.layers = cross_attention_layers(self.unet)
        self.groups = {path: self._group(path) for path in self.layers}
        self.paths = {}
        for model in (self.unet, *self.encoders.values()):
            names = {module: path for path, module in model.named_modules()}
            for site, layer in adapted_layers({"unet": self.unet, **self.encoders}).items():
                if layer in names and f"{site} up" in self.values:
                    self.paths[site] = names[layer]
        self.directions = self._start_token_inputs() if config.keep_start_token else {}
        self._keep_start_token()
        self.reports: list[dict[str, Any]] = []

    def _group(self, path: str) -> str:
        """What a cross-attention layer shares its text with: in SDXL all layers of one ``attentions`` module."""
        return path if len(self.encoders) == 1 else re.findall(r".*\.attentions\.\d+", path)[0]

    def run(self, batches: Iterator[Batch]) -> None:
        """Take all steps, each with as many batches as are accumulated."""
        config = self.config
        for phase, steps in (("embeddings", config.embedding_phase_steps), ("joint", config.max_train_steps)):
            groups = {name: self.rate(name) for name in self.values if phase == "joint" or name.startswith("emb")}
            groups = {name: rate for name, (_, rate) in groups.items() if rate}
            optimizer = self._optimizer(groups) if steps else None
            for step in range(steps):
                self._step(phase, step, steps, list(groups), optimizer, batches)

    def _optimizer(self, groups: Mapping[str, float]) -> torch.optim.Optimizer:
        kind = {each.lower(): each for each in dir(torch.optim)}[self.config.optimizer.lower()]
        made = [
            {
                "params": [self.values[name]],
                "lr": rate,
                "full": rate,
                "parameter": name,
                "weight_decay": 0.0 if name.startswith("embedding") else self.config.adam_weight_decay,
            }
            for name, rate in groups.items()
        ]
        optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(made)
        return optimizer

    def rate(self, name: str) -> tuple[str, float]:
        """The group of a parameter, and its full learning rate."""
        config = self.config
        if name.startswith("embedding"):
            return "embeddings", config.embedding_learning_rate
        if name.startswith("text_encoder"):
            return "text_encoder", config.text_encoder_learning_rate
        if ".attn2.to_k" in name or ".attn2.to_v" in name:
            return (
                "unet_text_kv",
                config.learning_rate if config.text_kv_learning_rate is None else config.text_kv_learning_rate,
            )
        return "unet", config.learning_rate

    def _step(
        self, phase: str, step: int, steps: int, learnt: list[str], optimizer: Any, batches: Iterator[Batch]
    ) -> None:
        config, count = self.config, self.config.gradient_accumulation_steps
        learnt_values = [self.values[name] for name in learnt]
        gradients = [torch.zeros_like(value) for value in learnt_values]
        parts: dict[str, float] = {}
        for _ in range(count):
            losses = self.losses(next(batches))
            found = torch.autograd.grad(sum(losses.values()), learnt_values, allow_unused=True)
            for total, gradient in zip(gradients, found, strict=True):
                total += (0 if gradient is None else gradient) / count
            for name, loss in losses.items():
                parts[name] = parts.get(name, 0.0) + float(loss.detach()) / count
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        factor = share_of_rate(step, steps, config)
        for value, gradient in zip(learnt_values, gradients, strict=True):
            value.grad = gradient * min(1.0, config.max_grad_norm / norm)
        too_long = config.embedding_norm_threshold is not None and (
            self.embedding_norm() >= config.embedding_norm_threshold
        )
        rates = {}
        for group in optimizer.param_groups:
            name, _ = self.rate(group["parameter"])
            group["lr"] = 0.0 if name == "embeddings" and too_long else group["full"] * factor
            rates[name] = group["lr"]
        optimizer.step()
        self._keep_start_token()
        self._average_in()
        self.reports.append(
            {
                "phase": phase,
                "loss": sum(parts.values()),
                **parts,
                "gradient_norm": norm,
                "embedding_norm": self.embedding_norm(),
                "rates": rates,
            }
        )

    @torch.no_grad()
    def _average_in(self) -> None:
        if self.config.ema_decay is None:
            self.average = {name: value.clone() for name, value in self.values.items()}
            return
        taken = len(self.reports) + 1
        decay = min(self.config.ema_decay, (1 + taken) / (10 + taken))
        for name, value in self.values.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * value

    def embedding_norm(self) -> float:
        """Mean Euclidean norm of all tokens' rows."""
        rows = [row for name, value in self.values.items() if name.startswith("embedding ") for row in value]
        return sum(math.sqrt(float((row**2).sum())) for row in rows) / len(rows)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Every part of the loss of one batch, with its weight in it."""
        config, concept = self.config, len(batch.latents) - batch.prior_pictures
        errors, strays = zip(*(self._picture(batch, number) for number in range(len(batch.latents))), strict=True)
        losses = {"denoising": sum(errors[:concept]) / concept}
        if batch.prior_pictures:
            losses["prior"] = config.prior_loss_weight * sum(errors[concept:]) / batch.prior_pictures
        if config.attn_reg_weight:
            counted = [stray for stray in strays if stray is not None]
            mean = sum(counted) / len(counted) if counted else torch.zeros(())
            losses["attention"] = config.attn_reg_weight * mean
        return losses

    def _picture(self, batch: Batch, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One picture's denoising error, and how far the tokens' attention strays from its subject."""
        latents, noise, mask = (each[number].double() for each in (batch.latents, batch.noise, batch.mask))
        timestep = int(batch.timesteps[number])
        caption = self.captions[batch.captions[int(batch.caption_of[number])]]
        signal = self.signals[timestep]
        noisy = math.sqrt(signal) * latents + math.sqrt(1 - signal) * noise
        ids, places = self._ids(caption)
        nothing = torch.zeros(1, 77, self.unet.config.cross_attention_dim).double()
        with self._texts_handed_out(caption, ids, places) as seen:
            told = {}
            if len(self.encoders) > 1:
                vector = self._vector(caption, ids, places)
                told = {"added_cond_kwargs": {"text_embeds": vector[None], "time_ids": batch.sizes[number][None]}}
            given = (noisy[None], timestep, nothing)
            (prediction,) = functional_call(self.unet, self._weights("unet"), given, told).sample
        velocity = math.sqrt(signal) * noise - math.sqrt(1 - signal) * latents
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[self.prediction_type]
        weights = mask.expand_as(target)
        error = (weights * (prediction - target) ** 2).sum() / weights.sum()
        if self.config.snr_gamma is not None:
            ratio = signal / (1 - signal)
            divisor = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": 1.0}[self.prediction_type]
            error = error * min(ratio, self.config.snr_gamma) / divisor
        if not self.config.attn_reg_weight or not batch.has_subject[number] or not places:
            return error, None
        return error, self._strays(seen, places, batch.subject[number, 0].double())

    def _ids(self, caption: str) -> tuple[list[int], dict[str, int]]:
        """Ids of a text, and where the concept's tokens stand first."""
        ids, places = [self.tokenizer.bos_token_id], {}
        for piece in re.split("(<potter>)", caption):
            if piece == "<potter>":
                for token in TOKENS:
                    places.setdefault(token, len(ids))
                    ids.append(0)
            elif piece.strip():
                ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        ids.append(self.tokenizer.eos_token_id)
        return ids + [self.tokenizer.pad_token_id] * (77 - len(ids)), places

    def _run_encoder(self, name: str, ids: list[int], rows_at: Mapping[int, torch.Tensor]) -> Any:
        """One text encoder's output for one text with these rows in place of words' embeddings."""

        def write(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            return torch.stack([rows_at.get(place, row) for place, row in enumerate(output[0])])[None]

        hook = self.encoders[name].get_input_embeddings().register_forward_hook(write)
        try:
            given = (torch.tensor([ids]),), {"output_hidden_states": True}
            return functional_call(self.encoders[name], self._weights(name), *given)
        finally:
            hook.remove()

    def _encode(self, group: int, ids: list[int], places: Mapping[str, int]) -> torch.Tensor:
        """A text as a group of layers reads it, both text encoders' states side by side, shape (77, dim)."""
        states = []
        for name in self.encoders:
            rows = {at: self.values[f"embedding {PARTS[name]}{token}"][group] for token, at in places.items()}
            output = self._run_encoder(name, ids, rows)
            states.append(output[0][0] if len(self.encoders) == 1 else output.hidden_states[-2][0])
        return torch.cat(states, dim=1)

    def _vector(self, caption: str, ids: list[int], places: Mapping[str, int]) -> torch.Tensor:
        """What SDXL reads of a text as a whole; no text is zeros."""
        rows = {at: self.values[f"embedding pooled.{token}"][0] for token, at in places.items()}
        vector: torch.Tensor = self._run_encoder("text_encoder_2", ids, rows).text_embeds[0]
        return vector if caption else torch.zeros_like(vector)

    @contextmanager
    def _texts_handed_out(
        self, caption: str, ids: list[int], places: Mapping[str, int]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Each cross-attention layer reads its own text; what each layer sees of the picture and the text is kept."""
        seen: dict[str, torch.Tensor] = {}
        groups = list(dict.fromkeys(self.groups.values()))
        of_group = {group: self._encode(number, ids, places) for number, group in enumerate(groups)}
        if not caption and len(self.encoders) > 1:
            of_group = {group: torch.zeros_like(text) for group, text in of_group.items()}
        texts = {path: of_group[group] for path, group in self.groups.items()}

        def handing(path: str) -> Any:
            def hand(_module: object, inputs: Any, named: dict[str, Any]) -> Any:
                seen[path], seen[f"text {path}"] = inputs[0][0], texts[path]
                return inputs, {**named, "encoder_hidden_states": texts[path][None]}

            return hand

        with ExitStack() as stack:
            for path in self.layers:
                layer = self.unet.get_submodule(path)
                stack.callback(layer.register_forward_pre_hook(handing(path), with_kwargs=True).remove)
            yield seen

    def _weights(self, component: str) -> dict[str, torch.Tensor]:
        model = self.unet if component == "unet" else self.encoders[component]
        scale = self.config.lora_alpha / self.config.rank
        return {
            f"{path}.weight": model.get_submodule(path).weight
            + scale * self.values[f"{site} up"] @ self.values[f"{site} down"]
            for site, path in self.paths.items()
            if site.startswith(component + ".")
        }

    def _strays(
        self, seen: Mapping[str, torch.Tensor], places: Mapping[str, int], subject: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the tokens; all maps of this U-Net have half the latents' sides."""
        small = torch.stack(
            [torch.stack([subject[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for x in range(8)]) for y in range(8)]
        )
        weights, total = self._weights("unet"), torch.zeros((), dtype=torch.float64)
        for token, place in places.items():
            maps = []
            for path in self.layers:
                queries = seen[path] @ weights[f"{path}.to_q.weight"].T
                keys = seen[f"text {path}"] @ weights[f"{path}.to_k.weight"].T
                heads = self.unet.get_submodule(path).heads
                for query, key in zip(queries.chunk(heads, dim=1), keys.chunk(heads, dim=1), strict=True):
                    scores = query @ key.T / math.sqrt(query.shape[1])
                    maps.append(scores.softmax(dim=1)[:, place].reshape(8, 8))
            mean = sum(maps) / len(maps)
            relative = mean / mean.max()
            if token == TOKENS[1] and self.config.reg_full_identity:
                total = total + ((relative - small) ** 2).mean()
            else:
                total = total + (relative * (1 - small)).sum() / (1 - small).sum()
        return total

    def _start_token_inputs(self) -> dict[str, torch.Tensor]:
        """What layers that read text have as input at the first place of any text: unit vectors."""
        inputs: dict[str, torch.Tensor] = {}

        def noting(site: str) -> Any:
            def note(_module: object, given: Any) -> None:
                inputs[site] = given[0][0, 0]

            return note

        ids, _ = self._ids("whatever")
        firsts = []
        with ExitStack() as stack, torch.no_grad():
            for site, path in self.paths.items():
                if not site.startswith("unet."):
                    layer = self.encoders[site.partition(".")[0]].get_submodule(path)
                    stack.callback(layer.register_forward_pre_hook(noting(site)).remove)
            for encoder in self.encoders.values():
                output = encoder(torch.tensor([ids]), output_hidden_states=True)
                firsts.append((output[0] if len(self.encoders) == 1 else output.hidden_states[-2])[0, 0])
        first = torch.cat(firsts)
        for site in self.paths:
            if site.endswith((".attn2.to_k", ".attn2.to_v")):
                inputs[site] = first
        return {site: value / math.sqrt(float((value**2).sum())) for site, value in inputs.items()}

    @torch.no_grad()
    def _keep_start_token(self) -> None:
        for site, direction in self.directions.items():
            down = self.values[f"{site} down"]
            for row in down:
                row -= (row * direction).sum() * direction


def in_float64(pipeline: Any) -> SimpleNamespace:
    """A copy of what of a base model a training needs beside its autoencoder."""
    found = (name for name in ("unet", *PARTS) if name in pipeline.components)
    models = {name: deepcopy(getattr(pipeline, name)).double().eval() for name in found}
    for model in models.values():
        model.requires_grad_(False)
    return SimpleNamespace(unet=models.pop("unet"), encoders=models, tokenizer=pipeline.tokenizer)


def signals(zero_snr: bool) -> list[float]:
    """Share of the picture's variance at each timestep.

    Stable Diffusion's noise schedule is linear in the square root. With zero terminal SNR its roots are moved and
    stretched, so that the first one stays and the last one is 0 (arXiv:2305.08891, algorithm 1).
    """
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    betas = [(first + (last - first) * step / 999) ** 2 for step in range(1000)]
    roots = [math.sqrt(math.prod(1 - beta for beta in betas[: step + 1])) for step in range(1000)]
    if zero_snr:
        roots = [(root - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for root in roots]
    return [root**2 for root in roots]


def share_of_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Of the full learning rate, at a step counted from 0."""
    warm_up = config.lr_warmup_steps
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    left = 1 - (step - warm_up) / (steps - warm_up)
    curves = {
        "linear": left,
        "cosine": (1 - math.cos(math.pi * left)) / 2,
        "polynomial": left**config.lr_power,
        "constant": 1.0,
    }
    return curves[config.lr_scheduler]
