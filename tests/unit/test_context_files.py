"""Context files and their folder: whole or refused, plain names, a limit, a time to live."""

import errno
import os
import stat
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_kvzip.contexts import context_file, folder
from vllm_kvzip.contexts.context_file import (
    StoredContext,
    check_identity,
    read_context,
    read_summary,
    write_context,
)
from vllm_kvzip.contexts.folder import ContextFolder, check_folder, file_name
from vllm_kvzip.contexts.model_digest import tokenizer_digest, weights_digest
from vllm_kvzip.core import PrefixPlan
from vllm_kvzip.errors import ConfigError, ContextFileError, NoContextFileError

IDENTITY = {"the model's weights": "abc", "the block size": "32"}


def context(number=0, pages=4):
    """One of ``pages`` head pages; its bytes grow with them."""
    generator = torch.Generator().manual_seed(number)
    keys = torch.randn(pages, 32, 16, generator=generator).to(torch.bfloat16)
    tensors = {
        "full.pages": torch.tensor([[1, pages - 1]]),
        "full.keys": keys,
        "full.values": -keys,
        "quantized.bytes": torch.arange(64, dtype=torch.uint8).view(2, 32),
        "empty": torch.zeros(0, 3),
    }
    plan = PrefixPlan(64, 2, 1, ready_tokens=70, keep_ratio=0.3)
    return StoredContext([number + index for index in range(64)], plan, IDENTITY, tensors)


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


def names(of):
    return [entry.name for entry in of.entries()]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_context(path, context(3))
    found = read_context(path)
    assert (found.token_ids, found.plan, found.identity) == (
        context(3).token_ids,
        context(3).plan,
        IDENTITY,
    )
    assert found.tensors.keys() == context(3).tensors.keys()
    for name, tensor in context(3).tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert read_summary(path).plan == found.plan
    assert read_summary(path).id == f"{found.seed:08x}"


def test_any_changed_byte_is_seen(tmp_path):
    path = tmp_path / "a.safetensors"
    write_context(path, context())
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ContextFileError, match=r"^a.safetensors [^\n]*[.]$"):
            read_context(path)


@pytest.mark.parametrize("left", [0, 5, 0.1, 0.5, -1])
def test_a_torn_file_is_refused(tmp_path, left):
    path = tmp_path / "a.safetensors"
    write_context(path, context())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    for read in (read_context, read_summary):
        with pytest.raises(ContextFileError, match=r"^a.safetensors is torn"):
            read(path)


def test_other_files_and_versions_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ContextFileError, match="is no file of a compressed context"):
        read_context(path)
    with monkeypatch.context() as patch:
        patch.setattr(context_file, "VERSION", "2")
        write_context(path, context())
    with pytest.raises(ContextFileError, match="version 2 of the format, and this server reads"):
        read_context(path)
    with monkeypatch.context() as patch:
        later = {**asdict(context().plan), "keep_ratio": "much"}
        patch.setattr(context_file, "asdict", lambda plan: later)
        write_context(path, context())
    with pytest.raises(ContextFileError, match="does not understand"):
        read_context(path)


def test_tokens_and_plan_belong_together(tmp_path):
    path = tmp_path / "a.safetensors"
    write_context(path, replace(context(), token_ids=[1, 2]))
    with pytest.raises(ContextFileError, match="does not hold the tokens that it names"):
        read_context(path)


def test_the_first_difference_is_named():
    check_identity("a", IDENTITY, dict(IDENTITY))
    with pytest.raises(ContextFileError, match=r"the block size is 16 here and was 32 where"):
        check_identity("a", IDENTITY, {**IDENTITY, "the block size": "16"})
    with pytest.raises(ContextFileError, match="the setting seed is none here and was 3"):
        check_identity("a", {**IDENTITY, "the setting seed": "3"}, IDENTITY)


