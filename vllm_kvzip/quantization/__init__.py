"""Head pages with fewer bits per value, so that a page of the same bytes holds more tokens.

``formats/`` has one format a file, and ``base.py`` their contract. ``layout.py`` says what lies
where in a page, ``pages.py`` fills and reads pages, ``reading.py`` reads them quickly,
``rotation.py`` spreads outliers beforehand, and ``choice.py`` goes from names to all of it.
"""

from vllm_kvzip.quantization.base import Encoded, Format, register_format
from vllm_kvzip.quantization.choice import (
    Quantization,
    available_formats,
    choose_quantization,
    choose_split,
    create_format,
)
from vllm_kvzip.quantization.formats.int4 import Int4
from vllm_kvzip.quantization.formats.int8 import Int8
from vllm_kvzip.quantization.formats.nf4 import NormalFloat4
from vllm_kvzip.quantization.layout import HalfPage, PageLayout
from vllm_kvzip.quantization.pages import pack_pages, unpack_pages
from vllm_kvzip.quantization.rotation import rotate, rotate_back

__all__ = [
    "Encoded",
    "Format",
    "HalfPage",
    "Int4",
    "Int8",
    "NormalFloat4",
    "PageLayout",
    "Quantization",
    "available_formats",
    "choose_quantization",
    "choose_split",
    "create_format",
    "pack_pages",
    "register_format",
    "rotate",
    "rotate_back",
    "unpack_pages",
]
