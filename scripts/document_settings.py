"""Write the table of settings into ``docs/settings.md``; the text is that of ``KVzipConfig``.

python scripts/document_settings.py
"""

from __future__ import annotations

from pathlib import Path

from vllm_kvzip.config import KVzipConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "settings.md"
BEGIN, END = "| setting | default | meaning |\n", "\n\n"


def settings_table() -> str:
    """The table in Markdown, a row a setting."""
    rows = [BEGIN.rstrip("\n"), "|---|---|---|"]
    for name, field in KVzipConfig.model_fields.items():
        default = "none" if field.default is None else f"`{field.default}`"
        if isinstance(field.json_schema_extra, dict):
            default = str(field.json_schema_extra["shown"])
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def with_table(document: str) -> str:
    """A document with its table of settings as it should be."""
    before, rest = document.split(BEGIN, 1)
    return before + settings_table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
