"""Fusing from files without a model, and changing a pack afterwards."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import packs
import tiny
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import ConceptError, FusionError, MixOfShowWarning
from diffusers_mixofshow.fusion import FusedPack, FusionSource, GradientFuser
from diffusers_mixofshow.fusion.published import SourceStatistics
from diffusers_mixofshow.fusion.report import FusionReport
from diffusers_mixofshow.fusion.solving import METHODS, Method
from diffusers_mixofshow.fusion.statistics import ConceptStatistics
from diffusers_mixofshow.pipelines import MixOfShowPipeline


NAMES = ("rex", "kit", "zoe")
RECORDED = {"steps": 2, "prompts": ("a <TOK>", "two <TOK>"), "batch_size": 2, "sequential": False}
STATISTICS = "edlora.statistics.safetensors"


@pytest.fixture
def pipe() -> MixOfShowPipeline:
    return MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three ED-LoRAs, statistics beside them."""
    fuser = GradientFuser(MixOfShowPipeline(**tiny.components(), requires_safety_checker=False), **RECORDED)
    parent = tmp_path_factory.mktemp("recorded")
    for seed, name in enumerate(NAMES):
        concept(name, seed).save_pretrained(parent / name)
        fuser.record(parent / name)
    return parent


@pytest.fixture
def published(recorded: Path, tmp_path: Path) -> list[Path]:
    """Folders of three ED-LoRAs with statistics beside them, for this test alone."""
    return [Path(shutil.copytree(recorded / name, tmp_path / name)) for name in NAMES]


def concept(name: str, seed: int) -> EDLoRA:
    return packs.random_pack(tiny.components(), name, ranks=(2,), seed=seed)


def same_deltas(ours: EDLoRA, theirs: EDLoRA, tolerance: float = 1e-5) -> None:
    assert ours.lora.keys() == theirs.lora.keys()
    for site, update in ours.lora.items():
        other = theirs.lora[site]
        mine, expected = (one.scaling * (one.up @ one.down) for one in (update, other))
        assert (mine - expected).norm() <= tolerance * expected.norm(), site


def _fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("failed on purpose")


