"""Gradient fusion against section 3.3.2, written out in float64: recorded, staged and solved by hand.

The reference keeps every feature, X_i of shape (tokens, in_features), and solves with dense matrices; statistics,
low-rank factors, shared inputs and held-out parts are the package's own affair.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import packs
import tiny
from diffusers_mixofshow import FusionSource, GradientFuser, MixOfShowPipeline
from diffusers_mixofshow.edlora import EDLoRA, LowRank


TEXT = tuple(
    f"text_encoder.text_model.encoder.layers.{place}" for place in ("0.self_attn.q_proj", "1.self_attn.out_proj")
)
BLOCK = "unet.up_blocks.0.attentions.0.transformer_blocks.0"
KEYS_VALUES = (f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v")
REST = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_out.0")
SITES = (*TEXT, *KEYS_VALUES, *REST)
PROMPTS = ("a <TOK>", "two <TOK>")
MORE_PROMPTS = (*PROMPTS, "<TOK>", "a <TOK> at sea", "red <TOK>")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the reference records and solves: what `GradientFuser` is told, by the same names."""

    prompts: Sequence[str] = PROMPTS
    steps: int = 2
    guidance_scale: float = 7.5
    negative_prompt: str = ""
    seeds: Sequence[int] = (0,)
    height: int = 16
    width: int = 16
    batch_size: int = 4
    ridge: float | str = 0.05
    max_rank: int | None = None
    prior: float = 0.0
    prior_prompts: Sequence[str] = ("a house", "")
    sequential: bool = True


USUAL = Way()


@pytest.fixture(scope="module")
def pipe() -> MixOfShowPipeline:
    found = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def sources(pipe: MixOfShowPipeline) -> list[EDLoRA]:
    """Two concepts on eight layers: two of the text encoder, keys and values of the text, four others."""
    found = []
    for seed, name in ((1, "rex"), (2, "kit")):
        pack = packs.random_pack(pipe.components, name, ranks=(2,), alphas=(3.0,), seed=seed)
        found.append(replace(pack, lora={site: pack.lora[site] for site in SITES}))
    return found


def pictures(prompts: Sequence[str], way: Way, part: str | None) -> list[tuple[str, int]]:
    """Prompts with the seed of their noise; every fourth is held out, or the last of fewer."""
    every = min(4, len(prompts))
    return [
        (prompt, 1_000_003 * (1 + seed) + place)
        for seed in way.seeds
        for place, prompt in enumerate(prompts)
        if part is None or (part == "held_out") == (every > 1 and place % every == every - 1)
    ]


def features(
    pipe: MixOfShowPipeline, edlora: EDLoRA | None, chosen: Sequence[tuple[str, int]], sites: Sequence[str], way: Way
) -> dict[str, torch.Tensor]:
    """Site to its inputs, (tokens, in_features), while these pictures are sampled in batches as a user would."""
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    if edlora is not None:
        pipe.load_edlora(edlora)
    usual = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(usual.config)
    hooks = []
    for site in sites:
        component, path = site.split(".", 1)
        model = pipe.components[component]
        # transformers before 5.6 has a module of that name.
        inner = model if component == "unet" else getattr(model, "text_model", model)
        module = inner.get_submodule(path.removeprefix("text_model."))

        def keep(_module: Any, inputs: tuple[torch.Tensor, ...], site: str = site) -> None:
            seen[site].append(inputs[0].detach().double().flatten(end_dim=-2))

        hooks.append(module.register_forward_pre_hook(keep))
    for start in range(0, len(chosen), way.batch_size):
        batch = chosen[start : start + way.batch_size]
        pipe(
            [prompt for prompt, _ in batch],
            negative_prompt=[way.negative_prompt] * len(batch),
            num_inference_steps=way.steps,
            guidance_scale=way.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            height=way.height,
            width=way.width,
            output_type="latent",
        )
    for hook in hooks:
        hook.remove()
    pipe.scheduler = usual
    if edlora is not None:
        pipe.unload_edlora()
    return {site: torch.cat(rows) for site, rows in seen.items()}


