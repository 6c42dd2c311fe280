"""Names of base models: Hub ids, folders and those in the package; what a name says of a base, and how to load it."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from diffusers_mixofshow.errors import ConfigurationError, HubError, MissingExtraError, first_line
from diffusers_mixofshow.families import FAMILIES, BaseModel, Family, family_of, family_of_index
from diffusers_mixofshow.families.recognition import BASE_MODELS
from diffusers_mixofshow.families.sd3 import EMBEDDED_SD3
from diffusers_mixofshow.families.sdxl import EMBEDDED_XL, SDXL, STABLE_DIFFUSION_XL
from diffusers_mixofshow.families.stable_diffusion import EMBEDDED, SD1, STABLE_DIFFUSION
from diffusers_mixofshow.versions import installed_version


if TYPE_CHECKING:
    import torch


TOYLAND = EMBEDDED.id
"""Name of the base model in the package that draws concepts, used in place of a Hub id."""

TOYLAND_SD3 = EMBEDDED_SD3.id
"""Name of the second one, a transformer that plain LoRAs can be fused for."""

TOYLAND_XL = EMBEDDED_XL.id
"""Name of the third one, a Stable Diffusion XL."""


@dataclass(frozen=True)
class _Embedded:
    """A base model that needs no download, and where its files lie."""

    model: BaseModel
    folder: str
    package: str = ""
    """The package that has the folder, if not this one."""

    def find_folder(self) -> Path | None:
        """The folder, in diffusers' layout; None if its package is not installed."""
        if not self.package:
            return Path(__file__).parent / self.folder
        package = importlib.util.find_spec(self.package)
        return Path(*package.submodule_search_locations or (), self.folder) if package else None


_EMBEDDED = {
    one.model.id: one
    for one in (
        _Embedded(EMBEDDED, "toyland/weights"),
        _Embedded(EMBEDDED_SD3, "toyland_sd3", package="diffusers_mixofshow_bases"),
        _Embedded(EMBEDDED_XL, "toyland_xl", package="diffusers_mixofshow_bases"),
    )
}
"""The base models that need no download, by name."""

_IN_CACHE = re.compile(r"/models--(?P<user>[^/]+?)--(?P<name>[^/]+)/snapshots/[0-9a-f]{40}$")
_LOCAL = re.compile(r"[/\\~.]|[A-Za-z]:[/\\]")
"""Start of a text that must be a path, as no Hub id begins like that."""
_HUB_ID = re.compile(r"[^/\\]+(/[^/\\]+)?")
"""Name of a repository, with its owner or without; what has more parts, or others, is a path."""


def normalise_name(base_model: str) -> str:
    """Spell an embedded base's name in lower case, unless a folder has that spelling; other names stay."""
    known = base_model.lower()
    return known if known in _EMBEDDED and (base_model == known or not Path(base_model).is_dir()) else base_model


def embedded_base(base_model: str) -> BaseModel | None:
    """The embedded base that the name means; None for any other base."""
    embedded = _EMBEDDED.get(normalise_name(base_model))
    return None if embedded is None else embedded.model


def classes_of(base_model: str) -> tuple[str, ...]:
    """Class words that a base model is limited to; empty for a base without such a limit."""
    known = embedded_base(base_model)
    return () if known is None else known.classes


def find_embedded() -> dict[str, Path]:
    """The folder of every embedded base by its name, of those whose package is installed."""
    folders = {name: one.find_folder() for name, one in _EMBEDDED.items()}
    return {name: folder for name, folder in folders.items() if folder is not None}


def location_of(base_model: str) -> str:
    """What to pass to diffusers' `from_pretrained`: the name itself, or the folder of an embedded base.

    Raises:
        MissingExtraError: If it is an embedded base of a package that is not installed.
    """
    embedded = _EMBEDDED.get(normalise_name(base_model))
    if embedded is None:
        return base_model
    folder = embedded.find_folder()
    if folder is None:
        raise MissingExtraError(
            f"The base model {embedded.model.id!r} lies in a package of its own, which is not installed: pip install "
            '"diffusers-mixofshow[bases]", or in a checkout pip install ./bases.'
        )
    return str(folder)


def canonical_name(base_model: str) -> str:
    """One name for all spellings of a base model, so that names can be compared.

    An embedded base's folder becomes its name, a folder of the Hub's cache becomes its Hub id, any other existing
    folder its absolute path. What is no folder on this disk keeps its name.
    """
    if embedded := embedded_base(base_model):
        return embedded.id
    try:
        path = Path(base_model).expanduser().resolve()
        here = bool(base_model) and path.is_dir()
    except (OSError, RuntimeError, ValueError):
        return base_model
    if not here:
        return base_model
    for name, folder in find_embedded().items():
        if path == folder.resolve():
            return name
    cached = _IN_CACHE.search(path.as_posix())
    return f"{cached['user']}/{cached['name']}" if cached else str(path)


