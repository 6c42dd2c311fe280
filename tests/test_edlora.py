"""The ED-LoRA file: exact round trips, stock diffusers loads it, and every defect is named in one error."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import stat

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file

import packs
import tiny
from diffusers_mixofshow import MixOfShowPipeline
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError
from diffusers_mixofshow.lora import merged


FILE = "edlora.safetensors"


@pytest.fixture
def saved(pack, tmp_path):
    """A valid file, as (path, its decoded header, its tensors), for tests to break."""
    path = pack.save_pretrained(tmp_path / "pack")
    tensors, metadata = contents(path)
    return path, json.loads(metadata["edlora"]), tensors


def test_it_is_shown_in_a_line(pack):
    assert len(repr(pack)) < 200
    assert "<rex>" in repr(pack)


def contents(path):
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()


def write(path, header, tensors):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"edlora": text})


def refused(source):
    """The message with which reading is refused."""
    with pytest.raises(EDLoRAFormatError) as caught:
        EDLoRA.from_pretrained(source)
    return str(caught.value)


# --- round trips ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "alphas"), [((4,), (4.0,)), ((4, 2, 1), (1.0, 4.0, 0.5)), ((4, 2), (8.0, -3.0, 0.0))]
)
def test_round_trip_is_exact(components, tmp_path, dtype, ranks, alphas):
    original = packs.random_pack(components, "rex", "tom", ranks=ranks, alphas=alphas, dtype=dtype)
    path = original.save_pretrained(tmp_path / "new" / "folder")
    packs.assert_same_pack(EDLoRA.from_pretrained(path), original)
    packs.assert_same_pack(EDLoRA.from_pretrained(path.parent), original)
    packs.assert_same_pack(EDLoRA.from_pretrained(str(tmp_path / "new"), subfolder="folder"), original)


def test_saving_needs_no_contiguous_unshared_or_detached_tensors(components, pack, tmp_path):
    shared = torch.randn(4, 32)
    lora = {
        site: LowRank(
            down=shared if update.down.shape == shared.shape else update.down, up=update.up.T.clone().T, alpha=4
        )
        for site, update in pack.lora.items()
    }
    embeddings = {token: rows.clone().requires_grad_() for token, rows in pack.embeddings.items()}
    odd = dataclasses.replace(pack, lora=lora, embeddings=embeddings)
    packs.assert_same_pack(EDLoRA.from_pretrained(odd.save_pretrained(tmp_path)), odd)


def test_text_encoder_keys_are_written_in_one_spelling_and_read_in_both(components, pack, tmp_path):
    nested = packs.random_pack(packs.with_nested_text_encoder(components))
    assert nested.lora.keys() == pack.lora.keys()
    path = pack.save_pretrained(tmp_path)
    tensors, metadata = contents(path)
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    flat = {name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}
    assert flat.keys() != tensors.keys()
    write(path, metadata["edlora"].replace(".text_model.", "."), flat)
    packs.assert_same_pack(EDLoRA.from_pretrained(path), pack)


def test_header_tells_format_layers_and_versions(saved):
    _, header, _ = saved
    assert header["format_version"] == 1
    assert header["concepts"] == [
        {"placeholder": "<rex>", "tokens": ["<rex1>", "<rex2>"], "class_word": "dog", "kind": "pet"}
    ]
    assert header["lora"]["text_encoder.text_model.encoder.layers.1.self_attn.out_proj"] == {"rank": 4, "alpha": 4.0}
    assert {"torch", "diffusers", "transformers", "peft"} <= header["versions"].keys()


# --- stock diffusers ---


@pytest.mark.parametrize(("ranks", "alphas"), [((4,), (4.0,)), ((4,), (1.0,)), ((4, 2), (1.0, 4.0, 3.5, 0.0))])
def test_stock_pipeline_loads_the_lora_with_the_right_effect(tmp_path, ranks, alphas):
    pipe = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pack = packs.random_pack(pipe.components, ranks=ranks, alphas=alphas)

    def picture():
        generator = torch.Generator().manual_seed(0)
        return pipe("hi", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt").images

    plain = picture()
    with merged(pipe.components, pack):
        expected = picture()
    pack.save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(picture(), expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).abs().max() > 0.05
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}


# --- writing ---


def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing_behind(pack, saved, monkeypatch):
    path, _, _ = saved
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack.save_pretrained(path.parent, overwrite=True)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == ["README.md", FILE]


def test_the_file_gets_ordinary_permissions(saved):
    path, _, _ = saved
    other = path.parent / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_pack_that_contradicts_itself_is_not_written(pack, tmp_path):
    site, update = next(iter(pack.lora.items()))
    endless = torch.full_like(update.up, float("inf"))
    bad = dataclasses.replace(
        pack,
        embeddings={"<rex1>": torch.zeros(3, 32)},
        lora={site: dataclasses.replace(update, up=endless), "vae.conv": update},
    )
    with pytest.raises(EDLoRAFormatError) as caught:
        bad.save_pretrained(tmp_path / "bad")
    for part in ("<rex2>", "(layers = 4, dim)", "not finite", "vae.conv"):
        assert part in str(caught.value)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("value", [torch.zeros(2), float("nan"), {1, 2}])
def test_a_training_record_that_is_no_json_is_refused(pack, tmp_path, value):
    with pytest.raises(EDLoRAFormatError, match="JSON values"):
        dataclasses.replace(pack, training={"x": value}).save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# --- the model card ---


def test_card_has_tags_table_and_code_for_one_concept(pack, tmp_path):
    path = pack.save_pretrained(tmp_path / "rex")
    card = ModelCard.load(path.parent / "README.md")
    assert {"mix-of-show", "edlora", "lora", "diffusers", "text-to-image"} <= set(card.data.tags)
    assert card.data.base_model == "someone/tiny"
    assert "| `<rex>` | dog | pet | `a <rex>` |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "pipe.load_edlora('rex')" in code
    assert "Region" not in code


def test_card_of_several_concepts_shows_regions(components, tmp_path):
    fused = packs.random_pack(components, "rex", "tom", "ann", "joe")
    card = ModelCard.load(fused.save_pretrained(tmp_path).parent / "README.md")
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "Region('a <ann>', box=(0.67, 0.1, 1.00, 1.0))" in code
    assert "draft=Draft()" in code
    assert "refine=Refinement()" in code


@pytest.mark.parametrize(
    ("kinds", "prompts"),
    [
        (("pet", "character"), ["a dog and a dog in a meadow", "a <rex> in a meadow", "a <tom> in a meadow"]),
        (("scene", "pet"), ["a dog in a <rex>", "a <tom> in a <rex>"]),
        (("scene", "scene"), ["a dog and a dog", "<rex>", "<tom>"]),
    ],
)
def test_regions_on_cards_of_the_embedded_base_say_what_they_show_and_where(components, tmp_path, kinds, prompts):
    pack = packs.random_pack(components, "rex", "tom")
    concepts = [dataclasses.replace(each, kind=kind) for each, kind in zip(pack.concepts, kinds, strict=True)]
    pack = dataclasses.replace(pack, concepts=tuple(concepts), base_model="toyland")
    code = ModelCard.load(pack.save_pretrained(tmp_path).parent / "README.md").text.split("```python\n")[1]
    assert re.findall(r"^    '(.*)',$|Region\('(.*?)'", code, re.MULTILINE) == [
        (prompts[0], ""),
        *(("", prompt) for prompt in prompts[1:]),
    ]


@pytest.mark.parametrize(("names", "wide"), [("rex tom", False), ("rex tom ann", True), ("rex tom ann joe", True)])
def test_three_things_on_the_embedded_base_get_a_wide_picture(components, tmp_path, names, wide):
    pack = dataclasses.replace(packs.random_pack(components, *names.split()), base_model="toyland")
    code = ModelCard.load(pack.save_pretrained(tmp_path).parent / "README.md").text
    assert ("    width=96,\n    height=64,\n" in code) == wide


@pytest.mark.parametrize("names", [("rex",), ("rex", "tom")])
def test_the_code_on_the_card_runs_when_pasted(components, tmp_path, monkeypatch, names):
    fused = dataclasses.replace(packs.random_pack(components, *names), base_model="toyland")
    card = ModelCard.load(fused.save_pretrained(tmp_path / "pack").parent / "README.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MixOfShowPipeline, "from_pretrained", classmethod(tiny_pipeline))
    exec(card.text.split("```python\n")[1].split("```")[0], {})
    assert (tmp_path / "rex.png").stat().st_size > 0


def tiny_pipeline(pipeline_class, source):
    assert source == "toyland"
    pipe = pipeline_class(**tiny.components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_card_survives_hostile_text(pack, tmp_path):
    concept = dataclasses.replace(pack.concepts[0], class_word='dog | `x` \n---\n"')
    path = dataclasses.replace(pack, concepts=(concept,), base_model="/home/me/a`b|c\nd").save_pretrained(tmp_path)
    card = ModelCard.load(path.parent / "README.md")
    assert card.data.base_model is None
    assert "dog \\| 'x' --- \" |" in card.text
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_readme_of_the_user_stays(pack, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    pack.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    (tmp_path / "README.md").unlink()
    pack.save_pretrained(tmp_path, overwrite=True)
    dataclasses.replace(pack, base_model="other/base").save_pretrained(tmp_path, overwrite=True)
    assert "other/base" in (tmp_path / "README.md").read_text()


# --- reading what is broken ---


def test_missing_files_are_reported_with_what_to_give(tmp_path):
    for source in (tmp_path, tmp_path / "nothing", str(tmp_path / "x.safetensors"), "no-such-folder"):
        with pytest.raises(EDLoRANotFoundError, match=r"does not exist.*user/edlora-potter"):
            EDLoRA.from_pretrained(source)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"\xff" * 64, b"PK\x03\x04 pickle", b"\x08" + b"\x00" * 7 + b"[1,2,3] "]
)
def test_files_that_are_no_safetensors(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    assert "cannot be read as safetensors" in refused(tmp_path)


def test_a_truncated_file(saved):
    path, _, _ = saved
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read as safetensors" in refused(path)


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises((EDLoRAFormatError, EDLoRANotFoundError)):
        EDLoRA.from_pretrained(tmp_path)


def test_an_ordinary_lora_is_no_edlora(saved):
    path, _, tensors = saved
    save_file(tensors, path)
    assert "no 'edlora' header" in refused(path)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        "[]",
        "3",
        "null",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        '{"format_version": 1, "x": NaN',
    ],
)
def test_headers_that_are_no_json_object(saved, header):
    path, _, tensors = saved
    write(path, header, tensors)
    assert "not a JSON object" in refused(path)


@pytest.mark.parametrize("version", [0, 3, "1", 1.0, True, None, [], 10**400])
def test_other_format_versions(saved, version):
    path, header, tensors = saved
    write(path, header | {"format_version": version}, tensors)
    assert "format version" in refused(path)


WRONG = [
    None,
    True,
    7,
    1.5,
    "text",
    [],
    [None],
    [[]],
    {},
    {"a": None},
    {"a": {"rank": 1}},
    [{}],
    [{"tokens": 3}],
    10**400,
]


@pytest.mark.parametrize("field", ["concepts", "base_model", "layers", "lora", "training"])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_header_fields_of_wrong_type_never_end_in_another_error(saved, field, value):
    path, header, tensors = saved
    write(path, header | {field: value}, tensors)
    if (field, type(value)) in {("base_model", str), ("training", dict)}:
        assert EDLoRA.from_pretrained(path)
    else:
        assert str(path) in refused(path)


@pytest.mark.parametrize("field", ["concepts", "base_model", "layers", "lora", "training"])
def test_missing_header_fields(saved, field):
    path, header, tensors = saved
    del header[field]
    write(path, header, tensors)
    assert f"header field '{field}' must be" in refused(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", -4),
        ("rank", 4.0),
        ("rank", True),
        ("rank", 10**400),
        ("rank", "4"),
        ("alpha", 10**400),
        ("alpha", float("inf")),
        ("alpha", None),
    ],
)
def test_hostile_ranks_and_alphas(saved, key, value):
    path, header, tensors = saved
    header["lora"][next(iter(header["lora"]))][key] = value
    write(path, header, tensors)
    refused(path)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("placeholder", "rex", "not of the form <name>"),
        ("placeholder", "<../../etc>", "not of the form <name>"),
        ("tokens", [], "no tokens"),
        ("tokens", ["<rex1>", "<rex1>"], "must differ"),
        ("kind", "virus", "not one of"),
        ("class_word", " ", "class word is empty"),
        ("class_word", 3, "concepts[0]"),
        ("extra", 3, "concepts[0]"),
    ],
)
def test_malformed_concepts(saved, key, value, part):
    path, header, tensors = saved
    header["concepts"][0][key] = value
    write(path, header, tensors)
    assert part in refused(path)


def test_two_concepts_of_one_name(saved):
    path, header, tensors = saved
    header["concepts"] *= 2
    write(path, header, tensors)
    assert "Names used twice" in refused(path)


def test_every_defect_is_named_in_one_error(saved):
    path, header, tensors = saved
    unet = [name for name in tensors if name.startswith("unet.")]
    gone, shrunk, nan = unet[0], unet[2], unet[4]
    del tensors[gone]
    tensors[shrunk] = tensors[shrunk][:, :-1] if "lora_B" in shrunk else tensors[shrunk][:-1]
    tensors[nan] = torch.full_like(tensors[nan], float("nan"))
    tensors["edlora.embeddings.<rex1>"] = torch.zeros(3, 32)
    tensors["edlora.embeddings.<stranger>"] = torch.zeros(4, 32)
    tensors["edlora.embeddings.<rex2>"] = torch.zeros(4, 32, dtype=torch.int64)
    tensors["unet.surprise"] = torch.zeros(1)
    write(path, header, tensors)
    message = refused(path)
    for part in (gone, shrunk.partition(".lora_")[0], nan.partition(".lora_")[0], "(3, 32)", "<stranger>", "int64"):
        assert part in message
    assert "unet.surprise" in message


def test_a_missing_pair_a_stranger_and_both_spellings(saved):
    path, header, tensors = saved
    site = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    other = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors[site.replace(".text_model", "") + ".lora_A.weight"] = tensors[site + ".lora_A.weight"].clone()
    tensors["unet.stranger.lora_A.weight"] = torch.zeros(4, 3)
    for ending in (".lora_A.weight", ".lora_B.weight"):
        del tensors[other + ending]
    write(path, header, tensors)
    message = refused(path)
    assert f"both spellings of the text encoder: 1 ({site}.lora_A.weight)" in message
    assert f"missing tensors: 2 ({other}.lora_A.weight, {other}.lora_B.weight)" in message
    assert "unet.stranger" in message


def test_long_lists_of_defects_are_cut(saved):
    path, header, tensors = saved
    write(path, header, {name: tensor for name, tensor in tensors.items() if "lora_A" not in name})
    assert "missing tensors: 40 (" in refused(path)
    assert len(refused(path)) < 2000


def test_tensors_of_odd_dimensions(saved):
    path, header, tensors = saved
    names = [name for name in tensors if name.startswith("unet.")]
    for name, shape in zip(names, [(), (0,), (4,), (4, 0, 1), (0, 64), (1, 1, 1, 1)], strict=False):
        tensors[name] = torch.zeros(shape)
    tensors["edlora.embeddings.<rex1>"] = torch.zeros(())
    write(path, header, tensors)
    assert "not a pair" in refused(path)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F4", "C64", "BOOL", "F8_E4M3", "F99"])
def test_tensors_of_odd_dtypes(pack, tmp_path, dtype):
    path = pack.save_pretrained(tmp_path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["edlora.embeddings.<rex1>"]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    refused(path)


def test_reading_unpickles_nothing(tmp_path):
    (tmp_path / FILE).write_bytes(b"")
    torch.save({"edlora": 1}, tmp_path / FILE)
    assert "cannot be read as safetensors" in refused(tmp_path)


# --- fitting a model ---


@pytest.mark.parametrize("nested", [False, True])
def test_fits_under_both_transformers_generations(components, pack, nested):
    pack.check_fits(packs.with_nested_text_encoder(components) if nested else components)


def test_every_misfit_is_named_in_one_error(components, pack):
    other = copy.deepcopy(components)
    block = other["unet"].mid_block.attentions[0].transformer_blocks[0]
    block.attn2.to_v = torch.nn.Linear(16, 64, bias=False)
    del block.attn1
    other["text_encoder"].set_input_embeddings(torch.nn.Embedding(10, 24))
    odd = dataclasses.replace(pack, layers=(*pack.layers[:-1], "up_blocks.7.attn2"))
    with pytest.raises(EDLoRAFormatError) as caught:
        odd.check_fits(other)
    for part in (
        "attn2.to_v (64, 32), in the model (64, 16)",
        "does not have: 4",
        "width 24",
        "up_blocks.7",
        "someone/tiny",
    ):
        assert part in str(caught.value)


def test_a_pack_that_diverged_or_is_malformed_fits_nothing(components, pack):
    site, update = next(iter(pack.lora.items()))
    for down in (torch.full_like(update.down, float("nan")), torch.zeros(3)):
        bad = dataclasses.replace(pack, lora={site: dataclasses.replace(update, down=down)})
        with pytest.raises(EDLoRAFormatError, match="defective"):
            bad.check_fits(components)


def test_another_number_of_layers(components, pack):
    fewer = {token: rows[1:] for token, rows in pack.embeddings.items()}
    other = dataclasses.replace(pack, layers=pack.layers[1:], embeddings=fewer)
    with pytest.raises(EDLoRAFormatError, match="for 3 cross-attention layers, the model has 4"):
        other.check_fits(components)


def test_a_part_of_the_model_is_checked_alone_and_nothing_is_an_error(components, pack):
    pack.check_fits({"unet": components["unet"], "text_encoder": None})
    with pytest.raises(EDLoRAFormatError, match="none of text_encoder"):
        pack.check_fits({"vae": components["vae"]})