def test_fusing_from_files_loads_no_library_of_models(published: list[Path], tmp_path: Path) -> None:
    """They take seconds to import, and only a pipeline needs them."""
    code = (
        "import sys\nfrom diffusers_mixofshow.fusion import GradientFuser\n"
        "GradientFuser().fuse(sys.argv[2:]).save_pretrained(sys.argv[1])\n"
        "print([name for name in ('diffusers', 'transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "fused"), *map(str, published)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
    assert len(EDLoRA.from_pretrained(tmp_path / "fused").concepts) == 3


def test_statistics_are_kept_and_serve_without_a_pipeline(
    pipe: MixOfShowPipeline, published: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    header = SourceStatistics.load(published[0] / STATISTICS)
    assert header.digest == EDLoRA.from_pretrained(published[0]).digest
    assert header.recording["prompts"] == {"<rex>": ["a <rex>", "two <rex>"]}
    assert (header.recording["seeds"], header.recording["steps"], header.recording["guidance_scale"]) == ([0], 2, 7.5)
    monkeypatch.setattr(type(pipe.unet), "forward", _fail)
    alone = GradientFuser().fuse(published)
    same_deltas(GradientFuser(pipe, **RECORDED).fuse(published), alone)
    assert set(alone.report.residuals) == {"<rex>", "<kit>", "<zoe>"}
    assert all(mean["fused"] < mean["average"] for mean in alone.report.residuals.values())
    assert str(published[1].parent) not in json.dumps(dict(alone.training))  # folders are private


def test_what_was_recorded_before_an_interruption_is_not_recorded_again(
    pipe: MixOfShowPipeline, passes: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate(NAMES[:2]):
        concept(name, seed).save_pretrained(tmp_path / name)
    fuser = GradientFuser(pipe, **RECORDED)
    passes.allow(5)  # two parts of two steps a concept
    with pytest.raises(KeyboardInterrupt):
        fuser.fuse([tmp_path / "rex", tmp_path / "kit"])
    assert [folder.name for folder in tmp_path.iterdir() if (folder / STATISTICS).exists()] == ["rex"]
    passes.allow(4)
    fuser.fuse([tmp_path / "rex", tmp_path / "kit"])
    assert passes.done == 4


def test_statistics_in_a_folder_of_their_own(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    source = concept("rex", 1)
    GradientFuser(pipe, statistics=tmp_path / "kept", **RECORDED).fuse([source])
    assert [file.name for file in (tmp_path / "kept").iterdir()] == [f"{source.digest[:16]}.statistics.safetensors"]
    GradientFuser(statistics=tmp_path / "kept").fuse([source])


def test_without_statistics_or_pipeline_every_source_that_lacks_them_is_named(
    published: list[Path], tmp_path: Path
) -> None:
    (published[0] / STATISTICS).unlink()
    retuned = concept("kit", 9)
    shutil.copy(retuned.save_pretrained(tmp_path / "retuned"), published[1])
    message = r"<rex> has none; the statistics given with <kit> are of another LoRA \(SHA-256 \w{12}, this one"
    with pytest.raises(FusionError, match=message):
        GradientFuser().fuse(published)
    with pytest.raises(FusionError, match="of another LoRA"):
        GradientFuser().fuse([FusionSource(retuned, statistics=published[2] / STATISTICS)])


def test_damaged_statistics_are_recorded_again_where_there_is_a_model(
    pipe: MixOfShowPipeline, published: list[Path], tmp_path: Path
) -> None:
    path = published[0] / STATISTICS
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(FusionError, match="cannot be read as fusion statistics"):
        GradientFuser().fuse(published)
    with pytest.warns(MixOfShowWarning, match="recorded again: .*cannot be read as fusion statistics") as warned:
        GradientFuser(pipe, **RECORDED).fuse(published)
    assert not [one for one in warned if "Record it" in str(one.message) or "download" in str(one.message)]
    assert SourceStatistics.load(path).digest == EDLoRA.from_pretrained(published[0]).digest
    fuser, source = GradientFuser(pipe, statistics=tmp_path / "kept", **RECORDED), concept("tom", 5)
    kept = fuser.record(source).file
    assert kept is not None
    kept.write_bytes(b"none")
    with pytest.warns(MixOfShowWarning, match="recorded again"):
        assert fuser.record(source).file == kept


def test_statistics_of_a_newer_release_are_not_written_over(pipe: MixOfShowPipeline, published: list[Path]) -> None:
    path = published[0] / STATISTICS
    save_file({"a": torch.zeros(1)}, path, metadata={"edlora_statistics": '{"format_version": 9}'})
    newer = path.read_bytes()
    for fuser in (GradientFuser(pipe, **RECORDED), GradientFuser()):
        with pytest.raises(FusionError, match=r"format version 9, this release reads 1\. Update"):
            fuser.fuse(published)
    assert path.read_bytes() == newer


@pytest.mark.parametrize(("settings", "scale"), [({"steps": 1}, 1.0), ({}, 0.5)])
def test_a_fusion_of_other_settings_records_for_itself_alone(
    pipe: MixOfShowPipeline, published: list[Path], tmp_path: Path, settings: dict[str, int], scale: float
) -> None:
    path, fuser = published[0] / STATISTICS, GradientFuser(pipe, **RECORDED | settings)
    before = path.read_bytes()
    with pytest.warns(MixOfShowWarning, match=r"for this fusion alone \(.*statistics.safetensors stays; .*record"):
        fused = fuser.fuse(published[:1], scales=[scale])
    assert path.read_bytes() == before
    path.unlink()
    fresh = fuser.fuse(published[:1], scales=[scale])
    for site, update in fresh.lora.items():
        wanted = low_rank_delta(update)
        assert (
            low_rank_delta(fused.lora[site]) - wanted
        ).norm() <= 0.02 * wanted.norm()  # statistics in float16, or not


def test_a_folder_of_statistics_is_looked_into_where_those_beside_a_source_do_not_serve(
    pipe: MixOfShowPipeline, published: list[Path], tmp_path: Path
) -> None:
    fuser = GradientFuser(pipe, statistics=tmp_path / "kept", **RECORDED | {"steps": 1})
    with pytest.warns(MixOfShowWarning, match=r"recorded again: .*steps 2 instead of 1"):
        fuser.fuse(published[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        fuser.fuse(published[:1])


def test_statistics_belong_to_one_scale(published: list[Path]) -> None:
    with pytest.raises(FusionError, match=r"at scale 0\.5"):
        GradientFuser().fuse(published[:1], scales=[0.5])


def test_statistics_of_another_model_are_refused(published: list[Path]) -> None:
    statistics = SourceStatistics.load(published[0] / STATISTICS)
    source = EDLoRA.from_pretrained(published[0])
    other = ConceptStatistics()
    for name in statistics.concepts["<rex>"].inputs:
        other.add(name, torch.eye(7))
    wrong = replace(statistics, concepts={"<rex>": other})
    with pytest.raises(FusionError, match=r"must be \(32, 32\) for these LoRAs, got <rex> \(7, 7\)"):
        GradientFuser().fuse([FusionSource(source, statistics=wrong)])
    wrong = replace(statistics, concepts={"<rex>": ConceptStatistics()})
    with pytest.raises(FusionError, match="Statistics lack inputs of layers that are to be fused: <rex> 24"):
        GradientFuser().fuse([FusionSource(source, statistics=wrong)])


def test_sources_that_do_not_fit_each_other_are_refused_without_a_model(published: list[Path]) -> None:
    with pytest.raises(ConceptError, match=r"used twice: <rex>\. Give each concept once, or rename one of them"):
        GradientFuser().fuse([published[0], published[0]])
    source = concept("tom", 5)
    lora = dict(source.lora)
    site, update = next(iter(lora.items()))
    lora[site] = replace(update, down=torch.full_like(update.down, float("nan")))
    with pytest.raises(FusionError, match="<tom> is defective: LoRA matrices with values that are not finite"):
        GradientFuser().fuse([replace(source, lora=lora)])
    lora[site] = replace(update, down=update.down[:, :-1])
    with pytest.raises(FusionError, match="layers of different sizes"):
        GradientFuser().fuse([published[0], replace(source, lora=lora)])
    with pytest.raises(FusionError, match="give GradientFuser a pipeline"):
        GradientFuser(sequential=True)


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
def test_adding_and_removing_equal_a_fresh_fusion(published: list[Path], weights: tuple[float, float] | None) -> None:
    fuser = GradientFuser()
    pair = fuser.fuse(published[:2], weights=weights)
    all_weights = (*(weights or (1.0, 1.0)), 2.0)
    three = pair.add(FusionSource(published[2], weight=2.0))
    assert isinstance(three, FusedPack)
    assert list(three.report.residuals) == ["<rex>", "<kit>", "<zoe>"]
    same_deltas(three, fuser.fuse(published, weights=all_weights))
    same_deltas(three.remove("<zoe>"), pair)
    same_deltas(three.reweight({"<zoe>": 5, "<rex>": 1}), fuser.fuse(published, weights=(1, all_weights[1], 5)))
    assert [concept.name for concept in three.remove("<rex>").concepts] == ["kit", "zoe"]


def test_changes_that_make_no_sense_are_refused(pipe: MixOfShowPipeline, published: list[Path]) -> None:
    pack = GradientFuser().fuse(published[:2])
    with pytest.raises(ConceptError, match=r"used twice: <rex>\. Give each concept once, or rename one of them"):
        pack.add(published[0])
    with pytest.raises(FusionError, match="<zoe> is not a source of this pack; its sources are <rex>, <kit>"):
        pack.remove("<zoe>")
    for misspelt in ("<rx>", "rexx", "<Rex>"):
        with pytest.raises(FusionError, match=rf"{misspelt} is not a source .* Did you mean <rex>\?"):
            pack.remove(misspelt)
    with pytest.raises(FusionError, match="finite and above 0"):
        pack.reweight({"<rex>": 0})
    with pytest.raises(FusionError, match="<kit> is the only source of this pack"):
        pack.remove("<rex>").remove("<kit>")
    sequential = GradientFuser(pipe, **RECORDED | {"sequential": True}).fuse(published[:2])
    with pytest.raises(FusionError, match="This pack was fused in stages"):
        sequential.remove("<rex>")
    with pytest.raises(FusionError, match=r"1 have none \(<tom>\)"):
        pack.add(concept("tom", 5))


def test_reports_read_back_from_a_file(published: list[Path], tmp_path: Path) -> None:
    pack = GradientFuser(ridge="auto", max_rank=3).fuse(published)
    pack.save_pretrained(tmp_path / "pack")
    report = FusionReport.of(EDLoRA.from_pretrained(tmp_path / "pack"))
    assert report == pack.report
    layers = report.data["layers"]
    assert all(0 < numbers["ridge"] < 4 for numbers in layers.values())
    assert len({numbers["ridge"] for numbers in layers.values()}) > 1
    assert all(numbers["condition"] >= 1 and 0 < numbers["energy_kept"] <= 1 for numbers in layers.values())
    assert max(update.rank for update in pack.lora.values()) == 3
    told = [
        value
        for layer in report.data["residuals"]["layers"].values()
        for pair in layer.values()
        for value in pair.values()
    ]
    assert [round(value, 4) for value in told] == told != [round(value, 3) for value in told]
    assert len(report.conflicts) == 3
    console = Console(record=True, width=160)
    report.print(console)
    printed = console.export_text()
    assert "<rex>" in printed
    assert "Largest overlaps" in printed
    with Image.open(report.heat_map(tmp_path / "map.png")) as picture:
        assert picture.width > 14 * len(layers)
    with pytest.raises(FusionError, match="was not fused"):
        FusionReport.of(EDLoRA.from_pretrained(published[0]))
    with pytest.raises(FusionError, match="nothing to draw"):
        GradientFuser().fuse([concept("tom", 5)], method="sum").report.heat_map(tmp_path / "other.png")


def test_a_concept_that_is_hardly_kept_is_warned_of_and_no_other(published: list[Path]) -> None:
    with pytest.warns(MixOfShowWarning, match="<kit> is hardly kept") as caught:
        pack = GradientFuser().fuse(published[:2], weights=[1.0, 1e-6])
    assert pack.report.poor == ("<kit>",)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        assert GradientFuser().fuse(published[:2]).report.poor == ()


def test_the_usual_ridge_grows_with_the_layers_width_and_where_each_concept_was_recorded_with_its_own_model(
    pipe: MixOfShowPipeline, published: list[Path]
) -> None:
    for fuser, usual in ((GradientFuser(), 2.5e-4), (GradientFuser(pipe, steps=1), 2.5e-5)):
        pack = fuser.fuse(published[:2])
        told = {site: numbers["ridge"] for site, numbers in pack.report.data["layers"].items()}
        widths = {site: update.down.shape[1] for site, update in pack.lora.items()}
        assert len(set(widths.values())) > 1
        assert told == pytest.approx({site: usual * width for site, width in widths.items()})
    given = GradientFuser(ridge=1e-2).fuse(published).report.data
    assert {numbers["ridge"] for numbers in given["layers"].values()} == {given["ridge"]} == {1e-2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_one_signature(published: list[Path], method: Method) -> None:
    pack = GradientFuser().fuse(published[:2], method=method)
    assert set(pack.report.residuals) == {"<rex>", "<kit>"}
    assert pack.training["fusion"]["method"] == method
    exact = GradientFuser(ridge=1e-9).fuse(published[:2]).report.residuals
    assert all(mean["fused"] >= exact[name]["fused"] - 0.02 for name, mean in pack.report.residuals.items())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_device_changes_nothing_but_the_time(published: list[Path], method: Method) -> None:
    ours = GradientFuser(device="cuda").fuse(published, method=method)
    same_deltas(ours, GradientFuser().fuse(published, method=method), tolerance=1e-2 if method == "lbfgs" else 1e-5)
    assert all(half.device.type == "cpu" for update in ours.lora.values() for half in (update.down, update.up))
    assert ours.reweight({"<rex>": 2}).device == "cuda"


@pytest.mark.parametrize("sequential", [False, True])
def test_a_prior_keeps_the_base_where_no_concept_is_named(
    pipe: MixOfShowPipeline, published: list[Path], sequential: bool
) -> None:
    settings = RECORDED | {"sequential": sequential, "prior_prompts": ["", "a castle"], "ridge": 1e-2}
    free, held = (GradientFuser(pipe, prior=prior, **settings).fuse(published[:1]) for prior in (0, 10))
    assert held.report.residuals["<rex>"]["fused"] > free.report.residuals["<rex>"]["fused"]
    norms = [sum(u.scaling * (u.up @ u.down).norm() for u in pack.lora.values()) for pack in (free, held)]
    assert norms[1] < 0.7 * norms[0]
    assert not pipe.concepts
    if not sequential:
        same_deltas(held.reweight({"<rex>": 2}), held)
    with pytest.raises(FusionError, match=r"prior is 1, .* give GradientFuser a pipeline"):
        GradientFuser(prior=1)


def test_a_pack_that_carries_its_sources_can_be_changed(published: list[Path], tmp_path: Path) -> None:
    fuser, folder = GradientFuser(ridge=1e-3), tmp_path / "pack"
    pack = fuser.fuse(published[:2], weights=[3, 1])
    pack.save_pretrained(folder, sources=True)
    reweighted, alone = pack.reweight({"<kit>": 9}), pack.remove("<rex>")
    both = pack.add(FusionSource(published[2], weight=2))
    same_deltas(FusedPack.from_pretrained(folder).add(FusionSource(published[2], weight=2)), both)
    shutil.rmtree(published[0])
    same_deltas(FusedPack.from_pretrained(folder).reweight({"<kit>": 9}), reweighted)
    same_deltas(FusedPack.from_pretrained(folder).remove("<rex>"), alone)
    concept("rex", 9).save_pretrained(folder / "sources" / "rex", overwrite=True)
    with pytest.raises(FusionError, match=r"fused from <rex>, which has changed since"):
        FusedPack.from_pretrained(folder)
    shutil.rmtree(folder / "sources" / "rex")
    with pytest.raises(FusionError, match=r"fused from <rex>, which cannot be found.*sources=True"):
        FusedPack.from_pretrained(folder)


def test_statistics_on_the_hub_serve_as_those_on_disk(loopback_hub: Any, published: list[Path]) -> None:
    source = EDLoRA.from_pretrained(published[0])
    source.push_to_hub("me/edlora-rex", token=loopback_hub.token)
    with pytest.raises(FusionError, match="<rex> has none"):
        GradientFuser().fuse(["me/edlora-rex"])
    statistics = SourceStatistics.load(published[0] / STATISTICS)
    statistics.push_to_hub("me/edlora-rex", token=loopback_hub.token)
    same_deltas(GradientFuser().fuse(["me/edlora-rex"]), GradientFuser().fuse(published[:1]))


def test_a_changed_pack_is_solved_as_it_was(published: list[Path]) -> None:
    """Ridge, rank, dtype of the file and device are the pack's own, not the defaults."""
    fuser = GradientFuser(ridge=0.3, max_rank=2, dtype=torch.float32, device="cpu:0")
    pack = fuser.fuse(published[:2])
    for changed, fresh in (
        (pack.add(published[2]), fuser.fuse(published)),
        (pack.remove("<kit>"), fuser.fuse(published[:1])),
        (pack.reweight({"<kit>": 4}), fuser.fuse(published[:2], weights=[1, 4])),
    ):
        same_deltas(changed, fresh)
        assert (changed.settings, changed.dtype, changed.device) == (pack.settings, torch.float32, "cpu:0")
        assert {update.rank for update in changed.lora.values()} == {2}
    average = GradientFuser().fuse(published[:2], method="average").reweight({"<kit>": 3})
    same_deltas(average, GradientFuser().fuse(published[:2], method="average", weights=[1, 3]))


def test_a_complete_pipeline_of_a_fused_pack_draws_all_of_it(pipe: MixOfShowPipeline, tmp_path: Path) -> None:
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    sources = [replace(concept(name, seed), base_model=str(base)) for seed, name in enumerate(("rex", "kit"))]
    pack = GradientFuser().fuse(sources, method="average")
    pack.save_pretrained(tmp_path / "whole", merged=True)
    whole = MixOfShowPipeline.from_pretrained(tmp_path / "whole")
    assert list(whole.concepts) == ["<rex>", "<kit>"]
    pipe.load_edlora(pack)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    ours, theirs = (
        one("a <rex>, a <kit>", generator=torch.Generator().manual_seed(0), **call).images for one in (pipe, whole)
    )
    assert (ours - theirs).norm() < 5e-3 * ours.norm()  # its file is in half precision


@pytest.mark.parametrize(
    ("what", "numbers", "told"),
    [
        ("weights", [1.0, 0.0], r"weights must be finite and above 0, got \[0\.0\]"),
        ("weights", [1.0, float("inf")], r"weights must be finite and above 0, got \[inf\]"),
        ("weights", [-1, float("nan")], r"weights must be finite and above 0, got \[-1, nan\]"),
        ("weights", [1.0], "got 1 weights for 2 LoRAs; give one for each"),
        ("scales", [1.0, float("-inf")], r"scales must be finite, got \[-inf\]"),
        ("scales", [1.0, 1.0, 1.0], "got 3 scales for 2 LoRAs"),
    ],
)
def test_shares_and_factors_that_make_no_sense_are_refused(what: str, numbers: list[float], told: str) -> None:
    sources = [concept("rex", 1), concept("kit", 2)]
    with pytest.raises(FusionError, match=told):
        GradientFuser().fuse(sources, method="average", **{what: numbers})


@pytest.mark.parametrize("odd", [5, None, ["rex"], ("rex", 1.0)])
def test_what_is_no_source_is_refused_by_its_place(odd: object) -> None:
    told = re.escape(f"source 2 is {odd!r}; expected an EDLoRA, a path or Hub id, a FusionSource or a LoRASource")
    with pytest.raises(FusionError, match=told):
        GradientFuser().fuse([concept("rex", 1), odd], method="average")


def test_a_source_may_be_left_out_or_turned_round_by_its_factor() -> None:
    sources = [concept("rex", 1), concept("kit", 2)]
    fused = GradientFuser().fuse(sources, method="sum", scales=[0, -2])
    for site, update in fused.lora.items():
        wanted = -2 * low_rank_delta(sources[1].lora[site])
        torch.testing.assert_close(low_rank_delta(update), wanted, rtol=1e-4, atol=1e-5)


def test_sources_of_a_pack_may_be_given_any_other_factor(tmp_path: Path) -> None:
    """As if they were read anew: from their own updates, not from those that were multiplied before."""
    fresh = {name: concept(name, seed).save_pretrained(tmp_path / name).parent for seed, name in enumerate(NAMES)}
    fuse = partial(GradientFuser().fuse, method="sum")
    pack = fuse(list(fresh.values()), scales=[0, 0.3, 1])
    again, anew = fuse(pack.sources, scales=[0.7, 0.7, 0.7]), fuse(list(fresh.values()), scales=[0.7, 0.7, 0.7])
    assert [source.edlora.digest for source in again.sources] == [source.edlora.digest for source in anew.sources]
    assert again.digest == anew.digest
    assert fuse(again.sources, scales=[0, 0.3, 1]).digest == pack.digest


def test_a_source_that_a_pack_carries_at_factor_0_keeps_it(tmp_path: Path) -> None:
    sources = [concept("rex", 1), concept("kit", 2)]
    pack = GradientFuser().fuse(sources, method="sum", scales=[0, 0.5])
    pack.save_pretrained(tmp_path / "pack", sources=True)
    carried = FusedPack.from_pretrained(tmp_path / "pack").sources
    same_deltas(
        GradientFuser().fuse(carried, method="sum", scales=[0, 2]),
        GradientFuser().fuse(sources, method="sum", scales=[0, 2]),
    )
    with pytest.raises(FusionError, match=r"<rex> is known only with its updates multiplied by 0.*give its own file"):
        GradientFuser().fuse(carried, method="sum", scales=[1, 1])


def test_a_changed_pack_keeps_how_it_was_recorded_and_that_it_has_a_prior(
    pipe: MixOfShowPipeline, published: list[Path], tmp_path: Path
) -> None:
    """Its file holds no prior, without which another change would give something else."""
    pair = GradientFuser(pipe, **RECORDED, prior=2.0, prior_prompts=["a photo"]).fuse(published[:2])
    three = pair.add(published[2])
    lost = pair.report.data.keys() - three.report.data.keys()
    assert not lost
    assert three.report.data["prior"] == 2.0
    three.save_pretrained(tmp_path / "three", sources=True)
    with pytest.raises(FusionError, match="with a prior that its file does not hold"):
        FusedPack.from_pretrained(tmp_path / "three").remove("<zoe>")


def test_a_pack_that_was_read_is_saved_in_its_own_dtype(published: list[Path], tmp_path: Path) -> None:
    GradientFuser(dtype=torch.float32).fuse(published[:2]).save_pretrained(tmp_path / "full", sources=True)
    FusedPack.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "again")
    once, again = (EDLoRA.from_pretrained(tmp_path / name) for name in ("full", "again"))
    assert once.digest == again.digest


def test_sources_are_found_from_a_subfolder_and_from_the_file(published: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "several" / "packs" / "both"
    GradientFuser().fuse(published[:2]).save_pretrained(folder, sources=True)
    for pack in (
        FusedPack.from_pretrained(tmp_path / "several", subfolder="packs/both"),
        FusedPack.from_pretrained(folder / "edlora.safetensors"),
    ):
        assert all(source.statistics for source in pack.sources)
        assert [source.name for source in pack.sources] == ["<rex>", "<kit>"]


def test_sources_are_found_at_the_revision_and_with_the_token_of_the_pack(
    loopback_hub: Any, published: list[Path], tmp_path: Path
) -> None:
    hub = {"token": loopback_hub.token, "revision": "old"}
    pack = GradientFuser().fuse(published[:2])
    pack.push_to_hub("me/both", sources=True, private=True, **hub)
    read = FusedPack.from_pretrained("me/both", cache_dir=tmp_path / "cache", **hub)
    assert all(source.statistics for source in read.sources)
    same_deltas(read.remove("<kit>"), pack.remove("<kit>"))


def test_concepts_of_one_source_have_one_weight(published: list[Path], tmp_path: Path) -> None:
    GradientFuser().fuse(published[:2]).save_pretrained(tmp_path / "pair")
    pack = GradientFuser().fuse([tmp_path / "pair", published[2]], method="average")
    with pytest.raises(FusionError, match=r"<rex>\+<kit> is one source, which has one weight; got 5 and 2"):
        pack.reweight({"<rex>": 5, "<kit>": 2})
    assert [source.weight for source in pack.reweight({"<rex>": 5, "<kit>": 5}).sources] == [5, 1]
