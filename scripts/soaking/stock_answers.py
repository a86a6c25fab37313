"""What stock vLLM answers, from an engine in a process of its own."""

from __future__ import annotations

import os
import traceback
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soaking.workload import Asked

POOL_BLOCKS, AT_ONCE = 400, 12  # nobody has to give way


def stock_answers(asked: list[Asked], engine: dict[str, Any]) -> list[list[int]]:
    """Token ids of the greedy answer to each request, in order.

    Must be called before this process has an engine: another one is forked, which costs less than
    importing vLLM anew.

    Args:
        asked: the requests; their options are left out.
        engine: arguments of ``LLM``; compression, prefix caching and a small pool are left out.

    Raises:
        RuntimeError: if the engine fails; what it said is on standard error.
    """
    import vllm.entrypoints.llm  # noqa: F401, in time for both processes

    receiver, sender = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sender.send(_answer(asked, engine))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    sender.close()
    try:
        answers: list[list[int]] = receiver.recv()
    except EOFError as error:
        raise RuntimeError("The engine without compression gave no answers.") from error
    finally:
        os.waitpid(child, 0)
    return answers


def _answer(asked: list[Asked], engine: dict[str, Any]) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    plain = {"additional_config": {}, "enable_prefix_caching": False, "scheduling_policy": "fcfs"}
    sizes = {"num_gpu_blocks_override": POOL_BLOCKS, "max_num_seqs": AT_ONCE}
    llm = LLM(**{**engine, **plain, **sizes})
    outputs = llm.generate(
        [{"prompt_token_ids": request.prompt} for request in asked],
        [
            SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in asked
        ],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
