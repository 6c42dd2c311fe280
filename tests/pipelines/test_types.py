"""What editors, type checkers and `help` are told of the pipelines."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Self, get_type_hints

import pytest
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput

import diffusers_mixofshow
from diffusers_mixofshow import Draft, Isolation, Refinement
from diffusers_mixofshow.pipelines.remarks import Regions


ROOT = Path(__file__).parents[2]
KINDS = [name for name in diffusers_mixofshow.__all__ if re.fullmatch("MixOfShow.*Pipeline", name)]
ADDED = {
    "regions": Regions | None,
    "isolation": Isolation | None,
    "draft": Draft | None,
    "refine": Refinement | None,
}


@pytest.mark.parametrize("name", KINDS)
def test_calls_and_loading_are_typed(name: str) -> None:
    kind = getattr(diffusers_mixofshow, name)
    signature = inspect.signature(kind.__call__)
    assert {each: signature.parameters[each].annotation for each in ADDED} == ADDED
    assert {signature.parameters[each].kind for each in ADDED} == {inspect.Parameter.KEYWORD_ONLY}
    assert signature.return_annotation == StableDiffusionPipelineOutput | StableDiffusionXLPipelineOutput
    assert get_type_hints(kind.from_pretrained)["return"] is Self
    assert get_type_hints(kind.from_pipe)["return"] is Self


@pytest.mark.parametrize("name", KINDS)
def test_a_call_has_one_docstring(name: str) -> None:
    call = getattr(diffusers_mixofshow, name).__call__
    assert call.__qualname__ == f"{name}.__call__"
    text = inspect.getdoc(call)
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert headings == ["Draw pictures of prompts, with concepts and regions in them.", "Args:", "Returns:"]
    arguments = re.findall(r"^    (\w+) \(", text.partition("Args:")[2].partition("\nReturns:")[0], re.MULTILINE)
    assert len(arguments) == len(set(arguments))
    assert {*ADDED, "prompt", "num_inference_steps", "callback_on_step_end"} <= {*arguments}
    if name == "MixOfShowAdapterPipeline":
        assert {"image", "adapter_conditioning_scale", "adapter_conditioning_factor"} <= {*arguments}


SNIPPET = """
from diffusers_mixofshow import Draft, MixOfShowControlNetPipeline, MixOfShowPipeline, Region

pipe = MixOfShowPipeline.from_pretrained("toyland")
reveal_type(pipe)
reveal_type(MixOfShowControlNetPipeline.from_pipe(pipe))
pipe("a dog", regions=[Region("a <potter>", box=(0, 0, 1, 1))], draft=Draft(), num_inference_steps=2)
pipe("a dog", regions=3)
pipe("a dog", refine=True)
"""


@pytest.mark.slow
def test_a_type_checker_knows_what_is_loaded_and_what_a_call_takes(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        str(tmp_path / "snippet.py"),
    ]
    told = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True).stdout
    found = re.findall(r"snippet\.py:(\d+): (note: Revealed type is \".*?(\w+)\"|error: .*\[(.*)\])", told)
    assert [(int(line), revealed or code) for line, _, revealed, code in found] == [
        (5, "MixOfShowPipeline"),
        (6, "MixOfShowControlNetPipeline"),
        (8, "arg-type"),
        (9, "arg-type"),
    ], told
