"""The parts below a training at their bounds: settings as texts, photos that are looked at, maps, files of latents."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.errors import (
    ConceptError,
    ConfigurationError,
    HubError,
    MixOfShowWarning,
    TrainingDataError,
)
from diffusers_mixofshow.families.layers import cross_attention_layers
from diffusers_mixofshow.training import hub_data, inspection
from diffusers_mixofshow.training.attention_maps import record_attention
from diffusers_mixofshow.training.captions import shuffle_tags
from diffusers_mixofshow.training.company import compose_company
from diffusers_mixofshow.training.config_files import read_settings
from diffusers_mixofshow.training.data import read_photos
from diffusers_mixofshow.training.folders import join_remarks, summarise_names
from diffusers_mixofshow.training.framing import Crop
from diffusers_mixofshow.training.latents import LatentEncoder
from diffusers_mixofshow.training.pictures import Photo
from diffusers_mixofshow.training.settings import settings_of
from diffusers_mixofshow.training.trained import initialise
from diffusers_mixofshow.training.words import check_words
from short_training import quick


# --- settings as texts ---


@dataclasses.dataclass
class Kinds:
    """One of each.

    Args:
        flag: Yes or no,
            on two lines: really.
        whole: A number.

    Raises:
        Nothing: At all.
    """

    flag: bool
    whole: int = 3
    number: float | None = None
    text: str | None = "x"
    place: str | Path = "here"
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


KNOWN = settings_of(Kinds)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *[("flag", text, True) for text in ("true", "yes", "on", "Yes", " ON ")],
        *[("flag", text, False) for text in ("false", "no", "off", "No", " OFF ")],
        ("flag", "1", "1"),
        ("flag", "none", "none"),
        ("whole", "7", 7),
        ("whole", " 7 ", 7),
        ("whole", "7.5", "7.5"),
        ("whole", "none", "none"),
        ("number", "1e-3", 1e-3),
        ("number", "3", 3.0),
        *[("number", text, None) for text in ("none", "None", " NULL ", "~", "")],
        ("number", "no", "no"),
        ("text", "none", None),
        ("text", "no", "no"),
        ("place", "none", "none"),
        ("place", "./a", "./a"),
        ("names", "a", ("a",)),
        ("names", ["a", "none"], ("a", "none")),
        ("sizes", ["1", "2"], (1, 2)),
        ("sizes", ["1", "x"], (1, "x")),
        ("whole", ["1"], ["1"]),
    ],
)
def test_texts_are_read_as_what_their_setting_is(name: str, text: Any, value: object) -> None:
    read = KNOWN[name].from_text(text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("flag", [True, False], [None, 1, 0, "yes"]),
        ("whole", [3, -1], [None, True, 3.0, "3"]),
        ("number", [None, 3, 2.5], [True, "3", 1j]),
        ("text", [None, "a"], [3, Path("a")]),
        ("place", ["a", Path("a")], [None, 3]),
        ("names", [(), ("a", "b")], [None, "a", ["a"], ("a", 3)]),
        ("sizes", [(1, 2)], [(1, True), (1.5,)]),
    ],
)
def test_values_are_of_their_settings_types(name: str, accepted: list[object], refused: list[object]) -> None:
    assert [value for value in accepted if not KNOWN[name].accepts(value)] == []
    assert [value for value in refused if KNOWN[name].accepts(value)] == []


def test_settings_say_what_they_are() -> None:
    assert list(KNOWN) == ["flag", "whole", "number", "text", "place", "names", "sizes"]
    assert [each.is_required for each in KNOWN.values()] == [True] + [False] * 6
    assert [each.is_list for each in KNOWN.values()] == [False] * 5 + [True] * 2
    assert [each.can_be_none for each in KNOWN.values()] == [False, False, True, True, False, False, False]
    assert [each.expected for each in KNOWN.values()] == [
        *("bool", "int", "float | None", "str | None", "str | Path", "tuple[str, ...]", "tuple[int, ...]")
    ]
    assert [each.documentation for each in KNOWN.values()][:3] == ["Yes or no, on two lines: really.", "A number.", ""]
    assert (KNOWN["whole"].option, KNOWN["whole"].default) == ("--whole", 3)
    assert settings_of(dataclasses.make_dataclass("Bare", [("a_b", int)]))["a_b"].option == "--a-b"
    assert [KNOWN["names"].normalise(value) for value in ("a", ["a", 3], ("a",), 3)] == [("a",), ("a", 3), ("a",), 3]
    assert KNOWN["text"].normalise(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("a.toml", 'number = "none"\ntext = "None"\nplace = "none"\nother = "none"', [None, "None", "none", "none"]),
        ("a.YAML", "number: none\ntext: None\nplace: none\nother: none", [None, None, "none", "none"]),
        ("a.Toml", "", []),
        ("a.yml", "", []),
        ("a.yml", "other: {a: 1}\nnumber: {b: 2}", [{"a": "1"}, {"b": "2"}]),
        ("a.yml", "sizes: [1, 2]\nflag: on", [(1, 2), True]),
    ],
)
def test_files_of_settings(tmp_path: Path, name: str, text: str, values: list[object]) -> None:
    (tmp_path / name).write_text(text)
    assert list(read_settings(tmp_path / name, KNOWN).values()) == values
    (tmp_path / "twice.yml").write_text("b: 1\na: 1\nb: 2\na: 3")
    with pytest.raises(ConfigurationError, match="sets a, b more than once"):
        read_settings(tmp_path / "twice.yml", KNOWN)


# --- photos that are looked at ---


def plain(path: str, value: int, size: tuple[int, int] = (64, 64)) -> Photo:
    return Photo(path=Path("/p") / path, image=Image.new("RGB", size, (value,) * 3), captions=("<potter>",), mask=None)


def test_a_photo_is_tiny_if_it_is_more_than_doubled() -> None:
    sizes = [(50, 90), (49, 90), (90, 49), (25, 25), (24, 24), (10, 10)]
    photos = [plain(f"{number}.png", 0, size) for number, size in enumerate(sizes)]
    assert inspection.list_tiny(photos, 100, Path("/p")) == [
        "training enlarges 5 of 6 photos more than 2 times: 1.png is 49x90 pixels (2.0 times), 2.png is 90x49 pixels "
        "(2.0 times), 3.png is 25x25 pixels (4.0 times) and 2 more"
    ]
    assert inspection.list_tiny(photos[:4], 100, Path("/p"))[0].endswith("3.png is 25x25 pixels (4.0 times)")
    assert inspection.list_tiny(photos[:1], 100, Path("/p")) == []


def test_photos_are_duplicates_below_a_difference_of_two() -> None:
    photos = [plain("a.png", 100), plain("b.png", 102), plain("c.png", 101, (32, 48)), plain("d.png", 98)]
    assert inspection.list_duplicates(photos, Path("/p")) == ["c.png shows the same as a.png, so it counts twice"]
    again = [*photos, plain("e.png", 103)]
    assert inspection.list_duplicates(again, Path("/p"))[1:] == ["e.png shows the same as b.png, so it counts twice"]


@pytest.mark.parametrize(("width", "accepted"), [(100, True), (101, True), (99, True), (103, False), (97, False)])
def test_a_mask_has_the_shape_of_its_photo(tmp_path: Path, width: int, accepted: bool) -> None:
    (tmp_path / "masks").mkdir()
    Image.linear_gradient("L").resize((100, 100)).save(tmp_path / "a.png")
    Image.new("L", (width, 100), 255).save(tmp_path / "masks" / "a.png")
    if accepted:
        (photo,) = read_photos(tmp_path, Concept.from_name("potter", "man"))
        assert photo.mask is not None
        assert photo.mask.size == (100, 100)
    else:
        with pytest.raises(TrainingDataError, match=f"masks/a.png is {width}x100, expected the photo's shape, 100x1"):
            read_photos(tmp_path, Concept.from_name("potter", "man"))


@pytest.mark.parametrize(
    ("size", "resolution", "kept"),
    [
        ((300, 200), 100, (300, 200)),
        ((303, 202), 100, (300, 200)),
        ((400, 1000), 50, (100, 250)),
        ((9, 9), None, (9, 9)),
    ],
)
def test_a_photo_is_kept_with_twice_the_pixels_it_is_trained_with(
    tmp_path: Path, size: tuple[int, int], resolution: int | None, kept: tuple[int, int]
) -> None:
    Image.linear_gradient("L").resize(size).save(tmp_path / "a.png")
    (photo,) = read_photos(tmp_path, Concept.from_name("potter", "man"), resolution=resolution)
    assert photo.image.size == kept


def test_sentences_about_files() -> None:
    assert summarise_names([], "is", "are") == []
    assert summarise_names(["a"], "is", "are") == ["a is"]
    assert summarise_names(["a", "b", "c"], "is", "are") == ["a, b, c are"]
    assert summarise_names(["a", "b", "c", "d", "e"], "is", "are") == ["a, b, c and 2 more are"]
    assert join_remarks("About", ["x"]) == "About: x."
    assert join_remarks("About", ["x", "y"]) == "About:\n  x;\n  y."


@pytest.mark.parametrize(
    ("caption", "count", "orders"),
    [
        ("a, b, c", 1, 1),
        ("a, b, c", 2, 2),
        ("a, b, c", 9, 2),
        ("a, b, c, d", 5, 5),
        ("a, b, c, d", 6, 6),
        ("a,b , b", 9, 1),
        ("a", 3, 1),
    ],
)
def test_how_many_orders_tags_are_written_in(caption: str, count: int, orders: int) -> None:
    found = shuffle_tags([caption], count, seed=0)
    assert len(set(found)) == orders
    assert all(each.split(", ")[0] == "a" for each in found)
    assert all(sorted(each.split(", ")) == sorted(tag.strip() for tag in caption.split(",")) for each in found)
    both = shuffle_tags([caption, "z"], count, seed=0)
    assert both == (*found, *["z"] * len(found))


# --- pictures composed of photos ---


def cut_out(soft: int, side: int = 300) -> Photo:
    """A box of the mask with a margin of ten pixels that is as grey as `soft`."""
    mask = Image.new("L", (side, side))
    mask.paste(soft, (90, 110, 210, 290))
    mask.paste(255, (100, 120, 200, 280))
    image = Image.new("RGB", (side, side), (0, 160, 0))
    image.paste((250, 0, 0), (90, 110, 210, 290))
    return Photo(path=Path("0.png"), image=image, captions=("a <potter>",), mask=mask)


@pytest.mark.parametrize(("soft", "margin"), [(127, 0), (128, 10)])
def test_what_was_behind_a_subject_is_unknown_with_a_rim(tmp_path: Path, soft: int, margin: int) -> None:
    for composed in compose_company([cut_out(soft)] * 3, quick(tmp_path, company=0.5)):
        rim = 3 + margin  # a hundredth of the side
        expected = np.ones((300, 300), dtype=bool)
        expected[120 - rim : 280 + rim, 100 - rim : 200 + rim] = False
        shown = np.asarray(composed.mask) > 0
        known = np.asarray(composed.known)
        assert ((known > 0) == (expected | shown)).all()
        assert (known[expected] == 255).all()
        columns = [np.flatnonzero(shown[:, part].any(axis=1)) for part in (slice(0, 150), slice(150, 300))]
        for column, part in zip(columns, (shown[:, :150], shown[:, 150:]), strict=True):
            width = len(np.flatnonzero(part.any(axis=0)))
            shape = (100 + 2 * margin) / (160 + 2 * margin)
            assert width / len(column) == pytest.approx(shape, abs=0.02)


# --- maps of attention ---


def test_maps_of_each_size_are_averaged(pipeline: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    latents, text = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 32)
    with record_attention(unet) as record, torch.no_grad():
        unet(latents, 10, encoder_hidden_states=text)
        maps = record.maps([3, 5], 8, 12)
    expected: dict[int, list[torch.Tensor]] = {}
    for path in cross_attention_layers(unet):
        heads = unet.get_submodule(path).heads
        pairs = (record.queries[path].unflatten(-1, (heads, -1)), record.keys[path].unflatten(-1, (heads, -1)))
        scores = torch.einsum("bphd,bthd->bhpt", *pairs) / pairs[0].shape[-1] ** 0.5
        mean = scores.softmax(dim=-1).mean(dim=1)
        expected.setdefault(mean.shape[1], []).append(torch.stack([mean[0, :, 3], mean[1, :, 5]]))
    assert {size: len(expected[size[0] * size[1]]) for size in maps} == {(8, 12): 3, (4, 6): 4}
    for (rows, columns), found in maps.items():
        mean = torch.stack(expected[rows * columns]).mean(dim=0)
        torch.testing.assert_close(found, mean.unflatten(1, (rows, columns)))


# --- files of latents ---


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mean": torch.full((2, 4, 8, 8), float("nan"))},
        {"deviation": torch.full((2, 4, 8, 8), float("inf"))},
        {"mean": torch.zeros(2, 4, 8, 8, dtype=torch.float64)},
        {"mean": torch.zeros(2, 4, 8, 4)},
        {"mean": torch.zeros(1, 4, 8, 8), "deviation": torch.zeros(1, 4, 8, 8)},
        {"more": torch.zeros(2, 4, 8, 8)},
        {"key": "another"},
    ],
)
def test_latents_that_cannot_be_meant_are_computed_again(
    pipeline: StableDiffusionPipeline, tmp_path: Path, change: dict[str, Any]
) -> None:
    crops = [Crop(pixels=torch.full((3, 16, 16), value), mask=torch.ones(1, 16, 16), valid=torch.ones(1, 16, 16))
             for value in (0.5, -0.5)]  # fmt: skip
    encoder = LatentEncoder(pipeline.vae, tmp_path)
    expected = encoder.encode(crops)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    assert metadata == {"key": file.stem}
    assert tensors.keys() == {"mean", "deviation"}
    changed = dict(change)
    key = changed.pop("key", file.stem)
    save_file({**tensors, "mean": tensors["mean"] + (not change), **changed}, file, metadata={"key": key})
    if not change:  # what fits is believed
        torch.testing.assert_close(encoder.encode(crops)[0], expected[0] + 1)
        return
    with pytest.warns(MixOfShowWarning, match="computed again"):
        again = encoder.encode(crops)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    with safe_open(file, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("mean"), expected[0])


def test_latents_of_other_pixels_have_another_name(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    def crop(value: float, width: int = 16) -> Crop:
        return Crop(pixels=torch.full((3, 16, width), value), mask=torch.ones(1), valid=torch.ones(1))

    encoder = LatentEncoder(pipeline.vae, tmp_path)
    for crops in ([crop(0.5)], [crop(0.25)], [crop(0.5)] * 2, [crop(0.5, 32)], [crop(0.5)]):
        encoder.encode(crops)
    assert len(list(tmp_path.iterdir())) == 4
    pipeline.vae.register_to_config(scaling_factor=0.5)
    LatentEncoder(pipeline.vae, tmp_path).encode([crop(0.5)])
    assert len(list(tmp_path.iterdir())) == 5


# --- a data set of the Hub ---


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (GatedRepoError, "access to it is gated; accept its terms on the Hub"),
        (RepositoryNotFoundError, "there is none of this name, or it is private"),
        (HFValidationError, "expected the form user/name"),
        (LocalEntryNotFoundError, "it is not in the cache, and the Hub was not reached"),
        (OSError, "odd"),
    ],
)
def test_why_a_data_set_cannot_be_fetched(error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> None:
        raised = error.__new__(error)
        Exception.__init__(raised, "odd")
        raise raised

    monkeypatch.setattr(hub_data, "snapshot_download", refusing)
    with pytest.raises(HubError, match=f"The data set 'me/x' cannot be fetched from the Hub: {told}"):
        hub_data.fetch_data_set("me/x")


# --- what is learnt ---


def test_values_of_another_model_are_refused(pipeline: StableDiffusionPipeline, photos: Path) -> None:
    with initialise(pipeline, quick(photos)) as trained:
        values = {name: value.detach() + 1 for name, value in trained.parameters().items()}
        trained.write(values)
        assert all(torch.equal(value, values[name]) for name, value in trained.parameters().items())
        name, value = next(iter(values.items()))
        for wrong in (
            {other: each for other, each in values.items() if other != name},
            {**values, name: value[:1]},
            {**values, "more": value},
        ):
            with pytest.raises(ConfigurationError, match="does not fit this base model"):
                trained.write(wrong)


def test_first_values_of_updates_are_pefts_and_hang_on_the_seed_alone(
    pipeline: StableDiffusionPipeline, photos: Path
) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        with initialise(pipeline, quick(photos, seed=seed, keep_start_token=False)) as trained:
            found.append({name: value.detach().clone() for name, value in trained.parameters().items()})
    first, again, other = found
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name.endswith(" down"):
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < float(value.abs().max()) <= bound  # uniform, as of a linear layer
        elif name.endswith(" up"):
            assert not value.any()


# --- what is written beside photos ---


def refusal_of(folder: Path) -> str:
    """What the folder is refused with; empty if it is not."""
    try:
        read_photos(folder, Concept.from_name("potter", "man"))
    except TrainingDataError as error:
        return str(error)
    return ""


def gradient(path: Path, turn: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").rotate(turn).save(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "<TOK>"}\n\n  \n{"file_name": "b.png", "text": "my <TOK>"}\n',
        ),
        ("metadata.csv", "\n,,\nfile_name,text\n\n,\na.png,<TOK>\n , \nb.png,my <TOK>\n"),
    ],
)
def test_empty_lines_of_metadata_end_nothing(tmp_path: Path, name: str, text: str) -> None:
    for turn, photo in enumerate(("a.png", "b.png")):
        gradient(tmp_path / photo, 90 * turn)
    (tmp_path / name).write_text(text)
    photos = read_photos(tmp_path, Concept.from_name("potter", "man"))
    assert [photo.captions for photo in photos] == [("<potter>",), ("my <potter>",)]


@pytest.mark.parametrize(("count", "more"), [(19, ""), (20, ""), (21, "metadata.jsonl, and 1 more")])
def test_twenty_wrong_lines_are_named(tmp_path: Path, count: int, more: str) -> None:
    gradient(tmp_path / "a.png")
    rows = [f'{{"file_name": "{number}.png", "mask_file_name": "m"}}' for number in range(count)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    told = refusal_of(tmp_path)
    assert told.count("there is no 'text' (there is no other column)") == min(count, 20)
    assert ("more" in told) is bool(more)
    assert more in told


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        (("masks/a.png",), ""),
        (("a_mask.png",), ""),
        (("masks/a.png", "a_mask.png"), "a.png has several masks (a_mask.png and masks/a.png); keep one"),
        (("masks/a.png", "mask/a.png"), "a.png has several masks (mask/a.png and masks/a.png); keep one"),
    ],
)
def test_a_photo_has_one_mask(tmp_path: Path, masks: tuple[str, ...], told: str) -> None:
    for name in ("a.png", *masks):
        gradient(tmp_path / name)
    refused = refusal_of(tmp_path)
    assert told in refused
    assert bool(refused) is bool(told)


@pytest.mark.parametrize(
    ("highest", "refused", "remark"), [(0, False, True), (1, True, False), (2, True, False), (3, False, False)]
)
def test_what_is_transparent_is_told(
    tmp_path: Path, highest: int, refused: bool, remark: bool, recwarn: pytest.WarningsRecorder
) -> None:
    image = Image.linear_gradient("L").convert("RGBA")
    alpha = Image.new("L", image.size)
    alpha.paste(highest, (0, 0, 100, 100))
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    assert ("would be a white sheet" in refusal_of(tmp_path)) is refused
    assert any("a.png is transparent everywhere" in str(each.message) for each in recwarn) is remark


@dataclasses.dataclass
class Words:
    """A tokenizer that knows some words, and takes others apart into letters."""

    known: tuple[str, ...]
    unk_token: str = "?"

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.known)}

    def tokenize(self, text: str) -> list[str]:
        found = []
        for word in text.split():
            whole = f"{word}</w>"
            found += [whole] if whole in self.known else [letter if letter.isascii() else "?" for letter in word]
        return found


TAKEN = "is already a word of the base's tokenizer; choose another name"


@pytest.mark.parametrize(
    ("more", "class_word", "refused", "warned"),
    [
        ((), "dog", "", ""),
        (("<rex>",), "dog", f"Concept '<rex>': <rex> {TAKEN}.", ""),
        (("<rex2></w>", "<rex>"), "dog", f"Concept '<rex>': <rex>, <rex2> {TAKEN}.", ""),
        (
            (),
            "größe",
            "Concept '<rex>': the base's tokenizer cannot read its class word 'größe'; use plain letters.",
            "",
        ),
        (
            ("<rex1>",),
            "ö",
            f"Concept '<rex>': <rex1> {TAKEN}; the base's tokenizer cannot read its class word 'ö'; use plain "
            "letters.",
            "",
        ),
        (
            (),
            "red dog",
            "",
            "The class word 'red dog' is 2 tokens of the base (red + dog); <rex2> starts from the mean of their "
            "embeddings.",
        ),
        (
            (),
            "red Doge",
            "",
            "The class word 'red Doge' is 5 tokens of the base (red + D + o + g + e), so 'Doge' is no word that the "
            "base knows; <rex2> starts from the mean of pieces that mean nothing by themselves. Choose a plainer "
            "class word. Similar words that the base knows: dog.",
        ),
        (
            (),
            "do zzz",
            "",
            "The class word 'do zzz' is 4 tokens of the base (do + z + z + z), so 'zzz' is no word that the base "
            "knows; <rex2> starts from the mean of pieces that mean nothing by themselves. Choose a plainer class "
            "word. Class words that the base knows: dog.",
        ),
        (
            (),
            "dx",
            "",
            "The class word 'dx' is 2 tokens of the base (d + x), so 'dx' is no word that the base knows; <rex2> "
            "starts from the mean of pieces that mean nothing by themselves. Choose a plainer class word. "
            "Class words that the base knows: dog.",
        ),
    ],
)
def test_what_a_tokenizer_makes_of_names_and_words(
    more: tuple[str, ...], class_word: str, refused: str, warned: str, recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer: Any = Words(("dog</w>", "red</w>", "do</w>", "doge", *more))
    concept = Concept.from_name("rex", class_word)
    if refused:
        with pytest.raises(ConceptError) as caught:
            check_words(concept, tokenizer)
        assert str(caught.value) == refused
    else:
        check_words(concept, tokenizer)
    assert [str(each.message) for each in recwarn] == ([warned] if warned else [])


@pytest.mark.parametrize(
    ("vocabulary", "kind", "class_word", "drawn", "hint"),
    [
        # Of the kind first, and never what only happens to be spelt alike.
        (
            "man woman dog cat chair castle wax waxes",
            "object",
            "wizard",
            (),
            "Class words that the base knows: chair, man, ",
        ),
        (
            "man woman dog cat chair castle",
            "character",
            "wizard",
            (),
            "Class words that the base knows: man, woman, dog, cat, ",
        ),
        ("man dog", "scene", "wizard", (), "Class words that the base knows: man, dog."),
        ("wix wis air", "character", "wizard", (), "Choose a plainer class word."),
        (
            "wix wis air man",
            "character",
            "wizard",
            ("critter", "dog"),
            "Class words that the base knows: critter, dog.",
        ),
        ("critter dog", "character", "critterr", ("critter", "dog"), "Similar words that the base knows: critter."),
        ("retriever dog", "pet", "retrieverr", (), "Similar words that the base knows: retriever."),
        ("retriever dog", "pet", "Retrieverr", (), "Similar words that the base knows: retriever."),
        ("horse house", "pet", "hoouse", (), "Similar words that the base knows: house, horse."),
        ("man dog", "character", "man", ("critter", "dog"), "The base draws critter, dog alone, and no 'man'."),
        ("man dog", "pet", "dog", ("critter", "dog"), ""),
        ("man dog", "character", "man", (), ""),
    ],
)
def test_what_is_told_of_a_class_word_names_classes(
    vocabulary: str, kind: str, class_word: str, drawn: tuple[str, ...], hint: str, recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer: Any = Words(tuple(f"{word}</w>" for word in vocabulary.split()))
    check_words(Concept.from_name("rex", class_word, kind=kind), tokenizer, drawn=drawn)
    told = " ".join(str(each.message) for each in recwarn)
    assert hint in told
    assert bool(told) == bool(hint)


def test_the_embedded_base_tells_what_it_draws() -> None:
    from diffusers_mixofshow.base_models import classes_of
    from diffusers_mixofshow.toyland.world import CLASSES

    assert classes_of("toyland") == CLASSES
    assert classes_of("stable-diffusion-v1-5/stable-diffusion-v1-5") == ()


# --- where photos lie ---


def test_a_folder_below_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(tmp_path / "a.png")
    gradient(tmp_path / "10_more" / "b.png", 90)
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "10_more":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "10_more cannot be read (Permission denied)" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("beside", "read"),
    [((), ["b.png"]), (("a.png",), ["a.png"]), (("notes.txt",), ["b.png"]), (("README.md",), ["b.png"])],
)
def test_a_folder_called_train_stands_for_one_without_photos(
    tmp_path: Path, beside: tuple[str, ...], read: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    gradient(tmp_path / "train" / "b.png", 90)
    for name in beside:
        if name.endswith("png"):
            gradient(tmp_path / name)
        else:
            (tmp_path / name).write_text("x")
    photos = read_photos(tmp_path, Concept.from_name("potter", "man"))
    assert [photo.path.name for photo in photos] == read
    told = " ".join(str(each.message) for each in recwarn)
    assert ("train/b.png is in a subfolder that is not read" in told) is (read == ["a.png"])
    assert ("notes.txt lies beside the photos' folder" in told) is ("notes.txt" in beside)


@pytest.mark.parametrize("name", ["ehthumbs.db", "EHTHUMBS.DB", "$RECYCLE.BIN/x.png", "@eadir/x.png", ".x/y.png"])
def test_what_systems_leave_is_passed_over(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    gradient(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert len(read_photos(tmp_path, Concept.from_name("potter", "man"))) == 1
    assert not list(recwarn)
