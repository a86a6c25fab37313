"""``/v1/kvzip/contexts``: contexts are compressed before anybody asks, listed, and explained.

An endpoint plugin of vLLM, loaded only when ``VLLM_PLUGINS`` names it. The routes lie under
``/v1``, so vLLM's API keys guard them. A context goes the way of any request: through the server's
own chat template and tokenizer, and through ``EngineClient.generate``.
"""

import asyncio
import contextlib
import dataclasses
import time
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import State

from vllm_kvzip.core import PrefixPlan
from vllm_kvzip.errors import LeftAloneError, RequestError
from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.planning.chat_contexts import common_prefix, continuations
from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed
from vllm_kvzip.planning.request_options import CONTEXT_TOKENS, KEEP_RATIO
from vllm_kvzip.vllm_bridge.contexts.context_rule import OUTPUT_TOKENS, plan_context
from vllm_kvzip.vllm_bridge.contexts.explain import (
    RECORD,
    TAKE,
    ExplainedContext,
    check_explains,
    context_params,
)
from vllm_kvzip.vllm_bridge.server import context_files
from vllm_kvzip.vllm_bridge.server.context_files import PATH, engine_of
from vllm_kvzip.vllm_bridge.server.data_parallel import call_workers, num_engines, on_each
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.symbols import (
    EngineClient,
    ModelConfig,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeParams,
    VLLMClientError,
    VLLMServerError,
    VLLMValidationError,
    random_uuid,
    validate_cache_salt,
    validate_json_request,
    with_cancellation,
)


