"""What the page does, without a browser or Gradio."""

from __future__ import annotations

import json
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_mixofshow import Concept, EDLoRA, Layout, MixOfShowPipeline, Region
from diffusers_mixofshow.errors import (
    ConceptError,
    ConfigurationError,
    EDLoRAFormatError,
    MixOfShowError,
    MixOfShowWarning,
    RegionError,
)
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.sampling.provenance import read_options
from diffusers_mixofshow.ui import actions
from diffusers_mixofshow.ui.actions import Wishes
from diffusers_mixofshow.ui.canvas import to_layout, to_value
from diffusers_mixofshow.ui.conditions import draw_condition
from diffusers_mixofshow.ui.session import MOST_PACKS, Session, Studio


CANVAS = to_value(Layout((Region("a brown dog in the snow", box=(0.0, 0.25, 0.5, 1.0)),)), 64, 64)
QUICK = {"prompt": "a dog in the snow", "steps": 2, "guidance": 3.0, "draft": False, "refine": False}


def weights_of(studio: Studio) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in studio.pipe.unet.state_dict().items()}


def test_a_concept_is_loaded_for_one_user_and_not_into_the_base(studio: Studio, packs: dict[str, Path]) -> None:
    before = weights_of(studio)
    session = actions.load(studio, Session(), packs["rex"])
    assert [concept.placeholder for concept in session.concepts] == ["<rex>"]
    assert actions.list_loaded(session) == [["rex", "<rex>", "dog", "toyland"]]
    assert Session().concepts == []
    assert studio.pipe.concepts == {}
    after = weights_of(studio)
    assert before.keys() == after.keys()
    assert session.without_pack("rex").concepts == []
    assert session.without_pack("what is not there").concepts == session.concepts


def test_two_concepts_of_one_name_are_refused(studio: Studio, packs: dict[str, Path]) -> None:
    session = actions.load(studio, Session(), str(packs["rex"].parent))
    with pytest.raises(ConceptError, match="<rex>"):
        actions.load(studio, session, packs["rex"])


def test_uploads_of_one_file_name_are_told_apart(studio: Studio, packs: dict[str, Path], tmp_path: Path) -> None:
    plain = []
    for name, path in packs.items():
        (tmp_path / name).mkdir()
        plain.append(write_lora(tmp_path / name / "lora.safetensors", studio.open(path).edlora.lora))
    session, _ = actions.load_files(studio, Session(), [*packs.values(), *plain])
    assert [row[:2] for row in actions.list_loaded(session)] == [
        ["rex", "<rex>"],
        ["tom", "<tom>"],
        ["lora.safetensors", "(a plain LoRA)"],
        ["lora.safetensors (2)", "(a plain LoRA)"],
    ]
    again = actions.load(studio, session, packs["rex"])
    assert len(again.packs) == 4


def test_a_fused_pack_takes_the_place_of_what_it_was_fused_from(
    studio: Studio, packs: dict[str, Path], tmp_path: Path
) -> None:
    files, _, _ = actions.fuse(studio, list(packs.values()), "sum", [])
    lora = write_lora(tmp_path / "style.safetensors", studio.open(packs["rex"]).edlora.lora)
    session, _ = actions.load_files(studio, Session(), [packs["rex"], lora])
    session = actions.load_fused(studio, session, files)
    assert list(session.packs) == ["style.safetensors", "rex, tom"]
    canvas = to_value(Layout((Region("a <rex>", box=(0.0, 0.25, 0.5, 1.0)),)), 64, 64)
    picture = actions.draw_picture(studio, session, canvas, Wishes(**QUICK)).picture
    assert actions.read_layout_file(picture, 8, 8).needs == ("style.safetensors", "rex, tom")
    fused_lora = write_lora(tmp_path / "again.safetensors", studio.open(packs["tom"]).edlora.lora)
    for _ in range(2):
        session = actions.load_fused(studio, session, [tmp_path / "README.md", fused_lora])
    assert list(session.packs) == ["style.safetensors", "rex, tom", "again.safetensors"]
    with pytest.raises(ConfigurationError, match="Nothing is fused yet"):
        actions.load_fused(studio, session, [])


def test_a_session_holds_only_so_many_packs(studio: Studio, packs: dict[str, Path]) -> None:
    plain = studio.open(packs["rex"]).edlora
    session = Session(packs=dict.fromkeys(map(str, range(MOST_PACKS)), plain))
    with pytest.raises(ConfigurationError, match="Unload one first"):
        session.with_pack("more", plain)


