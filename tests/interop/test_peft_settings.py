"""The scaling of adapters as PEFT and diffusers write them, wherever their settings lie; compared with PEFT's own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, MixOfShowWarning
from diffusers_mixofshow.interop import peft_settings
from diffusers_mixofshow.interop.foreign import Kind, read_foreign
from diffusers_mixofshow.interop.lora_files import read_lora
from diffusers_mixofshow.interop.summary import summary_of_foreign


TO_Q, TO_K = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
)
HALVES = {
    f"base_model.model.{layer}.{half}.weight": torch.ones(*shape)
    for layer in (TO_Q, TO_K)
    for half, shape in (("lora_A", (4, 6)), ("lora_B", (8, 4)))
}
CONFIGS = {
    "alpha": {"lora_alpha": 16},
    "rank-stabilised": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "lora_alpha": 2,
        "rank_pattern": {".*up_blocks.*": 3, r"attn2\.to_k": 2},
        "alpha_pattern": {f"^{TO_K}": 9, "attn1.*to_q": 7.5, "q_proj|attn1.to_k": 5},
    },
}


def config(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["to_q", "to_k", "q_proj"], "init_lora_weights": False} | changes)


def model_folder(pipe, folder: Path) -> None:
    pipe.unet.save_lora_adapter(folder)


def pipeline_folder(pipe, folder: Path) -> None:
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )


def training_script(pipe, folder: Path) -> None:
    """As diffusers' own training scripts save: in old names, with PEFT's settings in the header."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )


def in_kohyas_names(pipe, folder: Path) -> None:
    """Without alphas, but with the header that diffusers reads."""
    training_script(pipe, folder)
    path = folder / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    halves = {
        re.sub(r"\.(lora|lora_linear_layer)\.(down|up)\.weight$", r".lora_\2.weight", name): half
        for name, half in load_file(path).items()
        if name.startswith("unet.")
    }
    flat = {name.partition(".lora_") for name in halves}
    save_file(
        {f"lora_{layer.replace('.', '_')}.lora_{half}": halves[f"{layer}.lora_{half}"] for layer, _, half in flat},
        path,
        metadata=header,
    )


def peft_folder(pipe, folder: Path, *, component: str = "unet") -> None:
    """What `PeftModel.save_pretrained` leaves."""
    model = getattr(pipe, component)
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}": half for name, half in get_peft_model_state_dict(model).items()}
    save_file({name: half.contiguous() for name, half in tensors.items()}, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)


