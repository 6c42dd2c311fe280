"""Nothing is overwritten unasked, and what is overwritten leaves nothing behind that belongs to what was there."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from PIL import Image

import packs
import tiny
from diffusers_mixofshow.atomic import check_outputs, refuse_overwriting
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.folder import PARTS
from diffusers_mixofshow.errors import ConfigurationError, FileWriteError, OverwriteError
from diffusers_mixofshow.fusion import FusedPack, GradientFuser
from diffusers_mixofshow.interop import convert, write_lora
from diffusers_mixofshow.pipelines import MixOfShowPipeline
from diffusers_mixofshow.regions import Layout, Region


FILE, STATISTICS, PLAIN = "edlora.safetensors", "edlora.statistics.safetensors", "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def components() -> dict[str, object]:
    return tiny.components()


@pytest.fixture(scope="module")
def pipe(components: dict[str, object]) -> MixOfShowPipeline:
    made = MixOfShowPipeline(**components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def published(pipe: MixOfShowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ED-LoRAs with statistics beside them, and a base model."""
    folder = tmp_path_factory.mktemp("published")
    StableDiffusionPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(folder / "base")
    fuser = GradientFuser(pipe, steps=1, prompts=("a <TOK>", "two <TOK>"), sequential=False)
    for seed, name in enumerate(("rex", "kit", "zoe")):
        pack = packs.random_pack(pipe.components, name, ranks=(2,), seed=seed)
        replace(pack, base_model=str(folder / "base")).save_pretrained(folder / name)
        fuser.record(folder / name)
    return folder


def fused(published: Path, *names: str) -> FusedPack:
    return GradientFuser().fuse([str(published / name) for name in names])


def plain(published: Path) -> FusedPack:
    from diffusers_mixofshow.fusion import LoRASource

    files = []
    for name in ("rex", "kit"):
        files.append(
            write_lora(published / f"plain-{name}.safetensors", EDLoRA.from_pretrained(published / name).lora)
        )
    return GradientFuser().fuse([LoRASource(file, prompts=["a dog"]) for file in files], method="average")


def contents(folder: Path) -> dict[str, bytes]:
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.is_file()}


Save = Callable[[Path, bool], object]


def writers(published: Path, pipe: MixOfShowPipeline) -> dict[str, tuple[str, Save]]:
    """What writes: the name of what it writes, and how."""
    rex = EDLoRA.from_pretrained(published / "rex")

    def of_pipeline(place: Path, overwrite: bool) -> None:
        pipe.load_edlora(rex)
        try:
            pipe.save_edlora(place.parent, overwrite=overwrite)
        finally:
            pipe.unload_edlora()

    def converted(to: str, whole: bool) -> Save:
        return lambda place, overwrite: convert(rex, place if whole else place.parent, to, overwrite=overwrite)

    pack, layout = fused(published, "rex", "kit"), Layout((Region("a <rex>", box=(0, 0, 1, 1)),), prompt="a")
    return {
        "pack": (FILE, lambda place, overwrite: rex.save_pretrained(place.parent, overwrite=overwrite)),
        "fused": (FILE, lambda place, told: pack.save_pretrained(place.parent, sources=True, overwrite=told)),
        "plain": (PLAIN, lambda place, overwrite: plain(published).save_pretrained(place.parent, overwrite=overwrite)),
        "merged": (
            "model_index.json",
            lambda place, overwrite: rex.save_pretrained(place.parent, merged=True, overwrite=overwrite),
        ),
        "pipeline": (FILE, of_pipeline),
        "edlora": (FILE, converted("edlora", False)),
        "diffusers": (PLAIN, converted("diffusers", False)),
        "diffusers file": ("rex.safetensors", converted("diffusers", True)),
        "diffusers words": (
            "embeddings/rex.safetensors",
            lambda place, overwrite: convert(rex, place.parent.parent, "diffusers", overwrite=overwrite),
        ),
        "diffusers text": ("HOW_TO_USE.txt", converted("diffusers", False)),
        "kohya": ("rex.safetensors", converted("kohya", False)),
        "kohya text": ("HOW_TO_USE.txt", converted("kohya", False)),
        "textual inversion": ("rex.safetensors", converted("textual-inversion", False)),
        "textual inversion file": ("word.safetensors", converted("textual-inversion", True)),
        "authors'": ("edlora_model-latest.pth", converted("mix-of-show", False)),
        "authors' file": ("rex.pth", converted("mix-of-show", True)),
        "layout": ("layout.json", lambda place, overwrite: layout.save(place, overwrite=overwrite)),
        "heat map": ("kept.png", lambda place, overwrite: pack.report.heat_map(place, overwrite=overwrite)),
    }  # fmt: skip


