#!/usr/bin/env bash
# Every check and figure that needs a card, in one call; torch and Triton are enough.
#
#     bash scripts/gpu_suite.sh                 # on a machine with an NVIDIA card
#     bash scripts/gpu_suite.sh --interpret     # dry run on a CPU, tiny shapes
#     bash scripts/gpu_suite.sh --output-dir DIR [--tune]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" scripts/gpu_suite.py "$@"
