"""Kill a process that saves, again and again, at random points: the old file or the new one, never half.

By hand: PYTHONPATH=src:tests python tests/hostile/killed.py --times 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank
from diffusers_mixofshow.evaluation import record


WIDTH = 768
SAVES_IN_A_LIFE = 3.0
"""How many saves a process gets through before it is killed at the latest."""


def version(number: int, *, sites: int = 12) -> EDLoRA:
    """A pack of some megabytes, every value of which is its number."""
    half = torch.full((16, WIDTH), float(number))
    concept = Concept.from_name("rex", "dog")
    return EDLoRA(
        concepts=(concept,),
        embeddings={token: torch.full((2, WIDTH), float(number)) for token in concept.tokens},
        lora={f"unet.layer{i}": LowRank(down=half, up=half.T.contiguous(), alpha=16) for i in range(sites)},
        base_model="someone/tiny",
        layers=("one", "two"),
        training={"number": number},
    )


def number_of(folder: Path) -> int:
    """Which version lies in a folder; raises where it is none, or a mixture."""
    pack = EDLoRA.from_pretrained(folder)
    tensors = [
        *pack.embeddings.values(),
        *(half for update in pack.lora.values() for half in (update.down, update.up)),
    ]
    numbers = {float(value) for tensor in tensors for value in tensor.unique()}
    if numbers != {float(pack.training["number"])}:
        raise AssertionError(f"a mixture: {numbers}")
    return int(pack.training["number"])


def save_for_ever(folder: Path, numbers: tuple[int, ...], ready: int | None = None) -> None:
    packs = [version(number) for number in numbers]
    if ready is not None:
        os.write(ready, b"!")
    while True:
        for pack in packs:
            pack.save_pretrained(folder, overwrite=True)


def forked(work, *arguments) -> int:
    """Process id of a copy of this process that does nothing but the work."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        try:
            work(*arguments)
        finally:
            os._exit(1)
    return child


def kill(times: int, seed: int, folder: Path) -> dict[str, float]:
    """Kill a saving process so many times; how often the old and a new version was left, and how many halves beside.

    Raises:
        MixOfShowError: If what is left can ever not be read; AssertionError if it is a mixture.
    """
    chance = random.Random(seed)
    one_save = save_time(folder)
    left = {"old": 0, "new": 0}
    for trial in range(times):
        old = 10 * trial
        version(old).save_pretrained(folder, overwrite=True)
        reading, writing = os.pipe()
        child = forked(save_for_ever, folder, (old + 1, old + 2), writing)
        os.read(reading, 1)
        time.sleep(chance.uniform(0, SAVES_IN_A_LIFE * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        left["old" if number_of(folder) == old else "new"] += 1
    interrupted = len(list(folder.glob(".*.tmp")))
    return {"kills": times, **left, "killed while writing": interrupted, "one save (s)": round(one_save, 4)}


def save_time(folder: Path) -> float:
    """Seconds of one save of a process that has saved before."""
    pack = version(0)
    pack.save_pretrained(folder, overwrite=True)
    start = time.perf_counter()
    pack.save_pretrained(folder, overwrite=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="file that gets the counts, with commit, machine and versions")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill(arguments.times, arguments.seed, Path(folder))
    sys.stdout.write(json.dumps(counts) + "\n")
    if arguments.record is not None:
        record.write(arguments.record, {"run": record.run_info(Path(__file__).parent), "results": counts})


if __name__ == "__main__":
    main()