def test_a_file_that_is_refused_does_not_keep_others_out(
    studio: Studio, packs: dict[str, Path], tmp_path: Path
) -> None:
    refused = tmp_path / "bad.safetensors"
    refused.write_bytes(b"not a file")
    session, messages = actions.load_files(studio, Session(), [refused, packs["rex"]])
    assert [concept.placeholder for concept in session.concepts] == ["<rex>"]
    assert len(messages) == 1
    assert "bad.safetensors" in messages[0]
    with pytest.raises(ConfigurationError, match=r"bad\.safetensors"):
        actions.load_files(studio, session, [refused])
    assert actions.load_files(studio, session, []) == (session, [])


def test_messages_name_uploaded_files_without_their_folders() -> None:
    folder = Path("/tmp/gradio")
    told = actions.word_for_page(f"{folder}/0a1b/my dog.bin cannot be read; '{folder}/2c/x.pt', /data/y.pt", [folder])
    assert told == "my dog.bin cannot be read; 'x.pt', /data/y.pt"


def test_messages_on_the_page_name_no_function_or_option(studio: Studio) -> None:
    canvas = to_value(Layout((Region("a <rex>", box=(0, 0, 1, 1)),)), 64, 64)
    with pytest.raises(ConceptError) as raised:
        actions.draw_picture(studio, Session(), canvas, Wishes(**QUICK))
    told = actions.word_for_page(raised.value, [])
    assert "<rex>" in told
    assert "load_edlora" not in told
    assert "--" not in told


def test_the_base_is_told_with_what_it_can_draw(studio: Studio) -> None:
    assert (
        actions.tell_base(studio) == "The base `toyland` is loaded; it can draw critter, dog, cat, vase, chair, table."
    )


def test_a_session_can_be_sent_to_another_process(studio: Studio, packs: dict[str, Path]) -> None:
    session = actions.load(studio, Session(), packs["rex"])
    assert pickle.loads(pickle.dumps(session)).concepts == session.concepts


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file",
        b"PK\x03\x04",
        b"\x80\x04cos\nsystem\n",
        b"\xff" * 64,
        (8).to_bytes(8, "little") + b"{}      ",
    ],
    ids=["empty", "text", "zip", "pickle", "long header", "no tensors"],
)
@pytest.mark.parametrize("ending", [".safetensors", ".bin", ".pth"])
def test_what_is_dropped_is_read_as_any_strangers_file(
    studio: Studio, tmp_path: Path, content: bytes, ending: str
) -> None:
    path = tmp_path / f"dropped{ending}"
    path.write_bytes(content)
    for act in (lambda: actions.load(studio, Session(), path), lambda: actions.describe(studio, path)):
        with pytest.raises(MixOfShowError):
            act()
    assert studio.pipe.concepts == {}


def test_a_concept_of_another_base_is_refused_when_it_is_loaded(studio: Studio, tmp_path: Path) -> None:
    import packs as random_packs
    import tiny

    path = random_packs.random_pack(tiny.components()).save_pretrained(tmp_path)
    with pytest.raises(EDLoRAFormatError):
        actions.load(studio, Session(), path)
    assert studio.pipe.get_list_adapters() == {}


@pytest.mark.parametrize("typed", ["/etc", "../packs", "~/concepts", "packs", "a/b/c", "x.safetensors", "C:\\x"])
def test_strangers_name_no_place_of_this_machine(studio: Studio, typed: str) -> None:
    shared = Studio("toyland", "cpu", local=False)
    with pytest.raises(ConfigurationError, match="no Hub id"):
        shared.open(typed)


def test_an_empty_name_is_told(studio: Studio) -> None:
    with pytest.raises(ConfigurationError, match="Got no name"):
        studio.open("")


def test_names_can_be_read_over_wide_pictures_as_over_square_ones(studio: Studio) -> None:
    """The page shows all pictures equally wide, so that a name's height is a share of the width."""
    shares = []
    for width in (64, 160):
        canvas = to_value(Layout((Region("a dog in the snow", box=(0.0, 0.1, 0.5, 1.0)),)), width, 64)
        seen = np.asarray(actions.draw_picture(studio, Session(), canvas, Wishes(**QUICK)).overlay.convert("RGB"))
        label = (seen[:, 4:40] == 255).all(axis=2).mean(axis=1) > 0.2
        shares.append(label.sum() / width)
    assert shares[0] == pytest.approx(shares[1], rel=0.2)


