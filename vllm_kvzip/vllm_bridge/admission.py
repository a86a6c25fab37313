"""Requests are checked where they enter, so that a wrong option is an answer to its client."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvzip.errors import RequestError
from vllm_kvzip.request_options import check_request
from vllm_kvzip.vllm_bridge.settings import KEY

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

_MARK = "_kvzip_checks_requests"


def check_requests() -> None:
    """Make vLLM check the options of every request of an engine that compresses; idempotent.

    Symptom without it: a wrong option would reach the scheduler, where an error ends the engine.
    vLLM checks sampling parameters in ``InputProcessor.process_inputs`` and has no hook there that
    sees the prompt's length, so that method is wrapped. Safe: engines without compression are
    passed through. Remove when vLLM lets a plugin validate requests.
    """
    if getattr(InputProcessor, _MARK, False):
        return
    setattr(InputProcessor, _MARK, True)
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and KEY in (self.vllm_config.additional_config or {}):
            num_tokens = length_from_prompt_token_ids_or_embeds(
                request.prompt_token_ids, request.prompt_embeds
            )
            try:
                check_request(params.extra_args, num_tokens)
            except RequestError as error:
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return request

    InputProcessor.process_inputs = process_inputs