def as_pickle(pipe, folder: Path) -> None:
    peft_folder(pipe, folder)
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def both_forms(pipe, folder: Path) -> None:
    peft_folder(pipe, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")


def renamed(pipe, folder: Path) -> None:
    peft_folder(pipe, folder)
    (folder / "adapter_model.safetensors").rename(folder / "dog.safetensors")


def each_model(pipe, folder: Path) -> None:
    for component in ("unet", "text_encoder"):
        peft_folder(pipe, folder / component, component=component)


def each_model_by_its_own_library(pipe, folder: Path) -> None:
    pipe.unet.save_lora_adapter(folder / "unet")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")


def in_components_names(pipe, folder: Path) -> None:
    """As scripts rename PEFT's tensors before they save them."""
    folder.mkdir(parents=True)
    tensors = {f"unet.base_model.model.{name}": half for name, half in get_peft_model_state_dict(pipe.unet).items()}
    save_file({name: half.contiguous() for name, half in tensors.items()}, folder / "dog.safetensors")
    pipe.unet.peft_config["default"].save_pretrained(folder)


def a_dump_of_the_model(pipe, folder: Path) -> None:
    """Names with the adapter's own inside, as they stand in the model."""
    folder.mkdir(parents=True)
    halves = {f"unet.{name}": half for name, half in pipe.unet.state_dict().items() if ".lora_" in name}
    save_file({name: half.contiguous() for name, half in halves.items()}, folder / "dog.safetensors")
    pipe.unet.peft_config["default"].save_pretrained(folder)


WAYS = {
    "save_lora_adapter": model_folder,
    "save_lora_weights": pipeline_folder,
    "diffusers' training scripts": training_script,
    "kohya's names, diffusers' header": in_kohyas_names,
    "PEFT": peft_folder,
    "PEFT, pickled": as_pickle,
    "PEFT, both": both_forms,
    "PEFT, renamed": renamed,
    "a folder for each model": each_model,
    "a folder for each model, by its own library": each_model_by_its_own_library,
    "component in front": in_components_names,
    "adapter's name inside": a_dump_of_the_model,
}


OF_BOTH_MODELS = (pipeline_folder, training_script, each_model, each_model_by_its_own_library)


@pytest.fixture(scope="module", params=CONFIGS)
def pipe(request):
    torch.manual_seed(0)
    made = StableDiffusionPipeline(**tiny.components(), requires_safety_checker=False)
    for model in (made.unet, made.text_encoder):
        model.add_adapter(config(**CONFIGS[request.param]))
    return made


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_save_keeps_the_scaling(pipe, tmp_path: Path, way: str):
    WAYS[way](pipe, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MixOfShowWarning)
        found = read_foreign(tmp_path / "out")
    assert (found.kind, found.defects, found.remarks) == (Kind.LORA, (), ())
    assert "header" in found.alpha_from or "adapter_config.json" in found.alpha_from
    components = {site.partition(".")[0] for site in found.lora}
    assert components == ({"unet", "text_encoder"} if WAYS[way] in OF_BOTH_MODELS else {"unet"})
    for site, update in found.lora.items():
        component, _, path = site.partition(".")
        model = getattr(pipe, component)
        path = path if component == "unet" or hasattr(model, "text_model") else path.removeprefix("text_model.")
        layer = model.get_submodule(path)
        torch.testing.assert_close(low_rank_delta(update), layer.get_delta_weight("default"), msg=site)
    assert len(found.lora) == sum(
        hasattr(layer, "lora_A") for name in components for layer in getattr(pipe, name).modules()
    )


def test_settings_for_one_component_alone_are_not_the_others(tmp_path: Path):
    halves = {
        f"{component}.{TO_Q}.{half}.weight": HALVES[f"base_model.model.{TO_Q}.{half}.weight"]
        for component in ("unet",)
        for half in ("lora_A", "lora_B")
    }
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves |= {f"{text}.lora_A.weight": torch.ones(4, 6), f"{text}.lora_B.weight": torch.ones(8, 4)}
    save_file(halves, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 16}'})
    found = read_foreign(tmp_path / "x.safetensors")
    assert {site.partition(".")[0]: update.scaling for site, update in found.lora.items()} == {
        "unet": 4,
        "text_encoder": 1,
    }
    assert "not in the file, taken as the rank" in found.alpha_from


PATTERNS = [
    {"to_q": 2},
    {"o_q": 2},  # no part of a name
    {"attn1.to_q": 2, "to_q": 3},
    {"to_q": 3, "attn1.to_q": 2},
    {"[l-z]o_q": 3, "to_q": 2},  # the first that matches counts, not the longest
    {"to.q": 2},  # a dot stands for any letter
    {r"attn1\.to_q": 2},
    {"^to_q": 2},  # from the start of the whole name
    {f"^{TO_Q}": 2},
    {"to_(q|v)": 2},
    {"to_q|to_v": 2},
    {r".*attn\d.*": 2},
    {"mid_block": 2},  # to the end of the whole name
    {"mid_block.*": 2, "to_q": 3},
    {"up_blocks.*": 2},
    {"transformer_blocks.[0-4].attn1.to_q": 2},
    {"to_q$": 2},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_are_pefts(tmp_path: Path, patterns):
    """The truth is the model that PEFT makes of its own file, in which patterns stand sorted."""
    get_peft_model(tiny.components()["unet"], config(lora_alpha=4, alpha_pattern=patterns)).save_pretrained(tmp_path)
    model = get_peft_model(tiny.components()["unet"], LoraConfig.from_pretrained(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixOfShowWarning)
        found = read_foreign(tmp_path)
    assert found.defects == ()
    for site, update in found.lora.items():
        assert update.scaling == model.base_model.model.get_submodule(site.removeprefix("unet.")).scaling["default"]


def test_an_order_of_patterns_that_saving_lost_is_said_and_ranks_that_tell_it_are_believed(tmp_path: Path):
    patterns = {"to_q": 2, "attn1.to_q": 3}  # PEFT trains with the first, and saves them the other way round
    model = get_peft_model(tiny.components()["unet"], config(rank_pattern=patterns, alpha_pattern=patterns))
    model.save_pretrained(tmp_path)
    with pytest.warns(MixOfShowWarning, match="several patterns match these layers' alphas"):
        found = read_foreign(tmp_path)
    assert found.defects == ()
    assert {site.endswith("attn1.to_q") for site in found.lora} == {True, False}


@pytest.mark.parametrize("anchor", ["text_model.", ""])
def test_patterns_of_text_encoders_hold_with_and_without_text_model(tmp_path: Path, anchor: str):
    layer = "encoder.layers.0.self_attn.q_proj"
    halves = {f"base_model.model.text_model.{layer}.lora_A.weight": torch.ones(4, 6)}
    halves[f"base_model.model.text_model.{layer}.lora_B.weight"] = torch.ones(8, 4)
    save_file(halves, tmp_path / "adapter_model.safetensors")
    settings = {"lora_alpha": 4, "alpha_pattern": {f"^{anchor}{layer}": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (update,) = read_foreign(tmp_path).lora.values()
    assert update.scaling == 2


def written(folder: Path, settings: object) -> Path:
    save_file(HALVES, folder / "adapter_model.safetensors")
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changed_the_base_is_refused_by_name(tmp_path: Path, start: str):
    model = get_peft_model(tiny.components()["unet"], config(init_lora_weights=start, target_modules=["to_q"]))
    model.save_pretrained(tmp_path)
    (defect,) = read_foreign(tmp_path).defects
    assert start.partition("_")[0] in defect.lower()
    assert "changes the base" in defect
    with pytest.raises(EDLoRAFormatError, match="changes the base"):
        read_lora(tmp_path / "adapter_model.safetensors")
    # So is what diffusers' training scripts make of it, in names that are not PEFT's.
    halves = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    told = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path / "x", halves, unet_lora_adapter_metadata=told)
    assert any("changes the base" in defect for defect in read_foreign(tmp_path / "x").defects)
    # What PEFT converts on saving is an ordinary LoRA, which says so.
    model.save_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "made", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = read_foreign(tmp_path / "made")
    assert converted.defects == ()
    assert {update.rank for update in converted.lora.values()} == {8}


def test_untrained_starts_that_keep_the_base_are_read(tmp_path: Path):
    for start in (True, False, "gaussian", "orthogonal", "eva", "mica", None):
        found = read_foreign(written(tmp_path, {"r": 4, "lora_alpha": 16, "init_lora_weights": start}))
        assert found.defects == (), start
        assert {update.scaling for update in found.lora.values()} == {4}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
        ({"init_lora_weights": "PiSSA"}, "PiSSA"),
        ({"init_lora_weights": "tomorrow"}, "initialised by an unknown method, which may change the base: tomorrow"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "biases on the updates"),
        ({"modules_to_save": ["conv_in"]}, "fully trained layers"),
        ({"trainable_token_indices": {"token_embedding": [3]}}, "embeddings of tokens"),
        ({"target_parameters": ["to_q.weight"]}, "not layers"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "repeated"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
        ({"peft_type": "HIRA"}, "HIRA, another method of PEFT"),
        ({"peft_type": "ADALORA"}, "ADALORA, another method of PEFT"),
        ({"peft_type": "\x1b[2J"}, r"\x1b[2J, another method of PEFT"),
        ({"lora_alpha": "16"}, "lora_alpha is not a number"),
        ({"lora_alpha": True}, "lora_alpha is not a number"),
        ({"lora_alpha": 10**400}, "lora_alpha is not a number"),
        ({"lora_alpha": float("nan")}, "alpha is not finite"),
        ({"r": []}, "r is not a number"),
        ({"r": 8}, "has other ranks than these layers: 2"),
        ({"rank_pattern": {"attn2.to_k": 2}}, "has other ranks than these layers: 1"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern has unusable entries: 1 (to_q)"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern has unusable entries"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern has unusable entries: 1 (()"),
        ({"alpha_pattern": {r"(\w+\w*)+!": 2}}, "alpha_pattern has unusable entries"),
        ({"alpha_pattern": {".*.*.*.*.*!": 2}}, "alpha_pattern has unusable entries"),
        ({"alpha_pattern": {f"(to_q|{n})": 2 for n in range(17)}}, "alpha_pattern has unusable entries: 1 "),
        ("[" * 100_000, "cannot be read as a JSON object"),
        ("[]", "cannot be read as a JSON object"),
        ("", "cannot be read as a JSON object"),
        ({"lora_alpha": None}, "alpha is not known"),
    ],
)
def test_what_the_settings_say_that_no_update_can_is_told(tmp_path: Path, settings, told: str):
    whole = settings if isinstance(settings, str) else {"r": 4, "lora_alpha": 16} | settings
    defects = " / ".join(read_foreign(written(tmp_path, whole)).defects)
    assert told in defects
    assert "\x1b" not in defects


def test_every_setting_of_the_installed_peft_was_thought_of():
    """A new release may bring one with which a layer's change is not the scaled product of its halves."""
    harmless = {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type"),  # read
        *(
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "ensure_weight_tying",
        ),  # where
        *("lora_dropout", "runtime_config", "inference_mode", "velora_config"),  # in training
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),  # of others
        *("megatron_config", "megatron_core", "fan_in_fan_out"),  # of layers that no U-Net has
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version"),
    }
    fields = {one.name for one in dataclasses.fields(LoraConfig)}
    assert fields <= harmless | peft_settings._REFUSED.keys()


def test_settings_of_another_adapter_are_not_taken_for_a_file_with_alphas(tmp_path: Path):
    """A folder of downloads: the kohya file tells all itself, whatever lies beside it."""
    flat = f"lora_unet_{TO_Q.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": torch.ones(4, 6), f"{flat}.lora_up.weight": torch.ones(8, 4)}
    save_file(tensors | {f"{flat}.alpha": torch.tensor(2.0)}, tmp_path / "dog.safetensors")
    (tmp_path / "other.json").write_text('{"lora_alpha": 16, "use_rslora": true, "init_lora_weights": "pissa"}')
    (tmp_path / "in").mkdir()
    (tmp_path / "dog.safetensors").rename(tmp_path / "in" / "dog.safetensors")
    (tmp_path / "in" / "adapter_config.json").symlink_to(tmp_path / "other.json")  # which is not even looked at
    found = read_foreign(tmp_path / "in")
    assert ([update.scaling for update in found.lora.values()], found.defects) == ([0.5], ())
    assert found.alpha_from == "its own tensors"


@pytest.mark.parametrize(
    ("told", "warned"), [("1", True), ("1.0", True), ("4", False), ("4.0", False), ("Dynamic", False), ("None", False)]
)
def test_kohyas_alphas_that_were_lost_are_told(tmp_path: Path, told: str, warned: bool):
    flat = f"lora_unet_{TO_Q.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": torch.ones(4, 6), f"{flat}.lora_up.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"ss_network_dim": "4", "ss_network_alpha": told})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MixOfShowWarning)
        (update,) = read_lora(tmp_path / "x.safetensors").values()
    assert update.scaling == 1
    assert [f"says ss_network_alpha={told}, but the alphas" in str(one.message) for one in caught] == [True] * warned


def test_pefts_file_without_its_settings_is_not_guessed(tmp_path: Path):
    written(tmp_path, {})
    (tmp_path / "adapter_config.json").unlink()
    defect = summary_of_foreign(read_foreign(tmp_path))["problems"][0]
    assert "alpha is not known" in defect
    assert "adapter_config.json" in defect
    with pytest.raises(EDLoRAFormatError, match="alpha is not known"):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_one_models_file_without_a_header_is_read_as_diffusers_reads_it_and_that_is_said(tmp_path: Path):
    unet = tiny.components()["unet"]
    unet.add_adapter(config(lora_alpha=16))
    unet.save_lora_adapter(tmp_path, safe_serialization=False)
    with pytest.warns(MixOfShowWarning, match="alpha is not in this file.*taken as the rank"):
        found = read_foreign(tmp_path)
    assert {update.scaling for update in found.lora.values()} == {1}
    (note,) = summary_of_foreign(found)["notes"]
    assert "taken as the rank, as diffusers does" in note
    save_file(
        {f"{TO_Q}.lora_A.weight": torch.ones(4, 6), f"{TO_Q}.lora_B.weight": torch.ones(8, 4)},
        tmp_path / "x.safetensors",
    )
    with pytest.warns(MixOfShowWarning, match="taken as the rank"):
        read_lora(tmp_path / "x.safetensors")


def test_the_convention_of_every_program_is_a_fact_and_no_remark(tmp_path: Path):
    halves = {f"unet.{TO_Q}.lora_A.weight": torch.ones(4, 6), f"unet.{TO_Q}.lora_B.weight": torch.ones(8, 4)}
    save_file(halves, tmp_path / "x.safetensors")
    told = summary_of_foreign(read_foreign(tmp_path / "x.safetensors"))
    assert (told["alpha_from"], told["notes"], told["scalings"]) == ("not in the file, taken as the rank", [], [1])


def test_patterns_of_strangers_take_no_time(tmp_path: Path):
    evil = {r"(\w+\.?)+!": 1, ".*" * 20 + "!": 1, "(a|aa)+$": 1, "\\" + "w{1,60}" * 9 + "!": 1}
    begun = time.monotonic()
    found = read_foreign(written(tmp_path, {"r": 4, "lora_alpha": 4, "alpha_pattern": evil}))
    assert any(f"alpha_pattern has unusable entries: {len(evil)}" in defect for defect in found.defects)
    assert time.monotonic() - begun < 60


FEW = "at most 16 regular expressions are matched, of up to 256 characters and with few repeats"


@pytest.mark.parametrize(
    ("patterns", "refused"),
    [
        ({f".*.*.*{n}!": 1 for n in range(16)}, 16),
        ({f".*.*{n}!": 1 for n in range(16)}, 7),
        ({f".*{n}!": 1 for n in range(17)}, 1),
        ({f"{'.?' * 40}{n}!": 1 for n in range(16)}, 16),
        ({f"{'(.|.)' * 20}{n}!": 1 for n in range(2)}, 2),
        ({f".*(.|.|.|.|.|.|.|.|.){n}!": 1 for n in range(2)}, 2),
        ({f".*[{'a' * 300}]": 1}, 1),
        ({f".*{n}(a|b)": 1 for n in range(16)}, 0),
        ({".*attn.*to_.*": 1, "to_(q|k|v)": 2, r"(.*\.)?to_out\.0": 3}, 1),
        ({r"(.*\.)?attn\d\.to_(q|k|v)": 2, ".*up_blocks.*attn1.*": 3}, 1),
        ({r"(.*\.)?attn\d\.to_(q|k|v)": 2, ".*up_blocks.*": 3}, 0),
        ({".*up_blocks.*to_(q|k|v)": 2}, 0),
    ],
    ids=lambda value: f"{next(iter(value))} x {len(value)}"[:60] if isinstance(value, dict) else "",
)
def test_expressions_that_are_too_many_or_too_slow_together_are_said(tmp_path: Path, patterns, refused):
    found = read_foreign(written(tmp_path, {"r": 4, "lora_alpha": 4, "alpha_pattern": patterns}))
    told = [defect for defect in found.defects if FEW in defect]
    assert len(told) == bool(refused)
    assert all(f"alpha_pattern has unusable entries: {refused} (" in defect for defect in told)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path):
    inside = tmp_path / "in"
    inside.mkdir()
    written(inside, {})
    (inside / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    (inside / "adapter_config.json").symlink_to(tmp_path / "adapter_config.json")
    with pytest.raises(EDLoRAFormatError, match="not followed"):
        read_foreign(inside)


def test_folders_that_are_not_one_adapter(tmp_path: Path):
    for step in ("checkpoint-500", "checkpoint-1000"):
        (tmp_path / step).mkdir()
        written(tmp_path / step, {"r": 4, "lora_alpha": 4})
    with pytest.raises(EDLoRANotFoundError, match=r"Its subfolders do.*checkpoint-1000, checkpoint-500"):
        read_foreign(tmp_path)
    (tmp_path / "unet").mkdir()
    written(tmp_path / "unet", {"r": 4, "lora_alpha": 4})
    assert len(read_foreign(tmp_path).lora) == 2
    shutil.copy(
        tmp_path / "unet" / "adapter_model.safetensors", tmp_path / "unet" / "pytorch_lora_weights.safetensors"
    )
    with pytest.raises(EDLoRAFormatError, match=r"holds several.*unet/adapter_model\.safetensors"):
        read_foreign(tmp_path)
    (tmp_path / "unet" / "pytorch_lora_weights.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(EDLoRAFormatError, match="holds several"):
        read_foreign(tmp_path)


def test_a_pipelines_own_folders_are_no_adapters(tmp_path: Path):
    tiny.components()["unet"].save_pretrained(tmp_path / "unet")
    with pytest.raises(EDLoRANotFoundError, match="Give the file itself"):
        read_foreign(tmp_path)


def test_second_text_encoder_in_its_folder(tmp_path: Path):
    layer = "encoder.layers.0.self_attn.q_proj"
    for component in ("text_encoder", "text_encoder_2"):
        (tmp_path / component).mkdir()
        halves = {
            f"base_model.model.text_model.{layer}.{half}.weight": torch.ones(*shape)
            for half, shape in (("lora_A", (4, 6)), ("lora_B", (8, 4)))
        }
        save_file(halves, tmp_path / component / "adapter_model.safetensors")
        (tmp_path / component / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    assert sorted(read_foreign(tmp_path).lora) == [
        f"{name}.text_model.{layer}" for name in ("text_encoder", "text_encoder_2")
    ]
