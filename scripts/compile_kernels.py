"""Compile every Triton kernel for NVIDIA cards without one, and say what it takes of the chip.

    python scripts/compile_kernels.py

Each kernel is launched as the plugin would launch it, on CPU tensors, with a Triton driver that
stops after compilation; so what is compiled is what a card would run. Registers, local memory (that
is where spilled registers go) and shared memory are what ``cuobjdump`` reads from the machine code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

os.environ["TRITON_INTERPRET"] = "0"  # before kernels are decorated

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpu.kernel_cases import Asked, Case, Shape, attend, make_case
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.kernels.flat_tables import flatten_tables
from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.kernels.quantized_pages import dequantize_pages, quantize_pages
from vllm_kvzip.quantization import Int4, Int8, NormalFloat4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_kvzip.quantization import Format

T = TypeVar("T")

TARGETS = (80, 90, 100)
HEAD_DIMS = (64, 96, 128, 256)
FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "int4": Int4(32),
    "nf4": NormalFloat4(32),
    "nf4 with double quantization": NormalFloat4(32, double_quantization=True),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnly(DriverBase):
    """A Triton driver for a card that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[dict[str, Any]]:
    """Inside, launching a kernel compiles it and no more; gives the kernels by name."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.fn.__name__] = kernel
        return kernel

    driver.set_active(CompileOnly(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of local memory a thread, and bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
        "shared": int(kernel.metadata.shared),
        "warps": int(kernel.metadata.num_warps),
    }


def attention_case(
    dtype: torch.dtype, head_dim: int, page_tokens: int, query_len: int, pages_per_head: int = 1
) -> Case:
    shape = Shape(2, 2, 4, head_dim, page_tokens, pages_per_head)
    compressed = Asked(20 * shape.block_tokens + query_len, query_len, 16, 0.5)
    return make_case([compressed, Asked(query_len + 40, query_len)], shape, dtype=dtype)


def tier_case(
    head_dim: int,
    query_len: int,
    name: str | None = None,
    *,
    rotated: bool = True,
    eight_bits: Literal["none", "queries too"] = "none",
    pages_per_head: int = 1,
) -> Case:
    """As :func:`attention_case`, bfloat16, pages of 16, with a quantized tier if it has a name."""
    shape = Shape(2, 2, 4, head_dim, pages_per_head=pages_per_head)
    layout = None
    if name is not None:
        stored = torch.bfloat16 if eight_bits == "none" else torch.uint8
        layout = shape.page_layout(stored, FORMATS[name], FORMATS[name])
    compressed = Asked(20 * shape.block_tokens + query_len, query_len, 16, 0.5, 0.2)
    return make_case(
        [compressed, Asked(query_len + 40, query_len)],
        shape,
        dtype=torch.bfloat16,
        layout=layout,
        rotated=rotated,
        eight_bits=eight_bits,
    )


def with_sinks_and_cap(case: Case) -> Case:
    """The same of a model with learned and capped logits."""
    return replace(case, sink_logits=torch.zeros(case.query.shape[1]), soft_cap=30.0)


def compact(dtype: torch.dtype, head_dim: int, page_tokens: int) -> None:
    case = attention_case(dtype, head_dim, page_tokens, 1)
    empty = torch.zeros(4 * page_tokens, dtype=torch.int32)
    compact_pages(case.key_pages, case.value_pages, empty.view(4, -1), empty, empty[:4], empty[:4])


def lay_out_tables(page_tokens: int) -> None:
    tables = attention_case(torch.float32, 64, page_tokens, 1).tables
    flat = torch.zeros(2, 4, 128, dtype=torch.int32)
    flatten_tables(tables, flat, torch.zeros(2, 4, dtype=torch.int32))


def score(dtype: torch.dtype, head_dim: int, soft_cap: float | None = None) -> None:
    keys = torch.zeros(2, 256, head_dim, dtype=dtype)
    column_maximum(keys, keys, torch.zeros(2, 256), 0.1, soft_cap)


def quantize(dtype: torch.dtype, head_dim: int, page_tokens: int, name: str) -> None:
    shape = Shape(head_dim=head_dim, page_tokens=page_tokens)
    layout = shape.page_layout(dtype, FORMATS[name], FORMATS[name])
    code_book = FORMATS[name].code_book
    vectors = torch.zeros(layout.page_tokens, head_dim, dtype=dtype)
    rows = torch.zeros(1, layout.page_tokens, dtype=torch.int32)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    quantize_pages(vectors, vectors, rows, pages, rows[0, :1], layout, code_book)
    dequantize_pages(pages, rows[0, :1], vectors, vectors, layout, code_book)


def launches(*, every: bool) -> dict[str, Callable[[], object]]:
    """What is launched, by a readable name; ``every`` adds data types, page sizes and formats."""
    found: dict[str, Callable[[], object]] = {}
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if every else [torch.bfloat16]
    pages = [16, 32, 64, 128] if every else [16]
    for head_dim in HEAD_DIMS:
        for dtype in dtypes:
            name = f"{str(dtype).removeprefix('torch.')}, head size {head_dim}"
            found[name] = lambda d=dtype, h=head_dim: score(d, h)  # type: ignore[misc]
            for page in pages:
                about = f"{name}, pages of {page}"
                found[about] = lambda d=dtype, h=head_dim, p=page: compact(d, h, p)  # type: ignore[misc]
                for form in FORMATS if every or head_dim == 128 else list(FORMATS)[-1:]:
                    found[f"{about}, {form}"] = lambda d=dtype, h=head_dim, p=page, f=form: (  # type: ignore[misc]
                        quantize(d, h, p, f)
                    )
                for query_len in (1, 64):
                    key = f"{about}, {query_len} query tokens"
                    found[key] = lambda d=dtype, h=head_dim, p=page, q=query_len: (  # type: ignore[misc]
                        attend(attention_case(d, h, p, q), 1, num_runs=4)
                    )
    for page in pages:
        found[f"pages of {page}"] = lambda p=page: lay_out_tables(p)  # type: ignore[misc]
    return found | large_block_launches(every=every) | two_tier_launches(every=every)


def large_block_launches(*, every: bool) -> dict[str, Callable[[], object]]:
    """As :func:`launches`, where a head has 34 pages in a block; ``every`` adds sizes."""
    found: dict[str, Callable[[], object]] = {}
    name, per_head = "nf4 with double quantization", 34
    for head_dim, query_len in product(HEAD_DIMS, (1, 6, 64)) if every else [(256, 1), (128, 64)]:
        about = f"blocks of {16 * per_head}, head size {head_dim}, {query_len} query tokens"
        found[about] = lambda h=head_dim, q=query_len: (  # type: ignore[misc]
            attend(attention_case(torch.bfloat16, h, 16, q, per_head), 1, num_runs=4)
        )
        found[f"{about}, {name}"] = lambda h=head_dim, q=query_len: (  # type: ignore[misc]
            attend(tier_case(h, q, name, pages_per_head=per_head), 1, num_runs=4)
        )
    return found


def pairwise(formats: Sequence[T]) -> list[tuple[int, int, T]]:
    """Head dim, query tokens and one of two formats, so that any two of them meet once."""
    first, second = formats
    return [(64, 1, first), (128, 64, first), (64, 64, second), (128, 1, second)]


def two_tier_launches(*, every: bool) -> dict[str, Callable[[], object]]:
    """As :func:`launches`, of prefixes with a quantized tier; ``every`` adds sizes and formats."""
    found: dict[str, Callable[[], object]] = {}
    formats = [("int8", False), ("nf4 with double quantization", True)]
    cases = pairwise(formats)
    if every:
        cases = list(product(HEAD_DIMS, (1, 6, 64), product(FORMATS, (False, True))))
    for head_dim, query_len, (name, rotated) in cases:
        about = f"bfloat16, head size {head_dim}, {query_len} query tokens, "
        found[about + ("rotated " if rotated else "") + name] = (
            lambda h=head_dim, q=query_len, f=name, r=rotated: (  # type: ignore[misc]
                attend(tier_case(h, q, f, rotated=r), 1, num_runs=4)
            )
        )
    return found


def eight_bit_launches(*, every: bool) -> dict[str, Callable[[], object]]:
    """As :func:`launches`, of caches of 8-bit numbers, which cards before 8.9 cannot read."""
    found: dict[str, Callable[[], object]] = {}
    formats = (None, "nf4 with double quantization")
    cases = list(product(HEAD_DIMS, (1, 6, 64), formats)) if every else pairwise(formats)
    for head_dim, query_len, name in cases:
        about = f"8 bits, head size {head_dim}, {query_len} query tokens"
        found[about + (f", {name}" if name else "")] = lambda h=head_dim, q=query_len, f=name: (  # type: ignore[misc]
            attend(tier_case(h, q, f, eight_bits="queries too"), 1, num_runs=4)
        )
    return found


def sink_and_cap_launches(*, every: bool, eight_bits: bool) -> dict[str, Callable[[], object]]:
    """As :func:`launches`, of models with learned and capped logits; ``every`` adds sizes.

    ``eight_bits``: of caches of 8-bit numbers, too.
    """
    found: dict[str, Callable[[], object]] = {}
    double = "nf4 with double quantization"
    cases: list[tuple[int, int, str | None, bool]]
    cases = [(head_dim, rows, None, False) for head_dim in (64, 128, 256) for rows in (1, 64)]
    cases += [(64, 1, double, False), (128, 64, double, False), (256, 64, double, False)]
    cases += [(128, 1, None, True), (64, 64, double, True)]
    if every:
        cases = list(product(HEAD_DIMS, (1, 6, 64), (None, double), (False, True)))
    for head_dim, query_len, name, is_small in cases:
        if is_small and not eight_bits:
            continue
        about = f"sinks and cap, {'8 bits, ' * is_small}head size {head_dim}, "
        about += f"{query_len} query tokens" + (f", {name}" if name else "")
        kind: Literal["none", "queries too"] = "queries too" if is_small else "none"
        found[about] = lambda h=head_dim, q=query_len, f=name, k=kind: (  # type: ignore[misc]
            attend(with_sinks_and_cap(tier_case(h, q, f, eight_bits=k)), 1, num_runs=4)
        )
    for head_dim in HEAD_DIMS if every else (128,):
        found[f"cap, head size {head_dim}"] = lambda h=head_dim: (  # type: ignore[misc]
            score(torch.bfloat16, h, soft_cap=30.0)
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument(
        "--every", action="store_true", help="all data types, page sizes and formats"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rows = []
    for capability in args.targets:
        with compiling(capability) as compiled:
            found = launches(every=args.every)
            eight_bits = capability >= 89
            if eight_bits:
                found |= eight_bit_launches(every=args.every)
            found |= sink_and_cap_launches(every=args.every, eight_bits=eight_bits)
            for name, launch in found.items():
                compiled.clear()
                launch()
                rows += [
                    {"target": capability, "kernel": kernel, "launch": name, **resources(binary)}
                    for kernel, binary in compiled.items()
                ]
    print("| sm | kernel | launch | registers | local bytes | shared bytes | warps |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print(f"\nTriton {triton.__version__}, torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
