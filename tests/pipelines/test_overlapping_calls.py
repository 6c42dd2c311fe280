"""Calls that overlap on one model, from threads or inside a callback: each draws what it draws alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

import packs
import tiny
from diffusers_mixofshow import (
    MixOfShowAdapterPipeline,
    MixOfShowControlNetPipeline,
    MixOfShowImg2ImgPipeline,
    MixOfShowPipeline,
)
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.lora import merged, trainable
from diffusers_mixofshow.regions import Isolation, Region
from pipelines.conftest import SETTINGS


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
LEFT = Region("a <potter>", box=(0, 0, 0.5, 1), negative_prompt="beard")
RIGHT = Region("a dog", box=(0.4, 0.2, 1, 1))


def _random_texts(chunks):
    """Embeddings of a text that is this many times as long as a prompt, and of a negative one."""
    texts = torch.randn(2, 1, chunks * 77, 32, generator=torch.Generator().manual_seed(0))
    return {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}


class _Calls:
    """Pipelines of many kinds over one U-Net, each with a scheduler of its own, and what each draws alone."""

    def __init__(self, components, pack):
        self.components = components
        control = {"controlnet": tiny.controlnet(components["unet"])}
        adapter = {"adapter": tiny.adapter()}
        layers = len(cross_attention_layers(components["unet"]))
        kinds = {
            "concept": (MixOfShowPipeline, {}, {"prompt": "a <potter>"}),
            "regions": (MixOfShowPipeline, {}, {"prompt": "two", "regions": [LEFT, RIGHT]}),
            "other regions": (
                MixOfShowPipeline,
                {},
                {"prompt": "two <potter>", "regions": [RIGHT, LEFT, Region("x", box=(0.2, 0.1, 0.6, 0.5), end=0.5)]},
            ),
            "isolated": (MixOfShowPipeline, {}, {"prompt": "x", "regions": [LEFT], "isolation": Isolation()}),
            "a pair": (MixOfShowPipeline, {}, {"prompt": ["a <potter>", "x"], "regions": [[LEFT], [RIGHT, LEFT]]}),
            "plain": (MixOfShowPipeline, {}, {"prompt": "a dog"}),
            "stock": (StableDiffusionPipeline, {}, {"prompt": "a dog"}),
            "long text": (MixOfShowPipeline, {}, _random_texts(2)),
            "stock, as long as a stack": (StableDiffusionPipeline, {}, _random_texts(layers)),
            "image": (MixOfShowImg2ImgPipeline, {}, {"prompt": "a <potter>", "image": PICTURE, "strength": 1.0}),
            "control": (MixOfShowControlNetPipeline, control, {"prompt": "two", "image": PICTURE, "regions": [LEFT]}),
            "scaled control": (
                MixOfShowAdapterPipeline,
                adapter,
                {"prompt": "x", "image": PICTURE, "regions": [Region("a <potter>", box=LEFT.box, control_scale=0.3)]},
            ),
        }
        first = MixOfShowPipeline(**components, requires_safety_checker=False)
        first.load_edlora(pack)
        self.pipes, self.arguments = {}, {}
        for name, (kind, extra, arguments) in kinds.items():
            scheduler = DDIMScheduler.from_config(components["scheduler"].config)
            self.pipes[name] = kind.from_pipe(first, scheduler=scheduler, **extra)
            self.pipes[name].set_progress_bar_config(disable=True)
            size = {"height", "width"} if name == "image" else ()
            self.arguments[name] = {key: value for key, value in SETTINGS.items() if key not in size} | arguments
        self.alone = {name: self.draw(name) for name in kinds}

    def draw(self, name, at_step=None):
        generator = torch.Generator().manual_seed(0)
        return self.pipes[name](**self.arguments[name], generator=generator, callback_on_step_end=at_step).images

    def assert_alone(self, name, *drawn):
        for latents in drawn:
            torch.testing.assert_close(latents, self.alone[name], atol=1e-5, rtol=1e-5)

    def left_behind(self):
        unet, encoder = self.components["unet"], self.components["text_encoder"]
        hooks = [
            module._forward_hooks or module._forward_pre_hooks for module in (*unet.modules(), *encoder.modules())
        ]
        return {type(each).__name__ for each in unet.attn_processors.values()} | {str(hook) for hook in hooks if hook}


@pytest.fixture(scope="module")
def calls():
    components = tiny.components()
    return _Calls(components, packs.random_pack(components, "potter"))


def _in_thread(function, *arguments):
    """Run a function in another thread to its end, and raise here what it raised."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result(60)


def _at_first_step(function):
    def at_step(_pipe, step, _time, tensors):
        if step == 0:
            function()
        return tensors

    return at_step


