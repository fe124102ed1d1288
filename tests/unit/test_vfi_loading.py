"""Frame interpolators from files: what is loaded, what is converted, what is refused."""

import os
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import VFI, tiny_vfi

from allegro_model.errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from allegro_model.loading import interpolator_metadata, load_interpolator, read_pickled_interpolator


@pytest.fixture
def state():
    return tiny_vfi().state_dict()


def published(state):
    """A checkpoint as the reference's training writes it: a prefix, and buffers of the last picture's shape."""
    extra = {"feature_bone.block4.1.attn_mask": torch.zeros(4, 49, 49), "feature_bone.block4.1.HW": torch.tensor([196.0])}
    return OrderedDict((f"module.{name}", value) for name, value in (state | extra).items())


def same(model, state):
    return all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_loads_with_the_network_in_evaluation_and_without_gradients(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    model = load_interpolator(tmp_path / "a.safetensors")
    assert same(model, state)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config == replace(VFI, arbitrary_time=False)
    assert load_interpolator(tmp_path / "a.safetensors", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_prefix_and_left_over_buffers_are_dropped(tmp_path, state):
    save_file(published(state), tmp_path / "a.safetensors")
    assert same(load_interpolator(tmp_path / "a.safetensors"), state)


def test_arbitrary_time_comes_from_argument_metadata_or_name(tmp_path, state):
    def loaded(name, metadata=None, **options):
        save_file(state, tmp_path / name, metadata)
        return load_interpolator(tmp_path / name, **options).config.arbitrary_time

    assert loaded("ours_t.safetensors")
    assert not loaded("ours_tall.safetensors")
    assert loaded("a.safetensors", interpolator_metadata(VFI))
    assert not loaded("b_t.safetensors", interpolator_metadata(replace(VFI, arbitrary_time=False)))
    assert loaded("c.safetensors", arbitrary_time=True)
    assert not loaded("d_t.safetensors", interpolator_metadata(VFI), arbitrary_time=False)


def test_wrong_files_are_refused(tmp_path, state):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match="EMA-VFI frame interpolator"):
        load_interpolator(tmp_path / "other.safetensors")
    save_file({k: v for k, v in state.items() if k != "unet.conv.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"Missing \(1\): unet.conv.bias"):
        load_interpolator(tmp_path / "less.safetensors")
    save_file(state | {"unet.conv.extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"Unexpected \(1\)"):
        load_interpolator(tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_interpolator(tmp_path / "none.safetensors")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, state):
    torch.save(published(state), tmp_path / "ours_t.pkl")
    with pytest.raises(UnsupportedCheckpoint, match=r"python -m allegro_model convert-vfi .*ours_t.pkl .*ours_t.safetensors"):
        load_interpolator(tmp_path / "ours_t.pkl")


@pytest.mark.parametrize("zipped", [True, False])
def test_published_pickles_are_read(tmp_path, state, zipped):
    torch.save(published(state), tmp_path / "ours_t.pkl", _use_new_zipfile_serialization=zipped)
    tensors, config = read_pickled_interpolator(tmp_path / "ours_t.pkl")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], value) for name, value in state.items())
    assert config == VFI
    torch.save(dict(state), tmp_path / "plain.pkl")
    assert not read_pickled_interpolator(tmp_path / "plain.pkl")[1].arbitrary_time
    assert read_pickled_interpolator(tmp_path / "plain.pkl", arbitrary_time=True)[1].arbitrary_time


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, state, plain):
    content = published(state) | {"module.x": Malicious(tmp_path / "harm")}
    if plain:
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "bad.pkl")
    with pytest.raises(UnsupportedCheckpoint, match="can run code"):
        read_pickled_interpolator(tmp_path / "bad.pkl")
    assert not (tmp_path / "harm").exists()


def test_other_and_damaged_pickles_are_refused(tmp_path, state):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pkl")
    with pytest.raises(UnsupportedCheckpoint, match="EMA-VFI frame interpolator"):
        read_pickled_interpolator(tmp_path / "other.pkl")
    torch.save([1, 2], tmp_path / "list.pkl")
    with pytest.raises(UnsupportedCheckpoint, match="not a table of tensors"):
        read_pickled_interpolator(tmp_path / "list.pkl")
    torch.save(published({k: v for k, v in state.items() if k != "unet.conv.bias"}), tmp_path / "less.pkl")
    with pytest.raises(CheckpointMismatch, match=r"unet\.conv\.bias"):
        read_pickled_interpolator(tmp_path / "less.pkl")
    torch.save(published(state), tmp_path / "whole.pkl")
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "whole.pkl").read_bytes()[:50_000])
    with pytest.raises(UnsupportedCheckpoint):
        read_pickled_interpolator(tmp_path / "cut.pkl")
    (tmp_path / "text.pkl").write_text("hello")
    with pytest.raises(UnsupportedCheckpoint):
        read_pickled_interpolator(tmp_path / "text.pkl")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pickled_interpolator(tmp_path / "none.pkl")
