"""The code on the page about gradient fusion runs as it is pasted, save for fewer steps and no Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import packs
import tiny
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.interop.lora_files import write_lora
from diffusers_mixofshow.pipelines import MixOfShowPipeline


PAGE = (Path(__file__).parents[2] / "docs" / "gradient_fusion.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_of_the_page_runs_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components = tiny.components()
    pipe = MixOfShowPipeline(**components, requires_safety_checker=False)
    for seed, name in enumerate(("potter", "hermione", "thanos")):
        packs.random_pack(components, name, ranks=(2,), seed=seed).save_pretrained(tmp_path / f"edlora-{name}")
    for seed, name in enumerate(("dog", "ink")):
        write_lora(tmp_path / f"{name}.safetensors", packs.random_pack(components, "rex", ranks=(2,), seed=seed).lora)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MixOfShowPipeline, "from_pretrained", lambda name: pipe)
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block.replace("user/", "").replace("GradientFuser(pipe)", "GradientFuser(pipe, steps=1)"), namespace)
    assert {len(EDLoRA.from_pretrained(name).concepts) for name in ("hogwarts", "pair", "hermione-alone")} == {3, 2, 1}
    assert (tmp_path / "both" / "pytorch_lora_weights.safetensors").exists()
