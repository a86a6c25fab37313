"""What a server says of itself, and the calls that the client makes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from vllm_kvzip.client.errors import ServerError
from vllm_kvzip.client.retries import Retries, retried

Message = dict[str, str]

_PROBES = ("Alpha beta.", "Zulu yankee.")  # share no first token


@dataclass(frozen=True)
class ServerFacts:
    """What decides how a document is read; all of it told by the server.

    Attributes:
        model: name of the model that is asked.
        max_model_len: tokens of a prompt and its answer.
        block_size: tokens of a KV cache block.
        num_blocks: of the KV cache, vLLM's null block aside.
        cache_bytes: of the KV cache; None where the server does not tell.
        no_compression: why the server does not compress; None: it does.
        head_tokens: tokens that the chat template writes before a user's message.
    """

    model: str
    max_model_len: int
    block_size: int
    num_blocks: int
    cache_bytes: int | None
    no_compression: str | None
    head_tokens: int

    @property
    def estimated_block_bytes(self) -> float | None:
        """Bytes of one block; estimated, because the last block's rest is shared out too."""
        return None if self.cache_bytes is None else self.cache_bytes / (self.num_blocks + 1)


@dataclass(frozen=True)
class Reply:
    """One answer of the server.

    Attributes:
        text: of the answer.
        is_whole: whether the model ended it, and not the limit of its tokens.
        prompt_tokens, output_tokens: as the server counts them.
        cached_tokens: prompt tokens that needed no prefill; None: the server does not tell.
        first_token_seconds: from the first step of the request; None: the server does not tell.
        drafted, accepted: tokens of speculative decoding; None: the server does not tell.
        is_thinking: whether its tokens were used up by the model's reasoning.
        retries: how often it was asked for again.
    """

    text: str
    is_whole: bool
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    first_token_seconds: float | None
    drafted: int | None
    accepted: int | None
    is_thinking: bool = False
    retries: int = 0


