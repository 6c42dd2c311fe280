"""Gradient fusion end to end on a tiny pipeline: what it keeps, what it refuses, and that it only borrows."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import tiny
from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.conditioning.tokenize import STAND_IN_ID
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, FusionError
from diffusers_mixofshow.families.layers import adapted_layers, cross_attention_layers
from diffusers_mixofshow.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.collection import Recording, collect
from diffusers_mixofshow.fusion.config import FusionConfig, FusionKeywords
from diffusers_mixofshow.fusion.solvers import Factors, relative_residual
from diffusers_mixofshow.pipelines import MixOfShowPipeline


PROMPTS = ("a <TOK>", "two <TOK>")
CLOSED_FORM = {"steps": 2, "prompts": PROMPTS, "batch_size": 2}


@pytest.fixture
def pipe() -> MixOfShowPipeline:
    return MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)


def _concept(pipe: MixOfShowPipeline, name: str, seed: int, rank: int = 2) -> EDLoRA:
    generator = torch.Generator().manual_seed(seed)
    layers = cross_attention_layers(pipe.unet)
    concept = Concept.from_name(name, "dog", kind="pet")
    width = pipe.text_encoder.config.hidden_size

    def update(layer: torch.nn.Linear) -> LowRank:
        return LowRank(
            down=0.3 * torch.randn(rank, layer.in_features, generator=generator),
            up=0.3 * torch.randn(layer.out_features, rank, generator=generator),
            alpha=2.0 * rank,
        )

    return EDLoRA(
        concepts=(concept,),
        embeddings={token: 0.1 * torch.randn(len(layers), width, generator=generator) for token in concept.tokens},
        lora={site: update(layer) for site, layer in adapted_layers(pipe.components).items()},
        base_model="tiny",
        layers=layers,
    )


def _deltas(edlora: EDLoRA) -> dict[str, torch.Tensor]:
    return {site: update.scaling * (update.up.float() @ update.down.float()) for site, update in edlora.lora.items()}


def _assert_same_deltas(ours: EDLoRA, theirs: EDLoRA, tolerance: float = 1e-4) -> None:
    mine, others = _deltas(ours), _deltas(theirs)
    assert mine.keys() == others.keys()
    for site, delta in mine.items():
        assert (delta - others[site]).norm() <= tolerance * others[site].norm(), site


def _fingerprint(pipe: MixOfShowPipeline) -> str:
    digest = hashlib.sha256()
    for component in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, tensor in component.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        for name, module in component.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            digest.update(f"{name} {type(module).__name__} {len(hooks)} {module.training}".encode())
            digest.update(type(getattr(module, "processor", None)).__name__.encode())
    digest.update(f"{type(pipe.scheduler)} {sorted(pipe.concepts)} {pipe.get_list_adapters()}".encode())
    digest.update(f"{getattr(pipe, '_progress_bar_config', {})} {len(pipe.tokenizer)}".encode())
    return digest.hexdigest()


def test_one_concept_is_its_own_lora_on_the_features(pipe: MixOfShowPipeline) -> None:
    source = _concept(pipe, "rex", 1)
    fused = GradientFuser(pipe, ridge=1e-10, **CLOSED_FORM).fuse([source])
    residuals = fused.training["fusion"]["residuals"]["layers"]
    assert set(residuals) == set(source.lora)
    assert max(layer["<rex>"]["fused"] for layer in residuals.values()) < 1e-3
    assert fused.concepts == source.concepts
    assert all(torch.equal(fused.embeddings[token], rows) for token, rows in source.embeddings.items())


def test_one_fused_concept_samples_like_its_own_lora(pipe: MixOfShowPipeline) -> None:
    source = _concept(pipe, "rex", 1)
    fused = GradientFuser(pipe, ridge=1e-8, **CLOSED_FORM).fuse([source])

    def sample(edlora: EDLoRA) -> torch.Tensor:
        pipe.load_edlora(edlora)
        noise = torch.Generator().manual_seed(5)
        latents = pipe("a <rex>", num_inference_steps=2, generator=noise, output_type="latent").images
        pipe.unload_edlora()
        return latents

    own, copy = sample(source), sample(fused)
    plain = sample(replace(source, lora={}))
    assert (copy - own).norm() < 0.05 * (plain - own).norm()


def test_order_of_concepts_does_not_matter(pipe: MixOfShowPipeline) -> None:
    sources = [_concept(pipe, name, seed, rank) for name, seed, rank in (("rex", 1, 2), ("kit", 2, 3), ("zoe", 3, 2))]
    fuser = GradientFuser(pipe, **CLOSED_FORM)
    _assert_same_deltas(fuser.fuse(sources), fuser.fuse(sources[::-1]))


def test_gradient_fusion_keeps_every_concept_better_than_the_average(pipe: MixOfShowPipeline) -> None:
    sources = [_concept(pipe, name, seed) for name, seed in (("rex", 1), ("kit", 2))]
    fused = GradientFuser(pipe, **CLOSED_FORM).fuse(sources)
    means = fused.training["fusion"]["residuals"]["mean"]
    assert set(means) == {"<rex>", "<kit>"}
    assert all(mean["fused"] < mean["average"] for mean in means.values())


@pytest.mark.parametrize("sequential", [False, True])
def test_result_is_a_pack_that_saves_loads_and_samples(
    pipe: MixOfShowPipeline, tmp_path: Path, sequential: bool
) -> None:
    sources = [_concept(pipe, name, seed) for name, seed in (("rex", 1), ("kit", 2))]
    fused = GradientFuser(pipe, sequential=sequential, **CLOSED_FORM).fuse(sources)
    fused.save_pretrained(tmp_path)
    again = EDLoRA.from_pretrained(tmp_path)
    assert {half.dtype for update in again.lora.values() for half in (update.down, update.up)} == {torch.float16}
    _assert_same_deltas(again, fused, tolerance=2e-3)
    assert json.loads(json.dumps(again.training)) == fused.training
    assert all(update.rank == 4 and update.scaling == 1 for update in fused.lora.values())
    pipe.load_edlora(again)
    images = pipe("a <rex> and a <kit>", num_inference_steps=1, output_type="pt").images
    assert images.isfinite().all()


def test_average_is_equation_2_and_samples_nothing(pipe: MixOfShowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipe.unet), "forward", _fail)
    sources = [_concept(pipe, name, seed) for name, seed in (("rex", 1), ("kit", 2))]
    fused = GradientFuser(pipe).fuse(sources, method="average", weights=[3, 1], scales=[1, 0.5])
    ours, theirs = (_deltas(source) for source in sources)
    for site, delta in _deltas(fused).items():
        torch.testing.assert_close(delta, 0.75 * ours[site] + 0.25 * 0.5 * theirs[site], rtol=1e-4, atol=1e-5)


def test_more_rank_than_a_layer_has_is_recompressed(pipe: MixOfShowPipeline) -> None:
    sources = [_concept(pipe, f"dog{seed}", seed, rank=15) for seed in range(3)]
    fused = GradientFuser(pipe).fuse(sources, method="average")
    for site, update in fused.lora.items():
        assert update.rank == min(45, *update.down.shape[1:], update.up.shape[0]), site
    expected = [_deltas(source) for source in sources]
    for site, delta in _deltas(fused).items():
        torch.testing.assert_close(delta, sum(one[site] for one in expected) / 3, rtol=1e-4, atol=1e-4)


def test_packs_can_be_fused_again(pipe: MixOfShowPipeline) -> None:
    one, two, three = (_concept(pipe, name, seed) for name, seed in (("rex", 1), ("kit", 2), ("zoe", 3)))
    fuser = GradientFuser(pipe, **CLOSED_FORM)
    pack = fuser.fuse([one, two], method="average")
    fused = fuser.fuse([pack, three])
    assert [concept.name for concept in fused.concepts] == ["rex", "kit", "zoe"]
    assert set(fused.training["fusion"]["residuals"]["mean"]) == {"<rex>+<kit>", "<zoe>"}
    assert fused.training["fusion"]["prompts"]["<kit>"] == ["a <kit>", "two <kit>"]


def test_layers_that_a_concept_leaves_alone_stay_alone_for_it(pipe: MixOfShowPipeline) -> None:
    partial, whole = _concept(pipe, "rex", 1), _concept(pipe, "kit", 2)
    partial = replace(partial, lora={s: u for s, u in partial.lora.items() if s.startswith("unet")})
    fused = GradientFuser(pipe, **CLOSED_FORM).fuse([partial, whole])
    text_sites = [site for site in fused.lora if site.startswith("text_encoder")]
    assert text_sites
    assert all(fused.lora[site].rank == 2 for site in text_sites)
    assert fused.training["fusion"]["residuals"]["layers"][text_sites[0]]["<rex>"]["average"] is None


@pytest.mark.parametrize("text_tokens", ["all", "unpadded", "concept"])
def test_statistics_are_the_features(pipe: MixOfShowPipeline, text_tokens: str) -> None:
    source = _concept(pipe, "rex", 1)
    before = _fingerprint(pipe)
    recording = Recording(steps=2, text_tokens=text_tokens, batch_size=1).resolve(pipe)
    moved: list[int] = []
    statistics = collect(pipe, source, ["a <rex>"], list(source.lora), recording, moved.append)
    assert sum(moved) == 2
    assert set(statistics.inputs) == {STABLE_DIFFUSION.input_of(site) for site in source.lora}
    layers, text = len(source.layers), statistics.inputs[0]
    # Begin, a, the two tokens and end for each layer's prompt; begin and end for the negative prompt.
    counts = {"all": (layers + 1) * 77, "unpadded": layers * 5 + 2, "concept": layers * 3 + 2}
    assert statistics.tokens(text) == counts[text_tokens]
    keys_values = STABLE_DIFFUSION.input_of(f"unet.{source.layers[0]}.to_k")
    assert statistics.tokens(keys_values) == 2 * 77  # halves of guidance; keys and values are computed once a call
    pipe.load_edlora(source)
    halves = pipe.encode_prompt("a <rex>", pipe.device, 1, True, "")
    rows = torch.cat([half[:, :77] for half in halves]).double().flatten(end_dim=1)
    torch.testing.assert_close(
        statistics.gram(keys_values).matrix(), (rows.T @ rows / len(rows)).detach(), rtol=1e-4, atol=1e-6
    )
    pipe.unload_edlora()
    assert _fingerprint(pipe) == before


def test_words_with_the_id_that_stands_in_for_concepts_are_no_concepts(pipe: MixOfShowPipeline) -> None:
    source, recording = _concept(pipe, "rex", 1), Recording(steps=1, text_tokens="concept").resolve(pipe)
    assert pipe.tokenizer("!!", add_special_tokens=False).input_ids[0] == STAND_IN_ID

    def counted(edlora: EDLoRA, prompt: str) -> int:
        statistics = collect(pipe, edlora, [prompt], list(source.lora), recording)
        return statistics.tokens(statistics.inputs[0])

    # The two tokens and end for each layer's prompt; begin and end for the negative prompt.
    assert counted(source, "!! <rex> !!") == len(source.layers) * 3 + 2
    # A plain LoRA's prompt names no concept: begin, two of !, a and end; begin and end for the negative prompt.
    assert counted(replace(source, concepts=(), embeddings={}, base_model="", layers=()), "!! a") == 5 + 2


def test_batch_size_does_not_matter(pipe: MixOfShowPipeline) -> None:
    source = _concept(pipe, "rex", 1)
    grams = [
        collect(
            pipe, source, ["a <rex>", "<rex>"], list(source.lora), Recording(steps=2, batch_size=size).resolve(pipe)
        )
        for size in (1, 2)
    ]
    for name in grams[0].inputs:
        if name.startswith("unet"):
            one, two = (each.gram(name).matrix() for each in grams)
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("failing", [False, True])
def test_pipeline_comes_back_as_it_was(
    pipe: MixOfShowPipeline, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.load_edlora(_concept(pipe, "mine", 7), scale=0.7)
    pipe.set_progress_bar_config(desc="mine")
    before, latents = _fingerprint(pipe), _latents(pipe)
    sources = [_concept(pipe, "rex", 1), _concept(pipe, "kit", 2)]
    fuser = GradientFuser(pipe, **CLOSED_FORM)
    if failing:
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.unet.mid_block), "forward", _fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                fuser.fuse(sources)
    else:
        fuser.fuse(sources)
    assert _fingerprint(pipe) == before
    assert torch.equal(_latents(pipe), latents)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("record", [True, False])
def test_layers_that_attention_passes_over_are_told_before_anything_is_recorded(
    pipe: MixOfShowPipeline, sequential: bool, record: bool, passes: Any
) -> None:
    pipe.fuse_qkv_projections()
    source, before = _concept(pipe, "rex", 1), _fingerprint(pipe)
    fuser = GradientFuser(pipe, sequential=sequential, **CLOSED_FORM)
    with pytest.raises(ConfigurationError, match=r"copies.*pipe\.unet\.unfuse_qkv_projections\(\)"):
        fuser.record(source) if record else fuser.fuse([source])
    assert (passes.done, _fingerprint(pipe)) == (0, before)
    assert fuser.fuse([source], method="average").concepts == source.concepts  # which records nothing
    pipe.unet.unfuse_qkv_projections()
    fuser.record(source) if record else fuser.fuse([source])
    assert passes.done


def test_result_does_not_depend_on_what_the_user_had_loaded(pipe: MixOfShowPipeline) -> None:
    sources = [_concept(pipe, "rex", 1), _concept(pipe, "kit", 2)]
    fuser = GradientFuser(pipe, **CLOSED_FORM)
    alone = fuser.fuse(sources)
    pipe.load_edlora(sources[0])
    _assert_same_deltas(fuser.fuse(sources), alone)
    assert list(pipe.concepts) == ["<rex>"]


def _latents(pipe: MixOfShowPipeline) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    return pipe("a <mine>", num_inference_steps=2, generator=noise, output_type="latent").images


def _fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("failed on purpose")


def _other_base(source: EDLoRA) -> EDLoRA:
    return replace(source, base_model="other")


def _fewer_layers(source: EDLoRA) -> EDLoRA:
    return replace(source, layers=source.layers[1:], embeddings={t: rows[1:] for t, rows in source.embeddings.items()})


def _same_name(source: EDLoRA) -> EDLoRA:
    return replace(source, concepts=(Concept.from_name("rex", "cat"),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_base, r"<rex> on 'tiny', <kit> on 'other'"),
        (_fewer_layers, r"different cross-attention layers \(numbers of layers: <rex> 4, <kit> 3\)"),
        (lambda source: _other_base(_fewer_layers(source)), "different base models.*; .*cross-attention layers"),
    ],
)
def test_what_does_not_fit_is_refused_together(
    pipe: MixOfShowPipeline, change: Callable[[EDLoRA], EDLoRA], message: str
) -> None:
    sources = [_concept(pipe, "rex", 1), change(_concept(pipe, "kit", 2))]
    with pytest.raises(FusionError, match=message):
        GradientFuser(pipe).fuse(sources)


def test_names_used_twice_are_told_as_everywhere(pipe: MixOfShowPipeline) -> None:
    sources = [_concept(pipe, "rex", 1), _same_name(_concept(pipe, "kit", 2))]
    with pytest.raises(ConceptError, match=r"used twice: <rex>\. Give each concept once, or rename one of them\.$"):
        GradientFuser(pipe).fuse(sources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "none was given"),
        ({"sources": "edlora-rex"}, "Expected a list of sources to fuse, got 'edlora-rex' alone"),
        ({"weights": [1, 2]}, "got 2 weights for 1 LoRAs"),
        ({"weights": [-1]}, "weights must be finite and above 0"),
        ({"scales": [float("nan")]}, "scales must be finite"),
        ({"method": "magic"}, "unknown method 'magic', expected 'closed-form', 'lbfgs', 'ssr', 'average'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    pipe: MixOfShowPipeline, arguments: dict[str, object], message: str
) -> None:
    sources = arguments.pop("sources", [_concept(pipe, "rex", 1)])
    with pytest.raises(FusionError, match=message):
        GradientFuser(pipe).fuse(sources, **arguments)  # type: ignore[arg-type]


def test_an_interrupted_fusion_in_stages_goes_on_where_it_stopped(
    pipe: MixOfShowPipeline, passes: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate(("rex", "kit")):
        _concept(pipe, name, seed).save_pretrained(tmp_path / name)
    fuser, sources = GradientFuser(pipe, **CLOSED_FORM), [tmp_path / "rex", tmp_path / "kit"]
    passes.allow(5)  # one step each of two stages, then one of the third
    with pytest.raises(KeyboardInterrupt):
        fuser.fuse(sources)
    kept = {folder.name: len(list(folder.glob(".*.stage.safetensors"))) for folder in sources}
    assert kept == {"rex": 2, "kit": 2}
    passes.allow(4)
    resumed = fuser.fuse(sources)
    assert passes.done == 4
    assert not list(tmp_path.glob("*/.*"))
    passes.allow(8)
    _assert_same_deltas(resumed, fuser.fuse([EDLoRA.from_pretrained(folder) for folder in sources]), tolerance=1e-5)
    assert passes.done == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"ridge": -1},
        {"max_rank": 0},
        {"max_rank": 2.5},
        {"steps": 0},
        {"seeds": ()},
        {"seeds": 3},
        {"seeds": "12"},
        {"seeds": (0.5,)},
        {"text_tokens": "some"},
        {"prior": -1},
        {"device": "abacus"},
    ],
)
def test_settings_that_make_no_sense_are_refused(pipe: MixOfShowPipeline, settings: dict[str, object]) -> None:
    with pytest.raises(FusionError):
        GradientFuser(pipe, **settings)  # type: ignore[arg-type]


def test_a_config_is_what_its_keywords_are() -> None:
    config = FusionConfig(steps=3, ridge="auto")
    assert GradientFuser(None, config).config == GradientFuser(None, steps=3, ridge="auto").config
    changed = GradientFuser(None, config, steps=4).config
    assert (changed.steps, changed.ridge, config.steps) == (4, "auto", 3)
    with pytest.raises(FrozenInstanceError):
        config.steps = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="stepps"):
        GradientFuser(None, stepps=4)  # type: ignore[call-arg]
    assert get_type_hints(FusionKeywords).keys() == {field.name for field in fields(FusionConfig)}


@pytest.mark.parametrize(("pipe_given", "ridge"), [(True, 0.032), (False, 0.32)])
def test_the_usual_ridge_depends_on_whose_features_are_recorded(
    pipe: MixOfShowPipeline, pipe_given: bool, ridge: float
) -> None:
    for fuser in (GradientFuser(pipe if pipe_given else None), GradientFuser(pipe, sequential=pipe_given)):
        assert fuser.config.settings.ridge_of(1280) == pytest.approx(ridge)
        assert fuser.config.settings.ridge_of(640) == pytest.approx(ridge / 2)
        assert fuser.config.settings.ridge_of(15360) == pytest.approx(ridge)


def test_ssr_takes_no_automatic_ridge(pipe: MixOfShowPipeline) -> None:
    with pytest.raises(FusionError, match="ridge 'auto' is for 'closed-form'; give 'ssr' a number"):
        GradientFuser(pipe, ridge="auto").fuse([_concept(pipe, "rex", 1)], "ssr")


def test_residuals_of_the_report_are_those_of_the_pack(pipe: MixOfShowPipeline) -> None:
    sources = [_concept(pipe, "rex", 1), _concept(pipe, "kit", 2)]
    fused = GradientFuser(pipe, sequential=False, **CLOSED_FORM).fuse(sources)
    prompts = ["a <rex>", "two <rex>"]
    sites = list(sources[0].lora)
    recording = Recording(steps=2, batch_size=2).resolve(pipe)
    statistics = collect(pipe, sources[0], prompts, sites, recording, hold_out=True)
    for site in sites[::7]:
        own, pack = (
            Factors(down=edlora.lora[site].scaling * edlora.lora[site].down, up=edlora.lora[site].up)
            for edlora in (sources[0], fused)
        )
        reported = fused.training["fusion"]["residuals"]["layers"][site]["<rex>"]["fused"]
        gram = statistics.gram(STABLE_DIFFUSION.input_of(site))
        assert relative_residual(pack, own, gram) == pytest.approx(reported, abs=1e-3)
