"""Where an engine's time goes: scheduler, attention, page tables, compression, rest of the model.

The parts are timed by wrapping methods of one in-process engine's own objects, alike for stock vLLM
and for the plugin. A part that runs inside another one (attention inside the model) is taken out of
it. On a CPU an operator has run when it returns, so the clock needs no synchronisation.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ("scheduler", "attention", "page tables", "compression", "rest of model", "rest of engine")


class StepClock:
    """Seconds spent in each part of an engine, each second counted once.

    Attributes:
        seconds: by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = [0.0]  # time of wrapped calls inside each open call

    def time(self, owner: Any, name: str, part: str) -> None:
        """Count the time of ``owner.name(...)``, what it calls of other parts excepted."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - begin
                self.seconds[part] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        setattr(owner, name, timed)

    def clear(self) -> None:
        """Start from zero."""
        self.seconds.clear()


def profile_engine(engine: Any) -> StepClock:
    """Time the parts of an engine that runs in this process.

    Args:
        engine: vLLM's ``LLMEngine``.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    clock = StepClock()
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    runner = worker.model_runner
    clock.time(engine, "step", "rest of engine")
    for name in ("schedule", "update_from_output"):
        clock.time(core.scheduler, name, "scheduler")
    for name in ("execute_model", "sample_tokens"):
        clock.time(runner, name, "rest of model")
    layers = get_layers_from_vllm_config(core.vllm_config, Attention)
    for layer in layers.values():
        for name in ("forward", "do_kv_cache_update"):
            clock.time(layer.impl, name, "attention")
    for groups in runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                clock.time(builder, "build", "page tables")
    runtime = getattr(worker, "_kvzip", None)
    if runtime is not None:
        clock.time(runtime, "before_step", "compression")
        clock.time(runtime, "after_step", "compression")
    return clock