def dense(update: LowRank) -> torch.Tensor:
    return update.alpha / len(update.down) * update.up.double() @ update.down.double()


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    """X X^T for each token, so that concepts weigh the same however long they were recorded."""
    return rows.T @ rows / len(rows)


def as_lora(delta: torch.Tensor) -> LowRank:
    """Any matrix as an update."""
    return LowRank(down=delta.float(), up=torch.eye(len(delta)), alpha=float(len(delta)))


def least_squares(
    deltas: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    shares: Sequence[float],
    ridge: float,
    prior: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """D of sum_i w_i |(D - dW_i) X_i|^2 + |D X_0|^2 + lambda |D|^2, lambda relative to the mean of the diagonal."""
    total = sum(share * gram for share, gram in zip(shares, grams, strict=True)) + prior
    asked = sum(share * delta @ gram for share, delta, gram in zip(shares, deltas, grams, strict=True))
    return torch.linalg.solve(total + ridge * total.diagonal().mean() * torch.eye(len(total)).double(), asked.T).T


def judged_ridge(
    deltas: Sequence[torch.Tensor],
    fitted: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    shares: Sequence[float],
    prior: torch.Tensor | float,
) -> float:
    """The ridge whose solution of the inputs fitted does best on those held out."""

    def error(ridge: float) -> float:
        found = least_squares(deltas, fitted, shares, ridge, prior)
        misses = (found - delta for delta in deltas)
        return sum(
            share * (miss @ gram * miss).sum().item()
            for share, miss, gram in zip(shares, misses, held_out, strict=True)
        )

    return min((10 ** (exponent / 4) for exponent in range(-24, 3)), key=error)


def fused_by_hand(
    pipe: MixOfShowPipeline, sources: Sequence[EDLoRA], way: Way, weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Site to the fused update: stage after stage, each recorded on what is fused so far."""
    shares = [weight / sum(weights) for weight in weights]
    short = replace(way, steps=1, seeds=way.seeds[:1])
    stages = [(TEXT, short), (KEYS_VALUES, short), (REST, way)] if way.sequential else [(SITES, way)]
    fused: dict[str, torch.Tensor] = {}
    for sites, recording in stages:
        apart = way.ridge == "auto" or not way.sequential  # statistics that are kept may be asked for a ridge later
        parts: dict[str | None, list[dict[str, torch.Tensor]]]
        parts = {"fit": [], "held_out": []} if apart else {None: []}
        for source in sources:
            own = replace(source, lora={**source.lora, **{site: as_lora(delta) for site, delta in fused.items()}})
            prompts = [prompt.replace("<TOK>", source.concepts[0].placeholder) for prompt in way.prompts]
            for part, found in parts.items():
                found.append(features(pipe, own, pictures(prompts, recording, part), sites, recording))
        base = {}
        if way.prior:
            prompts = [
                *dict.fromkeys(f"a photo of a {one.concepts[0].class_word}" for one in sources),
                *way.prior_prompts,
            ]
            base = features(pipe, None, pictures(prompts, recording, None), sites, recording)
        solved = {}
        for site in sites:
            deltas = [dense(source.lora[site]) for source in sources]
            grams = {part: [gram_of(one[site]) for one in found] for part, found in parts.items()}
            whole = [gram_of(torch.cat([one[site] for one in own])) for own in zip(*parts.values(), strict=True)]
            prior = way.prior * gram_of(base[site]) if way.prior else 0.0
            ridge = way.ridge
            if ridge == "auto":
                ridge = judged_ridge(deltas, grams["fit"], grams["held_out"], shares, prior)
            found = least_squares(deltas, whole, shares, ridge, prior)
            if way.max_rank is not None:
                left, values, right = torch.linalg.svd(found)
                found = left[:, : way.max_rank] * values[: way.max_rank] @ right[: way.max_rank]
            solved[site] = found
        fused |= solved
    return fused


def changed_by(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest relative difference of a layer."""
    return max(((one[site] - other[site]).norm() / other[site].norm()).item() for site in SITES)


def fused(pipe: MixOfShowPipeline, sources: Sequence[Any], way: Way, **given: Any) -> dict[str, torch.Tensor]:
    """The same by the package."""
    pack = GradientFuser(pipe, **vars(way)).fuse(sources, **given)
    assert tuple(pack.lora) == SITES
    return {site: dense(update) for site, update in pack.lora.items()}


WAYS: dict[str, dict[str, Any]] = {
    "usual": {},
    "all that is recorded": {
        "guidance_scale": 2.0,
        "negative_prompt": "blurry",
        "seeds": (0, 5),
        "steps": 3,
        "height": 24,
        "width": 8,
        "prompts": ("the <TOK>", "my <TOK>", "<TOK>"),
        "batch_size": 2,
        "ridge": 0.5,
    },
    "a prior, a ridge chosen": {"prior": 0.5, "ridge": "auto", "prompts": MORE_PROMPTS},
    "own features, no guidance": {
        "guidance_scale": 1.0,
        "sequential": False,
        "prior": 2.0,
        "prior_prompts": ["a tree"],
        "max_rank": 2,
    },
    "own features, a ridge chosen": {"sequential": False, "ridge": "auto", "prompts": MORE_PROMPTS},
}


@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS)
def test_fusion_is_the_equations(pipe: MixOfShowPipeline, sources: list[EDLoRA], change: dict[str, Any]) -> None:
    way = replace(USUAL, **change)
    assert changed_by(fused(pipe, sources, way), fused_by_hand(pipe, sources, way, [1, 1])) < 1e-3


def scaled(source: EDLoRA, scale: float) -> EDLoRA:
    return replace(source, lora={site: as_lora(scale * dense(update)) for site, update in source.lora.items()})


def test_weights_are_shares_and_scales_are_factors(pipe: MixOfShowPipeline, sources: list[EDLoRA]) -> None:
    by_hand = fused_by_hand(pipe, [scaled(sources[0], 0.5), sources[1]], USUAL, [3, 1])
    given = [FusionSource(sources[0], weight=6, scale=0.5), FusionSource(sources[1], weight=2)]
    assert changed_by(fused(pipe, given, USUAL), by_hand) < 1e-3


def norm_on(delta: torch.Tensor, gram: torch.Tensor) -> float:
    """|delta X| of inputs with this Gram matrix."""
    return (delta @ gram * delta).sum().item() ** 0.5


def test_the_reports_numbers_are_the_equations(pipe: MixOfShowPipeline, sources: list[EDLoRA]) -> None:
    """Residuals of every layer and source, overlaps, ridge, condition and what a smaller rank keeps."""
    way = replace(USUAL, sequential=False, max_rank=2)
    report = GradientFuser(pipe, **vars(way)).fuse(sources, weights=[3, 1]).report.data
    shares = [0.75, 0.25]
    grams: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    for source in sources:
        prompts = [prompt.replace("<TOK>", source.concepts[0].placeholder) for prompt in way.prompts]
        for part in ("fit", "held_out"):
            seen = features(pipe, source, pictures(prompts, way, part), SITES, way)
            for site, rows in seen.items():
                grams[site].append(gram_of(rows))
    fused_residuals: dict[str, list[float]] = {"average": [], "fused": []}
    overlap = []
    for site in SITES:
        own = [torch.stack(grams[site][2 * place : 2 * place + 2]).mean(dim=0) for place in (0, 1)]
        deltas = [dense(source.lora[site]) for source in sources]
        whole = least_squares(deltas, own, shares, way.ridge)
        left, values, right = torch.linalg.svd(whole)
        kept = left[:, :2] * values[:2] @ right[:2]
        average = sum(share * delta for share, delta in zip(shares, deltas, strict=True))
        layer = report["residuals"]["layers"][site]
        for place, name in enumerate(("<rex>", "<kit>")):
            told = {
                kind: norm_on(delta - deltas[place], own[place]) / norm_on(deltas[place], own[place])
                for kind, delta in (("average", average), ("fused", kept))
            }
            assert layer[name] == pytest.approx(told, abs=2e-3)
            if place == 0:
                for kind, value in told.items():
                    fused_residuals[kind].append(value)
        total = sum(share * gram for share, gram in zip(shares, own, strict=True))
        damped = total + way.ridge * total.diagonal().mean() * torch.eye(len(total)).double()
        condition = torch.linalg.matrix_norm(damped, 1) * torch.linalg.matrix_norm(damped.inverse(), 1)
        numbers = {"ridge": way.ridge, "condition": condition.item()}
        numbers["energy_kept"] = (values[:2].square().sum() / values.square().sum()).item()
        assert report["layers"][site] == pytest.approx(numbers, rel=1e-2)
        if site not in (KEYS_VALUES[1], REST[1]):  # layers of one input count once, by the first
            asked = [share * delta @ gram for share, delta, gram in zip(shares, deltas, own, strict=True)]
            own_norms = [(rows @ rows.T).norm() for rows in asked]
            overlap.append(((asked[0] @ asked[1].T).norm() / (own_norms[0] * own_norms[1]).sqrt()).item())
    means = {kind: sum(values) / len(SITES) for kind, values in fused_residuals.items()}
    assert report["residuals"]["mean"]["<rex>"] == pytest.approx(means, abs=2e-3)
    assert report["overlaps"] == {"<rex> <kit>": pytest.approx(sum(overlap) / len(overlap), abs=2e-3)}


def test_what_a_report_says_of_sources_and_settings(pipe: MixOfShowPipeline, sources: list[EDLoRA]) -> None:
    way = replace(USUAL, prior=0.5, seeds=(3,), negative_prompt="blurry")
    report = GradientFuser(pipe, **vars(way)).fuse(sources, weights=[3, 1], scales=[1, 0.5]).report.data
    told = {name: report[name] for name in ("steps", "guidance_scale", "negative_prompt", "seeds", "height", "width")}
    assert told == {
        "steps": 2,
        "guidance_scale": 7.5,
        "negative_prompt": "blurry",
        "seeds": [3],
        "height": 16,
        "width": 16,
    }
    told = {name: report[name] for name in ("method", "ridge", "max_rank", "prior", "sequential", "text_tokens")}
    assert told == {
        "method": "closed-form",
        "ridge": 0.05,
        "max_rank": None,
        "prior": 0.5,
        "sequential": True,
        "text_tokens": "all",
    }
    assert report["sampler"] == "DPMSolverMultistepScheduler"
    assert report["prompts"] == {"<rex>": ["a <rex>", "two <rex>"], "<kit>": ["a <kit>", "two <kit>"]}
    assert report["recording_s"] > 0
    first, second = report["sources"]
    assert (first["concepts"], first["weight"], first["share"], first["scale"]) == (["<rex>"], 3, 0.75, 1)
    assert (second["concepts"], second["weight"], second["share"], second["scale"]) == (["<kit>"], 1, 0.25, 0.5)
    assert first["digest"] == sources[0].digest != second["digest"] != sources[1].digest
    assert (first["origin"], first["revision"]) == ("", "")
    assert first["training"] == dict(sources[0].training)
    assert ("peak_memory_mib" in report) == (sys.platform != "win32")


def test_the_papers_solver_has_its_steps(pipe: MixOfShowPipeline, sources: list[EDLoRA]) -> None:
    """500 steps are nearly the least squares without a ridge; 50 are on the way to them."""
    steps = {TEXT[0]: 500, KEYS_VALUES[1]: 500, REST[2]: 50}
    few = [replace(source, lora={site: source.lora[site] for site in steps}) for source in sources]
    way = replace(USUAL, sequential=False)
    pack = GradientFuser(pipe, **vars(way)).fuse(few, method="lbfgs")
    assert {site: numbers["steps"] for site, numbers in pack.report.data["layers"].items()} == steps
    exact = GradientFuser(pipe, **vars(replace(way, ridge=1e-9))).fuse(few).report.data["residuals"]["layers"]
    for site, layer in pack.report.data["residuals"]["layers"].items():
        for name, told in layer.items():
            assert told["fused"] == pytest.approx(exact[site][name]["fused"], abs=0.06)
        assert sum(told["fused"] for told in layer.values()) < sum(told["average"] for told in layer.values())
