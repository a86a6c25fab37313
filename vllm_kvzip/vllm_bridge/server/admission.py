"""Requests are checked where they enter, so that a wrong option is an answer to its client."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import RequestError
from vllm_kvzip.planning.request_options import (
    DECODE_BUDGET,
    QUALITY_LOSS,
    SWITCH,
    check_request,
    options_of,
)
from vllm_kvzip.vllm_bridge.settings import KEY, Settings, block_tokens, pool_blocks
from vllm_kvzip.vllm_bridge.symbols import (
    AsyncLLM,
    InputProcessor,
    VLLMValidationError,
    length_from_prompt_token_ids_or_embeds,
)

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import EngineCoreRequest, VllmConfig

_MARK = "_kvzip_checks_requests"


def check_requests() -> None:
    """Make vLLM check the options of every request of an engine that compresses; idempotent.

    Symptom without it: a wrong option would reach the scheduler, where an error ends the engine.
    vLLM has no hook that sees a request's parameters and its prompt's length, so two methods are
    wrapped: ``InputProcessor.process_inputs``, through which every request goes, and
    ``AsyncLLM.generate``, because a streamed answer has begun (with HTTP 200) when its inputs are
    processed. Safe: engines without compression are passed through. Remove when vLLM lets a plugin
    validate requests.
    """
    if getattr(InputProcessor, _MARK, False):
        return
    setattr(InputProcessor, _MARK, True)
    process_inputs, generate = InputProcessor.process_inputs, AsyncLLM.generate

    @functools.wraps(process_inputs)
    def checked_process_inputs(
        self: InputProcessor, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        """vLLM's, then a look at the request it made."""
        request = process_inputs(self, *args, **kwargs)
        if _is_on(self.vllm_config) and request.resumable:
            raise VLLMValidationError(
                "Streaming-input sessions, whose prompt grows after decoding began, do not work "
                "with KV compression yet; send the whole prompt in one request."
            )
        embeds = request.prompt_embeds
        _check(self.vllm_config, request.sampling_params, request.prompt_token_ids, embeds)
        return request

    @functools.wraps(generate)
    def checked_generate(
        self: AsyncLLM, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A look at the prompt, then vLLM's."""
        check_prompt(self.vllm_config, sampling_params, prompt)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    InputProcessor.process_inputs = checked_process_inputs
    AsyncLLM.generate = checked_generate


def check_prompt(vllm_config: VllmConfig, params: Any, prompt: Any) -> None:
    """Check what is asked for a prompt that has been tokenized; any other is seen later.

    Args:
        vllm_config: of the engine.
        params: sampling parameters, or others.
        prompt: as vLLM's engine takes it.

    Raises:
        VLLMValidationError: which is an HTTP 400.
    """
    if isinstance(prompt, dict):
        tokens, embeds = prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
        _check(vllm_config, params, tokens, embeds)


def _is_on(vllm_config: VllmConfig) -> bool:
    return KEY in (vllm_config.additional_config or {})


def _check(vllm_config: VllmConfig, params: Any, token_ids: Any, embeds: Any) -> None:
    if not _is_on(vllm_config):
        return
    extra_args = getattr(params, "extra_args", None)  # pooling parameters have none
    if not extra_args or (token_ids is None and embeds is None):
        return
    num_prompt_tokens = length_from_prompt_token_ids_or_embeds(token_ids, embeds)
    try:
        check_request(extra_args, num_prompt_tokens)
        _check_room(vllm_config, params, num_prompt_tokens)
        _check_decode_budget(vllm_config, params)
        _check_quality_loss(vllm_config, params)
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error


def _check_decode_budget(vllm_config: VllmConfig, params: Any) -> None:
    """Refuse a decode budget of a request that the server cannot follow.

    Raises:
        RequestError: in one sentence.
    """
    asked = options_of(params).decode_budget
    if asked is None:
        return
    settings = Settings.from_vllm_config(vllm_config)
    if settings.config.decode_budget is None:
        raise RequestError(
            f"This server was started without decode_budget, so a request cannot name its own; "
            f"leave {DECODE_BUDGET} out."
        )
    least = settings.least_budget(block_tokens(vllm_config))
    if 0 < asked < least:
        raise RequestError(f'{DECODE_BUDGET}={asked} must be at least {least}, or "off".')
    if not asked and settings.config.prefill_budget is not None:
        raise RequestError(
            f'{DECODE_BUDGET}="off" does not work on a server with prefill_budget, where answers '
            f"stay within that budget too; leave the option out."
        )


def _check_quality_loss(vllm_config: VllmConfig, params: Any) -> None:
    """Refuse a quality loss of a request where the server has no curve to read it from.

    Raises:
        RequestError: in one sentence.
    """
    if options_of(params).quality_loss is None:
        return
    if Settings.from_vllm_config(vllm_config).config.quality_loss is None:
        raise RequestError(
            f"This server was started without quality_loss, so a request cannot name its own; "
            f"leave {QUALITY_LOSS} out."
        )


def _check_room(vllm_config: VllmConfig, params: Any, num_prompt_tokens: int) -> None:
    """Refuse a request that is off and would never fit, where a prefill budget lets others in.

    Raises:
        RequestError: in one sentence.
    """
    asked, blocks = options_of(params), pool_blocks(vllm_config)
    if not asked.is_off or not blocks:
        return
    if Settings.from_vllm_config(vllm_config).config.prefill_budget is None:
        return
    most = (blocks - 1) * block_tokens(vllm_config)
    if num_prompt_tokens + (asked.max_output_tokens or 1) > most:
        raise RequestError(
            f'The KV cache holds {most} tokens, and {SWITCH}="off" keeps all of the '
            f"{num_prompt_tokens} of the prompt and up to {asked.max_output_tokens} more; leave "
            f"the option out, or lower max_tokens."
        )