NO_NAMES = [
    "", ".", "..", "../a", "a/b", "/etc/passwd", "a\\b", ".hidden", "-a", "a b", "a\n", "a\0", "ä",
    "x" * 101, "%2e%2e", ".safetensors", "a.safetensors.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_no_plain_names_are_refused(tmp_path, name):
    of = ContextFolder(tmp_path / "contexts")
    for call in (lambda: of.save(name, context()), lambda: of.load(name)):
        with pytest.raises(ContextFileError, match="is no name of a context file"):
            call()
    assert not (tmp_path / "contexts").exists()


def test_the_suffix_may_be_left_out():
    assert file_name("a.b-1_2") == file_name("a.b-1_2.safetensors") == "a.b-1_2.safetensors"


def test_a_link_is_no_context_file(tmp_path):
    of = ContextFolder(tmp_path / "contexts")
    of.save("a", context())
    (tmp_path / "contexts" / "b.safetensors").symlink_to(of.path / "a.safetensors")
    assert names(of) == ["a"]
    with pytest.raises(NoContextFileError, match=r"There is no context file b\.safetensors"):
        of.load("b")


def test_only_its_owner_may_read_a_file(tmp_path):
    of = ContextFolder(tmp_path)
    of.save("a", context())
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o600


def test_least_recently_used_files_go_first(tmp_path):
    clock = Clock()
    size = ContextFolder(tmp_path / "other").save("a", context()).num_bytes
    of = ContextFolder(tmp_path / "contexts", max_bytes=3 * size, clock=clock)
    for name in "abc":
        clock.now += 1
        of.save(name, context())
    clock.now += 1
    assert of.load("a")[1].token_ids == context().token_ids
    assert names(of) == ["b", "c", "a"]
    clock.now += 1
    of.save("d", context())
    assert names(of) == ["c", "a", "d"]
    of.save("d", context(1))  # the same name takes no more room
    assert names(of) == ["c", "a", "d"]
    of.save("e", context(pages=8))  # as large as two
    assert names(of) == ["d", "e"]
    with pytest.raises(ContextFileError, match="more than contexts_bytes, which is"):
        of.save("f", context(pages=100))
    assert "e" in names(of)


def test_files_of_others_stay_in_the_folder(tmp_path):
    clock = Clock()
    weights = tmp_path / "model-00001.safetensors"
    save_file({"weight": torch.ones(500)}, weights)
    odd = tmp_path / "a.safetensors.safetensors"
    odd.write_bytes(b"0" * 500)
    for path in (weights, odd):
        os.utime(path, times=(0, 0))
    size = ContextFolder(tmp_path / "other").save("a", context()).num_bytes
    of = ContextFolder(tmp_path, max_bytes=size, ttl_seconds=10, clock=clock)
    of.save("a", context())
    clock.now += 1
    of.save("b", context())
    assert [name for name in names(of) if "model" not in name] == ["b"]
    clock.now += 11
    of.entries()
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == [odd, weights]


def test_what_nobody_used_for_its_time_is_gone(tmp_path):
    clock = Clock()
    of = ContextFolder(tmp_path, ttl_seconds=10, clock=clock)
    of.save("a", context())
    of.save("b", context())
    clock.now += 6
    of.load("a")
    clock.now += 6
    with pytest.raises(NoContextFileError):
        of.load("b")
    assert names(of) == ["a"]
    clock.now += 11
    assert of.entries() == []
    assert list(tmp_path.iterdir()) == []


def full_disk(path, *arguments):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    size = ContextFolder(tmp_path / "other").save("a", context()).num_bytes
    of = ContextFolder(tmp_path / "contexts", max_bytes=2 * size)
    of.save("a", context(1))
    of.save("b", context(2))
    monkeypatch.setattr(folder, "write_context", full_disk)
    for name in ("b", "c"):
        with pytest.raises(ContextFileError, match=r"\(No space left on device\); all other"):
            of.save(name, context(3))
    assert names(of) == ["a", "b"]
    assert of.load("b")[1].token_ids == context(2).token_ids
    assert len(list(of.path.iterdir())) == 2  # no part of a file


def test_a_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    of = ContextFolder(tmp_path)
    of.save("a", context(1))
    seen = []

    def watched(path, written):
        write_context(path, written)
        seen.append((names(of), load_file(tmp_path / "a.safetensors")["token_ids"][0].item()))

    monkeypatch.setattr(folder, "write_context", watched)
    of.save("a", context(2))
    of.save("b", context(3))
    assert seen == [(["a"], 1), (["a"], 2)]


def test_the_part_of_a_killed_server_is_removed_later(tmp_path, monkeypatch):
    of = ContextFolder(tmp_path)
    part = tmp_path / ".a.safetensors.1.2.part"
    part.write_bytes(b"half")
    of.save("b", context())
    assert part.exists()
    monkeypatch.setattr(folder, "STALE_SECONDS", -1)
    of.save("b", context())
    assert not part.exists()
    assert names(of) == ["b"]


def test_a_broken_file_has_no_summary(tmp_path):
    of = ContextFolder(tmp_path)
    of.save("a", context())
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    summaries = {entry.name: of.summary(entry) for entry in of.entries()}
    assert summaries["b"] is None
    assert summaries["a"].plan == context().plan


def test_a_folder_that_is_none_is_refused(tmp_path):
    check_folder(tmp_path / "made" / "here")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder that can be used"):
        check_folder(tmp_path / "file")


def test_digests_tell_fine_tunes_and_tokenizers_apart(tmp_path):
    first, second, none = (tmp_path / name for name in ("first", "second", "none"))
    for path, number in ((first, 1), (second, 2)):
        path.mkdir()
        weight = torch.ones(200_000)
        weight[::500] = number
        save_file({"weight": weight}, path / "model.safetensors")
        (path / "tokenizer.json").write_text(str(number))
    assert weights_digest(first) != weights_digest(second)
    assert weights_digest(first / "model.safetensors") == weights_digest(first)
    assert tokenizer_digest(first) != tokenizer_digest(second)
    assert weights_digest(none) is None
    assert tokenizer_digest(none) is None
