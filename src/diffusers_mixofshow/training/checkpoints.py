"""Checkpoints: a resumed training reaches the same weights, bit for bit, as one that was never stopped.

Each is a folder ``checkpoint-STEP`` in the output folder: the ED-LoRA at that step, ``state.pt`` with parameters,
optimiser, scaler and position, and for each process ``process-N.pt`` with its random state and position in the data.
A folder appears whole or not at all. Files are read with ``weights_only=True``. accelerate's `save_state` would save
the whole base model each time, which is part of the module that accelerate wraps.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusers_mixofshow.atomic import find_existing, refuse_overwriting, write_probe, write_whole
from diffusers_mixofshow.edlora import EDLoRA
from diffusers_mixofshow.edlora.folder import find_places, remove
from diffusers_mixofshow.errors import ConfigurationError, warn
from diffusers_mixofshow.training.batches import CachedPhoto
from diffusers_mixofshow.training.config import RATES, TrainingConfig
from diffusers_mixofshow.training.renamed import use_new_names


LATEST = "latest"

_FORMAT_VERSION = 1
_BEFORE = {"keep_start_token": False}
"""Settings missing from older checkpoints, with the value that those were trained with."""
_STATE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_COPIES_OF_PARAMETERS = 5
"""Size of a checkpoint in sizes of the parameters: these, their average, Adam's two moments, and the ED-LoRA."""
_SPARE_BYTES = 1_000_000


