#!/usr/bin/env bash
# Every check and figure that needs a card, in one call; torch and Triton are enough. Where vLLM is
# there too, its engine is asked as well: the same tokens, blocks freed, throughput. What is right
# is asked first, all at once; then times are taken, one after the other.
#
#     bash scripts/gpu_suite.sh                 # on a machine with an NVIDIA card
#     bash scripts/gpu_suite.sh --interpret     # dry run on a CPU, tiny shapes
#     bash scripts/gpu_suite.sh --output-dir DIR [--tune]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0} # all is greedy; it may be missing
engine_flags=()
interpret=
for flag in "$@"; do
    case $flag in
    --interpret) interpret=1 engine_flags+=(--small) ;;
    --tune) ;;
    *) engine_flags+=("$flag") ;;
    esac
done
kernels=0 engine=0 times=0 throughput=0
has_vllm=$("$PYTHON" -c 'import importlib.util; print(importlib.util.find_spec("vllm") or "")')
[ -n "$has_vllm" ] || echo "No vLLM here: its engine is not asked."

if [ -n "$interpret" ]; then
    "$PYTHON" scripts/gpu_suite.py "$@" || kernels=$?
    [ -z "$has_vllm" ] || "$PYTHON" scripts/gpu_engine.py "${engine_flags[@]}" || engine=$?
    exit $((kernels | engine))
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    exec "$PYTHON" scripts/gpu_suite.py "$@" # says that there is no card
fi
if [ -n "$has_vllm" ]; then
    "$PYTHON" scripts/gpu_engine.py --part engines "${engine_flags[@]}" &
    engines=$!
fi
"$PYTHON" scripts/gpu_suite.py --part checks "$@" || kernels=$?
[ -z "$has_vllm" ] || wait "$engines" || engine=$?
"$PYTHON" scripts/gpu_suite.py --part times "$@" || times=$?
if [ -n "$has_vllm" ]; then
    "$PYTHON" scripts/gpu_engine.py --part throughput "${engine_flags[@]}" || throughput=$?
fi
exit $((kernels | engine | times | throughput))