def test_a_picture_is_drawn_that_tells_how(studio: Studio, packs: dict[str, Path]) -> None:
    before = weights_of(studio)
    session = actions.load(studio, Session(), packs["rex"])
    canvas = to_value(Layout((Region("a <rex> in the snow", box=(0.0, 0.25, 0.5, 1.0)),)), 64, 64)
    canvas["regions"][0]["colour"] = "#12e456"
    result = actions.draw_picture(studio, session, canvas, Wishes(**QUICK | {"seed": 7, "isolation": True}))
    with Image.open(result.picture) as picture:
        assert picture.size == (64, 64)
    assert min(result.overlay.size) >= 512
    assert (np.asarray(result.overlay.convert("RGB")) == (0x12, 0xE4, 0x56)).all(axis=2).sum() > 500
    with Image.open(result.picture) as picture:  # between outline and label, the overlay has its colours and pixels
        large = np.asarray(picture.convert("RGB").resize(result.overlay.size, Image.Resampling.NEAREST))
    seen = np.asarray(result.overlay.convert("RGB"))
    assert (seen[200:500, 10:240] == large[200:500, 10:240]).all()
    assert (seen[:, 300:] == large[:, 300:]).all()
    saved = actions.save_layout(studio, canvas, QUICK["prompt"], "")
    assert Layout.load(saved).describe()["regions"] == [
        {"prompt": "a <rex> in the snow", "box": [0.0, 0.25, 0.5, 1.0]}
    ]
    told = read_options(result.picture)
    assert (told["seed"], told["steps"], told["guidance"], told["base"]) == (7, 2, 3.0, "toyland")
    assert (told["isolation"], told["draft"]) == (True, False)
    assert studio.pipe.get_list_adapters() == {}
    after = weights_of(studio)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_picture_is_the_one_that_the_pipeline_draws(studio: Studio) -> None:
    result = actions.draw_picture(studio, Session(), CANVAS, Wishes(**QUICK))
    pipe = MixOfShowPipeline.from_pretrained("toyland")
    pipe.set_progress_bar_config(disable=True)
    region = Region("a brown dog in the snow", box=(0.0, 0.25, 0.5, 1.0))
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator}
    expected = pipe("a dog in the snow", regions=[region], **settings).images[0]
    with Image.open(result.picture) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize("switch", ["draft", "refine", "isolation", "condition"])
def test_every_switch_changes_the_picture_and_is_told(studio: Studio, switch: str) -> None:
    regions = (Region("a brown dog", box=(0.0, 0.25, 0.5, 1.0)), Region("a red vase", box=(0.5, 0.25, 1.0, 1.0)))
    canvas = to_value(Layout(regions), 64, 64)
    plain = actions.draw_picture(studio, Session(), canvas, Wishes(**QUICK))
    other = actions.draw_picture(studio, Session(), canvas, Wishes(**QUICK | {switch: True}))
    with Image.open(plain.picture) as one, Image.open(other.picture) as two:
        assert not np.array_equal(np.asarray(one), np.asarray(two))
    assert actions.read_layout_file(other.picture, 8, 8).settings[switch] is True
    assert actions.read_layout_file(plain.picture, 8, 8).settings[switch] is False
    assert (other.condition is not None) is (switch == "condition")


@pytest.mark.parametrize("switch", ["draft", "refine", "isolation", "condition"])
def test_switches_wait_for_a_region(studio: Studio, switch: str) -> None:
    canvas = CANVAS | {"regions": []}
    result = actions.draw_picture(studio, Session(), canvas, Wishes(**QUICK | {switch: True}))
    assert actions.read_layout_file(result.picture, 8, 8).canvas["regions"] == []


def test_a_picture_and_a_layout_are_read_again(studio: Studio) -> None:
    wishes = Wishes(**QUICK | {"seed": 3, "negative_prompt": "a cat"})
    canvas = CANVAS | {"regions": [CANVAS["regions"][0] | {"name": "the dog"}]}
    result = actions.draw_picture(studio, Session(), canvas, wishes)
    layout = actions.save_layout(studio, canvas, wishes.prompt, wishes.negative_prompt)
    for path in (result.picture, layout):
        read = actions.read_layout_file(path, 8, 8)
        assert read.canvas["regions"] == canvas["regions"]
        assert (read.canvas["width"], read.prompt, read.negative_prompt) == (64, "a dog in the snow", "a cat")
    assert actions.read_layout_file(layout, 8, 8).settings == {}
    settings = actions.read_layout_file(result.picture, 8, 8).settings
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (3, 2, 3.0)


