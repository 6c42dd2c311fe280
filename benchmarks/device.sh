#!/usr/bin/env bash
# Every measurement that is waiting for a GPU, the shortest first; each writes its record as soon as it has it.
#
#   benchmarks/device.sh RECORDS_DIR          # on a machine with CUDA: 8 minutes at most
#   benchmarks/device.sh RECORDS_DIR --dry    # the same commands on a CPU, so small that they only show that they run
#
# Needs the package's dependencies in the python of $PYTHON (default: python3), and nothing else: weights are random.
# A measurement that fails or takes too long is told at the end, and does not keep the others from running.
set -uo pipefail
cd "$(dirname "$0")/.."

records=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
failed=()

measure() { # seconds at most, name of the record, then the command
    local seconds=$1 name=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$python" "benchmarks/$1" "${@:2}" --record "$records/$name.json" || failed+=("$name")
}

if [ "${2:-}" = --dry ]; then
    measure 600 fusion-one-layer fusion.py --width 64 --concepts 2 --tokens 256
    measure 600 attention-toyland attention.py --steps 2 --rounds 2
    measure 600 training-toyland training_speed.py --steps 8
    measure 600 fusion-recording fusion_recording.py --work "$work" --concepts 1 --prompts 1 --steps 1 --size 64 --tiny
    measure 600 statistics-wide statistics_wide.py --blocks 1 --tokens 16 8 --rounds 1
else
    measure 40 fusion-one-layer-cuda fusion.py --device cuda
    measure 60 attention-sd15-1-cuda attention.py --model sd15 --device cuda
    measure 60 attention-sd15-4-cuda attention.py --model sd15 --device cuda --batch 4
    measure 90 training-speed-sd15-cuda training_speed.py --model sd15 --device cuda
    measure 90 statistics-wide-cuda statistics_wide.py --device cuda
    measure 140 fusion-recording-cuda fusion_recording.py --work "$work" --device cuda --concepts 4
fi

ls -l "$records"
if [ ${#failed[@]} -gt 0 ]; then
    echo "Failed or stopped: ${failed[*]}"
    exit 1
fi