OUTER = ["concept", "regions", "isolated", "a pair", "plain", "image", "control", "scaled control", "long text"]
INNER = [
    "concept",
    "other regions",
    "isolated",
    "plain",
    "stock",
    "scaled control",
    "control",
    "stock, as long as a stack",
]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", OUTER)
def test_a_call_inside_anothers_callback_and_in_a_thread_meanwhile(calls, outer, inner):
    drawn = []

    def meanwhile():
        drawn.append(calls.draw(inner))
        if inner != outer:  # which would be one pipeline in two threads
            drawn.append(_in_thread(calls.draw, inner))

    calls.assert_alone(outer, calls.draw(outer, _at_first_step(meanwhile)))
    calls.assert_alone(inner, *drawn)
    assert calls.left_behind() == {"AttnProcessor2_0"}


CROSSED = [("concept", "regions"), ("regions", "other regions"), ("regions", "stock"), ("isolated", "scaled control")]
CROSSED += [
    ("control", "a pair"),
    ("plain", "regions"),
    ("concept", "long text"),
    ("regions", "stock, as long as a stack"),
]


@pytest.mark.parametrize(("first", "second"), CROSSED + [pair[::-1] for pair in CROSSED])
@pytest.mark.parametrize("fails", [False, True], ids=["", "the first fails"])
def test_the_first_ends_while_the_second_runs(calls, first, second, fails):
    first_runs, second_runs, first_ended = (threading.Event() for _ in range(3))

    def of_first():
        first_runs.set()
        assert second_runs.wait(60)
        if fails:
            raise KeyboardInterrupt

    def of_second():
        second_runs.set()
        assert first_ended.wait(60)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(calls.draw, first, _at_first_step(of_first))
        assert first_runs.wait(60)
        two = pool.submit(calls.draw, second, _at_first_step(of_second))
        if fails:
            assert isinstance(one.exception(60), KeyboardInterrupt)
        else:
            calls.assert_alone(first, one.result(60))
        first_ended.set()
        calls.assert_alone(second, two.result(60))
    assert calls.left_behind() == {"AttnProcessor2_0"}


def test_threads_that_nobody_orders(calls):
    names = ["concept", "regions", "other regions", "isolated", "control", "scaled control", "plain"]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(calls.draw, names))
    for name, latents in zip(names, drawn, strict=True):
        calls.assert_alone(name, latents)
    assert calls.left_behind() == {"AttnProcessor2_0"}


def test_a_call_ends_while_another_begins_a_pass(calls):
    # Torch looks up a pass's hooks before it runs them: the second call's pass has seen the hook of the first, which
    # is removed meanwhile, together with torch's note that it takes named arguments.
    unet, ended, begun = calls.components["unet"], threading.Event(), threading.Event()

    def hold_pass(_unet, _inputs):
        if threading.current_thread() is second:
            begun.set()
            assert ended.wait(60)

    drawn = []
    second = threading.Thread(target=lambda: drawn.append(calls.draw("plain")))

    def begin_second():
        if second.ident is None:
            second.start()
        assert begun.wait(60)

    held = unet.register_forward_pre_hook(hold_pass)
    try:
        calls.assert_alone("regions", calls.draw("regions", _at_first_step(begin_second)))
        ended.set()
        second.join(60)
    finally:
        held.remove()
    calls.assert_alone("plain", *drawn)
    assert len(drawn) == 1
    assert calls.left_behind() == {"AttnProcessor2_0"}


def test_prompts_are_encoded_by_many_threads_at_once(calls):
    # A fast tokenizer keeps its truncation as state, which a concept's prompt and a plain one want otherwise; a
    # LoRA's scale is the text encoder's.
    pipe = calls.pipes["concept"]
    wanted = [("a <potter>", None), ("a dog " * 60, None), ("a <potter> and a dog", 0.5), ("a dog", 0.5)] * 40

    def encode(prompt, scale):
        with torch.no_grad():
            return pipe.encode_prompt(prompt, "cpu", 1, False, lora_scale=scale)[0]

    alone = {one: encode(*one) for one in dict.fromkeys(wanted)}
    with ThreadPoolExecutor(8) as pool:
        for one, encoded in zip(wanted, pool.map(encode, *zip(*wanted, strict=True)), strict=True):
            torch.testing.assert_close(encoded, alone[one])


