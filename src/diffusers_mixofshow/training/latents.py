"""Encode training pictures to latents once; a folder may keep the latents for the next training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as serialize

from diffusers_mixofshow.atomic import write_whole
from diffusers_mixofshow.edlora.reading import read_tensors
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, warn
from diffusers_mixofshow.training.framing import Crop


if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_ENCODED_AT_ONCE = 8
_PIXELS_AT_ONCE = 1024 * 1024
"""Pixels encoded together, at most; the autoencoder needs some gigabytes for them. One picture may have more."""
_KEY = "key"
_NAMES = {"mean", "deviation"}


class LatentEncoder:
    """Encodes the crops of one photo after another.

    A kept file is named by the digest of everything that its latents depend on: the pixels of the crops (and by them
    photo, framing, resolution, flips and seed), and the autoencoder's weights, precision and kind of device. A change
    of any gives another name, so that stale latents are never used.

    Args:
        vae: The base model's autoencoder.
        folder: Where latents are kept, one safetensors file per photo; None keeps none.
    """

    def __init__(self, vae: AutoencoderKL, folder: Path | None = None) -> None:
        self.vae, self.folder = vae, folder
        self._digest_of_vae = b"" if folder is None else _digest_of_vae(vae)

    def encode(self, crops: Sequence[Crop]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the crops' latents, from the folder or computed.

        Returns:
            Scaled as the denoiser expects, in float32 on the CPU, each (crops, channels, height, width).

        Raises:
            FileWriteError: If the folder cannot be written or is full.
        """
        pixels = torch.stack([crop.pixels for crop in crops])
        if self.folder is None:
            return _encode(pixels, self.vae)
        key = self._key(pixels)
        path = self.folder / f"{key}.safetensors"
        kept = _read(path, key, len(crops))
        if kept is None:
            kept = _encode(pixels, self.vae)
            tensors = dict(zip(("mean", "deviation"), (part.contiguous() for part in kept), strict=True))
            write_whole(path, serialize(tensors, metadata={_KEY: key}))
        return kept

    def _key(self, pixels: torch.Tensor) -> str:
        digest = hashlib.sha256(self._digest_of_vae + repr(tuple(pixels.shape)).encode())
        digest.update(pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _digest_of_vae(vae: AutoencoderKL) -> bytes:
    # Settings that start with an underscore (its path, the version of diffusers) do not change latents.
    kept = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    settings = json.dumps(kept, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{vae.dtype} {vae.device.type} {settings}".encode())
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _read(path: Path, key: str, crops: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Read the latents kept under this key; None if there are none, or with a warning if they cannot be used."""
    try:
        metadata, tensors = read_tensors(path)
    except EDLoRANotFoundError:
        return None
    except EDLoRAFormatError as error:
        warn(f"Latents are computed again: {error}")
        return None
    whole = tensors.keys() == _NAMES and all(
        len(part) == crops and part.dtype == torch.float32 and bool(part.isfinite().all()) for part in tensors.values()
    )
    if not whole or metadata.get(_KEY) != key or tensors["mean"].shape != tensors["deviation"].shape:
        warn(f"Latents are computed again: {path} does not hold those of this photo.")
        return None
    return tensors["mean"], tensors["deviation"]


@torch.no_grad()
def _encode(pixels: torch.Tensor, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    means, deviations = [], []
    at_once = max(1, min(_ENCODED_AT_ONCE, _PIXELS_AT_ONCE // pixels[0, 0].numel()))
    with _cast_to_float32(vae) if vae.config.force_upcast else nullcontext():
        for part in pixels.split(at_once):
            distribution = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
            means.append(distribution.mean.float().cpu())
            deviations.append(distribution.std.float().cpu())
    shift, scale = _find_scale(vae)
    return (torch.cat(means) - shift) * scale, torch.cat(deviations) * scale


def _find_scale(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """What to subtract from latents, then to multiply them by, for the denoiser; shapes (1 or channels, 1, 1)."""
    config = vae.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        mean, deviation = [getattr(config, "shift_factor", None) or 0.0], [1.0]
    shift, divisor = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
    return shift, config.scaling_factor / divisor


@contextmanager
def _cast_to_float32(vae: AutoencoderKL) -> Iterator[None]:
    """Let an autoencoder whose activations overflow float16 compute in float32, and restore its weights afterwards."""
    before = {name: weights.data for name, weights in vae.named_parameters()}
    try:
        for weights in vae.parameters():
            weights.data = weights.data.float()
        yield
    finally:
        for name, weights in vae.named_parameters():
            weights.data = before[name]
