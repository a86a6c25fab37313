"""What the documents say of files, settings and metrics is so."""

import re
from pathlib import Path

import pytest

from vllm_kvzip import metrics
from vllm_kvzip.config import KVzipConfig

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMPUTED = {"keep_ratio", "scorer", "budget", "full_share", "profile_cache", "profile_text"}
COMPUTED |= {"repeat_prompt", "key_format", "value_format"}  # defaults that are more than a value


def anchors(text):
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_document_is_in_the_readme():
    readme = DOCUMENTS[0].read_text()
    for document in DOCUMENTS[1:]:
        assert f"](docs/{document.name})" in readme


def test_every_file_that_a_document_names_is_there():
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:scripts|kernels|vllm_bridge|tests)/[\w/.-]+)", document.read_text()
        ):
            name = name.rstrip(".")
            assert (ROOT / name).exists() or (ROOT / "vllm_kvzip" / name).exists(), name


def test_every_setting_is_in_its_table_with_its_default():
    table = (ROOT / "docs" / "settings.md").read_text().split("## Scorers")[0]
    rows = dict(re.findall(r"(?m)^\| (`[^|]+`) \| ([^|]+) \|", table))
    defaults = {
        name: text for names, text in rows.items() for name in re.findall(r"`(\w+)`", names)
    }
    for name, field in KVzipConfig.model_fields.items():
        assert name in defaults, name
        if name not in COMPUTED:
            wanted = "none" if field.default is None else str(field.default)
            assert defaults[name].strip("` ") == wanted, name


def test_every_metric_is_in_its_table():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for metric in metrics.METRICS:
        assert metric.name in text