def name_of(pipeline: object) -> str:
    """Name of a loaded pipeline's base model: ``toyland``, a Hub id (also if loaded from the Hub's cache), or a path.

    Empty for a pipeline that was assembled from components.
    """
    return spell_name(str(getattr(pipeline, "config", {}).get("_name_or_path") or ""))


def spell_name(base_model: str) -> str:
    """A base model's name as files tell it: ``toyland``, a Hub id, or a path as it was given."""
    known = canonical_name(base_model)
    return base_model if Path(known).is_absolute() else known


def public_name(source: str) -> str:
    """A base model's name without private folders: a Hub id in full, of a path only its last part.

    A path counts as one even if it no longer exists.
    """
    known = canonical_name(source)
    if known != source and not Path(known).is_absolute():
        return known
    try:
        path = Path(known).expanduser()
        if path.exists():
            return path.resolve().name
    except (OSError, RuntimeError, ValueError):  # no such user, or a folder that cannot be read
        pass
    return known if _HUB_ID.fullmatch(known) and not _LOCAL.match(known) else PureWindowsPath(known).name


def license_of(base_model: str) -> str:
    """The licence of a base model, as the Hub spells it; empty where the package does not know it."""
    known = _find_known_base(base_model)
    return "" if known is None else known.license


def known_family(base_model: str) -> Family | None:
    """The family of a base model whose id the package knows, or that lies on this disk; None of any other."""
    known = _find_known_base(base_model)
    if known is not None:
        return next(family for family in FAMILIES if known in family.models)
    return family_of_index(_read_index(base_model))


def require_family(base_model: str, index: Mapping[str, Any]) -> Family:
    """The family of a pipeline that is not loaded yet.

    Args:
        base_model: Its name, for the error.
        index: Content of its ``model_index.json``.

    Raises:
        ConfigurationError: If it is of no known family; names the class of its pipeline.
    """
    if (family := family_of_index(index)) is None:
        known = ", ".join(one.name for one in FAMILIES)
        raise ConfigurationError(
            f"The base model {base_model!r} is a {_name_class(index)}, which is of no family that is known here. "
            f"Expected one of {known}."
        )
    return family


def find_strange_class(base_model: str) -> str:
    """The class of a pipeline on this disk that is of no known family; empty for any other base model."""
    index = _read_index(base_model)
    return _name_class(index) if index and family_of_index(index) is None else ""


def _name_class(index: Mapping[str, Any]) -> str:
    """The class that a pipeline's index names, which is shown as it is only where it is a name."""
    name = index.get("_class_name")
    return name if isinstance(name, str) and name.isidentifier() else "pipeline without a class"


def _read_index(base_model: str) -> dict[str, Any]:
    """Read the ``model_index.json`` of a folder; empty if there is none."""
    return _read_configuration(Path(base_model, "model_index.json")) if base_model else {}


def base_model_of(base_model: str, components: Mapping[str, object]) -> BaseModel:
    """What is known of a base model by its name and components; of an unknown one, what is known of its family.

    Args:
        base_model: Its name, which counts only if it is one of the components' family.
        components: ``pipeline.components``; may be empty if it is not loaded.
    """
    known = _find_any_base(base_model)
    family = family_of(components) if components else known_family(base_model) or STABLE_DIFFUSION
    return known if known is not None and (known in family.models or not components) else family.models[0]


def usual_guidance(base_model: str, family: Family | None = None) -> float:
    """The guidance scale that suits a base model: diffusers' default, or the best one measured on Toyland.

    Args:
        base_model: Its name.
        family: Its family as far as it is known otherwise; counts if neither name nor folder says anything.
    """
    known = _find_any_base(base_model)
    if known is not None:
        return known.guidance
    family = known_family(base_model) or family or STABLE_DIFFUSION
    configuration = _read_configuration(Path(base_model, family.denoiser, "config.json")) if base_model else {}
    if family.denoiser == STABLE_DIFFUSION.denoiser and configuration:
        return guidance_of_unet(configuration)
    return (_find_embedded_by(configuration) or family.models[0]).guidance


def find_size(base_model: str) -> tuple[int, int] | None:
    """Height and width in pixels that a base model draws by default, by its folder or its id; None if not known."""
    folder = Path(location_of(base_model))
    if (family := known_family(str(folder))) is None:
        return None
    size = _read_configuration(folder / family.denoiser / "config.json").get("sample_size")
    channels = _read_configuration(folder / "vae" / "config.json").get("block_out_channels")
    match [size, size] if isinstance(size, int) else size:
        case [int(height), int(width)] if isinstance(channels, list):
            scale = 2 ** (len(channels) - 1)
            return height * scale, width * scale
    known = _find_known_base(base_model)
    return (known.resolution, known.resolution) if known is not None and known.resolution else None


