"""Profiles: schema, matching, interpolation, and what a wrong file says."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.head_profile import (
    HeadProfile,
    ModelFingerprint,
    check_matches,
    find_profile,
    load_profile,
    profile_folders,
    save_profile,
)

FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM", num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=32,
    name="one",
)  # fmt: skip


def profile_values(**changes):
    values = {
        "schema_version": 1,
        "model": FINGERPRINT.model_dump(),
        "provenance": {
            "method": "test", "repeat_prompt": "again", "scoring_chunk_tokens": 64,
            "num_contexts": 1, "context_tokens": 64, "texts": ["x"], "versions": {},
            "created": "2026-01-01",
        },
        "importance": [[0.5, 0.1], [0.2, 0.9]],
        "budgets": {"0.2": [[0.4, 0.0], [0.0, 0.4]], "0.6": [[1.0, 0.2], [0.2, 1.0]]},
    }  # fmt: skip
    return {**values, **changes}


PROFILE = HeadProfile.model_validate(profile_values())


def test_saved_profiles_load_again(tmp_path):
    path = tmp_path / "deep" / "one.json"
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    assert "    [0.5, 0.1]" in path.read_text()  # one layer a line


def test_fractions_are_linear_between_the_grid():
    assert PROFILE.fractions(0.2) == [[0.4, 0.0], [0.0, 0.4]]
    assert PROFILE.fractions(0.4)[0] == pytest.approx([0.7, 0.1])
    assert PROFILE.fractions(0.1)[0] == pytest.approx([0.2, 0.0])
    assert PROFILE.fractions(1.0) == [[1.0, 1.0], [1.0, 1.0]]


@given(st.floats(0.001, 1.0))
def test_fractions_stay_in_range_and_their_mean_is_the_ratio(ratio):
    flat = [value for row in PROFILE.fractions(ratio) for value in row]
    assert all(0 <= value <= 1 for value in flat)
    assert sum(flat) / len(flat) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": [[0.5, 0.1]]}, "importance must have 2 rows of 2"),
        ({"budgets": {"0.5": [[1, 1], [1]]}}, "0.5 must have 2 rows of 2"),
        ({"budgets": {"half": [[1, 1], [1, 1]]}}, "'half', which is no ratio"),
        ({"budgets": {"0.5": [[2, 1], [1, 1]]}}, "broken at budgets.0.5.0.0"),
        ({"schema_version": 2}, "broken at schema_version"),
        ({"extra": 1}, "broken at extra"),
    ],
)
def test_broken_profiles_name_the_field(tmp_path, changes, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(profile_values(**changes)))
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_profiles(tmp_path):
    with pytest.raises(ProfileError, match=r"cannot be read \(No such file"):
        load_profile(tmp_path / "none.json")
    with pytest.raises(ProfileError, match=r"cannot be read \(Is a directory"):
        load_profile(tmp_path)
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ProfileError, match="is not JSON"):
        load_profile(tmp_path / "text.json")


def test_a_profile_of_another_model_names_field_and_both_values():
    running = FINGERPRINT.model_copy(update={"num_kv_heads": 8})
    with pytest.raises(ProfileError, match="its num_kv_heads is 2, the running model's is 8"):
        check_matches(PROFILE, running, Path("x.json"))
    check_matches(PROFILE, FINGERPRINT.model_copy(update={"name": "two"}), Path("x.json"))


def test_auto_finds_the_profile_that_matches(tmp_path, caplog):
    other = FINGERPRINT.model_copy(update={"num_layers": 3})
    assert find_profile(FINGERPRINT, [tmp_path]) is None
    (tmp_path / "a-broken.json").write_text("{")
    save_profile(PROFILE, tmp_path / "b.json")
    assert find_profile(FINGERPRINT, [tmp_path / "absent", tmp_path]) == tmp_path / "b.json"
    assert "a-broken.json" in caplog.text
    assert find_profile(other, [tmp_path]) is None
    named = FINGERPRINT.model_copy(update={"name": "two"})
    save_profile(PROFILE.model_copy(update={"model": named}), tmp_path / "c.json")
    assert find_profile(named, [tmp_path]) == tmp_path / "c.json"


def test_every_shipped_profile_is_valid():
    shipped = sorted(profile_folders()[1].glob("*.json"))
    assert shipped
    for path in shipped:
        assert load_profile(path).model.name == path.stem


TIERS = {
    "key_format": "nf4", "value_format": "nf4", "token_bytes": 0.25, "loss": 0.1,
    "full": {"0.2": [[0.1, 0.0], [0.0, 0.0]], "0.1": [[0.0, 0.0], [0.0, 0.0]]},
    "kept": {"0.2": [[1.0, 0.5], [0.5, 1.0]], "0.1": [[1.0, 0.5], [0.1, 0.0]]},
}  # fmt: skip


def test_tiers_are_saved_and_say_their_shares(tmp_path):
    profile = HeadProfile.model_validate(profile_values(tiers=TIERS))
    save_profile(profile, tmp_path / "one.json")
    assert load_profile(tmp_path / "one.json") == profile
    lower, upper = profile.tiers.shares()
    assert lower == pytest.approx((0.1, 0.4, 0.0))
    assert upper == pytest.approx((0.2, 0.75, 0.025 / (0.025 + 0.725 * 0.25)))


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ({"full": {"0.3": [[0.1, 0.0], [0.0, 0.0]]}}, "same ratios in full and kept"),
        ({"full": {"0.2": [[0.1]], "0.1": [[0.1]]}}, "tiers.full at 0.2 must have 2 rows of 2"),
        ({"loss": 0}, "tiers.loss"),
    ],
)
def test_broken_tiers_are_one_sentence(tmp_path, tiers, message):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(profile_values(tiers={**TIERS, **tiers})))
    with pytest.raises(ProfileError, match=message):
        load_profile(path)