def test_a_layout_is_saved_before_anything_is_drawn(studio: Studio) -> None:
    saved = actions.save_layout(studio, CANVAS, "", "")
    read = actions.read_layout_file(saved, 8, 8)
    assert (saved.name, read.canvas["regions"], read.prompt) == ("layout.json", CANVAS["regions"], "")
    assert "prompt" not in json.loads(saved.read_text())  # so that `mixofshow sample --prompt` can give one


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[]", "no layout"),
        ("x.json", b"{", r"cannot be read as a layout: it is no JSON \(.* line 1 column 2"),
        ("x.png", b"PNG", "cannot be read as a picture"),
        ("x.json", b'{"format": "mixofshow-layout", "version": 1, "width": 90000}', "90000"),
        (
            "x.json",
            b'{"format": "mixofshow-layout", "version": 1, "regions": [{"prompt": "a", "mask": "../x.png"}]}',
            "no file in the layout's folder",
        ),
    ],
)
def test_what_is_no_layout_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MixOfShowError, match=message):
        actions.read_layout_file(tmp_path / name, 8, 8)


@pytest.mark.parametrize(("pixels", "fits"), [(2048, True), (2056, False)])
def test_the_largest_size_of_layout_and_canvas(tmp_path: Path, pixels: int, fits: bool) -> None:
    layout = {"format": "mixofshow-layout", "version": 1, "width": pixels, "height": 8, "regions": []}
    (tmp_path / "x.json").write_text(json.dumps(layout))
    value = CANVAS | {"width": 8, "height": pixels}
    if fits:
        assert actions.read_layout_file(tmp_path / "x.json", 8, 8).canvas["width"] == pixels
        assert to_layout(value, "", "").height == pixels
        return
    with pytest.raises(RegionError, match=r"2056 x 8 pixels; expected at most 2048"):
        actions.read_layout_file(tmp_path / "x.json", 8, 8)
    with pytest.raises(RegionError, match="height of 2056 pixels; expected a multiple of 8 up to 2048"):
        to_layout(value, "", "")


def test_the_largest_wishes() -> None:
    largest = Wishes(**QUICK | {"steps": 200, "seed": 2**63 - 1, "guidance": 100.0})
    assert (largest.steps, largest.seed, largest.guidance) == (200, 2**63 - 1, 100.0)
    with pytest.raises(ConfigurationError, match="201 steps; expected 1 to 200"):
        Wishes(**QUICK | {"steps": 201})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 10_000}, "10000 steps"),
        ({"seed": 2**64}, "the seed"),
        ({"guidance": float("nan")}, "guidance of nan"),
        ({"guidance": -1.0}, "guidance of -1"),
    ],
)
def test_wishes_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Wishes(**QUICK | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, r"^Seed is empty; expected a whole number\.$"),
        ({"steps": None}, r"^Steps is empty; expected a whole number\.$"),
        ({"guidance": None}, r"^Guidance is empty; expected a number\.$"),
        ({"seed": 10**400}, r"^Seed is 1000*; expected a whole number\.$"),
        ({"guidance": 10**400}, r"^Guidance is 1000*; expected a number\.$"),
        ({"seed": 1.5}, r"^Seed is 1\.5; expected a whole number\.$"),
        ({"steps": float("inf")}, r"^Steps is inf; expected a whole number\.$"),
        ({"guidance": "3"}, r"^Guidance is '3'; expected a number\.$"),
        ({"seed": None, "steps": None}, r"^Seed is empty; .*\. Steps is empty; "),
    ],
)
def test_a_number_field_without_its_number_is_named(changes: dict, message: str) -> None:
    fields = {"prompt": "a dog", "seed": 1, "steps": 2.0, "guidance": 3}
    wishes = Wishes.from_fields(**fields)
    assert (wishes.seed, wishes.steps, wishes.guidance) == (1, 2, 3.0)
    assert isinstance(wishes.steps, int)
    with pytest.raises(ConfigurationError, match=message):
        Wishes.from_fields(**fields | changes)


