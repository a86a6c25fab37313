"""The calls of one question: counted, and no more than its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.client.asking.prompts import asked
from vllm_kvzip.client.errors import BudgetError

if TYPE_CHECKING:
    from vllm_kvzip.client.library import ReadPart
    from vllm_kvzip.client.server import Reply, Server
    from vllm_kvzip.client.statistics import Tally


class Calls:
    """Asks a server, within a budget.

    Args:
        server: to ask.
        tally: that counts what it answers.
        most: calls, in all.
        drafts: of them, that are kept for the first question to each part.

    Attributes:
        left: calls.
    """

    def __init__(self, server: Server, tally: Tally, most: int, drafts: int = 0) -> None:
        self.left = most
        self._drafts = drafts
        self._read_again: set[tuple[str, int]] = set()
        self._server = server
        self._tally = tally
        self._most = most

    async def about(
        self,
        part: ReadPart,
        prompt: str,
        max_tokens: int,
        opening: str | None = None,
        *,
        is_draft: bool = False,
    ) -> Reply:
        """The model's answer about a part, over its cached prefix.

        Args:
            part: that was read.
            prompt: follows its text.
            max_tokens: of the answer.
            opening: first words of the answer, given.
            is_draft: whether it is one of the calls that were kept for this.

        Raises:
            BudgetError: if no call is left.
        """
        messages = asked(part.part.text, prompt)
        self._drafts -= is_draft
        reply = await self._ask(messages, max_tokens, part.send, opening)
        if reply.cached_tokens is not None and reply.cached_tokens < part.compressed_tokens:
            key = (part.document.digest, part.part.number)
            self._tally.parts_read_again += key not in self._read_again
            self._read_again.add(key)
        return reply

    async def plain(self, prompt: str, max_tokens: int) -> Reply:
        """The model's answer to a prompt of its own."""
        return await self._ask([{"role": "user", "content": prompt}], max_tokens, {}, None)

    async def _ask(
        self, messages: list[dict[str, str]], max_tokens: int, send: dict[str, object],
        opening: str | None,
    ) -> Reply:  # fmt: skip
        if self.left - self._drafts < 1:
            raise BudgetError(f"The budget of {self._most} calls is used up.")
        self.left -= 1
        reply = await self._server.chat(messages, max_tokens=max_tokens, send=send, opening=opening)
        self._tally.replies.append(reply)
        return reply