class ContextRequest(BaseModel):
    """Body of ``POST``: either ``prompt`` or ``messages``, the start of later requests.

    Attributes:
        model: as in the OpenAI API; names a LoRA adapter or the base model.
        prompt: text or token ids, as in ``/v1/completions``.
        messages: as in ``/v1/chat/completions``. The context ends where the last one's text does,
            so that a question may follow in the same message or in the next.
        add_generation_prompt: it ends behind the marker that starts an answer instead.
        keep_ratio: kept / all KV pairs, in (0, 1]; the server's unless given. Only requests with
            the same ``kvzip_keep_ratio`` share the prefix.
        cache_salt: as in vLLM; only requests with the same salt share the prefix.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | list[int] | None = Field(None, min_length=1)
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_generation_prompt: bool = False
    keep_ratio: float | None = Field(None, gt=0, le=1)
    cache_salt: str | None = None


class _TextContext(TokenizeCompletionRequest):
    prompt: str | list[int]
    cache_salt: str | None = None

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        return _limited(super().build_tok_params(model_config), model_config)


class _ChatContext(TokenizeChatRequest):
    cache_salt: str | None = None

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        return _limited(super().build_tok_params(model_config), model_config)


def _limited(params: TokenizeParams, model_config: ModelConfig) -> TokenizeParams:
    """Let vLLM refuse a text that cannot fit before all of it is tokenized."""
    return dataclasses.replace(
        params, max_total_tokens=model_config.max_model_len, max_output_tokens=OUTPUT_TOKENS
    )


class ContextsEndpoint:
    """The entry point; see vLLM's ``EndpointPlugin``."""

    name = "kvzip"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)
        app.include_router(context_files.router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Keep what the routes need."""
        state.kvzip_engine = engine_client


router = APIRouter()


@router.post(PATH, dependencies=[Depends(validate_json_request)])
@with_cancellation
async def compress_context(body: ContextRequest, raw_request: Request) -> JSONResponse:
    """Compress a context; answers when it is in the prefix cache, of every data-parallel engine.

    The answer tells what a request must ``send`` besides to start from it, its ``tokens``, the
    ``compressed_tokens`` among them (whole blocks), ``cached_tokens`` that needed no prefill,
    ``blocks_held`` and ``blocks_before``, their ratio ``keep_ratio``, the ``seconds`` it took, and
    an ``id`` to find it in the list.
    """
    begin = time.perf_counter()
    asked = await _asked(body, raw_request)
    if isinstance(asked, JSONResponse):
        return asked
    engine, plan = asked.engine, asked.plan
    # A scorer that looks at queries must see those of the context computed.
    afresh = bool(asked.settings.prompt_observation_tokens)
    answers = await on_each(engine, lambda rank: _compress(asked, afresh, rank))
    try:
        found = [_checked(about) for _, about in answers]
    except LeftAloneError as error:
        return _left_alone(error)
    return JSONResponse(
        {
            "id": checksum(prefix_seed(asked.token_ids, plan.boundary_tokens)),
            "tokens": len(asked.token_ids),
            **plan.as_told(),
            **found[0],
            "cached_tokens": min(cached for cached, _ in answers),
            "seconds": time.perf_counter() - begin,
            "send": _to_send(body, len(asked.token_ids)),
        }
    )


@router.post(f"{PATH}/explain", dependencies=[Depends(validate_json_request)])
@with_cancellation
async def explain_context(body: ContextRequest, raw_request: Request) -> JSONResponse:
    """Compress a context afresh, and tell which tokens each head keeps.

    The answer is that of ``POST`` without ``cached_tokens``, and what
    :meth:`ExplainedContext.as_told` says.
    """
    begin = time.perf_counter()
    asked = await _asked(body, raw_request)
    if isinstance(asked, JSONResponse):
        return asked
    engine, config = asked.engine, asked.engine.vllm_config
    request_id = f"kvzip-explain-{random_uuid()}"
    try:
        check_explains(config, num_engines(engine))
        await engine.collective_rpc(RECORD, args=(request_id,))
        _, about = await _compress(asked, True, None, request_id)
        (kept,) = await engine.collective_rpc(TAKE, args=(request_id,))
        explained = ExplainedContext(config, asked.token_ids, asked.plan, _checked(about), kept)
        told = await asyncio.to_thread(explained.as_told)
    except LeftAloneError as error:
        return _left_alone(error)
    except RequestError as error:
        raise VLLMValidationError(str(error)) from error
    send = _to_send(body, len(asked.token_ids))
    return JSONResponse({**told, "seconds": time.perf_counter() - begin, "send": send})


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a client wants compressed, as the engine takes it."""

    engine: EngineClient
    settings: Settings
    keep_ratio: float | None
    prompt: dict[str, Any]
    plan: PrefixPlan
    lora_request: Any

    @property
    def token_ids(self) -> list[int]:
        """Of the context."""
        found: list[int] = self.prompt["prompt_token_ids"]
        return found


async def _asked(body: ContextRequest, raw_request: Request) -> _Asked | JSONResponse:
    """A body's context, or vLLM's refusal.

    Raises:
        VLLMValidationError: if it cannot be compressed.
    """
    engine, settings = engine_of(raw_request)
    handler = raw_request.app.state.serving_tokenization
    refusal = await handler._check_model(body)
    if refusal is not None:
        return JSONResponse(refusal.model_dump(), status_code=refusal.error.code)
    lora_request = handler._maybe_get_adapters(body)
    prompt = await _render(handler, body)
    try:
        plan = plan_context(engine.vllm_config, len(prompt["prompt_token_ids"]), body.keep_ratio)
    except LeftAloneError as error:
        return _left_alone(error)
    except RequestError as error:
        raise VLLMValidationError(str(error)) from error
    return _Asked(engine, settings, body.keep_ratio, prompt, plan, lora_request)


def _left_alone(error: LeftAloneError) -> JSONResponse:
    """A refusal by whose ``type`` a client sees that it can use the context as it is."""
    told = {"message": str(error), "type": error.TYPE, "param": error.reason, "code": 400}
    return JSONResponse({"error": told}, status_code=400)


async def _compress(
    asked: _Asked, afresh: bool, rank: int | None, request_id: str = ""
) -> tuple[int, dict[str, Any]]:
    """Cached tokens that one engine started from, and what it tells of the context."""
    cached_tokens, told = 0, None
    outputs = asked.engine.generate(
        asked.prompt,
        context_params(len(asked.token_ids), asked.keep_ratio, afresh),
        request_id or f"kvzip-context-{random_uuid()}",
        lora_request=asked.lora_request,
        data_parallel_rank=rank,
    )
    async for output in outputs:
        cached_tokens = output.num_cached_tokens or 0
        told = output.kv_transfer_params
    return cached_tokens, (told or {}).get(KEY, {})


def _checked(about: dict[str, Any]) -> dict[str, Any]:
    """What an engine tells of a context that is compressed.

    Raises:
        VLLMServerError: if its compression failed.
        LeftAloneError: if the engine left it alone, which knows more than its client.
    """
    reason = about.get("left_alone")
    if reason in FAILURES:
        raise VLLMServerError(f"The context could not be compressed ({reason}); see the log.")
    if reason is not None and "compressed_tokens" not in about:
        raise LeftAloneError(f"The engine left the context alone ({reason}).", reason)
    return {name: value for name, value in about.items() if name != "left_alone"}


@router.get(PATH)
async def list_contexts(raw_request: Request) -> JSONResponse:
    """Compressed prefixes in the caches, as of each engine's last step.

    Of several data-parallel engines an entry tells the ``data_parallel_rank``.
    """
    engine, _ = engine_of(raw_request)
    of_engines = await call_workers(engine, "kvzip_contexts")
    contexts = [
        entry if len(of_engines) == 1 else {**entry, "data_parallel_rank": rank}
        for rank, entries in enumerate(of_engines)
        for entry in entries
    ]
    held = sum(context["blocks_held"] for context in contexts)
    return JSONResponse({"contexts": contexts, "blocks_held": held})


def _to_send(body: ContextRequest, num_tokens: int) -> dict[str, Any]:
    """Fields of a request that shares a context of so many tokens."""
    options: dict[str, Any] = {CONTEXT_TOKENS: num_tokens}
    if body.keep_ratio is not None:
        options[KEEP_RATIO] = body.keep_ratio
    salt = {} if body.cache_salt is None else {"cache_salt": body.cache_salt}
    return {"vllm_xargs": options, **salt}


async def _render(handler: Any, body: ContextRequest) -> dict[str, Any]:
    """The body as vLLM's engine input, by the server's own template and tokenizer."""
    if (body.prompt is None) == (body.messages is None):
        raise VLLMValidationError("A context is either `prompt` or `messages`; give one of them.")
    validate_cache_salt(body.cache_salt)
    shared = {"model": body.model, "cache_salt": body.cache_salt}
    if body.prompt is not None:
        text = _TextContext(prompt=body.prompt, **shared)
        inputs: list[dict[str, Any]] = await handler.online_renderer.preprocess_completion(
            text, prompt_input=body.prompt, prompt_embeds=None
        )
        return inputs[0]
    assert body.messages is not None
    conversations = [body.messages]
    if not body.add_generation_prompt:
        # What is no message vLLM says better.
        with contextlib.suppress(TypeError, AttributeError, KeyError):
            conversations += continuations(body.messages)
    rendered, refusals = [], []
    for messages in conversations:
        try:
            rendered.append(await _render_chat(handler, body, messages, shared))
        except (ValueError, VLLMClientError) as error:
            refusals.append(error)  # such as of a template that wants a user's message
    if not rendered:
        raise refusals[0]
    first = rendered[0]
    if len(rendered) == 1 or first["type"] != "token":  # images have places among the tokens
        return first
    token_ids = common_prefix([one["prompt_token_ids"] for one in rendered])
    return {**first, "prompt_token_ids": token_ids}


async def _render_chat(
    handler: Any, body: ContextRequest, messages: list[dict[str, Any]], shared: dict[str, Any]
) -> dict[str, Any]:
    """Messages as vLLM's engine input.

    Raises:
        ValueError, VLLMClientError: if the template does not take them, or they are too long.
    """
    chat = _ChatContext(
        messages=messages, add_generation_prompt=body.add_generation_prompt, **shared
    )
    _, (rendered,) = await handler.online_renderer.preprocess_chat(
        chat,
        chat.messages,
        default_template=handler.chat_template,
        default_template_content_format=handler.chat_template_content_format,
        default_template_kwargs=handler.default_chat_template_kwargs,
    )
    found: dict[str, Any] = rendered
    return found
