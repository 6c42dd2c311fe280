"""What the page about tuning says of settings is so."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.presets import PRESETS


PAGE = (Path(__file__).parents[2] / "docs" / "ed_lora.md").read_text(encoding="utf-8")


def test_the_toml_of_the_page_is_a_config(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "potter.toml").write_text(block, encoding="utf-8")
    config = TrainingConfig.from_file(tmp_path / "potter.toml", seed=1)
    assert (config.rank, config.lora_alpha, config.text_kv_learning_rate, config.framing) == (8, 8, None, "place")


def test_the_page_lists_every_preset() -> None:
    section = PAGE.partition("| preset |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE) == [
        *(name for name in PRESETS if name != "toyland"),
        "toyland",
    ]
