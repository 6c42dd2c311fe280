"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call, create_autospec

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import packs
import tiny
from diffusers_mixofshow import EDLoRA, FusedPack, MixOfShowPipeline, MixOfShowXLPipeline, TrainingConfig
from diffusers_mixofshow.interop import write_lora
from diffusers_mixofshow.training.presets import PRESETS
from families.pipelines import tiny_pipeline


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PICTURES = {
    "fuse_and_push_to_the_hub": 1,
    "fuse_loras_you_found": 1,
    "quickstart": 2,
    "regions_layout_pose_masks": 4,
    "train_on_your_photos": 3,
}
"""How many pictures each notebook shows."""
FEWER = {"STEPS": 2, "DRAWING_STEPS": 2, "PREVIEWS": 1}
"""What a notebook's cell with the tag `parameters` is followed by here, so that the tests are short."""
BASES = (
    'BASE = "toyland"',
    '# BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"',
    '# BASE = "stabilityai/stable-diffusion-xl-base-1.0"',
)


def read_notebook(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def cell_with_tag(notebook: Any, tag: str) -> Any:
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return cell


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [*PICTURES]


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    notebook = read_notebook(name)
    parameters = notebook.cells.index(cell_with_tag(notebook, "parameters"))
    known = [line for line in notebook.cells[parameters].source.splitlines() if line.split(" ")[0] in FEWER]
    fewer = [f"{line.split(' ')[0]} = {FEWER[line.split(' ')[0]]}" for line in known]
    assert fewer
    notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell("\n".join(fewer)))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[name]
    said = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert re.search(r"100%\|\S+\| \d+/\d+", said), "no progress bar is shown"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "quickstart"])
def test_one_switch_goes_to_other_bases(name: str) -> None:
    notebook = read_notebook(name)
    lines = cell_with_tag(notebook, "parameters").source.splitlines()
    assert [line.partition("  #")[0] for line in lines if "BASE = " in line] == [*BASES]
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert code.count('BASE == "toyland"') + code.count('BASE != "toyland"') >= 1


@pytest.mark.parametrize("base", ["OnomaAIResearch/Illustrious-XL-v1.0", "someone/noobaiXL", BASES[2].split('"')[1]])
def test_the_switch_knows_tuned_models_of_sdxl_by_their_names(base: str) -> None:
    code = [cell.source for name in PICTURES for cell in read_notebook(name).cells if cell.cell_type == "code"]
    asked = [found for source in code for found in re.findall(r"if (.*\bin BASE\S*) else", source)]
    assert len(asked) >= 4
    assert all(eval(each, {"BASE": base}) and not eval(each, {"BASE": BASES[1].split('"')[1]}) for each in asked)


