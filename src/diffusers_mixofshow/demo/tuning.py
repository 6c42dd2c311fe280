"""Stage two of the demo: tune an ED-LoRA for every concept, several at a time, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers_mixofshow.base_models import location_of
from diffusers_mixofshow.demo.settings import DemoConcept, DemoSettings
from diffusers_mixofshow.errors import TrainingDataError
from diffusers_mixofshow.training import TrainingConfig
from diffusers_mixofshow.training.folders import is_hidden


ON_STEP = Callable[[str, int, int, float], None]
"""Called with the concept's name, the steps done, the total of steps, and the loss."""

_FINISHED = "finished.json"
_BASE_PARTS = ("tokenizer", "text_encoder", "text_encoder_2", "vae", "unet", "scheduler")


def tuning_config(concept: DemoConcept, settings: DemoSettings) -> TrainingConfig:
    """Make the training settings for one of the demo's concepts."""
    return TrainingConfig.toyland(
        instance_data_dir=str(concept.folder),
        concept=concept.name,
        class_word=concept.class_word,
        kind=concept.kind,
        output_dir=str(settings.folder / "concepts" / concept.name),
        **({"seed": settings.seed, "num_validation_images": 0} | dict(settings.tuning)),
    )


def fingerprint(config: TrainingConfig) -> str:
    """Digest of everything that an ED-LoRA depends on: settings, photos and the base model's files."""
    digest = hashlib.sha256(json.dumps(config.as_record(), sort_keys=True).encode())
    base = Path(location_of(config.pretrained_model_name_or_path))
    for folder in (Path(str(config.instance_data_dir)), *(base / part for part in _BASE_PARTS)):
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path.name)):
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def tune_all(concepts: Sequence[DemoConcept], settings: DemoSettings, on_step: ON_STEP) -> dict[str, Path]:
    """Tune every concept that is not finished yet.

    Args:
        concepts: The concepts.
        settings: The demo's settings.
        on_step: Called when a concept begins, with step 0, and after every optimiser step; for a finished concept
            once, with its last step.

    Returns:
        Concept name to the folder of its ED-LoRA.
    """
    configs = {concept.name: tuning_config(concept, settings) for concept in concepts}
    open_ones = {}
    for name, config in configs.items():
        if _is_finished(config):
            on_step(name, config.total_steps, config.total_steps, float("nan"))
        else:
            open_ones[name] = config
    workers = min(settings.workers or os.cpu_count() or 1, max(1, len(open_ones)))
    with _track_workers() as running, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_tune, name, config, on_step, running) for name, config in open_ones.items()]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _terminate(running)
            raise
    return {name: Path(str(config.output_dir)) for name, config in configs.items()}


def _is_finished(config: TrainingConfig) -> bool:
    marker = Path(str(config.output_dir)) / _FINISHED
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8"))["fingerprint"] == fingerprint(config))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _tune(name: str, config: TrainingConfig, on_step: ON_STEP, running: list[subprocess.Popen[str]]) -> None:
    """Run one worker process to its end, and pass its progress to `on_step`."""
    marker = Path(str(config.output_dir)) / _FINISHED
    marker.unlink(missing_ok=True)
    on_step(name, 0, config.total_steps, float("nan"))
    settings = asdict(config) | {"overwrite": True}  # an interrupted demo may have left files there
    log = Path(str(config.output_dir)) / "worker.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _start_worker(settings, log)
    running.append(process)
    failure = f"its process ended early, see {log}"
    for message in _read_messages(process):
        if "error" in message:
            failure = str(message["error"])
        else:
            on_step(name, message["step"], message["total"], message["loss"])
    if process.wait() != 0:
        raise TrainingDataError(f"Tuning <{name}> failed: {failure}")
    marker.write_text(json.dumps({"fingerprint": fingerprint(config)}), encoding="utf-8")


def _start_worker(settings: Mapping[str, Any], log: Path) -> subprocess.Popen[str]:
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusers_mixofshow.demo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that Ctrl-C reaches only the demo, which then ends its workers
        )
    if process.stdin is not None:
        process.stdin.write(json.dumps(settings, default=str))
        process.stdin.close()
    return process


def _read_messages(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in process.stdout or ():
        if line.startswith("{"):
            yield json.loads(line)


@contextmanager
def _track_workers() -> Iterator[list[subprocess.Popen[str]]]:
    """Yield a list for started workers; those still running at the end of the block are terminated."""
    running: list[subprocess.Popen[str]] = []
    try:
        yield running
    finally:
        _terminate(running)


def _terminate(running: Sequence[subprocess.Popen[str]]) -> None:
    for process in running:
        if process.poll() is None:
            process.kill()  # on SIGTERM it would write a checkpoint, which the demo never goes on from
