"""What the documents say of files, settings and metrics is so."""

import re
from pathlib import Path

import pytest
from document_settings import DOCUMENT, with_table

from vllm_kvzip import metrics
from vllm_kvzip.config import KVzipConfig

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


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


PLACES = (ROOT, ROOT / "vllm_kvzip", ROOT / "vllm_kvzip" / "vllm_bridge")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document):
    text = document.read_text()
    named = re.findall(r"`((?:scripts|kernels|vllm_bridge|tests)/[\w/.-]+)", text)
    for name in {*named, *re.findall(r"`([\w/]+/\w+\.py)`", text)}:
        assert any((place / name.rstrip(".")).exists() for place in PLACES), name


def test_the_table_of_settings_is_that_of_the_configuration():
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run scripts/document_settings.py"
    assert all(f"| `{name}` |" in text for name in KVzipConfig.model_fields)


def test_every_metric_is_in_its_table():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for metric in metrics.METRICS:
        assert metric.name in text