KINDS = (
    "pack", "fused", "plain", "merged", "pipeline", "edlora", "diffusers", "diffusers file", "diffusers words",
    "diffusers text", "kohya", "kohya text", "textual inversion", "textual inversion file", "authors'",
    "authors' file", "layout", "heat map",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_there_stays_unless_its_writer_is_told(
    published: Path, pipe: MixOfShowPipeline, tmp_path: Path, kind: str
) -> None:
    name, save = writers(published, pipe)[kind]
    place = tmp_path / "new" / name
    place.parent.mkdir(parents=True)
    save(place, False)  # an empty folder is free
    assert place.is_file()
    before = contents(tmp_path)
    place.write_bytes(b"mine")
    with pytest.raises(
        OverwriteError, match=r"there already, and nothing is overwritten unasked.*overwrite=True"
    ) as error:
        save(place, False)
    assert str(place) in str(error.value)
    with pytest.raises(OverwriteError):  # the way there is made by the writer itself
        save(tmp_path / "gone" / ".." / "new" / name, False)
    assert contents(tmp_path) == before | {place.relative_to(tmp_path).as_posix(): b"mine"}
    save(place, True)
    assert contents(tmp_path).keys() == before.keys()
    assert place.read_bytes() != b"mine"


@pytest.mark.parametrize("link", ["to a file", "to nowhere"])
def test_a_link_is_something_and_what_it_leads_to_stays(published: Path, tmp_path: Path, link: str) -> None:
    rex = EDLoRA.from_pretrained(published / "rex")
    target = tmp_path / "target"
    if link == "to a file":
        target.write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).symlink_to(target)
    with pytest.raises(OverwriteError, match="is there already"):
        rex.save_pretrained(tmp_path / "out")
    rex.save_pretrained(tmp_path / "out", overwrite=True)
    assert (target.read_bytes() if target.exists() else None) == (b"mine" if link == "to a file" else None)
    assert not (tmp_path / "out" / FILE).is_symlink()


