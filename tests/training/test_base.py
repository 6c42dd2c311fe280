"""The base that a training loads by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from diffusers_mixofshow import TrainingConfig, toyland
from diffusers_mixofshow.training.base import load_base


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_the_embedded_base_comes_as_it_is_in_float32_and_says_no_more_than_that_it_loads(
    precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    config = TrainingConfig.toyland(
        instance_data_dir=str(tmp_path),
        concept="rex",
        class_word="dog",
        output_dir=str(tmp_path),
        mixed_precision=precision,
    )
    usual = logging.get_verbosity()
    logging.set_verbosity_warning()  # as in a process where nobody has changed it
    request.addfinalizer(lambda: logging.set_verbosity(usual))
    loaded, shipped = load_base(config), toyland.load_pipeline()
    assert "".join(capfd.readouterr()) == "Loading toyland ...\n"
    assert type(loaded) is type(shipped)
    for name in ("unet", "vae", "text_encoder"):
        weights = getattr(loaded, name).state_dict()
        assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
        for key, value in getattr(shipped, name).state_dict().items():
            assert torch.equal(weights[key], value), f"{name}.{key}"
    assert dict(loaded.scheduler.config) == dict(shipped.scheduler.config)
    assert loaded.safety_checker is None
