"""diffusers' own ways with LoRAs before and after ours, in any order: what is said to be loaded is what draws."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
from diffusers.utils.peft_utils import delete_adapter_layers
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import packs
import tiny
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.errors import ConceptError, ConfigurationError, MixOfShowWarning
from diffusers_mixofshow.lora import merged
from diffusers_mixofshow.pipelines import MixOfShowImg2ImgPipeline, MixOfShowPipeline
from pipelines.conftest import SETTINGS


REX, TOM = "<rex>", "<tom>"


class _World:
    """A pipeline, another one over its models, packs and a style, and what each mixture of them draws."""

    def __init__(self, folder):
        components = tiny.components()
        self.packs = {name: packs.random_pack(components, name, seed=seed) for name, seed in (("rex", 1), ("tom", 2))}
        self.style = packs.random_pack(components, "style", seed=3)
        self.file = folder / "style.safetensors"
        save_file(_as_lora_file(self.style), self.file)
        self.pipe = MixOfShowPipeline(**components, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)

    def load(self, *names, **settings):
        for name in names:
            self.pipe.load_edlora(self.packs[name], **settings)

    def load_style(self, **settings):
        self.pipe.load_lora_weights(
            self.file.parent, weight_name=self.file.name, **{"adapter_name": "style", **settings}
        )


def _as_lora_file(pack):
    tensors = {}
    for site, update in pack.lora.items():
        tensors[f"{site}.lora_A.weight"] = update.down
        tensors[f"{site}.lora_B.weight"] = update.up
    return tensors


def _draw(pipe, prompt):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **SETTINGS).images


def _expected(world, prompt, **updates):
    """What a fresh model draws with these updates in its weights and the concepts' embeddings: no PEFT anywhere."""
    components = tiny.components()
    pipe = MixOfShowPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    everything = {**world.packs, "style": world.style}
    for pack in world.packs.values():
        pipe.load_edlora(dataclasses.replace(pack, lora={}))
    blocks = [merged(components, everything[name], strength) for name, strength in updates.items()]
    for block in blocks:
        block.__enter__()
    try:
        return _draw(pipe, prompt)
    finally:
        for block in reversed(blocks):
            block.__exit__(None, None, None)


@pytest.fixture
def world(tmp_path):
    return _World(tmp_path)


def _delete(world):
    world.pipe.delete_adapters("rex")


