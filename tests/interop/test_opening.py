"""One resolver: whatever `mixofshow inspect` understands is loaded, fused and named as it is, without a conversion."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import EDLoRA, GradientFuser, LoRASource, MixOfShowPipeline, MixOfShowWarning
from diffusers_mixofshow.cli import app
from diffusers_mixofshow.errors import ConfigurationError, EDLoRAFormatError, EDLoRANotFoundError, FusionError
from diffusers_mixofshow.fusion import FusedPack
from diffusers_mixofshow.interop import convert, write_kohya, write_lora, write_original
from diffusers_mixofshow.interop.opening import open_edlora, read_any
from diffusers_mixofshow.pipelines.publishing import join_packs
from interop import foreign as files


@pytest.fixture(scope="module")
def components() -> dict[str, object]:
    return tiny.components()


@pytest.fixture
def pipe(components: dict[str, object]) -> MixOfShowPipeline:
    pipeline = MixOfShowPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    pipeline.unload_edlora()


@pytest.fixture(scope="module")
def rex(components: dict[str, object]) -> EDLoRA:
    """A concept with the same embedding in all layers, which every format can say."""
    pack = packs.random_pack(components, "rex", ranks=(2,), alphas=(2.0,))
    rows = {token: row[:1].expand(len(row), -1).contiguous() for token, row in pack.embeddings.items()}
    lora = {site: replace(update, down=0.3 * update.down) for site, update in pack.lora.items()}
    return replace(pack, embeddings=rows, lora=lora)


def drawn(pipe: Any, prompt: str) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images


def _peft(folder: Path, pack: EDLoRA) -> Path:
    """PEFT's folder of the U-Net's updates."""
    unet = {site: update for site, update in pack.lora.items() if site.startswith("unet.")}
    tensors = load_file(write_lora(folder / "all.safetensors", unet))
    (folder / "all.safetensors").unlink()
    names = {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    return folder


def _a1111(folder: Path, pack: EDLoRA) -> Path:
    rows = torch.stack([row[0] for row in pack.embeddings.values()])
    torch.save({"string_to_param": {"*": rows}, "name": "rex"}, folder / "rex.pt")
    return folder / "rex.pt"


def _named(folder: Path, pack: EDLoRA, to: str) -> Path:
    convert(pack, folder / to, to)
    return folder / to


CONCEPTS: dict[str, Callable[[Path, EDLoRA], Path]] = {
    "authors' checkpoint": lambda folder, pack: write_original(folder / "edlora_model-latest.pth", pack),
    "folder with it": lambda folder, pack: write_original(folder / "models" / "x.pth", pack).parent,
    "kohya with embeddings": lambda folder, pack: _named(folder, pack, "kohya"),
    "diffusers with embeddings": lambda folder, pack: _named(folder, pack, "diffusers"),
    "the file beside embeddings": lambda folder, pack: (
        _named(folder, pack, "diffusers") / "pytorch_lora_weights.safetensors"
    ),
    "our own": lambda folder, pack: pack.save_pretrained(folder / "own"),
    "our own, renamed": lambda folder, pack: pack.save_pretrained(folder / "own").rename(
        folder / "my rex.safetensors"
    ),
}
WORDS: dict[str, Callable[[Path, EDLoRA], Path]] = {
    "textual inversion": lambda folder, pack: next(_named(folder, pack, "textual-inversion").iterdir()),
    "folder of it": lambda folder, pack: _named(folder, pack, "textual-inversion"),
    "A1111's": _a1111,
}
PLAIN: dict[str, Callable[[Path, EDLoRA], Path]] = {
    "diffusers": lambda folder, pack: write_lora(folder / "style.safetensors", pack.lora),
    "diffusers, folder": lambda folder, pack: (
        write_lora(folder / "pytorch_lora_weights.safetensors", pack.lora).parent
    ),
    "kohya": lambda folder, pack: write_kohya(folder / "my style, v2.safetensors", pack.lora),
    "PEFT": _peft,
    "authors' without embeddings": lambda folder, pack: write_original(
        folder / "lora.pth", replace(pack, concepts=(), embeddings={})
    ),
}


@pytest.mark.parametrize("write", [*CONCEPTS.values(), *WORDS.values()], ids=[*CONCEPTS, *WORDS])
def test_a_concept_of_any_program_draws_as_the_concept(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, write: Callable[[Path, EDLoRA], Path]
) -> None:
    pack = replace(rex, lora={}) if write in WORDS.values() else rex
    pipe.load_edlora(pack)
    expected = drawn(pipe, "a <rex> in the rain")
    pipe.unload_edlora()
    pipe.load_edlora(write(tmp_path, rex))
    assert list(pipe.concepts) == ["<rex>"]
    torch.testing.assert_close(drawn(pipe, "a <rex> in the rain"), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_edlora("<rex>")
    assert not pipe.concepts


@pytest.mark.parametrize("write", PLAIN.values(), ids=PLAIN)
def test_a_plain_lora_of_any_program_draws_as_diffusers_draws_it(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, write: Callable[[Path, EDLoRA], Path]
) -> None:
    base = drawn(pipe, "a dog")
    place = write(tmp_path, rex)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        pipe.load_edlora(place)
    found = drawn(pipe, "a dog")
    assert not pipe.concepts
    pipe.unload_edlora()
    assert torch.equal(drawn(pipe, "a dog"), base)
    told = {site: replace(update, alpha=6.0) for site, update in rex.lora.items() if site.startswith("unet.")}
    wanted = told if write is _peft else rex.lora
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.load_lora_weights(write_lora(tmp_path / "stock" / "x.safetensors", wanted))
    expected = drawn(stock, "a dog")
    stock.unload_lora_weights()
    assert (found - base).norm() > 0.01 * base.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plain_loras_are_called_like_their_files(pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path) -> None:
    for write in (PLAIN["diffusers"], PLAIN["kohya"]):
        pipe.load_edlora(write(tmp_path, rex))
    assert set(pipe.get_list_adapters()["unet"]) == {"style", "my_style__v2"}
    pipe.unload_edlora("style")
    assert set(pipe.get_list_adapters()["unet"]) == {"my_style__v2"}


def test_what_a_file_does_not_tell_is_told(pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path) -> None:
    path = write_original(tmp_path / "x.pth", rex)
    with pytest.warns(
        MixOfShowWarning, match=r"x\.pth: it has no class word for <rex>; 'thing' and kind 'object' are assumed"
    ):
        pipe.load_edlora(path)
    with pytest.warns(MixOfShowWarning, match="it has no class word for <rex>"):
        GradientFuser(pipe).fuse([path], method="average")


def _endless(folder: Path, pack: EDLoRA) -> Path:
    rows = {token: row * float("nan") for token, row in pack.embeddings.items()}
    return write_original(folder / "x.pth", replace(pack, embeddings=rows))


def _halved(folder: Path, pack: EDLoRA) -> Path:
    path = write_kohya(folder / "x.safetensors", pack.lora)
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_up" in name))
    save_file(tensors, path)
    return path


def _text(folder: Path, pack: EDLoRA) -> Path:
    (folder / "x.pth").write_text("{}")
    return folder / "x.pth"


def _empty(folder: Path, pack: EDLoRA) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


def _of_sd(folder: Path, pack: EDLoRA) -> Path:
    files.original(folder / "x.pth")
    return folder / "x.pth"


def _of_flux(folder: Path, pack: EDLoRA) -> Path:
    layer = "transformer.single_transformer_blocks.0.proj_mlp"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)},
        folder / "flux.safetensors",
    )
    return folder / "flux.safetensors"


BROKEN: dict[str, tuple[Callable[[Path, EDLoRA], Any], str]] = {
    "values that are not finite": (_endless, "not finite"),
    "half an update": (_halved, "only one of the two matrices"),
    "no checkpoint": (_text, "cannot be read"),
    "nothing in it": (_empty, "holds no LoRA"),
    "nothing there": (lambda folder, pack: folder / "none.pth", "does not exist"),
    "of another base": (_of_sd, "does not fit the model"),
    "of another family": (_of_flux, "has no transformer, whose layers it changes: 1"),
    "a name of 10,000 letters": (lambda folder, pack: "x" * 10_000, "does not exist"),
}


@pytest.mark.parametrize(("write", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_one_error_and_the_pipeline_stays(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, write: Callable[[Path, EDLoRA], Any], message: str
) -> None:
    place = write(tmp_path, rex)
    with pytest.raises((EDLoRAFormatError, EDLoRANotFoundError), match=message):
        pipe.load_edlora(place)
    assert not pipe.concepts
    assert not pipe.get_list_adapters()
    plain = write is _of_flux
    given = LoRASource(place, prompts=["sks"]) if plain else place
    if plain:
        message = "whose layers are others than those of flux for FLUX.1; give the base"
    with pytest.raises((EDLoRAFormatError, EDLoRANotFoundError, FusionError), match=message):
        GradientFuser(pipe).fuse([given], method="average")


def test_a_folder_of_folders_tells_which_of_them_hold_concepts(rex: EDLoRA, tmp_path: Path) -> None:
    for name in ("rex", "another rex"):
        rex.save_pretrained(tmp_path / name)
    write_lora(tmp_path / "style" / "pytorch_lora_weights.safetensors", rex.lora)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "model.safetensors").write_bytes(b"")
    with pytest.raises(EDLoRANotFoundError, match=r"give one of them: 3 \(another rex, rex, style\)\.$"):
        read_any(tmp_path)


@pytest.mark.parametrize("text", ["Hello, this is a text.\n", "x"])
def test_a_text_that_is_called_safetensors_is_told_to_be_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.safetensors"
    file.write_text(text * 20)
    with pytest.raises(EDLoRAFormatError, match="it is no safetensors file"):
        read_any(file)


@pytest.mark.parametrize(
    "write", [CONCEPTS["authors' checkpoint"], CONCEPTS["kohya with embeddings"], *WORDS.values()]
)
def test_any_concept_is_fused_without_a_conversion(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, write: Callable[[Path, EDLoRA], Path]
) -> None:
    kit = packs.random_pack(pipe.components, "kit", ranks=(2,), seed=3)
    fused = GradientFuser(pipe, steps=1, prompts=["a <TOK>"]).fuse([write(tmp_path, rex), kit])
    assert [concept.placeholder for concept in fused.concepts] == ["<rex>", "<kit>"]
    assert fused.base_model == "someone/tiny"
    fused.save_pretrained(tmp_path / "pack")
    pipe.load_edlora(tmp_path / "pack")
    assert drawn(pipe, "a <rex> and a <kit>").isfinite().all()


def test_statistics_of_other_programs_files_are_kept_and_found(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path
) -> None:
    settings = {"sequential": False, "steps": 1, "prompts": ["a <TOK>", "<TOK>"]}
    for place in (write_original(tmp_path / "x.pth", rex), _named(tmp_path, rex, "diffusers")):
        kept = GradientFuser(pipe, **settings).record(place).file
        assert kept is not None
        before = kept.stat().st_mtime_ns, kept.read_bytes()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Statistics")
            GradientFuser(pipe, **settings).fuse([place])
        assert (kept.stat().st_mtime_ns, kept.read_bytes()) == before
        assert set(GradientFuser().fuse([place]).lora) == set(rex.lora)


@pytest.mark.parametrize("write", PLAIN.values(), ids=PLAIN)
def test_a_plain_lora_needs_its_trigger_words_to_be_fused(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, write: Callable[[Path, EDLoRA], Path]
) -> None:
    place = write(tmp_path, rex)
    with pytest.raises(FusionError, match=r"is a plain LoRA.*give LoRASource\(.*prompts=") as told:
        GradientFuser(pipe).fuse([place])
    assert "\n" not in str(told.value)
    fused = GradientFuser(pipe).fuse([LoRASource(place, ["sks dog"])], method="average")
    assert not fused.concepts
    assert set(fused.lora) <= set(rex.lora)


def test_concepts_are_not_taken_for_plain_loras(pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path) -> None:
    path = write_original(tmp_path / "x.pth", rex)
    with pytest.raises(FusionError, match=r"not a plain LoRA: it holds embeddings of <rex>.*FusionSource\("):
        GradientFuser(pipe).fuse([LoRASource(path, ["sks dog"])])


def test_the_command_line_takes_the_same(components: dict[str, object], rex: EDLoRA, tmp_path: Path) -> None:
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    checkpoint = write_original(tmp_path / "rex.pth", rex)
    style = tmp_path / "style"
    style.mkdir()
    _peft(style, rex)
    common = ["--base", str(tmp_path / "base"), "--method", "average", "--output", str(tmp_path / "pack")]
    runner = CliRunner()
    given = ["fuse", str(checkpoint), str(style), "--prompts", "ink style"]
    result = runner.invoke(app, [*given, *common], catch_exceptions=False)
    assert "Wrote the fused pack of <rex>, style to" in result.output
    recording = [*common, "--method", "closed-form"]
    with pytest.raises(ConfigurationError, match=r"Got --prompts 0 times for 1 plain LoRAs \(.*style\)"):
        runner.invoke(app, ["fuse", str(checkpoint), str(style), *recording], catch_exceptions=False)
    drawing = ["--base", str(tmp_path / "base"), "--steps", "1"]
    for concepts, prompt in ((checkpoint, "a <rex>"), (style, "ink")):
        picture = tmp_path / f"{concepts.stem}.png"
        sampled = ["sample", "--concepts", str(concepts), "--prompt", prompt, *drawing, "--output", str(picture)]
        assert runner.invoke(app, sampled, catch_exceptions=False).exit_code == 0
        assert picture.exists()


def _published(hub: Any, repo_id: str, folder: Path) -> None:
    from diffusers_mixofshow.edlora.hub import create

    create(repo_id, token=hub.token, private=False, revision=None)
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories[repo_id].commit("main", "files", content)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("edlora_model-latest.pth", lambda folder, pack: write_original(folder / "edlora_model-latest.pth", pack)),
        ("adapter_model.safetensors", _peft),
        (
            "pytorch_lora_weights.safetensors",
            lambda folder, pack: write_lora(folder / "pytorch_lora_weights.safetensors", pack.lora),
        ),
    ],
)
def test_a_repository_of_another_program_is_loaded_and_fused(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, loopback_hub: Any, name: str, write: Callable[..., Path]
) -> None:
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo", rex)
    _published(loopback_hub, "me/rex", tmp_path / "repo")
    pipe.load_edlora(tmp_path / "repo")
    expected = drawn(pipe, "a dog")
    pipe.unload_edlora()
    pipe.load_edlora("me/rex")
    assert torch.equal(drawn(pipe, "a dog"), expected)
    pipe.unload_edlora()
    pipe.load_edlora("me/rex", weight_name=name)
    plain = not pipe.concepts
    fused = GradientFuser(pipe).fuse([LoRASource("me/rex", ["x"]) if plain else "me/rex"], method="average")
    assert fused.sources[0].revision
    again = fused.save_pretrained(tmp_path / "pack").parent
    found = FusedPack.from_pretrained(again).sources[0]
    assert (found.edlora.digest, found.revision) == (fused.sources[0].edlora.digest, fused.sources[0].revision)


@pytest.mark.parametrize("subfolder", [None, "of/two"])
def test_embeddings_of_the_advanced_training_script_come_with_its_lora(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, loopback_hub: Any, subfolder: str | None
) -> None:
    """From the Hub as from a folder, and from its cache when the Hub is not asked."""
    folder = tmp_path / "repo" / (subfolder or "")
    write_lora(folder / "pytorch_lora_weights.safetensors", rex.lora)
    width = next(iter(rex.embeddings.values())).shape[1]
    for name in ("rex_emb", "rex_emb_checkpoint_5", "other"):
        save_file({"clip_l": torch.ones(2, width)}, folder / f"{name}.safetensors")
    _published(loopback_hub, "me/rex", tmp_path / "repo")
    for name in ("rex_emb_checkpoint_5", "other"):
        (folder / f"{name}.safetensors").unlink()
    expected = open_edlora(tmp_path / "repo", subfolder=subfolder).edlora
    assert [concept.placeholder for concept in expected.concepts] == ["<rex>"]
    for where in ({}, {"local_files_only": True}):
        found = open_edlora("me/rex", subfolder=subfolder, **where)
        assert found.edlora.digest == expected.digest
        assert found.file.name == "pytorch_lora_weights.safetensors"
    alone = open_edlora("me/rex", subfolder=subfolder, weight_name="pytorch_lora_weights.safetensors")
    assert not alone.edlora.concepts


def test_a_plain_lora_of_a_repository_is_fused_without_the_embeddings_beside_it(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, loopback_hub: Any
) -> None:
    """As one of a folder is, and found again when the pack is changed."""
    write_lora(tmp_path / "repo" / "pytorch_lora_weights.safetensors", rex.lora)
    width = next(iter(rex.embeddings.values())).shape[1]
    save_file({"clip_l": torch.ones(2, width)}, tmp_path / "repo" / "rex_emb.safetensors")
    _published(loopback_hub, "me/rex", tmp_path / "repo")
    packs = [
        GradientFuser(pipe).fuse([LoRASource(source, ["x"], name="rex")], method="average")
        for source in (tmp_path / "repo", "me/rex")
    ]
    assert packs[0].digest == packs[1].digest
    again = packs[1].save_pretrained(tmp_path / "pack").parent
    assert FusedPack.from_pretrained(again).sources[0].edlora.digest == packs[1].sources[0].edlora.digest


def test_a_file_of_a_repository_or_folder_is_named(
    pipe: MixOfShowPipeline, rex: EDLoRA, tmp_path: Path, loopback_hub: Any
) -> None:
    folder = tmp_path / "repo"
    for name in ("one", "two"):
        write_kohya(folder / "styles" / f"{name}.safetensors", rex.lora)
    _published(loopback_hub, "me/styles", folder)
    for source in (folder, "me/styles"):
        pipe.load_edlora(source, subfolder="styles", weight_name="two.safetensors")
        assert list(pipe.get_list_adapters()["unet"]) == ["two"]
        pipe.unload_edlora()
    with pytest.raises(EDLoRANotFoundError, match=r"holds no three\.safetensors"):
        pipe.load_edlora("me/styles", weight_name="three.safetensors")
    with pytest.raises(EDLoRANotFoundError, match=r"holds no ED-LoRA"):
        pipe.load_edlora("me/styles")
    with pytest.raises(EDLoRAFormatError, match="holds several"):
        pipe.load_edlora(folder / "styles")
    with pytest.raises(EDLoRAFormatError, match="leads out of"):
        pipe.load_edlora(folder / "styles", weight_name="../../other.safetensors")


def test_a_complete_pipeline_is_no_concept(
    pipe: MixOfShowPipeline, components: dict[str, object], rex: EDLoRA, tmp_path: Path
) -> None:
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path / "base")
    merged = tmp_path / "merged"
    replace(rex, base_model=str(tmp_path / "base")).save_pretrained(merged, merged=True)
    for folder in (tmp_path / "base", merged, merged / "edlora.safetensors"):
        with pytest.raises(ConfigurationError, match=r"complete pipeline.*MixOfShowPipeline\.from_pretrained\("):
            pipe.load_edlora(folder)
        with pytest.raises(ConfigurationError, match="complete pipeline"):
            GradientFuser(pipe).fuse([folder])
    read = read_any(merged)  # to look at, it is a pack of embeddings
    assert isinstance(read, EDLoRA)
    assert not read.lora
    beside = Path(shutil.copytree(tmp_path / "base", tmp_path / "beside"))
    own = rex.save_pretrained(tmp_path / "own")
    for name in ("rex.safetensors", "edlora.safetensors"):  # packs in the folder of their base are packs
        pipe.load_edlora(shutil.copy(own, beside / name))
        pipe.unload_edlora()
    pipe.load_edlora(beside)
    assert list(pipe.concepts) == ["<rex>"]


def test_the_base_is_the_one_that_it_was_loaded_into(
    components: dict[str, object], rex: EDLoRA, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(base)
    pipe = MixOfShowPipeline.from_pretrained(base)
    path = write_original(tmp_path / "x.pth", rex)
    pipe.load_edlora(write_lora(tmp_path / "style.safetensors", rex.lora))
    pipe.load_edlora(path)
    pipe.save_edlora(tmp_path / "saved", "<rex>")
    assert EDLoRA.from_pretrained(tmp_path / "saved").base_model == str(base)
    assert GradientFuser(pipe).fuse([path], method="average").base_model == str(base)
    everything = join_packs(pipe.components, pipe._edloras)
    assert (everything.base_model, everything.layers) == (str(base), rex.layers)


def test_a_base_in_the_hubs_cache_is_called_by_its_id(tmp_path: Path, rex: EDLoRA, components) -> None:
    base = tmp_path / "models--someone--tiny" / "snapshots" / ("ab" * 20)
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(base)
    pipe = MixOfShowPipeline.from_pretrained(base)
    pipe.load_edlora(write_original(tmp_path / "x.pth", rex))
    pipe.save_edlora(tmp_path / "saved", "<rex>")
    assert EDLoRA.from_pretrained(tmp_path / "saved").base_model == "someone/tiny"


def test_the_command_line_says_which_base_it_takes(tmp_path: Path, rex: EDLoRA) -> None:
    files.original(tmp_path / "x.pth")
    arguments = ["sample", "--concepts", str(tmp_path / "x.pth"), "--prompt", "a <rex>", "--dry-run"]
    with pytest.warns(MixOfShowWarning, match=r"does not tell its base model; stable-diffusion-v1-5/\S+ is taken"):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "base model: stable-diffusion-v1-5/" in result.output
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)  # the class word decides nothing of the picture
        CliRunner().invoke(app, [*arguments, "--base", "toyland"], catch_exceptions=False)
        given = ["evaluate", str(tmp_path / "x.pth"), "--base", "toyland", "--class-word", "rex=cat", "--dry-run"]
        result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0
    style = str(write_lora(tmp_path / "style.safetensors", rex.lora))
    with pytest.raises(ConfigurationError, match=r"trigger words of style are not known.*--trigger style=WORDS"):
        CliRunner().invoke(app, ["evaluate", style, "--base", "toyland", "--dry-run"], catch_exceptions=False)