def test_an_unknown_concept_is_told_and_the_base_stays(studio: Studio, packs: dict[str, Path]) -> None:
    session = actions.load(studio, Session(), packs["tom"])
    canvas = to_value(Layout((Region("a <rex>", box=(0, 0, 1, 1)),)), 64, 64)
    with pytest.raises(ConceptError, match="<rex>"):
        actions.draw_picture(studio, session, canvas, Wishes(**QUICK))
    canvas = to_value(Layout([Region(f"a <{name}>", box=(0, 0, 1, 1)) for name in ("tom", "rex", "kit")]), 64, 64)
    canvas["regions"][2]["name"] = "the cat"
    with pytest.raises(ConceptError) as raised:
        actions.draw_picture(studio, session, canvas, Wishes(**QUICK))
    first, second = str(raised.value).splitlines()
    assert first.startswith("Region 2: Unknown in the prompt: <rex>")
    assert second.startswith("Region 3 ('the cat'): Unknown in the prompt: <kit>")
    assert studio.pipe.concepts == {}
    with pytest.raises(RegionError):
        actions.draw_picture(studio, session, {}, Wishes(**QUICK))


def test_two_users_at_once_get_what_they_would_get_alone(studio: Studio, packs: dict[str, Path]) -> None:
    sessions = {name: actions.load(studio, Session(), path) for name, path in packs.items()}

    def draw(name: str) -> bytes:
        canvas = to_value(Layout((Region(f"a <{name}>", box=(0, 0, 1, 1)),)), 64, 64)
        wishes = Wishes(**QUICK | {"prompt": f"a <{name}>"})
        return actions.draw_picture(studio, sessions[name], canvas, wishes).picture.read_bytes()

    alone = {name: draw(name) for name in packs}
    together: dict[str, bytes] = {}
    threads = [threading.Thread(target=lambda name=name: together.update({name: draw(name)})) for name in packs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone["rex"] != alone["tom"]
    assert together == alone


@pytest.mark.slow
def test_dropped_files_of_one_name_are_told_by_their_concepts(
    studio: Studio, packs: dict[str, Path], tmp_path: Path
) -> None:
    pack = EDLoRA.from_pretrained(packs["rex"])
    write_lora(tmp_path / "dog.safetensors", pack.lora)
    (tmp_path / "bad.safetensors").write_bytes(b"not a file")
    files = [*packs.values(), tmp_path / "dog.safetensors", tmp_path / "bad.safetensors"]
    assert actions.tell_contents(studio, files).splitlines() == [
        "edlora.safetensors: <rex>",
        "edlora.safetensors: <tom>",
        "dog.safetensors: a plain LoRA",
        "bad.safetensors: cannot be read",
    ]
    assert actions.tell_contents(studio, []) == ""


def test_loaded_concepts_are_fused_as_their_files_are(studio: Studio, packs: dict[str, Path], tmp_path: Path) -> None:
    session, _ = actions.load_files(studio, Session(), list(packs.values()))
    plain = write_lora(tmp_path / "dog.safetensors", studio.open(packs["rex"]).edlora.lora)
    names = actions.list_fusable(actions.load(studio, session, plain))
    assert names == ["rex", "tom"]
    fused = [
        actions.fuse(studio, sources, "closed-form", [])
        for sources in (list(packs.values()), actions.take_loaded(session, names))
    ]
    assert len({studio.open(files[1]).edlora.digest for files, _, _ in fused}) == 1
    assert fused[0][1:] == fused[1][1:]


def test_files_are_fused_with_the_report(studio: Studio, packs: dict[str, Path]) -> None:
    files, (headers, rows), meaning = actions.fuse(studio, list(packs.values()), "closed-form", [])
    assert [path.name for path in files] == ["README.md", "edlora.safetensors"]
    assert headers[:3] == ["concept", "averaged", "fused"]
    assert [row[0] for row in rows] == ["<rex>", "<tom>"]
    assert all(len(row) == len(headers) for row in rows)
    assert "residual" in meaning
    assert [concept.placeholder for concept in studio.open(files[1]).edlora.concepts] == ["<rex>", "<tom>"]


def test_a_merge_without_numbers_says_so(studio: Studio, packs: dict[str, Path]) -> None:
    _, (headers, rows), meaning = actions.fuse(studio, list(packs.values()), "sum", [])
    assert (headers, rows, meaning) == (["concept"], [["<rex>"], ["<tom>"]], "This method measures nothing.")


@pytest.mark.parametrize(
    ("count", "method", "message"),
    [(0, "sum", "Got 0 sources"), (1, "sum", "Got 1 source to fuse, .* a line each"), (2, "dare", "'dare'")],
)
def test_what_cannot_be_fused_is_told(
    studio: Studio, packs: dict[str, Path], count: int, method: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        actions.fuse(studio, list(packs.values())[:count], method, [])


def test_a_file_is_told_as_inspect_tells_it(studio: Studio, packs: dict[str, Path]) -> None:
    told = actions.describe(studio, packs["rex"])
    facts = dict(told.facts)
    assert (facts["file"], facts["kind"], facts["rank"]) == ("edlora.safetensors", "ED-LoRA", "2")
    assert told.concepts[0][:3] == ["<rex>", "dog", studio.open(packs["rex"]).edlora.concepts[0].kind]
    assert "## " in told.card
    assert "<img" not in told.card.replace("\\<", "")


def test_old_results_go(studio: Studio) -> None:
    import os

    old = studio.new_folder()
    (old / "x").write_text("x")
    os.utime(old, (0, 0))
    fresh = studio.new_folder()
    assert not old.exists()
    assert fresh.exists()


def test_plain_loras_are_recorded_with_the_prompts_that_were_typed_for_each(
    studio: Studio, packs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of prompts for each file whose metadata tells no trigger words, in their order."""
    plain = [
        write_lora(tmp_path / f"{name}.safetensors", studio.open(packs[pack]).edlora.lora)
        for name, pack in (("first", "rex"), ("second", "tom"))
    ]
    with pytest.raises(ConfigurationError, match=r"second\.safetensors is a plain LoRA whose file tells no trigger"):
        actions.fuse(studio, [packs["rex"], *plain], "closed-form", ["red dog"])
    with pytest.warns(MixOfShowWarning, match="tell what calls second: the fused file will not name it"):
        _, (_, rows), _ = actions.fuse(studio, [packs["rex"], *plain], "average", ["red dog"])
    assert rows == [["<rex>"], ["first"], ["second"]]
    recorded: list[str] = []
    with monkeypatch.context() as patch:
        encode = studio.pipe.text_encoder.forward
        read = studio.pipe.tokenizer.batch_decode
        patch.setattr(
            studio.pipe.text_encoder,
            "forward",
            lambda ids, *rest, **more: (
                recorded.extend(read(ids, skip_special_tokens=True)),
                encode(ids, *rest, **more),
            )[1],
        )
        _, (_, rows), meaning = actions.fuse(studio, plain, "closed-form", ["red dog |  red dog here", "tom"])
    assert [row[0] for row in rows] == ["first", "second"]
    assert re.search(r" Largest overlaps \(0 to 1\): first and second [01]\.\d\d\.$", meaning)
    assert {"red dog", "red dog here", "tom"} <= set(recorded)


@pytest.mark.parametrize(
    ("prompt", "thing"),
    [
        ("a Vase, in the snow", "vase"),
        ("red chair", "chair"),
        ("snow", "critter"),
        ("a <tiny> on a chair", "table"),
        ("a <big>", "critter"),
    ],
)
def test_the_condition_shows_what_the_prompt_names(prompt: str, thing: str) -> None:
    """A concept's class word comes before other words, and what is no thing of Toyland is drawn as a critter."""
    classes = {"tiny": "table", "big": "house"}
    concepts = [
        Concept(placeholder=f"<{name}>", tokens=(f"<{name}1>", f"<{name}2>"), class_word=word)
        for name, word in classes.items()
    ]
    drawn = [
        draw_condition(Layout((Region(text, box=(0.1, 0.2, 0.9, 1.0)),), width=64, height=64), known)[1].digest
        for text, known in ((prompt, concepts), (thing, []))
    ]
    assert drawn[0] == drawn[1]
    other = draw_condition(Layout((Region("dog", box=(0.1, 0.2, 0.9, 1.0)),), width=64, height=64), [])[1].digest
    assert other != drawn[0]


def test_what_is_assumed_of_another_programs_file_is_told_when_it_is_loaded(studio: Studio, tmp_path: Path) -> None:
    vectors = torch.ones(2, studio.pipe.text_encoder.config.hidden_size)
    save_file({"<rex>": vectors}, tmp_path / "learned_embeds.safetensors")
    with pytest.warns(MixOfShowWarning, match="class word"):
        session = actions.load(studio, Session(), tmp_path / "learned_embeds.safetensors")
    assert [concept.placeholder for pack in session.packs.values() for concept in pack.concepts] == ["<rex>"]
