"""HTTP routes on which a wrong option would not be seen before the answer has begun, or at all."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from vllm_kvzip.planning.request_options import has_options
from vllm_kvzip.vllm_bridge.server.admission import check_prompt
from vllm_kvzip.vllm_bridge.symbols import (
    ChatCompletionRequest,
    CompletionRequest,
    OpenAIServingResponses,
    ServingGenerativeScoring,
    ServingStructuredDecisions,
    TranscriptionRequest,
    TranslationRequest,
    VLLMValidationError,
)

_MARK = "_kvzip_checks_routes"
_FIELD = "vllm_xargs"


def check_routes() -> None:
    """Make these routes answer with HTTP 400; for a server that compresses, idempotent.

    Symptom without it: ``/v1/responses`` answers HTTP 200 and a broken stream, or a background
    response that fails, because it asks the engine only when somebody reads. Beam search makes
    sampling parameters of its own, and so do two routes that score labels: an option would be
    dropped without a word. Safe: requests without an option of ours are passed through. Remove when
    vLLM checks parameters before it answers, and hands them on to these routes.
    """
    if getattr(OpenAIServingResponses, _MARK, False):
        return
    setattr(OpenAIServingResponses, _MARK, True)
    _check_before_streaming(OpenAIServingResponses, "_generate_with_builtin_tools")
    for request in (
        ChatCompletionRequest,
        CompletionRequest,
        TranscriptionRequest,
        TranslationRequest,
    ):
        _refuse_options(request, "to_beam_search_params", 0, "beam search")
    for serving, method in (
        (ServingGenerativeScoring, "create_generative_scoring"),
        (ServingStructuredDecisions, "create_decision"),
    ):
        if serving is not None:
            _refuse_options(serving, method, 1, "scoring labels")


def _check_before_streaming(serving: type, method: str) -> None:
    """Look at a prompt when a generator of answers is made, not when it is first read."""
    original = getattr(serving, method)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        prompt, params = given["engine_input"], given["sampling_params"]
        check_prompt(self.engine_client.vllm_config, params, prompt)
        return original(self, *args, **kwargs)

    setattr(serving, method, _checked)


def _refuse_options(owner: type, method: str, place: int, what: str) -> None:
    """Refuse a request that names an option where nobody would read it.

    Args:
        owner: class of the method.
        method: called before anything is sent.
        place: of the request among its arguments.
        what: what cannot be combined with options, for the client.
    """
    original = getattr(owner, method)

    @functools.wraps(original)
    def _checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = [self, *args, *kwargs.values()][place]
        options = getattr(request, _FIELD, None)  # also where pydantic keeps an unknown field
        if isinstance(options, dict) and has_options(options):
            raise VLLMValidationError(
                f"Options of KV compression cannot be combined with {what}; leave them out of "
                f"{_FIELD}.",
                parameter=_FIELD,
            )
        return original(self, *args, **kwargs)

    setattr(owner, method, _checked)
