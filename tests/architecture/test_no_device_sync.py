"""Nothing that runs in a decode step on a GPU may wait for the device."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero"}
PATHS = [
    *sorted(path for path in (ROOT / "kernels").glob("*.py") if path.name != "reference.py"),
    ROOT / "vllm_kvzip" / "storage" / "row_pages.py",
    *(
        ROOT / "vllm_kvzip" / "vllm_bridge" / "attention" / f"{name}.py"
        for name in (
            "attention_layer",
            "batches",
            "gpu_attention",
            "kernel_batches",
            "metadata_builder",
            "stock_head_sequences",
        )
    ),
]


def waiting_calls(source):
    """Methods called in ``source`` that read a tensor back from its device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in WAITS:
                yield f"{node.func.attr} in line {node.lineno}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nothing_is_read_back(path):
    assert list(waiting_calls(path.read_text())) == []


def test_such_a_call_is_seen():
    assert list(waiting_calls("x = 1\ny = lengths.max().item()")) == ["item in line 2"]
