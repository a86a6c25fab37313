"""``/v1/kvzip/contexts/files``: compressed contexts as files of a folder that the operator named.

A request gives a plain name, never a path; see :mod:`vllm_kvzip.contexts.folder`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vllm_kvzip.errors import ContextFileError, NoContextFileError
from vllm_kvzip.vllm_bridge.contexts.calls import LIST, SAVE, ask, import_file
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.symbols import (
    VLLMNotFoundError,
    VLLMValidationError,
    validate_json_request,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from vllm_kvzip.vllm_bridge.symbols import EngineClient

PATH = "/v1/kvzip/contexts"


class ExportRequest(BaseModel):
    """Body of ``POST /export``.

    Attributes:
        id: of a cached context, as the list of contexts has it.
        name: of the file, plain; the id unless given. A file of that name is replaced.
        keep_ratio: of the context, where it is cached with several.
    """

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1)
    keep_ratio: float | None = Field(None, gt=0, le=1)


class ImportRequest(BaseModel):
    """Body of ``POST /import``.

    Attributes:
        name: of the file, plain.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)


router = APIRouter()


@router.post(f"{PATH}/export", dependencies=[Depends(validate_json_request)])
async def export_context(body: ExportRequest, raw_request: Request) -> JSONResponse:
    """Write a cached context to a file; answers when it is on the disk.

    The answer tells the file's ``name`` and ``bytes``, what the list of contexts says, what a
    request must ``send`` to start from it, and the ``seconds`` it took.
    """
    engine, _ = engine_of(raw_request)
    return await _timed(ask(engine, SAVE, body.id, body.keep_ratio, body.name))


@router.post(f"{PATH}/import", dependencies=[Depends(validate_json_request)])
async def import_context(body: ImportRequest, raw_request: Request) -> JSONResponse:
    """Bring the context of a file into the prefix cache; answers when requests can start from it.

    The answer is that of the export, and ``was_cached``: whether it was there already.
    """
    engine, _ = engine_of(raw_request)
    return await _timed(import_file(engine, body.name))


@router.get(f"{PATH}/files")
async def list_files(raw_request: Request) -> JSONResponse:
    """All files, least recently used first; their ``bytes``, and the limit ``most_bytes``."""
    engine, _ = engine_of(raw_request)
    return await _timed(ask(engine, LIST))


def engine_of(raw_request: Request) -> tuple[EngineClient, Settings]:
    """The engine and its settings; an HTTP 404 when it does not compress."""
    engine = getattr(raw_request.app.state, "kvzip_engine", None)
    if engine is None or KEY not in (engine.vllm_config.additional_config or {}):
        raise VLLMNotFoundError("KV compression is off; start vLLM with --kv-compression kvzip.")
    return engine, Settings.from_vllm_config(engine.vllm_config)


async def _timed(call: Awaitable[dict[str, Any]]) -> JSONResponse:
    """What the engine answers, with the time it took; what it refuses is an HTTP 400 or 404."""
    begin = time.perf_counter()
    try:
        found = await call
    except NoContextFileError as error:
        raise VLLMNotFoundError(str(error)) from error
    except ContextFileError as error:
        raise VLLMValidationError(str(error)) from error
    return JSONResponse({**found, "seconds": time.perf_counter() - begin})
