"""Checkpoints of one file: of SDXL as diffusers reads them, and those that are something else."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from diffusers_mixofshow import (
    MixOfShowPipeline,
    MixOfShowXLAdapterPipeline,
    MixOfShowXLControlNetPipeline,
    MixOfShowXLImg2ImgPipeline,
    MixOfShowXLInpaintPipeline,
    MixOfShowXLPipeline,
    Region,
)
from diffusers_mixofshow.errors import ConfigurationError
from diffusers_mixofshow.interop.checkpoint import family_of_checkpoint, is_checkpoint
from diffusers_mixofshow.pipelines.other_families import refuse_other_checkpoints
from families.pipelines import tiny_pipeline
from original_layout import write_original


REGIONS = [Region("a cat", box=(0, 0, 0.5, 1)), Region("a dog", box=(0.4, 0.2, 1, 0.8))]


def write(names, file):
    """Write a file whose tensors have these names, and hold nothing of interest."""
    save_file({name: torch.zeros(1) for name in names}, file)


@pytest.fixture(scope="module")
def base():
    return tiny_pipeline("Stable Diffusion XL")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The pipeline's configuration alone, as it would be downloaded: no weights of any model."""
    folder = tmp_path_factory.mktemp("config")
    base.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    return write_original(base, tmp_path_factory.mktemp("checkpoint") / "tuned.safetensors")


def test_a_pipeline_is_made_of_a_checkpoint_and_a_configuration(base, folder, checkpoint, latents):
    made = MixOfShowXLPipeline.from_single_file(checkpoint, config=str(folder), add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    assert torch.equal(latents(made, "a cat"), latents(base, "a cat"))
    assert made.vae.dtype == made.text_encoder_2.dtype == torch.float32
    theirs = MixOfShowXLPipeline(**base.components, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    assert torch.equal(latents(made, "a cat", regions=REGIONS), latents(theirs, "a cat", regions=REGIONS))


def test_the_dtype_is_the_one_asked_for_and_else_float32(base, folder, checkpoint, tmp_path):
    halves = {name: each.half() for name, each in load_file(checkpoint).items()}
    save_file(halves, tmp_path / "half.safetensors")
    for given, wanted in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        made = MixOfShowXLPipeline.from_single_file(tmp_path / "half.safetensors", config=str(folder), **given)
        parts = (made.unet, made.vae, made.text_encoder, made.text_encoder_2)
        assert {part.dtype for part in parts} == {wanted}
        stock = StableDiffusionXLPipeline.from_single_file(
            str(tmp_path / "half.safetensors"), config=str(folder), torch_dtype=wanted
        )
        for part, other in zip(parts, (stock.unet, stock.vae, stock.text_encoder, stock.text_encoder_2), strict=True):
            assert all(torch.equal(each, part.state_dict()[name]) for name, each in other.state_dict().items())


OF_SD1 = ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x")
OF_SDXL = ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.bias")
KINDS = {
    "Stable Diffusion": [OF_SD1, OF_SD1[:1]],
    "Stable Diffusion XL": [OF_SDXL, OF_SDXL[1:], (OF_SD1[0], "model.diffusion_model.label_emb.0.0.weight")],
}


@pytest.mark.parametrize(("family", "names"), [(family, names) for family in KINDS for names in KINDS[family]])
def test_the_family_is_read_off_the_names(tmp_path, family, names):
    file = tmp_path / "x.safetensors"
    write(names, file)
    assert is_checkpoint(file)
    assert family_of_checkpoint(file).name == family
    others = {"Stable Diffusion": MixOfShowXLPipeline, "Stable Diffusion XL": MixOfShowPipeline}
    with pytest.raises(ConfigurationError, match=rf"is a checkpoint of {family}; .*MixOfShow\w*\.from_single_file"):
        others.pop(family).from_single_file(file)
    (own,) = others.values()
    refuse_other_checkpoints(own, str(file))


def test_every_pipeline_of_sdxl_takes_sdxls(tmp_path):
    write(OF_SDXL, tmp_path / "x.safetensors")
    kinds = (
        MixOfShowXLAdapterPipeline,
        MixOfShowXLControlNetPipeline,
        MixOfShowXLImg2ImgPipeline,
        MixOfShowXLInpaintPipeline,
    )
    for kind in kinds:
        refuse_other_checkpoints(kind, tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", [MixOfShowPipeline, MixOfShowXLPipeline])
@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "those of FLUX"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "those of Stable Diffusion 3"),
        (["lora_unet_down_blocks_0.lora_down.weight"], r"a LoRA's .*load_edlora"),
        (["encoder.conv_in.weight"], "other names .*'encoder.conv_in.weight'"),
        ([], "none at all"),
    ],
)
def test_anything_else_is_one_clear_error(tmp_path, kind, names, told):
    write(names, tmp_path / "x.safetensors")
    with pytest.raises(ConfigurationError, match=rf"no checkpoint of Stable Diffusion or .* XL: .*{told}.*Expected"):
        kind.from_single_file(tmp_path / "x.safetensors")


def header(content, length=None):
    return (len(content) if length is None else length).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [b"", b"no header", header(b"{", 2**40), header(b"{"), header(b"[1]"), header(b"\xff" * 9), header(b"7")],
)
def test_a_damaged_file_is_told(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"x\.safetensors cannot be read as a checkpoint .*download it again"):
        MixOfShowXLPipeline.from_single_file(tmp_path / "x.safetensors")


def test_a_file_may_be_larger_than_any_lora(tmp_path):
    """SDXL in float32 has 14 GB; of the file, its header alone is read."""
    file = tmp_path / "x.safetensors"
    write(OF_SDXL, file)
    with file.open("r+b") as opened:
        opened.truncate(14 * 10**9)  # the end takes no place on the disk
    assert family_of_checkpoint(file).name == "Stable Diffusion XL"


def test_what_is_no_file_here_is_left_to_diffusers(tmp_path):
    for other in (tmp_path / "missing.safetensors", tmp_path, "https://huggingface.co/user/repo/blob/main/x.ckpt"):
        assert not is_checkpoint(other)
        refuse_other_checkpoints(MixOfShowXLPipeline, other)
