"""Draw docs/images/architecture.svg from the imports in src/: `python docs/draw_architecture.py`.

A box is a folder or a module at the top of the package; an arrow says who imports whom. A box lies one row above the
highest of those that it imports, so all arrows point down. Arrows that a longer way implies are left out.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "diffusers_mixofshow"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
NAME = PACKAGE.name
# Imported by nearly everything: shown as boxes, without their arrows.
EVERYWHERE = {"errors", "progress", "atomic"}
WIDTH, ROW, BOX_HEIGHT = 1180, 92, 46
LETTER = 8.4


def imports_between_parts(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Each part of the package with the parts that it imports at the top of its modules or inside functions."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part.startswith("__"):
            continue
        imported = found.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{NAME}."):
                imported.add(str(node.module).split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == NAME:
                imported |= {alias.name for alias in node.names if alias.name in _parts(package)}
    return {part: imported - {part} for part, imported in found.items()}


def _parts(package: Path) -> set[str]:
    return {path.name.removesuffix(".py") for path in package.iterdir() if not path.name.startswith("_")}


def rows_of(imports: dict[str, set[str]]) -> list[list[str]]:
    """Parts by row, the lowest first: those that import nothing, those that import only these, and so on."""
    rank: dict[str, int] = {}

    def rank_of(part: str) -> int:
        if part not in rank:
            rank[part] = 1 + max((rank_of(other) for other in imports[part] - EVERYWHERE), default=-1)
        return rank[part]

    rows: dict[int, list[str]] = defaultdict(list)
    for part in sorted(imports):
        rows[rank_of(part)].append(part)
    return [rows[number] for number in sorted(rows)]


def arrows_of(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Who imports whom, without what a longer way implies."""
    reached: dict[str, set[str]] = {}

    def all_below(part: str) -> set[str]:
        if part not in reached:
            reached[part] = set().union(*({other} | all_below(other) for other in imports[part]))
        return reached[part]

    direct = [(part, other) for part in sorted(imports) for other in sorted(imports[part] - EVERYWHERE)]
    return [
        (part, other)
        for part, other in direct
        if not any(other in all_below(between) for between in imports[part] - {other})
    ]


def draw(imports: dict[str, set[str]]) -> str:
    """The picture, as SVG."""
    rows = rows_of(imports)
    height = ROW * len(rows) + 20
    places: dict[str, tuple[float, float, float]] = {}
    for number, row in enumerate(rows):
        widths = [LETTER * len(part) + 22 for part in row]
        gap = (WIDTH - sum(widths)) / (len(row) + 1)
        left = gap
        for part, width in zip(row, widths, strict=True):
            places[part] = (left, height - ROW * (number + 1) + 20, width)
            left += width + gap
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" '
        'font-size="14">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#7a8aa0"/></marker></defs>',
    ]
    for part, other in arrows_of(imports):
        (left, top, width), (under, below, wide) = places[part], places[other]
        lines.append(
            f'<line x1="{left + width / 2:.0f}" y1="{top + BOX_HEIGHT:.0f}" x2="{under + wide / 2:.0f}" '
            f'y2="{below:.0f}" stroke="#7a8aa0" marker-end="url(#tip)"/>'
        )
    for part, (left, top, width) in places.items():
        colour = "#eeeeee" if part in EVERYWHERE else "#dcebff" if (PACKAGE / part).is_dir() else "#fff3d6"
        lines.append(
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6" fill="{colour}" '
            'stroke="#56657a"/>'
        )
        lines.append(
            f'<text x="{left + width / 2:.0f}" y="{top + 28:.0f}" text-anchor="middle" fill="#1c2733">{part}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(imports_between_parts()), encoding="utf-8")
