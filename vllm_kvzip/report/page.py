"""An explanation as one HTML file that needs nothing else: no network, no library."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from vllm_kvzip.report.explanation import WHOLE
from vllm_kvzip.report.passages import passage_starts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_kvzip.report.explanation import Explanation

NAMES = {
    "mode": "Mode",
    "scorer": "Scorer",
    "budget": "Budget",
    "keep_ratio": "Keep ratio asked for",
    "by_bytes": "Keep ratio counts bytes",
    "quality_loss": "Loss allowed (nats a token)",
    "estimated_loss": "Loss estimated (nats a token)",
    "block_size": "Block size (tokens)",
    "key_format": "Quantized keys",
    "value_format": "Quantized values",
}


def make_page(explanation: Explanation, title: str) -> str:
    """The page.

    Args:
        explanation: what was kept.
        title: of the document.
    """
    script, style = _part("page.js"), _part("page.css")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    return Template(_part("page.html")).substitute(
        title=escape(title),
        model=escape(_short(explanation.model)),
        created=explanation.created.strftime("%Y-%m-%d %H:%M UTC"),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=style,
        script=script,
        data=_as_json(page_data(explanation)),
        figures="\n".join(_figures(explanation)),
        facts="\n".join(_facts(explanation)),
    )


def page_data(explanation: Explanation) -> dict[str, object]:
    """What the page's script reads, as plain values."""
    starts = passage_starts(explanation.token_texts, explanation.compressed_tokens)
    tiers = [tier for tier in explanation.tiers if any(tier.counts)]
    # Where nothing is dropped, it is of interest what is exact.
    first = WHOLE if len(tiers) > 1 and min(explanation.shares) == 1 else "kept"
    return {
        "tokens": explanation.token_texts,
        "compressed": explanation.compressed_tokens,
        "passages": starts,
        "layers": explanation.layers,
        "heads": explanation.kv_heads,
        "sinks": explanation.sink_tokens,
        "recent": explanation.recent_tokens,
        "tier": first,
        "tiers": [{"name": tier.name, "bits": tier.bits} for tier in tiers],
    }


def _figures(explanation: Explanation) -> Iterable[str]:
    before, after = explanation.bytes
    tokens, compressed = len(explanation.token_texts), explanation.compressed_tokens
    yield _figure(
        "Memory",
        f"{_bytes(before)} → {_bytes(after)}",
        f"{_percent(after / before)} of the blocks of the compressed layers "
        f"({explanation.blocks[0]} → {explanation.blocks[1]})",
        [("held", after / before)],
    )
    shares = {tier.name: explanation.share_of(tier) for tier in explanation.tiers}
    kept = sum(shares.values())
    parts = [(name, share) for name, share in shares.items() if share]
    how = {WHOLE: "as they are"}
    words = [f"{_percent(share)} {how.get(name, name)}" for name, share in parts]
    words.append(f"{_percent(1 - kept)} dropped")
    yield _figure("KV pairs kept", _percent(kept), ", ".join(words), parts)
    heads = explanation.shares
    least, most = _percent(min(heads)), _percent(max(heads))
    yield _figure(
        "Per head",
        least if least == most else f"{least} to {most}",
        f"least and most that one of {explanation.num_heads} KV heads keeps, "
        f"{explanation.kv_heads} in each of {len(explanation.layers)} layers",
    )
    rest = tokens - compressed
    yield _figure(
        "Document",
        f"{tokens:,} tokens",
        f"{compressed:,} are compressed; the last {rest} fill no block and stay as they are"
        if rest
        else "all of them are compressed",
    )


def _figure(name: str, value: str, note: str, parts: Iterable[tuple[str, float]] = ()) -> str:
    bars = "".join(
        f'<i class="{escape(part)}" style="width:{100 * share:.2f}%"></i>' for part, share in parts
    )
    bar = f'<div class="bar" aria-hidden="true">{bars}</div>' if bars else ""
    return (
        f'<div class="figure"><h2>{escape(name)}</h2><p class="value">{escape(value)}</p>{bar}'
        f'<p class="note">{escape(note)}</p></div>'
    )


def _facts(explanation: Explanation) -> Iterable[str]:
    rows = {NAMES.get(name, name): value for name, value in explanation.settings.items()}
    protected = f"{explanation.sink_tokens} first, {explanation.recent_tokens} last"
    versions = ", ".join(f"{name} {number}" for name, number in explanation.versions.items())
    more = {"Kept by every head (tokens)": protected, "Model": explanation.model}
    for name, value in {**rows, **more, "Versions": versions}.items():
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        shown = f"{value:.4g}" if isinstance(value, float) else shown
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(shown)}</dd></div>"


def _as_json(values: object) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + "\u00a0%"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        value /= 1024
    return f"{value:.1f} GiB"


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
