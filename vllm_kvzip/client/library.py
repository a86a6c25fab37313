"""Documents that a server has read: each part is a compressed context in its cache."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_kvzip.client.errors import ClientError, DocumentError, ServerError
from vllm_kvzip.client.text.documents import Document, read_document
from vllm_kvzip.client.text.parts import PartLimits, split
from vllm_kvzip.client.text.quotes import PassageIndex
from vllm_kvzip.client.together import all_of
from vllm_kvzip.errors import LeftAloneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vllm_kvzip.client.server import Server, ServerFacts
    from vllm_kvzip.client.text.parts import Part

ROOM_TOKENS = 512  # beside a part, for question and answer
ROOM_SHARE = 0.25  # of the server's limit, where that is less
CACHE_SHARE = 0.5  # of the cache that one part may take; its compressed form is written beside it
READS_AT_ONCE = 2
LEAST_PART_TOKENS = 32


@dataclass(frozen=True)
class ReadPart:
    """A part of a document in the server's cache.

    Attributes:
        document: it belongs to.
        part: of the document.
        send: what a request must send besides to start from it.
        context_id: of its compressed context; empty where it is not compressed.
        compressed_tokens: of its prompt that a later request does not prefill.
        blocks_before, blocks_held: KV blocks of these tokens, before and after.
        left_alone: why it is not compressed; else empty.
    """

    document: Document
    part: Part
    send: dict[str, Any]
    context_id: str
    compressed_tokens: int
    blocks_before: int
    blocks_held: int
    left_alone: str = ""

    @cached_property
    def index(self) -> PassageIndex:
        """Its sentences."""
        return PassageIndex(self.part.text)


@dataclass(frozen=True)
class Reading:
    """A document that was read.

    Attributes:
        document: it is.
        parts: it was read in.
    """

    document: Document
    parts: list[ReadPart]


@dataclass
class LibraryCounts:
    """What a library did so far.

    Attributes:
        parts_read: contexts that were compressed.
        parts_found: parts that were known, or cached on the server already.
        parts_imported: contexts that came from a file.
        parts_read_again: contexts that were gone from the cache, and were read or imported anew.
        read_tokens: that were prefilled for it.
    """

    parts_read: int = 0
    parts_found: int = 0
    parts_imported: int = 0
    parts_read_again: int = 0
    read_tokens: int = 0


class AsyncContextLibrary:
    """Reads documents into the cache of a server, each part once.

    Parts are known by their text, so a document that was read is not read again, whoever asks and
    whatever its file is called.

    Args:
        server: that reads.
        part_tokens: of a part, at most; what the server can hold unless given.
        most_parts: of a document.
        keep_ratio: kept / all KV pairs, in (0, 1]; the server's unless given.
        compress: whether contexts are compressed. If not, vLLM's own prefix cache holds them.
        keep_files: whether contexts are written to the server's ``contexts_dir``, and come back
            from there when the cache has lost them.
        on_progress: called with a document's name, parts read, and all its parts.

    Raises:
        ClientError: if the keep ratio is none.
    """

    def __init__(
        self,
        server: Server,
        *,
        part_tokens: int | None = None,
        most_parts: int = 256,
        keep_ratio: float | None = None,
        compress: bool = True,
        keep_files: bool = False,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if keep_ratio is not None and not 0 < keep_ratio <= 1:
            raise ClientError(f"The keep ratio is {keep_ratio:g}; it must lie in (0, 1].")
        self.server = server
        self.counts = LibraryCounts()
        self._part_tokens = part_tokens
        self._most_parts = most_parts
        self._keep_ratio = keep_ratio
        self._compress = compress
        self._keep_files = keep_files
        self._on_progress = on_progress or (lambda name, done, count: None)
        self._known: dict[str, ReadPart] = {}
        self._readings: dict[str, Reading] = {}
        self._document_locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._part_locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._refreshing = asyncio.Lock()
        self._slots = asyncio.Semaphore(READS_AT_ONCE)

    async def limits(self) -> PartLimits:
        """How large parts may be on this server.

        Raises:
            ServerError: if the server does not compress and should.
            DocumentError: if ``part_tokens`` does not fit.
        """
        facts = await self.server.facts()
        if self._compress and facts.no_compression is not None:
            raise ServerError(facts.no_compression)
        most = most_part_tokens(facts)
        asked = most if self._part_tokens is None else self._part_tokens
        if not LEAST_PART_TOKENS <= asked <= most:
            raise DocumentError(
                f"Parts of {asked} tokens do not fit; this server takes {LEAST_PART_TOKENS} to "
                f"{most} tokens."
            )
        return PartLimits(asked, self._most_parts, facts.block_size, facts.head_tokens)

    async def read(self, source: Document | str | Path) -> Reading:
        """Read a document, or a file, unless it was read before.

        Raises:
            DocumentError: if the file cannot be read, or is too long.
            ServerError: if the server refuses, or is gone.
        """
        document = source if isinstance(source, Document) else read_document(source)
        async with self._document_locks[document.digest]:
            known = self._readings.get(document.digest)
            if known is not None:
                self.counts.parts_found += len(known.parts)
                return Reading(document, [replace(p, document=document) for p in known.parts])
            limits = await self.limits()
            parts = await split(document.name, document.text, self.server.count_tokens, limits)
            done = 0

            async def _read_one(part: Part) -> ReadPart:
                nonlocal done
                found = await self._read_part(document, part)
                done += 1
                self._on_progress(document.name, done, len(parts))
                return found

            self._on_progress(document.name, 0, len(parts))
            reading = Reading(document, await all_of(map(_read_one, parts)))
            self._readings[document.digest] = reading
            return reading

    async def refresh(self, readings: Sequence[Reading]) -> int:
        """Read again what the server's cache has lost, and say how many parts that were."""
        if not self._compress:
            return 0
        async with self._refreshing:  # whoever asks meanwhile finds what this reads
            cached = {entry["id"] for entry in await self.server.contexts()}
            lost = {
                part.context_id: part
                for reading in readings
                for part in reading.parts
                if part.context_id and part.context_id not in cached
            }
            await all_of(self._load(part.document, part.part) for part in lost.values())
        self.counts.parts_read_again += len(lost)
        return len(lost)

    async def _read_part(self, document: Document, part: Part) -> ReadPart:
        key = hashlib.sha256(part.text.encode()).hexdigest()
        async with self._part_locks[key]:
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = await self._load(document, part)
            else:
                self.counts.parts_found += 1
        return replace(known, document=document, part=part)

    async def _load(self, document: Document, part: Part) -> ReadPart:
        async with self._slots:
            return await self._load_now(document, part)

    async def _load_now(self, document: Document, part: Part) -> ReadPart:
        """Bring a part into the cache: from a file, or by reading it."""
        if not self._compress:
            return await self._read_plainly(document, part)
        name = await self._file_name(part)
        told = await self._imported(name) if self._keep_files else None
        if told is None:
            messages = [{"role": "user", "content": part.text}]
            try:
                told = await self.server.compress(messages, self._keep_ratio)
            except ServerError as error:
                if error.kind != LeftAloneError.TYPE:
                    raise
                plain = await self._read_plainly(document, part)
                return replace(plain, left_alone=str(error))
            read = told["tokens"] - told["cached_tokens"]
            was_cached = told["cached_tokens"] >= told["compressed_tokens"]
            self.counts.parts_found += was_cached
            self.counts.parts_read += not was_cached
            self.counts.read_tokens += read
            if self._keep_files:
                await self.server.export(told["id"], name, self._keep_ratio)
        return ReadPart(
            document,
            part,
            told["send"],
            told["id"],
            told["compressed_tokens"],
            told["blocks_before"],
            told["blocks_held"],
        )

    async def _file_name(self, part: Part) -> str:
        """Of a part's context file: the same for the same text, model and ratio."""
        facts = await self.server.facts()
        identity = "\n".join([facts.model, str(self._keep_ratio), part.text])
        return f"part-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"

    async def _imported(self, name: str) -> dict[str, Any] | None:
        """What the server says of a file that it brought into its cache; None: it cannot."""
        try:
            told = await self.server.import_file(name)
        except ServerError as error:
            if error.status not in (400, 404):  # made under other settings, or not there
                raise
            return None
        self.counts.parts_imported += not told.get("was_cached")
        self.counts.parts_found += bool(told.get("was_cached"))
        return told

    async def _read_plainly(self, document: Document, part: Part) -> ReadPart:
        """Let vLLM's own prefix cache have it."""
        facts = await self.server.facts()
        send = {} if facts.no_compression else {"vllm_xargs": {"kvzip": "off"}}
        reply = await self.server.chat(
            [{"role": "user", "content": part.text}], max_tokens=1, send=send
        )
        self.counts.parts_read += 1
        self.counts.read_tokens += reply.prompt_tokens - (reply.cached_tokens or 0)
        blocks = (facts.head_tokens + part.tokens) // facts.block_size
        return ReadPart(document, part, send, "", blocks * facts.block_size, blocks, blocks)


def most_part_tokens(facts: ServerFacts) -> int:
    """Tokens of the longest part that leaves room for a question, in whole blocks with its head."""
    room = min(ROOM_TOKENS, int(facts.max_model_len * ROOM_SHARE))
    cached = int(facts.num_blocks * facts.block_size * CACHE_SHARE)
    most = min(facts.max_model_len - room, cached)
    return most // facts.block_size * facts.block_size - facts.head_tokens
