#!/usr/bin/env bash
# Every check and figure that needs a card, in one call; torch and Triton are enough. Where vLLM is
# there too, its engine follows: the same tokens, blocks freed, throughput.
#
#     bash scripts/gpu_suite.sh                 # on a machine with an NVIDIA card
#     bash scripts/gpu_suite.sh --interpret     # dry run on a CPU, tiny shapes
#     bash scripts/gpu_suite.sh --output-dir DIR [--tune]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
kernels=0
engine_flags=()
for flag in "$@"; do
    case $flag in
    --interpret) engine_flags+=(--small) ;;
    --tune) ;;
    *) engine_flags+=("$flag") ;;
    esac
done
"$PYTHON" scripts/gpu_suite.py "$@" || kernels=$?
[ "$kernels" -eq 2 ] && exit 2 # no card, or a wrong flag
engine=0
if "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'; then
    "$PYTHON" scripts/gpu_engine.py "${engine_flags[@]}" || engine=$?
else
    echo "No vLLM here: its engine was not asked."
fi
exit $((kernels | engine))