def test_a_folder_of_somebody_else_is_no_obstacle_and_stays(published: Path, tmp_path: Path) -> None:
    for name in ("notes.txt", "samples/holiday.png", "sources/mine.txt", "unet/mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        fused(published, "rex", "kit").save_pretrained(tmp_path, sources=True, overwrite=overwrite)
    EDLoRA.from_pretrained(published / "zoe").save_pretrained(tmp_path, overwrite=True)
    expected = {FILE, "README.md", "notes.txt", "samples/holiday.png", "sources/mine.txt", "unet/mine.txt"}
    assert contents(tmp_path).keys() == expected


def test_another_pack_leaves_nothing_of_the_one_before(published: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    samples = {"a <rex>": picture, "two <rex>": picture}
    folder = tmp_path / "pack"
    fused(published, "rex", "kit").save_pretrained(folder, sources=True, samples=samples)
    shutil.copy(published / "rex" / STATISTICS, folder)
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert {"samples/1.png", f"sources/kit/{STATISTICS}"} <= contents(folder).keys()

    zoe = EDLoRA.from_pretrained(published / "zoe")
    zoe.save_pretrained(folder, overwrite=True, samples={"a <zoe>": picture})
    assert contents(folder).keys() == {FILE, "README.md", "samples/0.png"}
    assert {path.name for path in folder.iterdir()} == {FILE, "README.md", "samples"}  # no empty folders
    assert [entry["text"] for entry in ModelCard.load(card).data.widget] == ["a <zoe>"]
    EDLoRA.from_pretrained(published / "kit").save_pretrained(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {FILE, "README.md"}
    assert ModelCard.load(card).data.get("widget") is None
    assert "<Gallery />" not in card.read_text()
    assert "My own words." in card.read_text()


def test_the_same_pack_again_keeps_what_is_its_own(published: Path, tmp_path: Path) -> None:
    pack, picture = fused(published, "rex", "kit"), Image.new("RGB", (8, 8), "red")
    pack.save_pretrained(tmp_path, sources=True, samples={"a <rex>": picture})
    before = contents(tmp_path)
    pack.save_pretrained(tmp_path, overwrite=True)
    assert contents(tmp_path) == before
    replace(EDLoRA.from_pretrained(tmp_path), training={"note": "measured"}).save_pretrained(tmp_path, overwrite=True)
    assert contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("sources", [False, True])
def test_a_changed_pack_in_its_own_folder_keeps_the_sources_that_it_still_has(
    published: Path, tmp_path: Path, sources: bool
) -> None:
    fused(published, "rex", "kit", "zoe").save_pretrained(tmp_path, sources=True)
    less = FusedPack.from_pretrained(tmp_path).remove("<kit>")
    with pytest.raises(OverwriteError):
        less.save_pretrained(tmp_path, sources=sources)
    less.save_pretrained(tmp_path, sources=sources, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "sources").iterdir()) == ["rex", "zoe"]
    again = FusedPack.from_pretrained(tmp_path).remove("<rex>")
    again.save_pretrained(tmp_path, sources=sources, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "sources").iterdir()) == ["zoe"]
    FusedPack.from_pretrained(tmp_path).add(str(published / "kit")).save_pretrained(
        tmp_path, sources=sources, overwrite=True
    )
    kept = ["kit", "zoe"] if sources else ["zoe"]
    assert sorted(path.name for path in (tmp_path / "sources").iterdir()) == kept


def test_a_source_of_the_same_name_and_other_weights_is_another(published: Path, tmp_path: Path) -> None:
    fused(published, "rex", "kit").save_pretrained(tmp_path, sources=True)
    other = replace(
        packs.random_pack(tiny.components(), "rex", ranks=(2,), seed=9), base_model=str(published / "base")
    )
    anew = GradientFuser().fuse([other, str(published / "kit")], method="average")
    anew.save_pretrained(tmp_path, overwrite=True)
    assert [path.name for path in (tmp_path / "sources").iterdir()] == ["kit"]
    anew.save_pretrained(tmp_path, overwrite=True, sources=True)
    assert contents(tmp_path / "sources" / "rex").keys() == {FILE, "README.md"}
    assert EDLoRA.from_pretrained(tmp_path / "sources" / "rex").digest == other.digest


def test_a_fusion_may_take_the_place_of_one_of_its_sources_if_it_carries_them(published: Path, tmp_path: Path) -> None:
    shutil.copytree(published / "rex", tmp_path / "rex")
    pack = GradientFuser().fuse([str(tmp_path / "rex"), str(published / "kit")])
    with pytest.raises(OverwriteError, match="and nothing is overwritten"):
        pack.save_pretrained(tmp_path / "rex", sources=True)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OverwriteError, match=r"would replace its own source: .*rex\. .*sources=True"):
            pack.save_pretrained(tmp_path / "rex", overwrite=overwrite)
    assert contents(tmp_path) == before
    pack.save_pretrained(tmp_path / "rex", sources=True, overwrite=True)
    assert not (tmp_path / "rex" / STATISTICS).exists()
    again = FusedPack.from_pretrained(tmp_path / "rex").remove("<kit>")
    torch.testing.assert_close(again.embeddings["<rex1>"], pack.embeddings["<rex1>"])


