#!/usr/bin/env bash
# Write constraints/current.txt and constraints/oldest.txt: every package that `.[dev]` brings, with one exact version.
# `current` takes the newest versions; `oldest` pins each runtime dependency to the floor that pyproject.toml states.
# constraints/ui.txt has the newest that the extra `ui` allows, whose Gradio holds Pillow back.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" - >"$work/floors.txt" <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    for requirement in tomllib.load(file)["project"]["dependencies"]:
        if not requirement.startswith("torch"):
            print(requirement.replace(">=", "=="))
PY
echo "torch==2.13.0" >"$work/torch.txt"

resolve() { # <constraints to obey> <file to write> [<what to install>]
    "$work/venv/bin/pip" install --quiet --dry-run --ignore-installed --report "$work/report.json" \
        -c "$1" -c "$work/torch.txt" "${3:-.[dev]}"
    "$work/venv/bin/python" - "$work/report.json" >"$work/pins.txt" <<'PY'
import json
import sys

with open(sys.argv[1]) as file:
    packages = [entry["metadata"] for entry in json.load(file)["install"]]
print("# Written by `make constraints`; do not edit by hand.")
for package in sorted(packages, key=lambda package: package["name"].lower()):
    if package["name"] != "diffusers-mixofshow":
        print(f"{package['name']}=={package['version'].split('+')[0]}")
PY
    mv "$work/pins.txt" "$2"
}

resolve "$work/torch.txt" constraints/current.txt
resolve "$work/floors.txt" constraints/oldest.txt
resolve "$work/torch.txt" constraints/ui.txt '.[dev,ui]'