def shortened(source: str) -> str:
    """A cell's code for a tiny base: without IPython's own lines, and as small as it gets."""
    source = re.sub(r"^( *)%.*$", r"\1pass", source, flags=re.MULTILINE)
    source = source.replace("drawing = recording = {}", "drawing = {}\n    recording = {}")
    source = source.replace("drawing = {}", 'drawing = {"num_inference_steps": 1}')
    source = source.replace("recording = {}", 'recording = {"steps": 1, "prompts": ["a <TOK>"]}')
    return re.sub(r"\(1216, 832\) if .* else \(768, 512\)", "(48, 32)", source)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("fuse_and_push_to_the_hub", "Stable Diffusion XL"),
        ("fuse_loras_you_found", "Stable Diffusion XL"),
        ("regions_layout_pose_masks", "Stable Diffusion"),
        ("regions_layout_pose_masks", "Stable Diffusion XL"),
    ],
)
def test_the_code_of_other_bases_runs_with_tiny_ones(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    parent, base = tiny_pipeline(family), BASES[1 if family == "Stable Diffusion" else 2].split('"')[1]
    parts = parent.components
    sources, loaded = [], []
    Image.new("RGB", (30, 20)).save("pose.png")
    for seed, concept in enumerate(("potter", "hermione")):
        pack = packs.random_pack(parts, concept, seed=seed)
        pack.save_pretrained(concept)
        sources.append(concept)
        write_lora(Path(f"{concept}.safetensors"), pack.lora)
    found = {f"{concept}.safetensors": [f"a {concept}", f"{concept} at night"] for concept in sources}

    def load(cls: Any, place: str, **settings: Any) -> Any:
        loaded.append((place, settings))
        return cls(**parts, **({"requires_safety_checker": False} if family == "Stable Diffusion" else {}))

    for kind in (MixOfShowPipeline, MixOfShowXLPipeline):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
    monkeypatch.setattr("diffusers.DiffusionPipeline.enable_model_cpu_offload", lambda pipe: None)
    controlnet = tiny.controlnet(parts["unet"])
    monkeypatch.setattr("diffusers.ControlNetModel.from_pretrained", lambda *_, **__: controlnet)
    given: dict[str, Any] = {"display": print}
    for cell in read_notebook(name).cells:
        if cell.cell_type != "code":
            continue
        exec(shortened(cell.source), given)
        if "parameters" in cell.metadata.get("tags", ()):
            given |= {"BASE": base, "SOURCES": sources, "FOUND": found, "POSE": "pose.png"}
    assert loaded == [(base, {"dtype": torch.float16, "variant": "fp16"})]
    if name == "regions_layout_pose_masks":
        assert type(given["posed"]).__name__.endswith("ControlNetPipeline")
        assert given["following"].size == (48, 32)
    else:
        assert len(given["fused"].lora) == len(packs.random_pack(parts, "potter").lora)


def test_the_settings_for_other_bases_are_those_that_need_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = read_notebook("train_on_your_photos")
    (cell,) = (cell for cell in notebook.cells if "EDLoRATrainer(TrainingConfig" in cell.source)
    trained: list[TrainingConfig] = []
    monkeypatch.setattr("diffusers_mixofshow.EDLoRATrainer", lambda config: trained.append(config) or MagicMock())
    for line in BASES[1:]:
        given = {"BASE": line.split('"')[1], "photos": tmp_path, "STEPS": 5, "PREVIEWS": 2}
        exec(cell.source, given | {"NAME": "waldi", "CLASS_WORD": "dog", "KIND": "pet"})
    assert [config.resolution for config in trained] == [512, 1024]
    for config in trained:
        assert (config.mixed_precision, config.train_batch_size, config.gradient_checkpointing) == ("fp16", 1, True)
        assert config.max_train_steps == 800


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_badge_opens_the_notebook_itself_as_soon_as_the_repository_has_an_address(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository", "").removesuffix("/")
    there = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    expected = [f"[![Open In Colab]({badge})]({there}/blob/main/examples/{path.name})"] if address else []
    first = nbformat.read(path, as_version=4).cells[0].source
    assert re.findall(r"\[!\[.*?\]\(\S+\)\]\(\S+\)", first) == expected, "see CONTRIBUTING.md, Notebooks"


@pytest.mark.parametrize(
    ("repository", "token", "told"),
    [
        ("", "", "a name in REPOSITORY and a login"),
        ("", "hf_x", "a name in REPOSITORY."),
        ("me/both", "", "a login"),
        ("me/both", "hf_x", ""),
    ],
)
def test_nothing_is_pushed_without_a_name_and_a_login(
    repository: str,
    token: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token or None)
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "edlora.safetensors").write_bytes(b"x" * 5000)
    fused = create_autospec(FusedPack, instance=True)
    fused.push_to_hub.return_value = "https://there"
    given = {"fused": fused, "REPOSITORY": repository, "names": ["rex", "ming"], "samples": {"a <rex>": "picture"}}
    exec(cell_with_tag(read_notebook("fuse_and_push_to_the_hub"), "push").source, given)
    printed = capsys.readouterr().out
    if told:
        assert fused.mock_calls == []
        assert told in printed
        assert f"To {repository or 'you/mixofshow-rex-ming'} would go the pictures above and:" in printed
        assert "  edlora.safetensors, 5 kB" in printed
    else:
        assert printed == "Pushed to https://there\n"
        assert fused.mock_calls == [call.push_to_hub("me/both", samples={"a <rex>": "picture"}, private=True)]


def test_photos_that_are_uploaded_in_colab_are_those_that_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uploaded = {"waldi.jpg": b"a photo"}
    files = SimpleNamespace(upload=lambda: uploaded)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=files))
    source = cell_with_tag(read_notebook("train_on_your_photos"), "upload").source
    given = {"BASE": "stable-diffusion-v1-5/stable-diffusion-v1-5", "NAME": "waldi"}
    exec(source, given)
    assert {path.name: path.read_bytes() for path in (tmp_path / "photos").iterdir()} == uploaded
    uploaded.clear()
    (tmp_path / "photos" / "waldi.jpg").unlink()
    with pytest.raises(ValueError, match=r"is empty\. Put photos of <waldi> into it"):
        exec(source, given)
    exec(source, given | {"BASE": "toyland"})
    assert len(list((tmp_path / "photos").glob("*.png"))) == 8


def test_the_scripts_are_short_and_numbered_and_say_how_they_are_started() -> None:
    assert [path.name[:3] for path in SCRIPTS] == ["01_", "02_", "03_", "04_"]
    lengths = {path.name: path.read_text(encoding="utf-8").count("\n") for path in SCRIPTS}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert all(f"`python examples/{path.name}`" in path.read_text(encoding="utf-8") for path in SCRIPTS)


def test_the_scripts_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_step = {"max_train_steps": 1, "embedding_phase_steps": 1, "train_batch_size": 2, "captions_per_step": 1}
    monkeypatch.setitem(PRESETS, "toyland", PRESETS["toyland"] | one_step)
    for path in SCRIPTS:
        runpy.run_path(str(path), run_name="__main__")
    sizes = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    square, wide = (256, 256), (480, 320)
    assert sizes == {"dog.png": square, "vase.png": square, "together.png": wide, "layout.png": wide}
    assert [concept.name for concept in EDLoRA.from_pretrained("fused").concepts] == ["rex", "ming"]


def test_files_that_the_documentation_names_exist() -> None:
    root = Path(__file__).parents[1]
    pages = sorted((root / "docs").glob("*.md"))
    named = {
        name for page in pages for name in re.findall(r"`((?:src|benchmarks)/[\w/.]+\.py)`", page.read_text("utf-8"))
    }
    assert len(pages) >= 4
    assert len(named) > 10
    assert [name for name in sorted(named) if not (root / name).exists()] == []


def test_names_that_the_documentation_maps_are_in_the_files_it_names() -> None:
    root = Path(__file__).parents[1]
    rows = [
        line.split("|")
        for page in sorted((root / "docs").glob("*.md"))
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("|") and "`src/" in line
    ]
    missing = [
        (name, path)
        for row in rows
        for path in re.findall(r"`(src/[^`]+)`", row[-2])
        for name in re.findall(r"`([A-Za-z_]+)`", row[2])
        if name not in (root / path).read_text("utf-8")
    ]
    assert missing == []
