"""``/v1/kvzip/contexts``: compress a context before anybody asks about it, and list what is cached.

An endpoint plugin of vLLM, loaded only when ``VLLM_PLUGINS`` names it. The routes lie under
``/v1``, so vLLM's API keys guard them. A context goes the way of any request: through the server's
own chat template and tokenizer, and through ``EngineClient.generate``.
"""

import dataclasses
import time
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import State

from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.planning.chat_contexts import common_prefix, continuations
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed
from vllm_kvzip.planning.request_options import CONTEXT_TOKENS, KEEP_RATIO, RequestOptions
from vllm_kvzip.vllm_bridge.drafts import rule_with_drafts
from vllm_kvzip.vllm_bridge.server import context_files
from vllm_kvzip.vllm_bridge.server.context_files import PATH, engine_of
from vllm_kvzip.vllm_bridge.server.data_parallel import call_workers, on_each
from vllm_kvzip.vllm_bridge.settings import KEY, cache_shape
from vllm_kvzip.vllm_bridge.symbols import (
    EngineClient,
    ModelConfig,
    SamplingParams,
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

# The prefix is compacted at the start of the step after the one that completes it.
OUTPUT_TOKENS = 2


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
    engine, settings = engine_of(raw_request)
    cache = engine.vllm_config.cache_config
    rule = settings.rule(*cache_shape(engine.vllm_config))
    rule = rule_with_drafts(rule, engine.vllm_config)
    rule = dataclasses.replace(rule, pool_blocks=cache.num_gpu_blocks)
    if not cache.enable_prefix_caching:
        raise VLLMValidationError(
            "Prefix caching is off on this server, so no compressed context can be kept; start "
            "vLLM without --no-enable-prefix-caching."
        )
    handler = raw_request.app.state.serving_tokenization
    refusal = await handler._check_model(body)
    if refusal is not None:
        return JSONResponse(refusal.model_dump(), status_code=refusal.error.code)
    lora_request = handler._maybe_get_adapters(body)
    prompt = await _render(handler, body)
    token_ids = prompt["prompt_token_ids"]
    longest = engine.vllm_config.model_config.max_model_len - OUTPUT_TOKENS
    if len(token_ids) > longest:
        raise VLLMValidationError(
            f"The context has {len(token_ids)} tokens, more than the {longest} that leave room "
            f"for {OUTPUT_TOKENS} more in max_model_len {longest + OUTPUT_TOKENS}."
        )
    options = RequestOptions(context_tokens=len(token_ids), keep_ratio=body.keep_ratio)
    plan = rule.plan(len(token_ids), options)
    if plan is None:
        raise VLLMValidationError(_left_alone(rule, len(token_ids), options))
    params = SamplingParams(
        max_tokens=OUTPUT_TOKENS,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={CONTEXT_TOKENS: len(token_ids), KEEP_RATIO: body.keep_ratio},
        # A scorer that looks at queries must see those of the context computed.
        skip_reading_prefix_cache=True if settings.prompt_observation_tokens else None,
    )

    async def compress(rank: int | None) -> tuple[int, dict[str, Any]]:
        """Cached tokens it started from, and what one engine tells of it."""
        cached_tokens, told = 0, None
        outputs = engine.generate(
            prompt, params.clone(), f"kvzip-context-{random_uuid()}", lora_request=lora_request,
            data_parallel_rank=rank,
        )  # fmt: skip
        async for output in outputs:
            cached_tokens = output.num_cached_tokens or 0
            told = output.kv_transfer_params
        return cached_tokens, (told or {}).get(KEY, {})

    answers = await on_each(engine, compress)
    found = [about for _, about in answers]
    reason = next((r for about in found if (r := about.get("left_alone")) in FAILURES), None)
    if reason is not None:
        raise VLLMServerError(f"The context could not be compressed ({reason}); see the log.")
    return JSONResponse(
        {
            "id": checksum(prefix_seed(token_ids, plan.boundary_tokens)),
            "tokens": len(token_ids),
            **plan.as_told(),
            **{name: value for name, value in found[0].items() if name != "left_alone"},
            "cached_tokens": min(cached for cached, _ in answers),
            "seconds": time.perf_counter() - begin,
            "send": _to_send(body, len(token_ids)),
        }
    )


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


def _left_alone(rule: PrefixRule, num_tokens: int, options: RequestOptions) -> str:
    reason = rule.skip_reason(num_tokens, options)
    if reason == "no_room":
        return (
            f"The context has {num_tokens} tokens, which fit into the KV cache of "
            f"{rule.pool_blocks} blocks, but not together with their compressed form."
        )
    if reason == "below_min_prompt_tokens":
        return (
            f"The context has {num_tokens} tokens and is left alone: min_prompt_tokens is "
            f"{rule.min_prompt_tokens}, and a block holds {rule.block_size} tokens."
        )
    return (
        f"Nothing would be freed: keep_ratio {rule.wanted_ratio(options)} of the context's "
        f"{num_tokens} tokens needs as many blocks as they have."
    )