class Server:
    """An OpenAI-compatible vLLM server.

    Args:
        url: such as ``http://localhost:8000``, with or without ``/v1``.
        api_key: of the server, if it has one.
        model: to ask; its first one unless given.
        concurrency: calls that run at the same time, at most.
        retries: how often a call is tried again.

    Attributes:
        url: without ``/v1``.
        num_retries: how often a call was tried again so far.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        concurrency: int = 16,
        retries: Retries | None = None,
    ) -> None:
        self.url = _checked_url(url)
        self.num_retries = 0
        self._asked_model = model
        self._retries = retries or Retries()
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key or "none",
            max_retries=0,
            timeout=self._retries.timeout_seconds,
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._facts: ServerFacts | None = None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def facts(self) -> ServerFacts:
        """What the server says of itself; asked once.

        Raises:
            ServerError: if it does not answer, or has no such model.
        """
        if self._facts is None:
            model, max_model_len = await self._model()
            cache = _labels(await self.metrics_text(), "vllm:cache_config_info")
            self._facts = ServerFacts(
                model=model,
                max_model_len=max_model_len,
                block_size=int(cache["block_size"]),
                num_blocks=int(cache["num_gpu_blocks"]) - 1,
                cache_bytes=_whole(cache.get("kv_cache_memory_bytes")),
                no_compression=await self._refusal(),
                head_tokens=await self._head_tokens(model),
            )
        return self._facts

    async def count_tokens(self, text: str) -> int:
        """Tokens of a text, by the server's tokenizer, without special ones."""
        model = (await self.facts()).model
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return int((await self._post(f"{self.url}/tokenize", body))["count"])

    async def compress(self, messages: list[Message], keep_ratio: float | None) -> dict[str, Any]:
        """Compress a context, and learn what to send with a question."""
        return await self._post("/kvzip/contexts", await self._context(messages, keep_ratio))

    async def explain(self, messages: list[Message], keep_ratio: float | None) -> dict[str, Any]:
        """Compress a context once more, and learn which of its tokens each KV head keeps."""
        body = await self._context(messages, keep_ratio)
        return await self._post("/kvzip/contexts/explain", body)

    async def contexts(self) -> list[dict[str, Any]]:
        """Compressed contexts that are cached now."""
        found: list[dict[str, Any]] = (await self._get("/kvzip/contexts"))["contexts"]
        return found

    async def export(self, context_id: str, name: str, keep_ratio: float | None) -> dict[str, Any]:
        """Write a cached context to a file of the server's folder."""
        body: dict[str, Any] = {"id": context_id, "name": name}
        if keep_ratio is not None:
            body["keep_ratio"] = keep_ratio
        return await self._post("/kvzip/contexts/export", body)

    async def import_file(self, name: str) -> dict[str, Any]:
        """Bring the context of a file into the server's cache."""
        return await self._post("/kvzip/contexts/import", {"name": name})

    async def chat(
        self,
        messages: list[Message],
        *,
        max_tokens: int,
        send: dict[str, Any] | None = None,
        opening: str | None = None,
    ) -> Reply:
        """The greedy answer to a conversation.

        Cancelling it closes the request, and the server drops it.

        Args:
            messages: of the user.
            max_tokens: of the answer.
            send: what the server said to send with a context.
            opening: first words of the answer, which the model goes on with.
        """
        body = dict(send or {})
        if opening is not None:
            messages = [*messages, {"role": "assistant", "content": opening}]
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        model = (await self.facts()).model
        retries = 0

        def count() -> None:
            nonlocal retries
            retries += 1
            self._count_retry()

        async def once() -> Any:
            async with self._slots:
                return await self._client.chat.completions.create(
                    model=model,
                    messages=messages,  # type: ignore[arg-type]
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body=body,
                )

        return _reply(await retried(once, self._retries, count), retries)

    async def metrics(self) -> dict[str, float]:
        """The server's ``/metrics``: name -> value, summed over labels."""
        totals: dict[str, float] = {}
        for line in (await self.metrics_text()).splitlines():
            if line and line[0] != "#":
                sample, value = line.rsplit(" ", 1)
                name = sample.partition("{")[0]
                totals[name] = totals.get(name, 0.0) + float(value)
        return totals

    async def metrics_text(self) -> str:
        """The server's ``/metrics`` as it is."""
        url = f"{self.url}/metrics"
        return str(await self._retried(lambda: self._client.get(url, cast_to=str)))

    async def _context(self, messages: list[Message], keep_ratio: float | None) -> dict[str, Any]:
        body: dict[str, Any] = {"model": (await self.facts()).model, "messages": messages}
        if keep_ratio is not None:
            body["keep_ratio"] = keep_ratio
        return body

    async def _model(self) -> tuple[str, int]:
        listed = (await self._get("/models")).get("data")
        if not listed:
            raise ServerError(f"{self.url} lists no model; is it a vLLM server?")
        names = [one["id"] for one in listed]
        if self._asked_model is not None and self._asked_model not in names:
            raise ServerError(
                f"{self.url} has no model {self._asked_model}; it has {', '.join(names)}."
            )
        chosen = next(one for one in listed if one["id"] == (self._asked_model or names[0]))
        longest = chosen.get("max_model_len")
        if longest is None:  # a LoRA adapter, which is as long as its model
            parents = [one for one in listed if one["id"] == chosen.get("parent")]
            longest = parents[0].get("max_model_len") if parents else None
        if longest is None:
            raise ServerError(f"{self.url} does not tell max_model_len; is it a vLLM server?")
        return chosen["id"], int(longest)

    async def _refusal(self) -> str | None:
        try:
            await self._get("/kvzip/contexts")
        except ServerError as error:
            if error.status != 404:
                raise
            return (
                f"{self.url} does not compress contexts; start it with VLLM_PLUGINS=kvzip and "
                f"--kv-compression kvzip."
            )
        return None

    async def _head_tokens(self, model: str) -> int:
        rendered = []
        for text in _PROBES:
            body = {"model": model, "messages": [{"role": "user", "content": text}]}
            rendered.append((await self._post(f"{self.url}/tokenize", body))["tokens"])
        first, second = rendered
        same = (a == b for a, b in zip(first, second, strict=False))
        return next((n for n, is_same in enumerate(same) if not is_same), len(first))

    async def _get(self, path: str) -> dict[str, Any]:
        return self._checked(
            path, await self._retried(lambda: self._client.get(path, cast_to=object))
        )

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._checked(
            path, await self._retried(lambda: self._client.post(path, body=body, cast_to=object))
        )

    def _checked(self, path: str, found: Any) -> dict[str, Any]:
        if not isinstance(found, dict):
            raise ServerError(f"{self.url} does not answer {path} as a vLLM server does.")
        return found

    async def _retried(self, call: Any) -> Any:
        return await retried(call, self._retries, self._count_retry)

    def _count_retry(self) -> None:
        self.num_retries += 1


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no number for a port, a bracket that does not close
        is_good = False
    if not is_good:
        raise ServerError(f"{url!r} is not the URL of a server, such as http://localhost:8000.")
    return url.rstrip("/").removesuffix("/v1")


def _labels(metrics: str, name: str) -> dict[str, str]:
    """Labels of the first sample of a metric.

    Raises:
        ServerError: if there is none.
    """
    line = next((line for line in metrics.splitlines() if line.startswith(name + "{")), None)
    if line is None:
        raise ServerError(f"The server's /metrics has no {name}; is it a vLLM server?")
    inside = line[line.index("{") + 1 : line.rindex("}")]
    pairs = (pair.split('="', 1) for pair in inside.removesuffix('"').split('",'))
    return {pair[0]: pair[1] for pair in pairs}


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _reply(answer: Any, retries: int) -> Reply:
    choice, usage = answer.choices[0], answer.usage
    said = choice.message.content or ""
    more = choice.message.model_extra or {}
    reasoning = more.get("reasoning") or more.get("reasoning_content")
    details = usage.prompt_tokens_details
    metrics = (answer.model_extra or {}).get("metrics") or {}
    first_ms = metrics.get("time_to_first_token_ms")
    drafts = metrics.get("speculative_decoding") or {}
    return Reply(
        text=said,
        is_whole=choice.finish_reason != "length",
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens or 0,
        cached_tokens=None if details is None else details.cached_tokens or 0,
        first_token_seconds=None if first_ms is None else first_ms / 1000,
        drafted=drafts.get("num_draft_tokens"),
        accepted=drafts.get("num_accepted_draft_tokens"),
        is_thinking=not said.strip() and bool(reasoning) and choice.finish_reason == "length",
        retries=retries,
    )