def guidance_of(components: Mapping[str, object], base_model: str = "") -> float:
    """The guidance scale that a loaded pipeline draws well with, by its components.

    Args:
        components: ``pipeline.components``.
        base_model: Its name, see `name_of`; tells models of one family apart whose components do not.
    """
    family = family_of(components)
    configuration = getattr(components[family.denoiser], "config", {})
    if family is STABLE_DIFFUSION:
        return guidance_of_unet(configuration)
    return (_find_embedded_by(configuration) or base_model_of(base_model, components)).guidance


def guidance_of_unet(configuration: Mapping[str, Any]) -> float:
    """The guidance scale of a U-Net by its configuration, which recognises that of an embedded base in any folder.

    Args:
        configuration: ``unet.config``.
    """
    if (embedded := _find_embedded_by(configuration)) is not None:
        return embedded.guidance
    of_xl = all(configuration.get(name) == value for name, value in STABLE_DIFFUSION_XL.marks.items())
    return SDXL.guidance if of_xl else SD1.guidance


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword argument that sets the dtype in diffusers: ``dtype`` since 0.40, ``torch_dtype`` before."""
    known_as = "dtype" if tuple(map(int, installed_version("diffusers").split(".")[:2])) >= (0, 40) else "torch_dtype"
    return {known_as: dtype}


def absent_parts(index: Mapping[str, Any]) -> dict[str, None]:
    """The arguments of `from_pretrained` for a pipeline that was saved without some parts, such as Stable Diffusion 3
    without T5: diffusers refuses to load it unless each of them is given as None.

    Args:
        index: The pipeline's ``model_index.json``.
    """
    return {name: None for name, value in index.items() if value == [None, None]}


def list_devices() -> str:
    """The devices that torch has on this machine, as it names them, separated by commas."""
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join(["cpu", *(f"cuda:{number}" for number in range(cards)), *apple])


def make_loading_error(base_model: str, error: Exception) -> ConfigurationError | HubError:
    """The error for a base model that cannot be found or read, with the first line of the reason."""
    kind = HubError if isinstance(error, HubError) else ConfigurationError
    return kind(
        f"The base model {base_model!r} cannot be loaded.{suggest_name(base_model)} Expected a Hub id, a folder of a "
        f"Stable Diffusion pipeline, or one of the package's own: {', '.join(map(repr, _EMBEDDED))}. "
        f"({first_line(error)}.)"
    )


def _find_embedded_by(configuration: Mapping[str, Any]) -> BaseModel | None:
    """The embedded base whose denoiser has this configuration, so that a copy under another name is recognised."""
    for name, folder in find_embedded().items():
        family = next(family for family in FAMILIES if _EMBEDDED[name].model in family.models)
        shipped = _read_configuration(folder / family.denoiser / "config.json")
        told = {key: value for key, value in shipped.items() if not key.startswith("_")}
        if told and all(_tuple_to_list(configuration.get(key)) == value for key, value in told.items()):
            return _EMBEDDED[name].model
    return None


def _find_any_base(base_model: str) -> BaseModel | None:
    """The embedded base that a name means in any spelling, or else the published one of this id; None if unknown."""
    return embedded_base(base_model) or _find_known_base(base_model)


def _find_known_base(base_model: str) -> BaseModel | None:
    """The published base model that has this id on the Hub; None where the package knows none."""
    return next((one for one in BASE_MODELS if base_model and base_model in (one.id, *one.other_ids)), None)


def _read_configuration(file: Path) -> dict[str, Any]:
    """Read a model's JSON configuration; empty if it is missing or unreadable."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _tuple_to_list(value: Any) -> Any:
    """A configuration in memory may have tuples where its JSON file has lists."""
    return list(value) if isinstance(value, tuple) else value


def suggest_name(base_model: str) -> str:
    """Ask whether a similar name was meant, an embedded base or a folder beside; empty if none is similar."""
    path = Path(base_model)
    try:
        path = path.expanduser()
        folders = [entry for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, RuntimeError, ValueError):  # no such user, or a folder that cannot be listed
        folders = []
    places = {folder.name: str(folder) for folder in folders} | {name: name for name in _EMBEDDED}
    near = [] if path.exists() else difflib.get_close_matches(path.name, places, n=1)
    return f" Did you mean {places[near[0]]!r}?" if near else ""
