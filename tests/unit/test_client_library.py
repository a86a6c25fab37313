"""What a library asks a server for; the server's answers are given here."""

import asyncio

import pytest

from vllm_kvzip.client import AsyncContextLibrary, ClientError, ContextLibrary, Document
from vllm_kvzip.client.errors import ServerError
from vllm_kvzip.client.library import READS_AT_ONCE
from vllm_kvzip.client.server import Reply, ServerFacts

FACTS = ServerFacts("model", 4096, 16, 1000, None, None, 4)


class Cache:
    """A server that remembers what it has compressed.

    Attributes:
        kept: ids of what is cached.
        compressed: all texts it was given, in order.
        most_at_once: of them.
        refusal: raised in place of an answer.
    """

    def __init__(self, refusal=None):
        self.kept, self.compressed, self.refusal = set(), [], refusal
        self.running = self.most_at_once = self.plain = 0

    async def facts(self):
        return FACTS

    async def count_tokens(self, text):
        return len(text.split())

    async def contexts(self):
        await asyncio.sleep(0)
        return [{"id": one} for one in self.kept]

    async def compress(self, messages, keep_ratio):
        if self.refusal:
            raise self.refusal
        text = messages[0]["content"]
        self.compressed.append(text)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        self.kept.add(text)
        return {
            "id": text, "tokens": 64, "cached_tokens": 0, "compressed_tokens": 64, "send": {},
            "blocks_before": 4, "blocks_held": 2,
        }  # fmt: skip

    async def import_file(self, name):
        return {**await self.compress([{"content": name}], None), "was_cached": True}

    async def chat(self, messages, *, max_tokens, send):
        self.plain += 1
        return Reply("", True, 64, 1, 0, None, None, None)


def documents(count):
    return [Document(f"{n}.txt", f"Number {n} is here.") for n in range(count)]


def test_questions_at_once_read_a_lost_part_once():
    server = Cache()

    async def lose_and_ask():
        library = AsyncContextLibrary(server)
        readings = [await library.read(document) for document in documents(6)]
        server.kept.clear()
        server.compressed.clear()
        counts = await asyncio.gather(*(library.refresh(readings) for _ in range(20)))
        return counts, library.counts.parts_read_again

    counts, in_all = asyncio.run(lose_and_ask())
    assert sum(counts) == in_all == len(server.compressed) == 6
    assert server.most_at_once == READS_AT_ONCE


def test_documents_read_at_once_share_the_slots():
    server = Cache()

    async def read():
        library = AsyncContextLibrary(server)
        return await asyncio.gather(*map(library.read, documents(9)))

    assert len(asyncio.run(read())) == len(server.compressed) == 9
    assert server.most_at_once == READS_AT_ONCE


def test_only_what_the_server_leaves_alone_is_used_as_it_is():
    (document,) = documents(1)
    server = Cache(ServerError("It is short.", 400, "kvzip_left_alone"))
    reading = asyncio.run(AsyncContextLibrary(server).read(document))
    assert (reading.parts[0].left_alone, server.plain) == ("It is short.", 1)
    server = Cache(ServerError("Prefix caching is off.", 400, "BadRequestError"))
    with pytest.raises(ServerError, match="Prefix caching is off"):
        asyncio.run(AsyncContextLibrary(server).read(document))
    assert server.plain == 0


def test_a_context_that_a_file_brings_and_that_was_cached_is_found():
    server = Cache()
    library = AsyncContextLibrary(server, keep_files=True)
    asyncio.run(library.read(documents(1)[0]))
    counts = library.counts
    assert (counts.parts_found, counts.parts_imported, counts.parts_read) == (1, 0, 0)


def test_the_same_text_under_another_name_is_not_read_again_but_quoted_by_that_name():
    server = Cache()

    async def read():
        library = AsyncContextLibrary(server)
        return [await library.read(Document(name, "The same text.")) for name in "ab"]

    first, second = asyncio.run(read())
    assert len(server.compressed) == 1
    assert [part.document.name for part in first.parts + second.parts] == ["a", "b"]


@pytest.mark.parametrize("ratio", [0.0, -0.5, 30.0])
def test_a_keep_ratio_that_is_none_is_refused_at_once(ratio):
    with pytest.raises(ClientError, match=r"it must lie in \(0, 1\]"):
        ContextLibrary("http://localhost:8000", keep_ratio=ratio)
