"""Offload and half precision: accelerate's hooks on the CPU, and the real thing where there is a GPU."""

import accelerate
import pytest
import torch

from diffusers_mixofshow.regions import Region


REGIONS = [Region("a <potter>", box=(0, 0, 0.5, 1), negative_prompt="beard"), Region("a dog", box=(0.4, 0.2, 1, 1))]


@pytest.fixture
def potter(pipe, make_pack):
    """The pipeline with one concept."""
    pipe.load_edlora(make_pack("potter"))
    return pipe


def test_weights_may_be_away_between_calls(potter, latents):
    """What enable_sequential_cpu_offload() does, with the CPU as the device to run on."""
    expected = latents(potter, "a <potter>", regions=REGIONS)
    for name in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload(getattr(potter, name), torch.device("cpu"), offload_buffers=True)
    assert next(potter.text_encoder.parameters()).is_meta
    assert torch.allclose(latents(potter, "a <potter>", regions=REGIONS), expected, atol=1e-5)


def test_models_may_come_and_go(potter, latents):
    """What enable_model_cpu_offload() does, with the CPU as the device to run on."""
    expected = latents(potter, "a <potter>", regions=REGIONS)
    hook = None
    for name in ("text_encoder", "unet"):
        _, hook = accelerate.cpu_offload_with_hook(getattr(potter, name), torch.device("cpu"), prev_module_hook=hook)
    assert torch.equal(latents(potter, "a <potter>", regions=REGIONS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(potter, latents, dtype):
    expected = latents(potter, "a <potter>", regions=REGIONS)
    potter.to(dtype=dtype)
    result = latents(potter, "a <potter>", regions=REGIONS)
    assert result.dtype == dtype
    assert torch.nn.functional.cosine_similarity(result.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_a_gpu_it_draws_what_it_draws_on_the_cpu(potter, latents, dtype, place):
    expected = latents(potter, "a <potter>", regions=REGIONS)
    potter.to(dtype=dtype)
    getattr(potter, place)("cuda")
    result = latents(potter, "a <potter>", regions=REGIONS)
    assert torch.nn.functional.cosine_similarity(result.float().cpu().flatten(), expected.flatten(), dim=0) > 0.99