class CheckpointFolder:
    """Where the checkpoints of one training lie.

    Args:
        folder: The output folder.
        limit: How many checkpoints are kept, the newest.
        accelerator: Tells the processes apart.
    """

    def __init__(self, folder: Path, limit: int, accelerator: Accelerator) -> None:
        self.folder, self.limit, self.accelerator = folder, limit, accelerator

    def save(self, step: int, edlora: EDLoRA, state: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write one checkpoint and remove the oldest beyond `limit`; all processes call it together.

        Args:
            step: Steps done.
            edlora: The concept at this step.
            state: Tensors, numbers, lists and dictionaries, equal in all processes.
            own: Tensors, numbers, lists and dictionaries of this process alone.

        Raises:
            ConfigurationError: If it cannot be written; older checkpoints are unchanged.
        """
        final = self.folder / f"checkpoint-{step}"
        temporary = self.folder / f".checkpoint-{step}.tmp"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                edlora.save_pretrained(temporary)
                whole = {"format_version": _FORMAT_VERSION, "step": step, **state}
                whole["processes"] = self.accelerator.num_processes
                write_whole(temporary / _STATE, _serialize(whole))
            self.accelerator.wait_for_everyone()
            write_whole(temporary / self._own_name, _serialize(own))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                for old in list_checkpoints(self.folder)[: -self.limit]:
                    shutil.rmtree(old)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise ConfigurationError(
                f"The checkpoint of step {step} cannot be written to {self.folder} ({error}). Make room, or choose "
                "another output_dir and go on from the newest checkpoint with resume_from_checkpoint."
            ) from error
        return final

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `state` and `own`, as `save` got them, to the CPU.

        Raises:
            ConfigurationError: If a file is missing or damaged, or was written by another number of processes.
        """
        state = _read(path / _STATE)
        processes = state.get("processes")
        if state.get("format_version") != _FORMAT_VERSION:
            raise ConfigurationError(f"{path} was written by another release; start the training anew.")
        if processes != self.accelerator.num_processes:
            raise ConfigurationError(
                f"{path} was written by {processes} processes, this training has {self.accelerator.num_processes}. "
                "Go on with as many, so that every one finds its random state."
            )
        return state, _read(path / self._own_name)

    @property
    def _own_name(self) -> str:
        return f"process-{self.accelerator.process_index}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """List all complete checkpoints in an output folder, the newest last."""
    whole = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in whole if (path / _STATE).is_file()), key=_age_key)


def find_checkpoint(folder: Path, wanted: str | Path) -> Path | None:
    """Find a checkpoint by its folder, or the ``latest``, which is None if there is none yet.

    Raises:
        ConfigurationError: If the folder is no checkpoint.
    """
    if wanted == LATEST:
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(wanted) if (Path(wanted) / _STATE).is_file() else folder / wanted
    if not (path / _STATE).is_file():
        known = ", ".join(each.name for each in list_checkpoints(folder)) or "none"
        raise ConfigurationError(
            f"resume_from_checkpoint is {str(wanted)!r}, which is no checkpoint. Expected {LATEST!r} or a folder "
            f"checkpoint-STEP; in {folder} there are: {known}."
        )
    return path


def find_start(config: TrainingConfig) -> Path | None:
    """Find the checkpoint that a training is to resume; None if it starts from scratch.

    Raises:
        ConfigurationError: If `resume_from_checkpoint` is no checkpoint.

    Warns:
        MixOfShowWarning: If it is ``latest``, and there is none yet.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or config.output_dir is None:
        return None
    path = find_checkpoint(Path(config.output_dir), wanted)
    if path is None:
        warn(f"{config.output_dir} has no checkpoint yet, so the training begins at its start.")
    return path


def _list_earlier_steps(folder: Path) -> list[Path]:
    """List checkpoints and validation sheets of an earlier training in an output folder."""
    return [*list_checkpoints(folder), *sorted(folder.glob("validation/step-*.png"))]


def list_replaced(config: TrainingConfig) -> list[Path]:
    """List files of an earlier training that this one would replace; none if it resumes that training."""
    if config.output_dir is None:
        return []
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    checkpoint = None if wanted is None else find_checkpoint(folder, wanted)
    if checkpoint is not None and checkpoint.resolve().parent == folder.resolve():
        return []
    return find_existing(*find_places(folder), *_list_earlier_steps(folder))


def refuse_replacing(config: TrainingConfig) -> None:
    """Refuse to replace an earlier training, unless `config.overwrite` allows it.

    Raises:
        OverwriteError: If there is one in the output folder.
        ConfigurationError: If `resume_from_checkpoint` is no checkpoint.
    """
    resumable = config.output_dir is not None and list_checkpoints(Path(config.output_dir))
    going_on = "Go on with resume_from_checkpoint 'latest', choose" if resumable else "Choose"
    refuse_overwriting(*list_replaced(config), overwrite=config.overwrite, otherwise=f"{going_on} another output_dir")


def remove_earlier_steps(config: TrainingConfig) -> None:
    """Remove checkpoints and sheets of the training to be replaced; its ED-LoRA stays until the new one is saved."""
    if config.output_dir is not None and list_replaced(config):
        remove(_list_earlier_steps(Path(config.output_dir)))


def check_writable(folder: Path, *, make: bool = True) -> None:
    """Check before the training that its output folder can be written.

    Args:
        folder: The output folder.
        make: Whether to make it; else the nearest existing folder above it is tried.

    Raises:
        ConfigurationError: If it cannot be written.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        write_probe(folder)
    except OSError as error:
        raise ConfigurationError(
            f"output_dir {str(folder)!r} cannot be written ({error}). Choose another folder, or None not to save."
        ) from error


def check_space(folder: Path, parameters: Sequence[torch.Tensor], config: TrainingConfig) -> None:
    """Check that the disk has room for the ED-LoRA and the checkpoints.

    Raises:
        ConfigurationError: If it has not.
    """
    one = 4 * sum(parameter.numel() for parameter in parameters)
    kept = config.checkpoints_total_limit + 1 if config.checkpointing_steps is not None else 0
    needed = one * (1 + kept * _COPIES_OF_PARAMETERS) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigurationError(
            f"output_dir {str(folder)!r} has {free / 1e6:.1f} MB free, but the ED-LoRA and {kept} checkpoints need "
            f"{needed / 1e6:.1f} MB. Make room, choose another folder, or lower checkpoints_total_limit."
        )


def digest_data(photos: Sequence[CachedPhoto], captions: Sequence[str]) -> str:
    """SHA-256 of latents, masks and captions, by which a resumed training notices changed data."""
    digest = hashlib.sha256("\n".join(captions).encode())
    for photo in photos:
        for tensor in (photo.mean, photo.deviation, photo.mask):
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(repr(photo.captions).encode())
    return digest.hexdigest()


def digest_conditions(photos: Sequence[CachedPhoto], config: TrainingConfig) -> str:
    """SHA-256 of what else of the photos is learnt from: sizes, and masks that the attention regulariser reads."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(photo.sizes.contiguous().numpy().tobytes())
        if photo.subject is not None and config.attn_reg_weight:
            digest.update(photo.subject.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_same_training(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any], data: str) -> None:
    """Refuse to resume with other settings or data than the checkpoint's; warn of other learning rates.

    Rates may change, as they are lowered after a divergence; not from or to 0, which changes which parameters learn.

    Args:
        path: The checkpoint, for the message.
        state: What `CheckpointFolder.load` returned.
        settings: `TrainingConfig.as_identity` of this training.
        data: `digest_data` of this training, then `digest_conditions`, which older checkpoints lack.

    Raises:
        ConfigurationError: Lists everything that differs.
    """
    before = _BEFORE | use_new_names(state["settings"], silent=True)
    changed = {
        name: f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    }
    rates = [name for name in changed if name in RATES and before.get(name) and settings.get(name)]
    defects = [text for name, text in changed.items() if name not in rates]
    if not data.startswith(state["data"]):
        defects.append("the photos, captions or masks have changed")
    if defects:
        raise ConfigurationError(
            f"{path} is the checkpoint of another training: {'; '.join(defects)}. Take its settings and photos to go "
            "on, or set resume_from_checkpoint to None to begin anew."
        )
    if rates:
        warn(f"The training goes on from {path} with other rates: {'; '.join(changed[name] for name in rates)}.")


def _age_key(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    return (path / _STATE).stat().st_mtime_ns, int(match.group(1)) if match else 0


def _serialize(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise all sorts of errors for a damaged file
        raise ConfigurationError(
            f"{path} cannot be read ({error}). Go on from another checkpoint, or start the training anew."
        ) from error
    if not isinstance(state, dict):
        raise ConfigurationError(f"{path} is no checkpoint of this package. Start the training anew.")
    return state
