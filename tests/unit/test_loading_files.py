"""Reading checkpoints: every way a file can be wrong has its own message, and reading costs no memory."""

import json
import os
import pickle
import struct

import psutil
import pytest
import torch
from safetensors.torch import save_file

from allegro_model.errors import CheckpointError, CheckpointMismatch, UnsupportedCheckpoint
from allegro_model.loading.files import read_checkpoint, read_header


def tensors(count=3):
    return {f"layer.{i}.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) + i for i in range(count)}


def write_raw(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard(folder, parts, *, stem="diffusion_pytorch_model", index=True):
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))
    return folder


# Sound files


def test_round_trip_of_a_single_file(tmp_path):
    original = tensors() | {"table": torch.randn(4).to(torch.bfloat16), "step": torch.tensor(7)}
    path = tmp_path / "anything.sft"
    save_file(original, path, metadata={"format": "pt", "config": '{"num_layers": 3}'})
    checkpoint = read_checkpoint(path)
    assert checkpoint.tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)
    assert checkpoint.config == {"num_layers": 3}
    assert checkpoint.metadata["format"] == "pt"
    assert checkpoint.files == (path,)


def test_header_tells_shapes_types_and_size_without_reading(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.zeros(5, dtype=torch.int64)}, path)
    header = read_header(str(path))
    assert header.shapes == {"a": (2, 3), "b": (5,)}
    assert {name: info.dtype for name, info in header.tensors.items()} == {"a": torch.float16, "b": torch.int64}
    assert header.num_bytes == 2 * 6 + 8 * 5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.bool])
def test_small_storage_types_are_read(tmp_path, dtype):
    save_file({"a": torch.ones(3).to(dtype)}, tmp_path / "a.safetensors")
    assert read_checkpoint(tmp_path / "a.safetensors").tensors["a"].dtype == dtype


