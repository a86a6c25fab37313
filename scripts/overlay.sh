#!/usr/bin/env bash
# Run tests/bridge on a vLLM that has no CPU build yet: its Python files, from the wheel with the CUDA
# build, over the compiled part of the CPU build that .venv has. That is not the release: no engine can
# be trusted to start, but block manager, prefix cache, scheduler, configuration and checks are vLLM's.
#   scripts/overlay.sh VERSION [arguments of pytest]
#   VENV  environment of the compiled part (default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:?name a version of vLLM, such as 0.33.0}
shift
venv=${VENV:-.venv}
folder=".overlay-$version"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if [ ! -f "$folder/.complete" ]; then
    rm -rf "$folder"
    mkdir "$folder"
    echo "overlay: fetching the Python part of vLLM $version"
    "${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "$folder" "vllm==$version"
    "${pip[@]}" install --quiet --no-deps --target "$folder" orjson # since 0.33 vLLM needs it
    "$venv/bin/python" - "$folder" "$version" << 'PYTHON'
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

folder, version = Path(sys.argv[1]), sys.argv[2]
(path,) = folder.glob("vllm-*.whl")
with zipfile.ZipFile(path) as wheel:
    names = [n for n in wheel.namelist() if n.startswith("vllm/") and n.endswith((".py", ".json"))]
    wheel.extractall(folder, names)
path.unlink()
for compiled in Path(find_spec("vllm").origin).parent.glob("*.so"):
    (folder / "vllm" / compiled.name).symlink_to(compiled)
metadata = folder / f"vllm-{version}+cpu.dist-info"
metadata.mkdir()
(metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
PYTHON
    touch "$folder/.complete"
fi

export PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}"
"$venv/bin/python" -P -c "import vllm; assert vllm.__version__ == '$version', vllm.__file__"
exec "$venv/bin/python" -P -m pytest tests/bridge "$@"
