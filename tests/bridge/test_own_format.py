"""A format of quantized pages is one file: here that of another package, with an entry point."""

import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from startup import ON, engine_config
from tiered_world import BLOCK, DIM, IMPL, NAMES, TieredWorld

from vllm_kvzip.config import load_config
from vllm_kvzip.errors import ConfigError
from vllm_kvzip.quantization import available_formats, choose_quantization, unpack_pages
from vllm_kvzip.registry import FORMATS
from vllm_kvzip.storage.page_store import PackedPages, PageCodec
from vllm_kvzip.vllm_bridge.attention.head_sequence_batches import HeadSequenceBatcher
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.start import checks

pytestmark = pytest.mark.vllm
FOLDER = Path(__file__).parent.parent / "support" / "plain_format"
BOTH = {"keys": "plain8", "values": "plain8"}
ASKED = '{"mode": "quantize", "key_format": "plain8", "value_format": "plain8"}'


@pytest.fixture
def installed(monkeypatch):
    """The package is installed; what was read before is read again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "plain_format", raising=False)
    announced = {entry.name: entry for entry in entry_points(group="vllm_kvzip.formats")}
    monkeypatch.setitem(vars(FORMATS), "_entry_points", announced)
    monkeypatch.setattr(FORMATS, "_registered", dict(FORMATS._registered))


def chosen(page_bytes=8192, rotation="none"):
    return choose_quantization(page_bytes=page_bytes, head_dim=32, rotation=rotation, **BOTH)


def test_its_name_is_known_without_its_code(installed):
    assert available_formats() == ("int4", "int8", "nf4", "plain8")
    assert load_config(ASKED, {}, {}).key_format == "plain8"
    assert "plain_format" not in sys.modules
    layout = chosen().layout
    assert sys.modules["plain_format"].PlainEightBits is type(layout.key_format)
    assert layout.key_format.bits_per_value(32, layout.page_tokens) == 8 + 32 / 32


def test_its_pages_hold_what_it_encodes(installed):
    made = chosen()
    keys, values = torch.randn(2, 3, made.layout.page_tokens, 32)
    read = unpack_pages(made.pack(keys, values), made.layout)
    for exact, found in zip((keys, values), read, strict=True):
        limit = exact.abs().amax(dim=-1, keepdim=True).flatten(0, 1) / 250
        assert ((found - exact.flatten(0, 1)).abs() <= limit).all()


@pytest.mark.parametrize("rotation", ["none", "auto"])
@pytest.mark.parametrize("formats", [("plain8", "plain8"), ("plain8", "nf4"), ("int8", "plain8")])
def test_attention_on_the_cpu_reads_its_pages(installed, formats, rotation):
    torch.manual_seed(4)

    def make_store(pages, quantization):
        return PackedPages(pages, PageCodec.identity(BLOCK, DIM), BLOCK, DIM, quantization)

    made = TieredWorld(make_store, formats=formats, rotation=rotation)
    made.add("a", 500, 530)
    made.add("b", 320, 360)
    common, query = made.step(["b", "a"], [1, 12])
    batch = HeadSequenceBatcher(made.cache, "vec").split(["b", "a"], common, made.states).compressed
    for name, layer in NAMES.items():
        output = torch.full_like(query, float("nan"))
        batch.attend(IMPL, SimpleNamespace(layer_name=name), query, output)
        wanted = made.expected(["b", "a"], [1, 12], query, layer)
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-4)


def test_an_engine_takes_it_by_its_name(installed):
    settings = Settings.from_vllm_config(engine_config(*ON, "--kv-compression-config", ASKED))
    layout = settings.quantization(32, 32, 4).layout
    assert (layout.key_format.name, layout.value_format.name) == ("plain8", "plain8")
    assert settings.rule(32, 32, 4).tiers.page_tokens == layout.page_tokens


def test_a_gpu_refuses_a_format_without_triton_code(installed, monkeypatch):
    made = chosen()
    checks.check_page_code(made)  # the CPU reads it
    monkeypatch.setattr(checks.current_platform, "is_cpu", lambda: False)
    with pytest.raises(ConfigError, match="key_format plain8 works on CPUs only, as it has no Tri"):
        checks.check_page_code(made)
    checks.check_page_code(None)
    plain = choose_quantization(
        page_bytes=8192, head_dim=32, keys="nf4", values="int4", rotation="auto"
    )
    checks.check_page_code(plain)
    own_book = SimpleNamespace(name="own", code_book=torch.zeros(16), page_code=object())
    both = SimpleNamespace(key_format=plain.layout.key_format, value_format=own_book)
    with pytest.raises(ConfigError, match="nf4 and value_format own look their codes up in differ"):
        checks.check_page_code(SimpleNamespace(layout=both))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nf5", r"key_format='nf5' is wrong, there is no format nf5; did you mean nf4\?$"),
        ("fp16x", r"there is no format fp16x; known are int4, int8, nf4\.$"),
    ],
)
def test_an_unknown_name_is_one_sentence(name, message):
    asked = {"mode": "quantize", "key_format": name}
    with pytest.raises(ConfigError, match=message):
        load_config(asked, {}, {})
