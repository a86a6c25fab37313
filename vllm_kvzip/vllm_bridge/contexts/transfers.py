"""Engine side: compressed contexts between the KV cache and files.

The engine's own thread copies pages and does the accounting, between two steps; another thread
reads, checks and writes files, while the engine goes on. So a context comes in by two calls: the
first one opens its file, the second one puts it into the cache. A context that has come in is
cached with no user. The pool takes its blocks back like those of any other.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any, Protocol

from vllm_kvzip.contexts.context_file import StoredContext, check_identity
from vllm_kvzip.contexts.folder import ContextFolder, file_name
from vllm_kvzip.errors import ContextFileError, NoContextFileError, NotYetError
from vllm_kvzip.planning.prefix_seed import checksum
from vllm_kvzip.planning.request_options import (
    CONTEXT_TOKENS,
    KEEP_RATIO,
    QUALITY_LOSS,
    RequestOptions,
)
from vllm_kvzip.vllm_bridge.contexts.identity import context_identity
from vllm_kvzip.vllm_bridge.contexts.source import RunSource
from vllm_kvzip.vllm_bridge.drafts import has_draft_layers
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.symbols import Request, SamplingParams, init_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from vllm_kvzip.contexts.folder import FileEntry
    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.vllm_bridge.symbols import EngineCore

logger = init_logger("vllm." + __name__)

NOT_YET = "not yet"
"""What a worker answers while it has still to compress what lies in the blocks that it shall fill.
"""

MOST_SAVED = 2  # contexts that were copied into memory and are not yet in a file
MOST_OPENED = 4  # files that were opened and not yet put into the cache; older ones are closed


class CachedRuns(Protocol):
    """The compressed prefixes of a scheduler; see :class:`HeadPageManager`.

    Attributes:
        rule: what is compressed.
        prefixes: the scheduler's ``CompressedPrefixCache``.
    """

    rule: PrefixRule
    prefixes: Any

    def is_compressed(self, run: Any) -> bool:
        """Whether workers have said that they compressed a run."""
        ...


class ContextTransfers:
    """Contexts of one engine that leave it, and those that come in.

    Args:
        core: vLLM's engine core.
        runs: compressed prefixes of its scheduler.

    Raises:
        ContextFileError: if this engine's contexts cannot travel; in one sentence.
    """

    def __init__(self, core: EngineCore, runs: CachedRuns) -> None:
        config = core.vllm_config
        settings = Settings.from_vllm_config(config).config
        if settings.contexts_dir is None:
            raise NoContextFileError(
                "This server keeps no context files; start it with the setting contexts_dir."
            )
        _check_engine(core)
        self._runs = runs
        self._workers = core.model_executor
        self._hasher = core.request_block_hasher
        self._longest = config.model_config.max_model_len
        self._folder = ContextFolder(
            Path(settings.contexts_dir).expanduser(),
            settings.contexts_bytes,
            settings.reuse_ttl_seconds,
        )
        self._identity = context_identity(config, runs.rule.block_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvzip-contexts")
        self._saving = BoundedSemaphore(MOST_SAVED)
        self._opened: OrderedDict[int, tuple[FileEntry, StoredContext]] = OrderedDict()
        self._tickets = itertools.count(1)

    def save(
        self, context_id: str, keep_ratio: float | None, name: str | None
    ) -> Future[dict[str, Any]]:
        """Write a cached context to a file.

        Args:
            context_id: as it is listed.
            keep_ratio: of the context, where several have that id; None: the server's own.
            name: of the file; None: the id.

        Returns:
            what the client is told, once the file is on the disk.

        Raises:
            ContextFileError: if there is no such context, or it must stay; in one sentence.
            NotYetError: if the context is being compressed, or others wait to be written.
        """
        name = name or context_id
        file_name(name)  # before anything is copied
        self._check_awake()
        run = self._find(context_id, keep_ratio)
        if not self._saving.acquire(blocking=False):
            raise NotYetError("Other contexts are being written; ask again.")
        try:
            written = self._thread.submit(self._write, name, self._copied(run))
        except BaseException:
            self._saving.release()
            raise
        written.add_done_callback(lambda _: self._saving.release())
        return written

    def _copied(self, run: Any) -> StoredContext:
        """A cached run in the memory of this process.

        Raises:
            NotYetError: if it is being compressed.
        """
        source, tensors = run.source, None
        if self._runs.is_compressed(run):
            (tensors,) = self._workers.collective_rpc("kvzip_read_context", args=(run.serial,))
        if tensors is None:
            raise NotYetError(f"Context {source.context_id} is not compressed yet; ask again.")
        return StoredContext(list(source.token_ids), run.plan, self._identity, tensors)

    def open(self, name: str) -> Future[dict[str, Any]]:
        """Read a file and check all of it.

        Returns:
            a ``ticket`` for :meth:`place`; fails with a ContextFileError.
        """
        file_name(name)
        return self._thread.submit(self._read, name)

    def place(self, ticket: int) -> dict[str, Any]:
        """Put what has been opened into the KV cache.

        Args:
            ticket: of :meth:`open`.

        Returns:
            what the client is told.

        Raises:
            ContextFileError: if there is no room, or workers cannot take it. Nothing is cached.
            NotYetError: if its blocks are still to be read; the ticket stays good.
        """
        if ticket not in self._opened:
            raise ContextFileError("Too many files were opened at once; import the file again.")
        entry, context = self._opened.pop(ticket)
        try:
            return self._place(entry, context)
        except NotYetError:
            self._opened[ticket] = entry, context
            raise

    def listed(self) -> Future[dict[str, Any]]:
        """All files of the folder, and their ``bytes``; ``most_bytes`` is the limit or None."""
        return self._thread.submit(self._list)

    def _place(self, entry: FileEntry, context: StoredContext) -> dict[str, Any]:
        self._check_awake()
        name, plan = entry.name, context.plan
        if plan.boundary_tokens >= self._longest:
            raise ContextFileError(
                f"{name} has a context of {plan.boundary_tokens} tokens, too many for this "
                f"server's max_model_len, which is {self._longest}."
            )
        if plan.boundary_tokens != plan.num_prefix_blocks * self._runs.rule.block_size:
            raise ContextFileError(f"{name} does not name whole blocks of this server's cache.")
        if plan.quality_loss is not None and self._runs.rule.quality_loss is None:
            raise ContextFileError(
                f"{name} was compressed for a quality_loss of {plan.quality_loss}, and no request "
                f"can ask for one here; start this server with a quality_loss."
            )
        prefix_hash = self._hash(context.token_ids, plan)
        cached = self._runs.prefixes.has(prefix_hash, plan)
        if not cached:
            source = RunSource(context.token_ids)
            self._runs.prefixes.adopt(plan, prefix_hash, source, self._filler(name, context))
        return {**self._told(entry, context), "was_cached": cached}

    def _check_awake(self) -> None:
        """Refuse while vLLM's sleep mode has given the KV cache's memory away.

        Raises:
            ContextFileError: in one sentence.
        """
        if self._workers.is_sleeping:
            raise ContextFileError("The engine sleeps; wake it up first.")

    def _find(self, context_id: str, keep_ratio: float | None) -> Any:
        """A cached run.

        Raises:
            ContextFileError: if there is none that may leave.
        """
        wanted = keep_ratio or self._runs.rule.keep_ratio
        cached = self._runs.prefixes.whole_runs()
        of_id = [run for run in cached if run.source.context_id == context_id]
        if not of_id:
            raise NoContextFileError(
                f"No compressed context {context_id} is cached; the list of contexts has the ids."
            )
        fitting = [run for run in of_id if run.plan.keep_ratio == wanted]
        own_loss = self._runs.rule.wanted_loss(RequestOptions())
        fitting = [run for run in fitting if run.plan.quality_loss == own_loss] or fitting
        if not fitting and (keep_ratio is not None or len(of_id) > 1):
            ratios = ", ".join(str(run.plan.keep_ratio) for run in of_id)
            raise NoContextFileError(
                f"Context {context_id} is not cached with keep_ratio {wanted}; those that are: "
                f"{ratios}."
            )
        found = fitting or of_id
        free = [run for run in found if run.source.stays is None]
        if not free:
            raise ContextFileError(
                f"Context {context_id} belongs to requests with {found[0].source.stays}, and stays "
                f"on this server."
            )
        return free[0]

    def _hash(self, token_ids: list[int], plan: PrefixPlan) -> bytes:
        """This engine's hash of all tokens before the boundary."""
        params = SamplingParams(max_tokens=1)
        request = Request("kvzip-context", token_ids, params, None, block_hasher=self._hasher)
        found: bytes = request.block_hashes[plan.num_prefix_blocks - 1]
        return found

    def _filler(self, name: str, context: StoredContext) -> Callable[[int, list[int]], None]:
        """Lets workers write a context's pages into blocks, as a run of some serial number."""

        def fill(serial: int, block_ids: list[int]) -> None:
            """What ``CompressedPrefixCache.adopt`` calls."""
            args = (serial, context.plan, context.seed, block_ids, context.tensors)
            (refusal,) = self._workers.collective_rpc("kvzip_write_context", args=args)
            if refusal == NOT_YET:
                raise NotYetError(f"{name} finds no free blocks between two steps; ask again.")
            if refusal is not None:
                raise ContextFileError(f"{name} cannot be used: {refusal}.")

        return fill

    def _write(self, name: str, context: StoredContext) -> dict[str, Any]:
        entry = self._folder.save(name, context)
        logger.info("Context file %s was written, %d bytes.", entry.name, entry.num_bytes)
        return self._told(entry, context)

    def _read(self, name: str) -> dict[str, Any]:
        entry, context = self._folder.load(name)
        check_identity(file_name(name), context.identity, self._identity)
        ticket = next(self._tickets)
        self._opened[ticket] = entry, context
        while len(self._opened) > MOST_OPENED:
            self._opened.popitem(last=False)
        return {"ticket": ticket}

    def _told(self, entry: FileEntry, context: StoredContext) -> dict[str, Any]:
        """What a client is told of a context that left or came in."""
        plan = context.plan
        send: dict[str, Any] = {CONTEXT_TOKENS: plan.boundary_tokens}
        if plan.keep_ratio != self._runs.rule.wanted_ratio(RequestOptions()):
            send[KEEP_RATIO] = plan.keep_ratio
        if plan.quality_loss != self._runs.rule.wanted_loss(RequestOptions()):
            send[QUALITY_LOSS] = "off" if plan.quality_loss is None else plan.quality_loss
        return {
            "name": entry.name,
            "id": checksum(context.seed),
            **plan.as_told(),
            "bytes": entry.num_bytes,
            "send": {"vllm_xargs": send},
        }

    def _list(self) -> dict[str, Any]:
        entries = self._folder.entries()
        return {
            "files": [self._listed(entry) for entry in entries],
            "bytes": sum(entry.num_bytes for entry in entries),
            "most_bytes": self._folder.max_bytes,
        }

    def _listed(self, entry: FileEntry) -> dict[str, Any]:
        summary = self._folder.summary(entry)
        about = {"id": summary.id, **summary.plan.as_told()} if summary else {"broken": True}
        return {
            "name": entry.name,
            "bytes": entry.num_bytes,
            "last_used": entry.last_used,
            **about,
        }


def _check_engine(core: EngineCore) -> None:
    """Refuse engines whose contexts are in several places.

    Raises:
        ContextFileError: in one sentence.
    """
    parallel = core.vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(parallel, name) > 1:
            raise ContextFileError(
                f"Context files do not work with {name} {getattr(parallel, name)} yet; they need "
                f"a server of one rank."
            )
    if has_draft_layers(core.vllm_config):
        raise ContextFileError(
            "Context files do not work with a draft model yet; start the server without "
            "--speculative-config, or with method ngram."
        )
    if len(core.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups) > 1:
        raise ContextFileError(
            "Context files do not work for models whose layers differ: those that are not "
            "compressed would lack what they computed of the context."
        )
    if core.request_block_hasher is None:
        raise ContextFileError(
            "Prefix caching is off on this server, so no context can be kept; start vLLM without "
            "--no-enable-prefix-caching."
        )
