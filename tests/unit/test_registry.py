"""Classes by name: of this package, of other packages, and registered by hand."""

import re
import sys
from pathlib import Path

import pytest

from vllm_kvzip.registry import FORMATS, SCORERS, Registry

FAULTY_SCORER = Path(__file__).parent.parent / "support" / "faulty_scorer"


@pytest.fixture
def scorers(monkeypatch):
    """As :data:`SCORERS`, in a process where another package with a scorer is installed."""
    monkeypatch.syspath_prepend(str(FAULTY_SCORER))
    monkeypatch.delitem(sys.modules, "faulty_scorer", raising=False)
    made = Registry("scorer", "scoring", "vllm_kvzip.scorers", others=("base",))
    for found in map(SCORERS.find, SCORERS.names()):
        made.register(found)
    return made


@pytest.mark.parametrize("registry", [SCORERS, FORMATS])
def test_a_file_of_the_folder_is_named_like_its_class(registry):
    assert [registry.find(name).name for name in registry.names()] == list(registry.names())


def test_another_package_is_imported_when_its_class_is_asked_for(scorers):
    assert {"faulty", "knorm", "expected-attention"} <= set(scorers.names())
    assert "faulty_scorer" not in sys.modules
    found = scorers.find("faulty")
    assert found is sys.modules["faulty_scorer"].FaultyScorer
    assert scorers.find("faulty") is found


def test_a_class_of_another_name_than_its_entry_point_is_refused(scorers, monkeypatch):
    announced = scorers._entry_points
    monkeypatch.setitem(announced, "sound", announced["faulty"])
    with pytest.raises(ValueError, match=re.escape("scorer sound has another name; give the cla")):
        scorers.find("sound")
