"""Encoded prompts on disk: found again, bounded, never in the way."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from allegro_model.prompt_store import PromptStore, files_identity, prompt_key

KEY = "ab" * 32


def entry(value: float, cells: int = 100) -> dict[str, torch.Tensor]:
    return {"embeds": torch.full((1, cells), value), "mask": torch.ones(1, cells, dtype=torch.bool)}


def test_what_is_put_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "a" / "b")
    assert store.get(KEY) is None
    tensors = {"embeds": torch.randn(1, 5, 7).bfloat16(), "mask": torch.tensor([[True, False]])}
    store.put(KEY, tensors)
    found = PromptStore(tmp_path / "a" / "b").get(KEY)
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_the_entry_unused_for_longest_goes_first(tmp_path: Path) -> None:
    PromptStore(tmp_path / "one").put(KEY, entry(0))
    size = (tmp_path / "one" / f"{KEY}.safetensors").stat().st_size
    store = PromptStore(tmp_path / "all", max_bytes=3 * size)
    keys = [f"{i:064x}" for i in range(4)]
    for age, key in enumerate(keys[:3]):
        store.put(key, entry(age))
        os.utime(tmp_path / "all" / f"{key}.safetensors", (1000 + age, 1000 + age))
    assert store.get(keys[0]) is not None  # now it was used last
    store.put(keys[3], entry(3))
    assert [key in {p.stem for p in (tmp_path / "all").iterdir()} for key in keys] == [True, False, True, True]


def test_an_entry_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    PromptStore(tmp_path, max_bytes=100).put(KEY, entry(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"half a fi", save({"embeds": torch.ones(1, 9)}), save({"embeds": torch.ones(9), "mask": torch.ones(1, 9)})])
def test_a_damaged_or_foreign_entry_is_removed_and_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    store = PromptStore(tmp_path)
    store.put(KEY, entry(1))
    assert store.get(KEY, embeds=2, mask=2) is not None
    (tmp_path / f"{KEY}.safetensors").write_bytes(content)
    assert store.get(KEY, embeds=2, mask=2) is None
    assert "encoded again" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = PromptStore(tmp_path / "file")
    store.put(KEY, entry(1))
    assert "not kept" in caplog.text
    assert store.get(KEY) is None


def test_clear_removes_entries_and_nothing_else(tmp_path: Path) -> None:
    store = PromptStore(tmp_path)
    store.put(KEY, entry(1))
    (tmp_path / "notes.txt").write_text("mine")
    assert store.clear() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_keys_depend_on_every_part() -> None:
    assert len({prompt_key("a", 1), prompt_key("a", 2), prompt_key("b", 1), prompt_key("a", [1, 2.0])}) == 4
    assert prompt_key("a", 1) == prompt_key("a", 1)
    assert prompt_key("a", torch.zeros(1)) is None  # an embedding in the text cannot be told apart by JSON


@pytest.mark.parametrize("position", [0, 5_000_000, 9_999_999])
def test_weight_files_are_told_apart_by_content(tmp_path: Path, position: int) -> None:
    content = bytes(10_000_000)
    one, two, copy = tmp_path / "one", tmp_path / "two", tmp_path / "copy"
    one.write_bytes(content)
    copy.write_bytes(content)
    # Every weight of another file differs; a sample meets some of them.
    two.write_bytes(content[:position] + bytes([1]) * min(200_000, len(content) - position) + content[position + 200_000 :])
    assert files_identity([one]) == files_identity([copy])
    assert files_identity([one]) != files_identity([two])
    assert files_identity([one, two]) != files_identity([two, one])
