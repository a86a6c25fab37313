"""Questions about long documents, over any vLLM server that runs the plugin; imports no vLLM."""

from vllm_kvzip.client.asking.answers import Answer, Claim, Quote
from vllm_kvzip.client.asking.reader import AsyncReader
from vllm_kvzip.client.blocking import ContextLibrary, Reader
from vllm_kvzip.client.errors import ClientError
from vllm_kvzip.client.library import AsyncContextLibrary
from vllm_kvzip.client.retries import Retries
from vllm_kvzip.client.server import Server
from vllm_kvzip.client.statistics import Statistics
from vllm_kvzip.client.text.documents import Document, read_document

__all__ = [
    "Answer",
    "AsyncContextLibrary",
    "AsyncReader",
    "Claim",
    "ClientError",
    "ContextLibrary",
    "Document",
    "Quote",
    "Reader",
    "Retries",
    "Server",
    "Statistics",
    "read_document",
]
