"""What benchmarks share: results that outlive an interruption, and tables as the documentation shows them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from diffusers_mixofshow import toyland
from diffusers_mixofshow.atomic import write_picture, write_whole


class Kept:
    """Files under the hash of all that they depend on: a plan, an embedded base's weights, and other files."""

    def __init__(
        self, folder: Path, plan: Mapping[str, Any], files: Sequence[Path] = (), base: str = "toyland"
    ) -> None:
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
        for file in (*sorted(toyland.path(base).rglob("*.safetensors")), *files):
            digest.update(file.read_bytes())
        self.folder = folder / f"kept-{digest.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the JSON of a name is kept."""
        return self.folder / f"{_file_name(name)}.json"

    def result(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON that is kept under a name, computed where it is not."""
        path = self.path(name)
        if not path.exists():
            write_whole(path, json.dumps(compute()).encode())
        return json.loads(path.read_text(encoding="utf-8"))

    def picture_path(self, name: str, number: int) -> Path:
        """Where a series has its numbered picture."""
        return self.folder / _file_name(name) / f"{number:04}.png"

    def pictures(
        self, name: str, batches: Sequence[Sequence[int]], compute: Callable[[Sequence[int]], Sequence[Image.Image]]
    ) -> list[Image.Image]:
        """A series of numbered pictures, computed in batches of those that are not kept, in the order of numbers."""
        for batch in track(batches, description=name):
            missing = [number for number in batch if not self.picture_path(name, number).exists()]
            for number, picture in zip(missing, compute(missing) if missing else (), strict=True):
                write_picture(self.picture_path(name, number), picture)
        numbers = sorted(number for batch in batches for number in batch)
        return [Image.open(self.picture_path(name, number)).convert("RGB") for number in numbers]


def _file_name(name: str) -> str:
    return name.replace("/", "-").replace(":", "@").replace(", ", "-").replace(" ", "-")


def markdown(head: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """A table, the rows' names in its first column."""
    lines = [["", *head], ["---"] * (1 + len(head)), *([name, *map(str, cells)] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
