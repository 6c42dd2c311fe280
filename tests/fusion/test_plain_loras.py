"""Plain LoRAs with trigger prompts are sources like ED-LoRAs."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import packs
import tiny
from diffusers_mixofshow import cli
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.edlora.file import PLAIN_NAME
from diffusers_mixofshow.edlora.hub import create
from diffusers_mixofshow.errors import (
    ConfigurationError,
    EDLoRAFormatError,
    EDLoRANotFoundError,
    FileWriteError,
    FusionError,
    MixOfShowWarning,
)
from diffusers_mixofshow.families.layers import linear_layers
from diffusers_mixofshow.fusion import FusedPack, FusionSource, GradientFuser, LoRASource
from diffusers_mixofshow.fusion.pack import read_plain_pack
from diffusers_mixofshow.fusion.pack_sources import list_places
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.sampling.loading import load_base


@pytest.fixture
def pipe() -> MixOfShowPipeline:
    return MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)


def _write(pipe: MixOfShowPipeline, path: Path, seed: int) -> Path:
    """A LoRA on every layer that a LoRA may adapt, ranks dealt out in turn."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for number, (site, layer) in enumerate(linear_layers(pipe.components).items()):
        wide, narrow = layer.weight.shape[:2]
        rank = 1 + number % 3
        lora[site] = LowRank(
            down=0.3 * torch.randn(rank, narrow, generator=generator),
            up=0.3 * torch.randn(wide, rank, generator=generator),
            alpha=2.0,
            convolution=layer.weight.dim() == 4,
        )
    return write_lora(path, lora)


def _fuser(pipe: MixOfShowPipeline, **settings: object) -> GradientFuser:
    return GradientFuser(pipe, steps=1, prompts=["<TOK>", "a <TOK>"], **settings)