def test_folder_with_config_and_one_file(tmp_path):
    save_file(tensors(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text('{"num_layers": 2}')
    assert read_checkpoint(tmp_path).config == {"num_layers": 2}
    assert len(read_checkpoint(tmp_path).tensors) == 3


@pytest.mark.parametrize("index", [True, False], ids=["with index", "index not downloaded"])
def test_sharded_folder(tmp_path, index):
    everything = tensors(4)
    names = list(everything)
    shard(tmp_path, [{n: everything[n] for n in names[:3]}, {names[3]: everything[names[3]]}], index=index)
    checkpoint = read_checkpoint(tmp_path)
    assert len(checkpoint.files) == 2
    assert checkpoint.tensors.keys() == everything.keys()
    assert torch.equal(checkpoint.tensors[names[3]], everything[names[3]])


def test_index_file_given_directly(tmp_path):
    shard(tmp_path, [tensors(2)], stem="model")
    assert len(read_checkpoint(tmp_path / "model.safetensors.index.json").tensors) == 2


def test_published_name_wins_over_variants(tmp_path):
    save_file(tensors(1), tmp_path / "model.safetensors")
    save_file(tensors(2), tmp_path / "model.fp16.safetensors")
    assert len(read_checkpoint(tmp_path).tensors) == 1


def test_snapshot_root_with_subfolder(tmp_path):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        save_file({part: torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    assert list(read_checkpoint(tmp_path, subfolder="vae").tensors) == ["vae"]
    assert list(read_checkpoint(tmp_path / "vae", subfolder="vae").tensors) == ["vae"]


def test_config_of_a_neighbour_is_not_taken(tmp_path):
    save_file(tensors(), tmp_path / "first.safetensors")
    save_file(tensors(), tmp_path / "second.safetensors")
    (tmp_path / "config.json").write_text('{"num_layers": 2}')
    assert read_header(tmp_path / "first.safetensors").config is None


def test_only_maps_what_is_asked_for(tmp_path):
    save_file(tensors(3), tmp_path / "a.safetensors")
    assert list(read_checkpoint(tmp_path / "a.safetensors", only=lambda n: ".1." in n).tensors) == [
        "layer.1.weight"
    ]


def test_tensors_are_mapped_and_the_file_is_safe_from_writes(tmp_path):
    path = tmp_path / "big.safetensors"
    save_file({"big": torch.zeros(75_000_000)}, path)  # 300 MB
    before = psutil.Process(os.getpid()).memory_info().rss
    big = read_checkpoint(path).tensors["big"]
    assert psutil.Process(os.getpid()).memory_info().rss - before < 30e6
    big[0] = 1.0
    assert read_checkpoint(path).tensors["big"][0] == 0.0
    path.unlink()


# Files that are something else


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"abc", "has only 3 bytes"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5500000000\n",
            "is a Git LFS pointer",
        ),
        (b"  <!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
        (b"PK\x03\x04" + b"\x00" * 100, "is a pickled PyTorch checkpoint"),
        (pickle.dumps({"weight": [1.0] * 50}), "is a pickled PyTorch checkpoint"),
        (pickle.dumps({"weight": [1.0] * 50}, protocol=2), "is a pickled PyTorch checkpoint"),
        (b'{"error": "not found, sorry"}', "is a JSON text"),
        (bytes(range(256)) * 4, "is not a safetensors file"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint) as error:
        read_checkpoint(path)
    assert f"{path} {message}" in str(error.value)
    assert "expected a safetensors file" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"0123456789"])
def test_the_format_that_a_name_promises_is_named(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match="expected a GGUF file") as error:
        read_header(tmp_path / "model.gguf")
    assert "safetensors" not in str(error.value)


def test_lfs_pointer_says_what_to_do(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5500000000\n")
    with pytest.raises(UnsupportedCheckpoint, match="Download the real file"):
        read_header(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"a": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match="Pickles can run code"):
        read_checkpoint(tmp_path / "model.safetensors")
    assert not (tmp_path / "exploded").exists()


# Damaged safetensors


@pytest.mark.parametrize("keep", [0.5, 0.999], ids=["half", "nearly all"])
def test_truncated_tensors(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(
        UnsupportedCheckpoint, match=rf"is truncated: it has .* at least {len(content):,}\..*interrupted"
    ):
        read_checkpoint(path)


def test_truncated_inside_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnsupportedCheckpoint, match="is truncated: it has 40 bytes"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a": nonsense}', 0, "its header is not valid JSON"),
        (b'{"a":' + b"[" * 100_000 + b"}", 0, "its header is not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{}}', 4, "a name occurs twice"),
        ({"__metadata__": {"x": 1}}, 0, "its metadata is not a table of strings"),
        ({"a": [1, 2]}, 0, "the entry of tensor 'a' is not a JSON object"),
        ({"a": entry([2, -1], 0, 8)}, 8, "tensor 'a' has the shape [2, -1]"),
        ({"a": entry([True], 0, 4)}, 4, "tensor 'a' has the shape [True]"),
        ({"a": entry([2], 8, 0)}, 8, "tensor 'a' has the offsets [8, 0]"),
        ({"a": entry([2], 0, 8) | {"data_offsets": "all"}}, 8, "tensor 'a' has the offsets 'all'"),
        ({"a": entry([3], 0, 8)}, 8, "needs 12 bytes, the header gives it 8"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "tensor 'b' overlaps the tensor before it"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "tensor 'b' leaves a gap before it"),
        ({"a": entry([2], 0, 8)}, 30, "22 bytes follow the last tensor"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, message):
    path = write_raw(tmp_path / "a.safetensors", header, b"\x00" * data)
    with pytest.raises(UnsupportedCheckpoint) as error:
        read_checkpoint(path)
    assert message in str(error.value)
    assert "Download it again" in str(error.value)


def test_huge_shape_is_refused_before_allocation(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", {"a": entry([10**9, 10**6], 0, 4 * 10**15)}, b"\x00" * 8)
    with pytest.raises(UnsupportedCheckpoint, match="is truncated"):
        read_checkpoint(path)


def test_unknown_storage_type_is_named(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", {"a": entry([2], 0, 1, "F4")}, b"\x00")
    with pytest.raises(UnsupportedCheckpoint, match=r"tensor 'a' is stored as 'F4', expected one of .*BF16"):
        read_checkpoint(path)


# Folders and indexes


def test_missing_path(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b"], ids=["too long", "with NUL"])
def test_impossible_path(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"cannot be read|does not exist"):
        read_checkpoint(tmp_path / name)


def test_unreadable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pathlib.Path.iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_missing_shards_are_listed(tmp_path, index):
    shard(tmp_path, [{f"t{i}": torch.zeros(1)} for i in range(4)], index=index)
    for part in (2, 3):
        (tmp_path / f"diffusion_pytorch_model-0000{part}-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path)
    assert "2 of 4 files" in str(error.value)
    assert "model-00002-of-00004.safetensors, diffusion_pytorch_model-00003-of-00004" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "a.bin",
        "a\x00.safetensors",
        7,
    ],
)
def test_index_cannot_point_elsewhere(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsupportedCheckpoint, match="in the same folder"):
        read_checkpoint(tmp_path)


def test_shards_of_another_download(tmp_path):
    shard(tmp_path, [tensors(2)])
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layer.9.weight"] = "diffusion_pytorch_model-00001-of-00001.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointMismatch, match=r"1 tensors are not in the files.*layer\.9\.weight"):
        read_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    shard(tmp_path, [tensors(2), tensors(1)], index=False)
    with pytest.raises(CheckpointMismatch, match=r"layer\.0\.weight is in .*00001-of-00002.* and in .*00002"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no .safetensors or .gguf file"),
        ({"pytorch_model.bin": b"x"}, "holds pickled weights only (pytorch_model.bin)"),
        (
            {"a.safetensors": b"x", "b.safetensors": b"x"},
            "holds several models (a.safetensors, b.safetensors)",
        ),
    ],
)
def test_folders_without_one_model(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint) as error:
        read_checkpoint(tmp_path)
    assert message in str(error.value)


def test_snapshot_root_without_subfolder(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    with pytest.raises(UnsupportedCheckpoint, match=r"is a whole model.*transformer, vae"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="has no folder text_encoder/"):
        read_checkpoint(tmp_path, subfolder="text_encoder")


@pytest.mark.parametrize("content", ["[1]", "{oops", '"text"'])
def test_broken_config(tmp_path, content):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json .*Download it again"):
        read_checkpoint(tmp_path)


def test_index_without_weight_map(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match="has no weight_map"):
        read_checkpoint(tmp_path)