@pytest.mark.parametrize("inner", ["other regions", "long text"])
@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_compiled_denoisers_serve_overlapping_calls(calls, compiled, inner):
    unet = calls.components["unet"]
    try:
        if compiled == "in place":
            unet.compile(disable=True)  # by the way of a compiled model, without the minutes
        else:
            calls.pipes["regions"].unet = torch.compile(unet, disable=True)
        before, drawn = unet._compiled_call_impl, []
        outer = calls.draw("regions", _at_first_step(lambda: drawn.append(_in_thread(calls.draw, inner))))
        calls.assert_alone("regions", outer)
        calls.assert_alone(inner, *drawn)
        assert unet._compiled_call_impl is before
    finally:
        unet._compiled_call_impl = None
        calls.pipes["regions"].unet = unet
    assert calls.left_behind() == {"AttnProcessor2_0"}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_a_pipeline_may_be_called_inside_its_own_callback(calls, scheduler):
    pipe = MixOfShowPipeline.from_pipe(calls.pipes["concept"])
    pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt, steps, guidance, **settings):
        settings = {**SETTINGS, **settings, "num_inference_steps": steps, "guidance_scale": guidance}
        return pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images

    alone = draw("a <potter>", 4, 3), draw("x", 3, 1.5, regions=[LEFT])
    inner = []
    outer = draw(
        "a <potter>",
        4,
        3,
        callback_on_step_end=_at_first_step(lambda: inner.append(draw("x", 3, 1.5, regions=[LEFT]))),
    )
    torch.testing.assert_close(outer, alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inner[0], alone[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", ["pipeline", "scheduler"])
def test_what_serves_one_thread_at_a_time_says_so(calls, shared):
    other = calls.pipes["regions"]
    if shared == "scheduler":
        other = MixOfShowPipeline.from_pipe(other)  # diffusers hands the scheduler over as it is

    def draw():
        return other("x", **SETTINGS)

    def meanwhile():
        with pytest.raises(ConfigurationError, match=r"another thread.*scheduler of its own"):
            _in_thread(draw)

    calls.assert_alone("regions", calls.draw("regions", _at_first_step(meanwhile)))
    calls.assert_alone("regions", _in_thread(calls.draw, "regions"))


CHANGES = {
    "load": lambda pipe: pipe.load_edlora(packs.random_pack(pipe.components, "thanos")),
    "unload": lambda pipe: pipe.unload_edlora(),
    "load a LoRA": lambda pipe: pipe.load_lora_weights(
        {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(1, 64)}, adapter_name="style"
    ),
    "unload all LoRAs": lambda pipe: pipe.unload_lora_weights(),
    "delete": lambda pipe: pipe.delete_adapters("potter"),
    "weigh": lambda pipe: pipe.set_adapters(["potter"], [0.3]),
    "set aside": lambda pipe: pipe.set_concepts_aside().__enter__(),
    "train": lambda pipe: trainable(pipe.components, 1, 1.0).__enter__(),
    "merge": lambda pipe: merged(pipe.components, packs.random_pack(pipe.components)).__enter__(),
    "scale": lambda pipe: pipe("x", cross_attention_kwargs={"scale": 0.5}, **SETTINGS),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_thread_changes_a_model_that_another_draws_with(calls, change):
    def meanwhile():
        with pytest.raises(ConfigurationError, match="Another thread draws"):
            _in_thread(change, calls.pipes["concept"])

    calls.assert_alone("regions", calls.draw("regions", _at_first_step(meanwhile)))
    assert list(calls.pipes["concept"].concepts) == ["<potter>"]
    calls.assert_alone("concept", calls.draw("concept"))


def test_no_thread_draws_with_a_model_that_another_changes(calls):
    pipe = calls.pipes["regions"]
    for block in (trainable(pipe.components, 1, 1.0), pipe.set_concepts_aside()):
        with block, pytest.raises(ConfigurationError, match="Another thread is changing"):
            _in_thread(calls.draw, "concept")
    calls.assert_alone("concept", calls.draw("concept"))


def test_a_strength_for_one_call_leaves_a_call_inside_its_callback_alone(calls):
    expected = calls.pipes["plain"]("a <potter>", cross_attention_kwargs={"scale": 0.5}, **_seeded()).images
    drawn = []
    weaker = calls.pipes["plain"](
        "a <potter>",
        cross_attention_kwargs={"scale": 0.5},
        **_seeded(),
        callback_on_step_end=_at_first_step(lambda: drawn.append(calls.draw("concept"))),
    ).images
    torch.testing.assert_close(weaker, expected)
    assert not torch.allclose(weaker, calls.alone["concept"], atol=1e-3)
    calls.assert_alone("concept", *drawn)


def _seeded():
    return {**SETTINGS, "generator": torch.Generator().manual_seed(0)}


def test_processors_that_a_callback_sets_stay_and_serve_the_next_call(calls):
    unet = calls.components["unet"]
    before = dict(unet.attn_processors)
    try:
        calls.draw("plain", _at_first_step(lambda: unet.set_attn_processor(AttnProcessor())))
        assert {type(each).__name__ for each in unet.attn_processors.values()} == {"AttnProcessor"}
        torch.testing.assert_close(calls.draw("regions"), calls.alone["regions"], atol=1e-4, rtol=1e-3)
        with pytest.raises(ConfigurationError, match="stop here"):
            calls.draw("regions", _at_first_step(lambda: (unet.set_attn_processor(dict(before)), _stop())))
        assert all(unet.attn_processors[name] is each for name, each in before.items())
    finally:
        unet.set_attn_processor(dict(before))
    calls.assert_alone("regions", calls.draw("regions"))


def _stop():
    raise ConfigurationError("stop here")