def test_prompts_of_a_plain_lora_cannot_name_a_concept(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    path = _write(pipe, tmp_path / "one.safetensors", 0)
    with pytest.raises(FusionError, match=r"prompt: <rex>, which is one of a plain LoRA.*trigger words as they are"):
        _fuser(pipe).fuse([LoRASource(path, ["a <rex> in the snow"])])


def test_plain_loras_become_one_ordinary_lora(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    paths = [_write(pipe, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
    sources = [LoRASource(path, ["photo of sks dog", "sks dog"]) for path in paths]
    fused = _fuser(pipe, sequential=False, dtype=torch.float32).fuse(sources)
    assert (tmp_path / "one.statistics.safetensors").exists()
    assert set(fused.report.residuals) == {"one", "two"}
    assert all(mean["fused"] < mean["average"] for mean in fused.report.residuals.values())
    assert {site for site in fused.lora if "ff.net" in site or "proj_in" in site or "mlp" in site}
    assert fused.save_pretrained(tmp_path / "out").name == PLAIN_NAME
    stock = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    stock.load_lora_weights(tmp_path / "out")
    pipe.load_edlora(fused)
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    ours, theirs = (
        one("sks dog", num_inference_steps=2, generator=g, output_type="latent").images
        for one, g in zip((pipe, stock), noise, strict=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert set(GradientFuser().fuse(sources).report.residuals) == {"one", "two"}  # the statistics beside them serve


def test_a_plain_pack_calls_itself_by_its_sources(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    paths = [_write(pipe, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
    fused = _fuser(pipe).fuse([LoRASource(path, ["sks"]) for path in paths], method="average")
    fused.save_pretrained(tmp_path / "out", sources=True)
    for pack in (fused, FusedPack.from_pretrained(tmp_path / "out")):
        assert repr(pack).startswith("<FusedPack of the plain LoRAs one, two: "), repr(pack)


def test_one_plain_lora_is_itself_on_what_was_recorded(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    path = _write(pipe, tmp_path / "one.safetensors", 1)
    for sequential in (False, True):
        fused = _fuser(pipe, sequential=sequential, ridge=1e-9).fuse([LoRASource(path, ["sks"])])
        assert fused.report.residuals["one"]["fused"] < 0.01


def test_plain_loras_and_concepts_together(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    path = _write(pipe, tmp_path / "one.safetensors", 1)
    concept = packs.random_pack(pipe.components, "rex", ranks=(2,))
    fused = _fuser(pipe).fuse([LoRASource(path, ["sks"], scale=0.5, name="my style"), FusionSource(concept, weight=2)])
    assert set(fused.report.residuals) == {"my_style", "<rex>"}
    assert [one.placeholder for one in fused.concepts] == ["<rex>"]
    assert fused.base_model == concept.base_model
    fused.save_pretrained(tmp_path / "out")
    pipe.load_edlora(EDLoRA.from_pretrained(tmp_path / "out"))
    assert pipe("a <rex>", num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_plain_loras_that_make_no_sense_are_refused(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="needs a list of prompts"):
        LoRASource("x.safetensors", "photo of sks dog")
    path = _write(pipe, tmp_path / "one.safetensors", 1)
    with pytest.raises(FusionError, match="LoRAs with the same name: one"):
        _fuser(pipe).fuse([LoRASource(path, ["sks"])] * 2)
    with pytest.raises(FusionError, match=r"one.safetensors is a plain LoRA.*give LoRASource\("):
        _fuser(pipe).fuse([path])
    fused = _fuser(pipe).fuse([LoRASource(path, ["sks"])], method="average")
    with pytest.raises(FusionError, match="written as one plain LoRA"):
        fused.save_pretrained(tmp_path / "out", merged=True)
    with pytest.raises(FusionError, match="give push_to_hub a repo_id"):
        fused.push_to_hub()


def _told_of_fusion(act: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(one.message) for one in caught if "by their content" in str(one.message)]


def test_a_lora_that_is_given_under_several_names_is_said_once(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    """Under any factor, as it is the same file; another LoRA of the same layers is none."""
    lora = dict(packs.random_pack(pipe.components, "any", ranks=(2,)).lora)
    other = dict(packs.random_pack(pipe.components, "any", ranks=(2,), seed=1).lora)
    for name, content in {"dog": lora, "ink": other, "hound": lora, "pup": lora, "inks": other}.items():
        write_lora(tmp_path / f"{name}.safetensors", content)

    def source(name: str, **settings: float) -> LoRASource:
        return LoRASource(tmp_path / f"{name}.safetensors", prompts=[name], **settings)

    def fuse(*sources: LoRASource) -> list[str]:
        return _told_of_fusion(lambda: GradientFuser().fuse(sources, method="average"))

    told = "are the same LoRA by their content, which so counts"
    assert fuse(source("dog"), source("ink")) == []
    twice = [f"dog and hound {told} 2 times; give it once."]
    assert fuse(source("dog"), source("ink"), source("hound", scale=0.5)) == twice
    assert fuse(*map(source, ("dog", "ink", "hound", "pup", "inks"))) == [
        f"dog and hound and pup {told} 3 times; give it once.",
        f"ink and inks {told} 2 times; give it once.",
    ]


def test_a_copy_under_another_name_is_said_when_it_is_added_and_on_the_command_line(
    pipe: MixOfShowPipeline, tmp_path: Path
) -> None:
    lora = dict(packs.random_pack(pipe.components, "any", ranks=(2,)).lora)
    files = [write_lora(tmp_path / f"{name}.safetensors", lora) for name in ("dog", "hound")]
    first, second = (LoRASource(file, prompts=["x"]) for file in files)
    fused = GradientFuser().fuse([first], method="average")
    assert len(_told_of_fusion(lambda: fused.add(second))) == 1
    asked = ["fuse", *map(str, files), "--prompts", "x", "--prompts", "x", "--method", "average", "--output"]
    for arguments in ([*asked, str(tmp_path / "both")], [*asked, str(tmp_path / "none"), "--dry-run"]):
        invoke = partial(CliRunner().invoke, cli.app, arguments, catch_exceptions=False)
        assert len(_told_of_fusion(invoke)) == 1


@pytest.mark.parametrize("method", ["average", "sum", "ties", "dare", "svd"])
def test_methods_that_record_nothing_need_no_prompts(pipe: MixOfShowPipeline, tmp_path: Path, method: Any) -> None:
    """One warning says that the file will not tell what calls them; prompts that are given are kept."""
    files = []
    for seed, name in enumerate(("dog", "ink", "cat")):
        lora = dict(packs.random_pack(pipe.components, "any", ranks=(2,), seed=seed).lora)
        files.append(write_lora(tmp_path / f"{name}.safetensors", lora))
    sources = [LoRASource(files[0]), LoRASource(files[1], ["ink style"]), files[2]]
    with pytest.warns(MixOfShowWarning, match="what calls dog, cat: the fused file will not name it") as caught:
        fused = GradientFuser().fuse(sources, method=method)
    assert len(caught) == 1
    assert fused.report.data["prompts"] == {"dog": [], "ink": ["ink style"], "cat": []}
    given = [LoRASource(file, ["x"]) for file in files]
    _same(fused, GradientFuser().fuse(given, method=method))
    fused.save_pretrained(tmp_path / "out")
    assert "| `dog` | - |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(FusionError, match=r"dog\.safetensors is a plain LoRA.*its file names none"):
        GradientFuser(pipe).fuse(sources)


def test_a_lora_without_prompts_is_added_to_an_average(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    files = [_write(pipe, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    average = GradientFuser().fuse([LoRASource(files[0], ["x"], name="one")], method="average")
    with pytest.warns(MixOfShowWarning, match="what calls two"):
        both = average.add(LoRASource(files[1], name="two"))
    assert [source.name for source in both.sources] == ["one", "two"]


def test_a_damaged_file_of_the_hub_is_said_to_be_damaged(pipe: MixOfShowPipeline, loopback_hub: Any) -> None:
    packs.random_pack(pipe.components, "rex", ranks=(2,)).push_to_hub("me/rex", token=loopback_hub.token)
    loopback_hub.repositories["me/rex"].commit("main", "damaged", {"edlora.safetensors": b"none"})
    with pytest.raises(EDLoRAFormatError, match=r"edlora\.safetensors cannot be read as safetensors: it has 4 bytes"):
        _fuser(pipe).fuse(["me/rex"])


def _same(ours: EDLoRA, theirs: EDLoRA) -> None:
    assert ours.lora.keys() == theirs.lora.keys()
    for site, update in ours.lora.items():
        mine, other = (one.scaling * (one.up.float() @ one.down.float()) for one in (update, theirs.lora[site]))
        assert (mine - other).norm() <= 1e-5 * other.norm(), site


@pytest.mark.parametrize("with_concept", [False, True])
def test_a_pack_with_plain_loras_can_be_changed_after_reading_it(
    pipe: MixOfShowPipeline, tmp_path: Path, with_concept: bool
) -> None:
    sources: list[LoRASource | FusionSource] = [
        LoRASource(_write(pipe, tmp_path / f"{seed}.safetensors", seed), [f"sks {name}"], scale=scale, name=name)
        for seed, (name, scale) in enumerate({"one": 1.0, "my+two": 0.5}.items())
    ]
    if with_concept:
        sources.append(FusionSource(packs.random_pack(pipe.components, "one", ranks=(2,))))
    own = _fuser(pipe, sequential=False, statistics=tmp_path / "kept")
    pack = own.fuse(sources)
    pack.save_pretrained(tmp_path / "out", sources=True)
    of_first = "lora-one" if with_concept else "one"
    assert {path.name for path in (tmp_path / "out" / "sources").iterdir()} >= {of_first, "my+two"}
    again = FusedPack.from_pretrained(tmp_path / "out")
    assert [one.prompts for one in again.sources] == [one.prompts for one in pack.sources]
    _same(again.remove("one"), pack.remove("one"))
    with pytest.raises(FusionError, match=r"my_two is not a source .* Did you mean my\+two\?"):
        again.remove("my_two")
    _same(again.reweight({"my+two": 3}), pack.reweight({"my+two": 3}))
    third = FusionSource(packs.random_pack(pipe.components, "kit", ranks=(2,)))
    with pytest.raises(FusionError, match=r"Statistics lack inputs.*alongside"):
        pack.add(replace(third, statistics=own.record(third)))
    added = own.record(third, alongside=[pack])
    _same(again.add(replace(third, statistics=added)), pack.add(replace(third, statistics=added)))


def test_a_plain_lora_cannot_be_called_like_a_path(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    source = LoRASource(_write(pipe, tmp_path / "one.safetensors", 1), ["sks"], name="../one")
    with pytest.raises(FusionError, match="names cannot name a folder"):
        GradientFuser(pipe).fuse([source], method="sum")


def test_a_plain_pack_goes_to_the_hub_and_comes_from_there(
    loopback_hub: Any, pipe: MixOfShowPipeline, tmp_path: Path
) -> None:
    path = _write(pipe, tmp_path / "one.safetensors", 1)
    fused = _fuser(pipe).fuse([LoRASource(path, ["sks"])], method="sum")
    fused.push_to_hub("me/both", token=loopback_hub.token)
    again = GradientFuser(pipe).fuse([LoRASource("me/both", ["sks"])], method="sum")
    assert again.lora.keys() == fused.lora.keys()
    assert list(again.report.data["prompts"]) == ["both"]


def test_a_plain_pack_of_the_hub_is_read_with_its_sources(
    loopback_hub: Any, pipe: MixOfShowPipeline, tmp_path: Path
) -> None:
    files = [_write(pipe, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("ink", "oil"))]
    pack = _fuser(pipe, sequential=False, statistics=tmp_path / "kept").fuse([LoRASource(one, ["x"]) for one in files])
    hub = {"token": loopback_hub.token, "revision": "old"}
    pack.push_to_hub("me/both", sources=True, private=True, **hub)
    pack.save_pretrained(tmp_path / "several" / "packs" / "both", sources=True)
    _publish(loopback_hub, "me/several", tmp_path / "several")
    for again in (
        FusedPack.from_pretrained("me/both", **hub),
        FusedPack.from_pretrained("me/several", subfolder="packs/both"),
    ):
        assert all(source.statistics for source in again.sources)
        _same(again.remove("ink"), pack.remove("ink"))
    _publish(loopback_hub, "me/style", write_lora(tmp_path / "style" / PLAIN_NAME, pack.lora).parent)
    with pytest.raises(EDLoRANotFoundError, match=r"holds no ED-LoRA \(edlora\.safetensors\)"):
        FusedPack.from_pretrained("me/style")


def _publish(hub: Any, repo_id: str, folder: Path) -> None:
    create(repo_id, token=hub.token, private=False, revision=None)
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories[repo_id].commit("main", "files", content)


@pytest.mark.parametrize(
    ("name", "is_there"), [(PLAIN_NAME, True), ("adapter_model.safetensors", True), (PLAIN_NAME, False)]
)
def test_statistics_of_a_plain_lora_are_found_again_on_the_hub(
    loopback_hub: Any, pipe: MixOfShowPipeline, tmp_path: Path, name: str, is_there: bool
) -> None:
    """Beside the file that the repository has; before it has any, beside the one that packs of plain LoRAs have."""
    path = _write(pipe, tmp_path / "repo" / name, 1)
    source = LoRASource(path, ["sks"], name="style")
    statistics = _fuser(pipe, sequential=False, statistics=tmp_path / "kept").record(source)
    if is_there:
        _publish(loopback_hub, "me/style", path.parent)
    statistics.push_to_hub("me/style", token=loopback_hub.token)
    if not is_there:
        _publish(loopback_hub, "me/style", path.parent)
    _same(
        GradientFuser().fuse([replace(source, source="me/style")]),
        GradientFuser().fuse([replace(source, statistics=statistics)]),
    )


def test_a_pack_never_leads_out_of_its_folder() -> None:
    assert list_places([["../../x"]]) == [("sources/_.._x", "sources/lora-.._.._x")]
    assert list_places([["<../x>", "<rex>"]]) == [("sources/_x+rex",)]
    assert list_places([["<..>"], [".."]]) == [("sources/",), ("sources/lora-__",)]


def test_a_pack_carries_its_sources_in_folders_that_windows_takes() -> None:
    assert list_places([["<con>"], ["con"]]) == [("sources/con_",), ("sources/lora-con",)]
    assert list_places([["<aux.v2>"]]) == [("sources/aux_.v2",)]
    assert list_places([["ink."]]) == [("sources/ink_", "sources/lora-ink_")]
    assert list_places([["<con>", "<rex>"]]) == [("sources/con+rex",)]


@pytest.mark.parametrize(
    ("names", "concepts", "told"),
    [
        (("a&b", "a,b"), (), "a&b and a,b"),
        (("ink", "Ink"), (), "ink and Ink"),
        (("ink",), ("lora-ink", "ink"), "<lora-ink> and ink"),
        (("ink",), ("lora-ink",), ""),
        (("x-y", "x.y", "ink"), (), ""),
        ((), ("Rex", "rex"), "<Rex> and <rex>"),
        (("ink", "a&b", "INK", "a'b"), (), "ink and INK; for a&b and a'b"),
        (("ink", "ink2"), ("rex", "ink"), ""),
    ],
    ids=str,
)
def test_sources_are_not_carried_in_one_folder(
    pipe: MixOfShowPipeline, tmp_path: Path, names: tuple[str, ...], concepts: tuple[str, ...], told: str
) -> None:
    sources: list[Any] = [packs.random_pack(pipe.components, name, ranks=(1,)) for name in concepts]
    update = packs.random_pack(pipe.components, ranks=(1,)).lora
    for number, name in enumerate(names):
        file = write_lora(tmp_path / f"{number}.safetensors", dict(update))
        sources.append(LoRASource(file, ["sks"], name=name))
    fused = GradientFuser().fuse(sources, method="average")
    if told:
        with pytest.raises(FusionError, match=f"one folder for {re.escape(told)}"):
            fused.save_pretrained(tmp_path / "out", sources=True)
        assert not (tmp_path / "out").exists()
    else:
        fused.save_pretrained(tmp_path / "out", sources=True)
        assert len(list((tmp_path / "out" / "sources").iterdir())) == len(sources)
    fused.save_pretrained(tmp_path / "alone")


def _keep_sources(pipe: MixOfShowPipeline, folder: Path) -> FusedPack:
    """Fuse two plain LoRAs with statistics of their own into a pack in the folder that carries them."""
    named = {name: _write(pipe, folder.with_name(f"{name}.safetensors"), seed) for seed, name in enumerate("ab")}
    own = _fuser(pipe, sequential=False)
    pack = own.fuse([LoRASource(file, [f"sks {name}", f"{name} in snow"]) for name, file in named.items()])
    pack = pack.name_base("tiny/base")
    pack.save_pretrained(folder, sources=True)
    return pack


def test_carried_plain_loras_are_fused_again_by_themselves(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    """They know their names, prompts and base, and the statistics beside them are used: no model runs."""
    pack = _keep_sources(pipe, tmp_path / "pack")
    places = [tmp_path / "pack" / "sources" / name for name in "ab"]
    again = GradientFuser().fuse(places)
    _same(again, pack)
    assert again.base_model == "tiny/base"
    assert [one.prompts for one in again.sources] == [one.prompts for one in pack.sources]
    again.save_pretrained(tmp_path / "again", sources=True)
    assert {path.name for path in (tmp_path / "again" / "sources").iterdir()} == {"a", "b"}
    alone = GradientFuser().fuse([tmp_path / "again" / "sources" / "a"])
    assert list(alone.report.data["prompts"]) == ["a"]
    assert "carried_prompts" not in json.dumps(alone.report.data)
    assert read_plain_pack(places[0]) is None, "one of them was not fused itself"


def test_carried_plain_loras_keep_names_given_to_them(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    _keep_sources(pipe, tmp_path / "pack")
    (tmp_path / "pack" / "sources" / "a").rename(tmp_path / "moved")
    given = (LoRASource(tmp_path / "moved", ["sks other"]), LoRASource(tmp_path / "moved", name="called"))
    names = [list(GradientFuser().fuse([one], method="average").report.data["prompts"]) for one in given]
    assert names == [["a"], ["called"]]


def test_packs_of_earlier_releases_are_read_and_keep_their_sources(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    """Those put plain LoRAs into sources/lora-NAME, without a record."""
    pack = _keep_sources(pipe, tmp_path / "pack")
    for name, source in zip("ab", pack.sources, strict=True):
        (tmp_path / "pack" / "sources" / name).rename(tmp_path / "pack" / "sources" / f"lora-{name}")
        write_lora(tmp_path / "pack" / "sources" / f"lora-{name}" / PLAIN_NAME, source.edlora.lora)
    read = FusedPack.from_pretrained(tmp_path / "pack")
    assert [one.prompts for one in read.sources] == [one.prompts for one in pack.sources]
    _same(read.remove("a"), pack.remove("a"))
    read.save_pretrained(tmp_path / "pack", overwrite=True)
    assert {path.name for path in (tmp_path / "pack" / "sources").iterdir()} == {"lora-a", "lora-b"}
    read.save_pretrained(tmp_path / "pack", sources=True, overwrite=True)
    assert {path.name for path in (tmp_path / "pack" / "sources").iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("source", "name", "label"),
    [
        ("styles/ink wash.safetensors", "", "ink_wash"),
        ("styles/ink.v2.safetensors", "", "ink.v2"),
        ("x.safetensors", "my own  style", "my_own_style"),
        ("x.safetensors", "<ink>", "ink"),
        (Path("x.safetensors"), " a<b>c ", "a_b_c"),
    ],
)
def test_a_plain_lora_is_called_by_its_name_or_its_files(source: str | Path, name: str, label: str) -> None:
    assert LoRASource(source, ["sks"], name=name).label == label


def test_a_plain_pack_has_a_card_that_says_how_to_call_what_is_in_it(
    loopback_hub: Any, pipe: MixOfShowPipeline, tmp_path: Path
) -> None:
    paths = [_write(pipe, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))]
    prompts = [["sks dog", "a sks dog on grass", "sks <!-- dog", "four"], ["ink `style`"]]
    sources = [LoRASource(path, texts) for path, texts in zip(paths, prompts, strict=True)]
    fused = _fuser(pipe).fuse(sources)
    out = tmp_path / "out"
    picture = Image.new("RGB", (8, 8), "red")
    fused.save_pretrained(out, samples={"a sks dog": picture}, license="mit")
    card = (out / "README.md").read_text(encoding="utf-8")
    for part in (
        "# LoRA fused from `one`, `two`\n",
        "license: mit",
        "instance_prompt: sks dog",
        "| `one` | `sks dog`, `a sks dog on grass`, `sks <! -- dog`, ... |",
        "| `two` | `ink 'style'` |",
        "features lost, fused",
        "pipe.load_lora_weights('out', weight_name=",
        "pipe('sks dog')",
        "a private file",
        "samples/0.png",
    ):
        assert part in card, card
    assert str(tmp_path) not in card
    assert "edlora" not in card
    assert (out / "samples" / "0.png").is_file()
    mine = card + "\nMy own words.\n"
    (out / "README.md").write_text(mine, encoding="utf-8")
    fused.save_pretrained(out, overwrite=True)
    assert "My own words." in (out / "README.md").read_text(encoding="utf-8")
    run = partial(CliRunner().invoke, cli.app)
    assert "there is no concept to name its repository after" in str(run(["push", str(out), "--dry-run"]).exception)
    told = run(["push", str(out), "me/both", "--dry-run", "--json"])
    assert json.loads(told.stdout)["concepts"] == ["one", "two"], told.output


@pytest.mark.parametrize("base", ["toyland", "toyland-sd3", "toyland-xl"])
def test_the_code_on_the_card_of_a_plain_pack_runs_and_says_nothing(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = load_base(base, "cpu", "float32", concepts=base != "toyland-sd3")
    path = _write(pipe, tmp_path / "one.safetensors", 1)
    GradientFuser(pipe).fuse([LoRASource(path, ["a dog"])], method="sum").save_pretrained(tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        for kind in (FutureWarning, UserWarning):
            warnings.simplefilter("error", kind)
        exec(code.replace("guidance_scale", "num_inference_steps=2, guidance_scale"), {})
    assert (tmp_path / "picture.png").is_file()
    said = re.split(r"[\r\n]+", "".join(capfd.readouterr()))
    bar = re.compile(r"\d+%\|.*\| \d+/\d+ \[")  # its end may be cut to the width of the terminal
    assert [line for line in said if line.strip() and not bar.search(line)] == []


def _pair(pipe: MixOfShowPipeline, folder: Path, scale: float = 1.0) -> FusedPack:
    files = [_write(pipe, folder / f"{name}.safetensors", seed) for seed, name in enumerate(("ink", "oil"))]
    return GradientFuser().fuse([LoRASource(file, ["x"], scale=scale) for file in files], method="average")


def test_the_same_plain_pack_again_keeps_what_is_its_own(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    pack, out = _pair(pipe, tmp_path), tmp_path / "out"
    pack.save_pretrained(out, samples={"ink": Image.new("RGB", (8, 8))})
    (out / "pytorch_lora_weights.statistics.safetensors").write_bytes(b"recorded for hours")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    pack.save_pretrained(out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_stood_there_stays_where_a_plain_pack_cannot_be_written(
    pipe: MixOfShowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _pair(pipe, tmp_path).save_pretrained(out, samples={"ink": Image.new("RGB", (8, 8))})
    before = sorted(out.rglob("*"))

    def full(*args: object, **kwargs: object) -> None:
        raise FileWriteError("no room")

    monkeypatch.setattr("diffusers_mixofshow.fusion.pack.write_lora", full)
    with pytest.raises(FileWriteError):
        _pair(pipe, tmp_path, 0.5).save_pretrained(out, overwrite=True)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("kind", ["plain", "pack", "single"])
def test_nothing_is_written_where_the_card_cannot_be_made(
    pipe: MixOfShowPipeline, tmp_path: Path, kind: str, is_there: bool
) -> None:
    out, sources = tmp_path / "out", {"sources": True} if kind != "single" else {}
    pack = concept = packs.random_pack(pipe.components, "rex", ranks=(2,))
    if kind != "single":
        pack = _pair(pipe, tmp_path) if kind == "plain" else GradientFuser().fuse([concept], method="average")
    if is_there:
        pack.save_pretrained(out, samples={"ink": Image.new("RGB", (8, 8))}, **sources)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    scaled = replace(pack, lora={site: replace(one, alpha=9 * one.alpha) for site, one in pack.lora.items()})
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ConfigurationError, match=r"no\.png"):
        scaled.save_pretrained(out, samples={"x": tmp_path / "no.png"}, overwrite=True, **sources)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_lora_of_a_name_that_the_pack_has_is_not_added(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = _write(pipe, tmp_path / "other" / "ink.safetensors", 5)
    with pytest.raises(FusionError, match="LoRAs with the same name: ink"):
        _pair(pipe, tmp_path).add(LoRASource(other, ["y"]))


def test_the_card_of_layers_that_no_base_is_known_by_names_the_base_that_was_given(tmp_path: Path) -> None:
    update = LowRank(down=torch.ones(2, 64), up=torch.ones(64, 2), alpha=2.0)
    site = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    record = {"fusion": {"sources": []}}
    FusedPack(
        concepts=(), embeddings={}, lora={site: update}, base_model="toyland", layers=(), training=record
    ).save_pretrained(tmp_path)
    assert "guidance_scale=3)" in (tmp_path / "README.md").read_text(encoding="utf-8")
