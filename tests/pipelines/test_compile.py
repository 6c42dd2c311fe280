"""`torch.compile` on the denoiser: no graph breaks, the same pictures, and nothing compiled twice for one layout."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import tiny
from diffusers_mixofshow.regions import Isolation, Region
from pipelines.conftest import SETTINGS


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.4, 0.2, 1.0, 1.0)


def _in_place(pipe, compiled):
    pipe.unet.compile(fullgraph=True, backend=compiled)


def _wrapped(pipe, compiled):
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=compiled)


def _blocks(pipe, compiled):
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=compiled)


class _Counting:
    """The backend "eager", counting the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def components():
    """With a U-Net of one block down, none between and one up, as tracing takes seconds for each."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return tiny.components() | {"unet": unet.eval()}


_PLACED = {"regions": [Region("a <potter>", box=LEFT), Region("a dog", box=RIGHT)]}
_CHANGING = {
    "regions": [Region("a <potter>", box=LEFT, end=0.5), Region("a dog", box=RIGHT)],
    "isolation": Isolation(),
}


@pytest.mark.parametrize(
    ("compile_unet", "call"),
    [(_in_place, {}), (_in_place, _CHANGING), (_wrapped, _PLACED), (_blocks, _PLACED)],
    ids=["layer-wise in place", "changing and isolated in place", "regions wrapped", "regions by blocks"],
)
def test_compiled_gives_the_same_without_graph_breaks(pipe, make_pack, call, compile_unet):
    pipe.load_edlora(make_pack("potter"))
    settings = {**SETTINGS, **call, "prompt": "a <potter> and a dog", "num_inference_steps": 3}

    def sample():
        return pipe(**settings, generator=torch.Generator().manual_seed(0)).images

    expected = sample()
    backend = _Counting()
    compile_unet(pipe, backend)
    torch.testing.assert_close(sample(), expected)
    assert backend.graphs > 0
    graphs = backend.graphs
    torch.testing.assert_close(sample(), expected)
    assert backend.graphs == graphs


def test_another_layout_gets_its_own_picture(pipe, make_pack):
    pipe.load_edlora(make_pack("potter"))

    def sample(box):
        regions = [Region("a <potter>", box=box)]
        return pipe("a dog", regions=regions, **SETTINGS, generator=torch.Generator().manual_seed(0)).images

    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.25, 0.0, 0.75, 0.5)]
    expected = [sample(box) for box in boxes]
    _blocks(pipe, "eager")
    for box, picture in zip(boxes, expected, strict=True):
        torch.testing.assert_close(sample(box), picture)


def test_a_compiled_denoiser_is_given_back(pipe, make_pack):
    _in_place(pipe, "eager")
    before = pipe.unet._compiled_call_impl
    pipe.load_edlora(make_pack("potter"))
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="stop"):
        pipe("a dog", regions=[Region("a <potter>", box=LEFT)], **SETTINGS, callback_on_step_end=_stop)
    assert pipe.unet._compiled_call_impl is before
    assert not pipe.unet._forward_pre_hooks


def _stop(*_):
    raise RuntimeError("stop")
