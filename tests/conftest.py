"""Set what must be set before vLLM, Triton or a kernel is imported."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent

os.environ.setdefault("TRITON_INTERPRET", "1")
for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)
if "PYTEST_XDIST_WORKER" in os.environ:  # engines of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("LLM_KVZIP_")]:
    del os.environ[name]  # a developer's own settings must not decide a test

sys.path.insert(0, str(ROOT / "scripts"))  # scripts import each other by name
sys.path.insert(0, str(ROOT / "tests" / "support"))

# Machines are noisy: how long an example takes decides no test.
settings.register_profile("kvzip", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvzip")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with slow tests come first, so that several workers end at about the same time."""
    for item in items:
        if ROOT / "tests" / "bridge" in item.path.parents:
            item.add_marker("versions")
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of a real language model; made first where it is missing (`make model`)."""
    from real_model import real_model

    return str(real_model())