# Name: the steps, the concepts afterwards, the updates that act, and what a call that names <rex> warns of.
ORDERS = {
    "nothing": ([], [], {}, None),
    "ours": ([lambda w: w.load("rex")], [REX], {"rex": 1}, None),
    "ours, style": ([lambda w: w.load("rex"), lambda w: w.load_style()], [REX], {"rex": 1, "style": 1}, None),
    "style, ours": ([lambda w: w.load_style(), lambda w: w.load("rex")], [REX], {"rex": 1, "style": 1}, None),
    "weak ours, style, ours": (
        [lambda w: w.load("rex", scale=0.5), lambda w: w.load_style(), lambda w: w.load("tom")],
        [REX, TOM],
        {"rex": 0.5, "style": 1, "tom": 1},
        None,
    ),
    "a sleeping one sleeps on": (
        [
            lambda w: w.load("rex", "tom"),
            lambda w: w.pipe.set_adapters("tom"),
            lambda w: w.load_style(),
        ],
        [REX, TOM],
        {"tom": 1, "style": 1},
        r"'rex' is not among the active adapters \('tom', 'style'\)",
    ),
    "set_adapters with ours": (
        [
            lambda w: w.load("rex"),
            lambda w: w.load_style(),
            lambda w: w.pipe.set_adapters(["rex", "style"], [0.3, 0.6]),
        ],
        [REX],
        {"rex": 0.3, "style": 0.6},
        None,
    ),
    "set_adapters without ours": (
        [lambda w: w.load("rex"), lambda w: w.load_style(), lambda w: w.pipe.set_adapters("style")],
        [REX],
        {"style": 1},
        "'rex' is not among the active adapters",
    ),
    "disabled": ([lambda w: w.load("rex"), lambda w: w.pipe.disable_lora()], [REX], {}, "enable_lora"),
    "disabled and enabled": (
        [lambda w: w.load("rex"), lambda w: w.pipe.disable_lora(), lambda w: w.pipe.enable_lora()],
        [REX],
        {"rex": 1},
        None,
    ),
    "disabled, then ours": (
        [lambda w: w.load("tom"), lambda w: w.pipe.disable_lora(), lambda w: w.load("rex")],
        [TOM, REX],
        {},
        "enable_lora",
    ),
    "the U-Net disabled": (
        [
            lambda w: w.load("rex"),
            lambda w: w.pipe.unet.disable_lora(),
            lambda w: w.pipe.text_encoder.disable_adapters(),
        ],
        [REX],
        {},
        "in unet and text_encoder: adapter 'rex' is switched off",
    ),
    "unloaded": ([lambda w: w.load("rex"), lambda w: w.pipe.unload_lora_weights()], [], {}, "has been removed"),
    "deleted": ([lambda w: w.load("rex", "tom"), _delete], [TOM], {"tom": 1}, "has been removed"),
    "deleted by the models": (
        [
            lambda w: w.load("rex"),
            lambda w: w.pipe.unet.delete_adapters("rex"),
            lambda w: w.pipe.text_encoder.delete_adapter("rex"),
        ],
        [],
        {},
        "has been removed",
    ),
    "unloaded, loaded again": (
        [lambda w: w.load("rex"), lambda w: w.pipe.unload_lora_weights(), lambda w: w.load("rex")],
        [REX],
        {"rex": 1},
        None,
    ),
    "deleted, loaded again": ([lambda w: w.load("rex"), _delete, lambda w: w.load("rex")], [REX], {"rex": 1}, None),
    "another LoRA under its name": (
        [lambda w: w.load("rex"), _delete, lambda w: w.load_style(adapter_name="rex")],
        [],
        {"style": 1},
        "has been removed",
    ),
    "unloaded elsewhere": (
        [
            lambda w: w.load("rex"),
            lambda w: setattr(w, "other", MixOfShowImg2ImgPipeline.from_pipe(w.pipe)),
            lambda w: w.other.unload_edlora(),
        ],
        [],
        {},
        "has been removed",
    ),
    "unloaded elsewhere, loaded again": (
        [
            lambda w: w.load("rex"),
            lambda w: setattr(w, "other", MixOfShowImg2ImgPipeline.from_pipe(w.pipe)),
            lambda w: w.other.unload_edlora(),
            lambda w: w.load("rex"),
        ],
        [REX],
        {"rex": 1},
        None,
    ),
    "fused": ([lambda w: w.load("rex", scale=0.5), lambda w: w.pipe.fuse_lora()], [REX], {"rex": 0.5}, None),
    "fused and unfused": (
        [lambda w: w.load("rex"), lambda w: w.pipe.fuse_lora(), lambda w: w.pipe.unfuse_lora()],
        [REX],
        {"rex": 1},
        None,
    ),
    "fused for good": (
        [lambda w: w.load("rex"), lambda w: w.pipe.fuse_lora(lora_scale=0.7), lambda w: w.pipe.unload_lora_weights()],
        [REX],
        {"rex": 0.7},
        None,
    ),
    "fused and deleted": ([lambda w: w.load("rex"), lambda w: w.pipe.fuse_lora(), _delete], [REX], {"rex": 1}, None),
    "fused for good beside a style": (
        [
            lambda w: w.load_style(),
            lambda w: w.load("rex"),
            lambda w: w.pipe.fuse_lora(adapter_names=["style", "rex"]),
            lambda w: w.pipe.unload_lora_weights(),
        ],
        [REX],
        {"rex": 1, "style": 1},
        None,
    ),
    "the style fused": (
        [lambda w: w.load_style(), lambda w: w.load("rex"), lambda w: w.pipe.fuse_lora(adapter_names=["style"])],
        [REX],
        {"style": 1},
        "other adapters are fused",
    ),
    "fused projections": (
        [lambda w: w.load("rex"), lambda w: w.pipe.unet.fuse_qkv_projections()],
        [REX],
        None,
        "in unet: adapter 'rex' is bypassed by fuse_qkv_projections",
    ),
    "projections fused, then fused for good by the models": (
        [
            lambda w: w.load("rex"),
            lambda w: w.pipe.unet.fuse_qkv_projections(),
            lambda w: w.pipe.unet.fuse_lora(),
            lambda w: w.pipe.unload_lora_weights(),
        ],
        [REX],
        None,
        "in unet: adapter 'rex' is bypassed by fuse_qkv_projections",
    ),
    "projections fused after fusing for good": (
        [
            lambda w: w.load("rex"),
            lambda w: w.pipe.fuse_lora(),
            lambda w: w.pipe.unload_lora_weights(),
            lambda w: w.pipe.fuse_qkv_projections(),
        ],
        [REX],
        {"rex": 1},
        None,
    ),
    "projections fused and back": (
        [
            lambda w: w.load("rex"),
            lambda w: w.pipe.fuse_qkv_projections(),
            lambda w: w.pipe.unfuse_qkv_projections(),
        ],
        [REX],
        {"rex": 1},
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter .* was active:UserWarning", "ignore:Already found a:UserWarning")
@pytest.mark.parametrize(("steps", "concepts", "updates", "warning"), ORDERS.values(), ids=ORDERS)
def test_what_is_listed_is_what_draws(world, steps, concepts, updates, warning):
    for step in steps:
        step(world)
    assert list(world.pipe.concepts) == concepts
    if updates is not None:
        torch.testing.assert_close(
            _draw(world.pipe, "a dog"), _expected(world, "a dog", **updates), atol=1e-3, rtol=1e-3
        )
    if REX in [*concepts, REX if warning else None]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", MixOfShowWarning)
            drawn = _draw(world.pipe, f"a {REX}")
        told = " ".join(str(each.message) for each in seen if issubclass(each.category, MixOfShowWarning))
        assert bool(told) == (warning is not None), told
        if warning:
            with pytest.warns(MixOfShowWarning, match=warning):
                _draw(world.pipe, f"a {REX}")
        if updates is not None:
            torch.testing.assert_close(drawn, _expected(world, f"a {REX}", **updates), atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Adapter .* was active:UserWarning", "ignore:Already found a:UserWarning")
@pytest.mark.filterwarnings("ignore::diffusers_mixofshow.errors.MixOfShowWarning")
@pytest.mark.parametrize("steps", [order[0] for order in ORDERS.values()], ids=ORDERS)
def test_after_unloading_ours_the_rest_is_as_if_ours_had_never_been_there(world, steps):
    for step in steps:
        step(world)
    fused = any(layer.merged for layer in _lora_layers(world.pipe))
    copied = "FusedAttnProcessor2_0" in {type(each).__name__ for each in world.pipe.unet.attn_processors.values()}
    if fused or (copied and not _lora_layers(world.pipe)):  # the error names the step that makes it possible
        with pytest.raises(ConfigurationError, match=r"pipe\.unfuse_lora\(\)" if fused else "unfuse_qkv_projections"):
            world.pipe.unload_edlora()
    if copied:
        world.pipe.unet.unfuse_qkv_projections()
    world.pipe.unfuse_lora()
    world.pipe.unload_edlora()
    assert world.pipe.concepts == {}
    with_style = "style" in str(world.pipe.get_list_adapters())
    if _lora_layers(world.pipe):
        world.pipe.enable_lora()
    style = {"style": 1} if "load_style" in str([step.__code__.co_names for step in steps]) else {}
    if with_style:
        world.pipe.set_adapters("style")
    torch.testing.assert_close(_draw(world.pipe, "a dog"), _expected(world, "a dog", **style), atol=1e-3, rtol=1e-3)
    world.load("rex", adapter_name="once_more")
    expected = _expected(world, f"a {REX}", rex=1, **style)
    torch.testing.assert_close(_draw(world.pipe, f"a {REX}"), expected, atol=1e-3, rtol=1e-3)


def _lora_layers(pipe):
    models = (pipe.unet, pipe.text_encoder)
    return [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]


def _modules(pipe):
    models = (pipe.unet, pipe.text_encoder)
    return [(path, type(module)) for model in models for path, module in model.named_modules()]


@pytest.mark.parametrize("remove", [lambda pipe: pipe.unload_lora_weights(), lambda pipe: pipe.delete_adapters("rex")])
def test_no_module_is_left_when_diffusers_removed_a_concept(world, remove):
    before = _modules(world.pipe)
    world.load("rex")
    remove(world.pipe)
    world.pipe.unload_edlora()
    assert _modules(world.pipe) == before


def test_unloading_leaves_somebody_elses_adapter_of_the_same_name(world):
    world.load("rex")
    world.pipe.delete_adapters("rex")
    world.load_style(adapter_name="rex")
    with pytest.raises(ConfigurationError, match="'rex' is loaded already"):
        world.load("rex")
    world.pipe.unload_edlora()
    assert world.pipe.get_list_adapters()["unet"] == ["rex"]


def test_weights_are_not_swapped_under_a_concepts_embeddings(world):
    world.load("rex")
    drawn = _draw(world.pipe, "a <rex>")
    with pytest.raises(ConfigurationError, match="hotswap"):
        world.load_style(adapter_name="rex", hotswap=True)
    assert torch.equal(_draw(world.pipe, "a <rex>"), drawn)
    world.pipe.unet.load_lora_adapter(_as_lora_file(world.style), prefix="unet", adapter_name="rex", hotswap=True)
    with pytest.warns(MixOfShowWarning, match="in unet: adapter 'rex' has been removed"):
        _draw(world.pipe, "a <rex>")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_concept_of_which_half_is_gone_is_told_and_unloads(world, component):
    before = _draw(world.pipe, "a dog")
    world.load("rex")
    delete_adapter_layers(getattr(world.pipe, component), "rex")
    assert list(world.pipe.concepts) == [REX]
    with pytest.warns(MixOfShowWarning, match=f"in {component}: adapter 'rex' has been removed"):
        _draw(world.pipe, "a <rex>")
    with world.pipe.set_concepts_aside():
        torch.testing.assert_close(_draw(world.pipe, "a dog"), before)
    assert list(world.pipe.concepts) == [REX]
    world.pipe.unload_edlora()
    torch.testing.assert_close(_draw(world.pipe, "a dog"), before)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_fused_pipeline_is_not_saved_as_if_it_were_the_base(world, tmp_path, for_good):
    before = _draw(world.pipe, "a dog")
    world.load("rex")
    world.pipe.fuse_lora()
    if for_good:
        world.pipe.unload_lora_weights()
    with pytest.raises(ConfigurationError, match="unload_edlora" if for_good else "unfuse_lora"):
        world.pipe.save_pretrained(tmp_path / "base")
    with pytest.warns(MixOfShowWarning, match="subtracted") if for_good else contextlib.nullcontext():
        world.pipe.unload_edlora() if for_good else world.pipe.unfuse_lora()
    world.pipe.save_pretrained(tmp_path / "base")
    saved = MixOfShowPipeline.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(_draw(saved, "a dog"), before, atol=1e-3, rtol=1e-3)


def test_a_disabled_concept_is_still_disabled_after_saving(world, tmp_path):
    world.load("rex")
    world.pipe.disable_lora()
    world.pipe.save_pretrained(tmp_path / "base")
    with pytest.warns(MixOfShowWarning, match="enable_lora"):
        _draw(world.pipe, "a <rex>")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_model_still_has_its_concept(world, dtype):
    world.load("rex")
    world.pipe.to(dtype)
    assert list(world.pipe.concepts) == [REX]
    world.pipe.to(torch.float32)
    assert list(world.pipe.concepts) == [REX]
    world.pipe.unload_edlora()
    assert not _lora_layers(world.pipe)


STRENGTHS = {
    "another": lambda pipe: pipe.set_adapters(["rex"], [0.3]),
    "the default": lambda pipe: pipe.set_adapters("rex"),
    "by component": lambda pipe: pipe.set_adapters("rex", {"unet": 0.3, "text_encoder": 0.1}),
    "with another": lambda pipe: pipe.set_adapters(["style", "rex"], adapter_weights=[1.0, 0.3]),
    "of another": lambda pipe: pipe.set_adapters(["style"], [0.3]),
}


@pytest.mark.parametrize("fused", [["rex"], ["rex", "style"]], ids=" and ".join)
@pytest.mark.parametrize("weigh", STRENGTHS.values(), ids=STRENGTHS)
def test_what_is_fused_takes_no_other_strength(world, weigh, fused):
    before = {key: value.clone() for key, value in world.pipe.unet.state_dict().items()}
    world.load("rex", scale=0.5)
    world.load_style()
    world.pipe.fuse_lora(adapter_names=fused)
    with pytest.raises(ConfigurationError, match=r"pipe\.unfuse_lora\(\).*another strength"):
        weigh(world.pipe)
    world.pipe.unfuse_lora()
    weigh(world.pipe)
    world.pipe.unload_edlora()
    world.pipe.unload_lora_weights()
    torch.testing.assert_close(world.pipe.unet.state_dict(), before, atol=1e-6, rtol=1e-5)


AGAIN = {
    "by name": lambda pipe: pipe.fuse_lora(lora_scale=0.5),
    "by place": lambda pipe: pipe.fuse_lora(["unet", "text_encoder"], 0.5),
    "one adapter": lambda pipe: pipe.fuse_lora(adapter_names=["rex"], lora_scale=2.0),
    "another one": lambda pipe: pipe.fuse_lora(adapter_names=["style"], lora_scale=0.5),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_what_is_fused_is_not_fused_again_with_another_scale(world, again):
    before = {key: value.clone() for key, value in world.pipe.unet.state_dict().items()}
    world.load("rex")
    world.load_style()
    world.pipe.fuse_lora(adapter_names=["rex"])
    with pytest.raises(ConfigurationError, match=r"pipe\.unfuse_lora\(\).*another strength"):
        again(world.pipe)
    world.pipe.fuse_lora(adapter_names=["rex"])  # which changes nothing
    world.pipe.unfuse_lora()
    again(world.pipe)
    world.pipe.unfuse_lora()
    world.pipe.unload_edlora()
    world.pipe.unload_lora_weights()
    torch.testing.assert_close(world.pipe.unet.state_dict(), before, atol=1e-6, rtol=1e-5)


# What would change the weights under the copies of them that attention reads: the steps, and the one that is refused.
UNDER_COPIES = {
    "fuse": ([lambda w: w.pipe.fuse_qkv_projections()], lambda w: w.pipe.fuse_lora()),
    "fuse, copied by the model": ([lambda w: w.pipe.unet.fuse_qkv_projections()], lambda w: w.pipe.fuse_lora()),
    "fuse a style": (
        [lambda w: w.load_style(), lambda w: w.pipe.fuse_qkv_projections()],
        lambda w: w.pipe.fuse_lora(adapter_names=["style"]),
    ),
    "unfuse": (
        [lambda w: w.pipe.fuse_lora(), lambda w: w.pipe.fuse_qkv_projections()],
        lambda w: w.pipe.unfuse_lora(),
    ),
    "unload what the models unfused": (
        [
            lambda w: w.pipe.fuse_lora(),
            lambda w: w.pipe.fuse_qkv_projections(),
            lambda w: (w.pipe.unet.unfuse_lora(), _unmerged(w.pipe.text_encoder)),
        ],
        lambda w: w.pipe.unload_edlora(),
    ),
    "unload what was fused for good": (
        [
            lambda w: w.pipe.fuse_lora(),
            lambda w: w.pipe.unload_lora_weights(),
            lambda w: w.pipe.fuse_qkv_projections(),
        ],
        lambda w: w.pipe.unload_edlora(),
    ),
}


def _unmerged(model):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.unmerge()


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
@pytest.mark.filterwarnings("ignore:The updates of 'rex':diffusers_mixofshow.errors.MixOfShowWarning")
@pytest.mark.parametrize(("steps", "refused"), UNDER_COPIES.values(), ids=UNDER_COPIES)
def test_weights_are_not_changed_under_copies_of_them(world, steps, refused):
    before = _draw(world.pipe, "a dog")
    world.load("rex")
    for step in steps:
        step(world)
    drawn = _draw(world.pipe, "a dog")
    with pytest.raises(ConfigurationError, match=r"copies.*pipe\.unet\.unfuse_qkv_projections\(\)"):
        refused(world)
    assert torch.equal(_draw(world.pipe, "a dog"), drawn)
    world.pipe.unet.unfuse_qkv_projections()
    refused(world)
    world.pipe.unfuse_lora()
    world.pipe.unload_edlora()
    world.pipe.unload_lora_weights()
    torch.testing.assert_close(_draw(world.pipe, "a dog"), before, atol=1e-4, rtol=1e-4)


def test_copies_of_the_bases_own_weights_are_no_hindrance(world):
    world.pipe.fuse_qkv_projections()
    before = _draw(world.pipe, "a dog")
    world.load("rex")
    world.pipe.unload_edlora()
    torch.testing.assert_close(_draw(world.pipe, "a dog"), before)
    world.load_style()
    world.pipe.fuse_lora()  # a style alone is diffusers' own business


@pytest.mark.parametrize("updates", [True, False], ids=["with updates", "embeddings alone"])
def test_a_lora_does_not_go_by_a_concepts_name(world, updates):
    rex = packs.random_pack(world.pipe.components, "rex")
    world.pipe.load_edlora(rex if updates else dataclasses.replace(rex, lora={}), adapter_name="a")
    with pytest.raises(ConfigurationError, match=r"'a' is loaded already .*another adapter_name"):
        world.pipe.load_lora_weights(str(world.file), adapter_name="a")
    world.pipe.load_lora_weights(str(world.file), adapter_name="b")
    world.pipe.unload_edlora("a")
    assert world.pipe.get_list_adapters()["unet"] == ["b"]
    world.pipe.load_lora_weights(str(world.file), adapter_name="a")


def test_others_that_are_fused_are_left_to_diffusers(world):
    world.load("rex")
    world.load_style()
    world.pipe.fuse_lora(adapter_names=["style"])
    world.pipe.set_adapters(["rex"], [0.3])
    world.pipe.unfuse_lora()
    torch.testing.assert_close(_draw(world.pipe, "a dog"), _expected(world, "a dog", rex=0.3), atol=1e-4, rtol=1e-4)


def test_of_several_concepts_the_one_that_is_left_is_saved(world, tmp_path):
    world.load("rex", "tom")
    world.pipe.delete_adapters("rex")
    world.pipe.save_edlora(tmp_path)
    assert [concept.placeholder for concept in EDLoRA.from_pretrained(tmp_path).concepts] == [TOM]
    world.pipe.delete_adapters("tom")
    with pytest.raises(ConceptError, match=r"0 are loaded \(nothing is loaded\)"):
        world.pipe.save_edlora(tmp_path)


@pytest.mark.parametrize("disabled", [False, True])
def test_setting_concepts_aside_changes_no_gradient_flag(world, disabled):
    world.load("rex", "tom")
    world.load_style()
    if disabled:
        world.pipe.disable_lora()

    def flags():
        return {name: each.requires_grad for name, each in world.pipe.unet.named_parameters()}

    before = flags()
    with world.pipe.set_concepts_aside():
        pass
    assert flags() == before
    assert not any(flag for name, flag in before.items() if "rex" in name or "tom" in name)


def test_a_plain_lora_alone_is_not_published_as_a_concept(world):
    with pytest.raises(ConceptError, match="Nothing is loaded"):
        world.pipe.push_to_hub("me/style")
    world.pipe.load_edlora(world.file)
    with pytest.raises(ConceptError, match=r"Only LoRAs without a concept are loaded\. Load a concept"):
        world.pipe.push_to_hub("me/style")