def test_a_pack_in_the_place_of_a_merged_pipeline_and_the_reverse(published: Path, tmp_path: Path) -> None:
    rex = EDLoRA.from_pretrained(published / "rex")
    rex.save_pretrained(tmp_path, merged=True)
    assert (tmp_path / "unet").is_dir()
    rex.save_pretrained(tmp_path, overwrite=True)  # beside a pipeline that has its updates it would act twice
    assert contents(tmp_path).keys() == {FILE, "README.md"}
    rex.save_pretrained(tmp_path, merged=True, overwrite=True)
    assert {"model_index.json", "unet/config.json"} <= contents(tmp_path).keys()
    EDLoRA.from_pretrained(published / "kit").save_pretrained(tmp_path, merged=True, overwrite=True)
    pipe = MixOfShowPipeline.from_pretrained(tmp_path)
    assert list(pipe.concepts) == ["<kit>"]


def test_what_no_pack_has_written_stays_whatever_its_name(published: Path, tmp_path: Path) -> None:
    """A folder of a project, whose own sources and pictures have the names of a pack's."""
    for name in ("sources/raw/model.safetensors", "samples/2024.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    EDLoRA.from_pretrained(published / "rex").save_pretrained(tmp_path)
    EDLoRA.from_pretrained(published / "kit").save_pretrained(tmp_path, overwrite=True)
    assert contents(tmp_path).items() >= before.items()


def test_fewer_samples_leave_none_of_those_before(published: Path, tmp_path: Path) -> None:
    rex, picture = EDLoRA.from_pretrained(published / "rex"), Image.new("RGB", (8, 8))
    rex.save_pretrained(tmp_path, samples=dict.fromkeys(("a", "b", "c"), picture))
    (tmp_path / "samples" / "7.png").write_text("mine")
    rex.save_pretrained(tmp_path, samples={"a": picture}, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["0.png", "7.png"]


def test_the_parts_of_a_pipeline_are_those_of_diffusers() -> None:
    of_both = [StableDiffusionPipeline, StableDiffusionXLPipeline]
    named = {name for each in of_both for name in inspect.signature(each.__init__).parameters}
    settings = {"self", "requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker"}
    assert set(PARTS) == named - settings


@pytest.mark.parametrize(
    ("files", "error", "told"),
    [
        (("a.png", "a.png"), ConfigurationError, "a place of its own"),
        (("a.png", "x/../a.png"), ConfigurationError, "a place of its own"),
        (("a.png", "A.PNG"), ConfigurationError, "a place of its own"),
        (("caf\u00e9.png", "cafe\u0301.png"), ConfigurationError, "a place of its own"),
        (("pack/edlora.safetensors", "pack"), ConfigurationError, "a place of its own"),
        (("link.png", "taken.png"), ConfigurationError, "a place of its own"),
        (("folder",), FileWriteError, "there are folders: .*folder"),
        (("taken.png", "b.png"), OverwriteError, "taken.png is there already"),
        (("taken.png", "nowhere.png"), OverwriteError, "taken.png, .*nowhere.png are there already"),
        (("taken.png/b.png",), FileWriteError, "Not a directory"),
        (("new/folder/b.png", "b.png"), None, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_outputs_that_cannot_or_may_not_be_written_are_told_before_the_work(
    tmp_path: Path, files: tuple[str, ...], error: type[Exception] | None, told: str, overwrite: bool
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.png").write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to("taken.png")
    (tmp_path / "nowhere.png").symlink_to("missing.png")
    before = contents(tmp_path)
    places = [tmp_path / file for file in files]
    if error is None or (error is OverwriteError and overwrite):
        check_outputs(*places, overwrite=overwrite)
    else:
        with pytest.raises(error, match=told):
            check_outputs(*places, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_many_places_are_named_up_to_four(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / str(number)).touch()
    with pytest.raises(OverwriteError, match=r"/3 and 2 more are there already.*replaces them"):
        refuse_overwriting(*(tmp_path / str(number) for number in range(6)), overwrite=False)
