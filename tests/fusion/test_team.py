"""Two gloo processes on the CPU fuse the same pack as one."""

from collections.abc import Mapping
from pathlib import Path

import pytest

import packs
import processes
import tiny
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.fusion import GradientFuser
from diffusers_mixofshow.fusion.report import FusionReport
from diffusers_mixofshow.fusion.team import Team
from diffusers_mixofshow.pipelines import MixOfShowPipeline


NAMES = ("rex", "kit", "zoe")

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed
from diffusers_mixofshow import GradientFuser, MixOfShowPipeline

import tiny

torch.distributed.init_process_group("gloo")
folder, rank = Path(sys.argv[1]), torch.distributed.get_rank()
for sequential in (False, True):
    pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
    settings = {"steps": 1, "prompts": ["<TOK>", "a <TOK>"], "ridge": "auto", "dtype": torch.float32}
    fuser = GradientFuser(pipe, sequential=sequential, **settings)
    pack = fuser.fuse([folder / name for name in ("rex", "kit", "zoe")])
    pack.save_pretrained(folder / f"together{rank}{sequential}")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(NAMES):
        packs.random_pack(tiny.components(), name, ranks=(2,), seed=seed).save_pretrained(folder / name)
    return folder


def test_two_processes_fuse_the_same_pack_as_one(folder: Path) -> None:
    processes.run_two(WORKER, str(folder))
    for sequential in (False, True):
        pipe = MixOfShowPipeline(**tiny.components(), requires_safety_checker=False)
        fuser = GradientFuser(pipe, sequential=sequential, steps=1, prompts=["<TOK>", "a <TOK>"], ridge="auto")
        alone = fuser.fuse([folder / name for name in NAMES])
        for rank in range(2):
            together = EDLoRA.from_pretrained(folder / f"together{rank}{sequential}")
            _assert_same(FusionReport.of(together).residuals, alone.report.residuals)
            for site, update in alone.lora.items():
                other = together.lora[site]
                difference = update.up @ update.down - other.up @ other.down
                assert difference.norm() <= 1e-4 * (update.up @ update.down).norm(), (sequential, site)


def _assert_same(
    ours: Mapping[str, Mapping[str, float | None]], theirs: Mapping[str, Mapping[str, float | None]]
) -> None:
    assert list(ours) == list(theirs)
    for name, mean in ours.items():
        assert mean == pytest.approx(theirs[name], abs=1e-3)


def test_shares_cover_everything_once() -> None:
    teams = [Team(rank, 3) for rank in range(3)]
    assert sorted(place for team in teams for place in team.share("abcdefg")) == list(range(7))
    assert Team.current() == Team(0, 1)
