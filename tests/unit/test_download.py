"""Fetching released weights, from a hub on this machine that fails in every way it can."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
from hub_server import COMMIT, Hub

from allegro_model import cli
from allegro_model.download import (
    Target,
    comfyui_folders,
    comfyui_targets,
    fetch,
    make_plan,
    snapshot_targets,
    transfer,
)
from allegro_model.download import hub as hub_module
from allegro_model.errors import CheckpointError, DownloadError, MissingDependency, OutputError
from allegro_model.loading import bundled_model, load_dit, read_header, released
from allegro_model.loading.released import MODELS, TEXT_ENCODERS, released_files

constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed (extra: standalone)")

ROOT = Path(__file__).parents[2]
DIT, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))
T5 = "t5xxl_fp16.safetensors"
ALLEGRO = "rhymes-ai/Allegro"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that publishes the small model in place of the released one."""
    tiny = bundled_model("tiny")
    files = {(ALLEGRO, name): (tiny / name).read_bytes()
             for name in ("model_index.json", DIT, "transformer/config.json", VAE, "vae/config.json",
                          "tokenizer/tokenizer_config.json")}
    files[ALLEGRO, "tokenizer/spiece.model"] = b"pieces"
    encoder = (tiny / "text_encoder" / "model.safetensors").read_bytes()
    files[TEXT_ENCODERS["fp16"].repository, T5] = encoder
    known = replace(TEXT_ENCODERS["fp16"], num_bytes=len(encoder), sha256=hashlib.sha256(encoder).hexdigest())
    monkeypatch.setitem(released.TEXT_ENCODERS, "fp16", known)
    monkeypatch.setattr(hub_module, "FIRST_WAIT", 0.01)
    with hub_server.running(Hub(files)) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        speak_to(running.url, monkeypatch)
        yield running


def speak_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends every question to a server on this machine, in old versions of huggingface_hub, too."""
    for module in ("constants", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}", raising=False)


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """An empty ComfyUI."""
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    return tmp_path / "ComfyUI"


@pytest.fixture
def allegro(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(["download", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def content(hub: Hub, path: str, repository: str = ALLEGRO) -> bytes:
    return hub.files[repository, path]


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextmanager
def silent(title: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def get_transformer(comfyui: Path, watch: Callable = silent) -> str:
    """Fetches the transformer alone."""
    (item,) = make_plan(transformer_alone(comfyui)).missing
    return fetch(item, watch)


def transformer_alone(comfyui: Path) -> list[Target]:
    files = [file for file in released_files("t2v") if file.part == "transformer" and file.is_weights]
    return comfyui_targets(files, comfyui_folders(comfyui))


def dit_file(comfyui: Path) -> Path:
    return comfyui / "models" / "diffusion_models" / "allegro_dit.safetensors"


# Where files go


def test_into_comfyui(hub: Hub, comfyui: Path, allegro: Run) -> None:
    code, out, err = allegro("t2v", "--comfyui", comfyui)
    assert code == 0, err
    models = comfyui / "models"
    assert files_in(models) == [
        "diffusion_models/allegro-download.json", "diffusion_models/allegro_dit.config.json",
        "diffusion_models/allegro_dit.safetensors", "text_encoders/allegro-download.json",
        "text_encoders/t5xxl_fp16.safetensors", "vae/allegro-download.json", "vae/allegro_vae.config.json",
        "vae/allegro_vae.safetensors"]
    assert dit_file(comfyui).read_bytes() == content(hub, DIT)
    assert (models / "text_encoders" / T5).read_bytes() == content(hub, T5, TEXT_ENCODERS["fp16"].repository)
    assert read_header(dit_file(comfyui)).config == json.loads(content(hub, "transformer/config.json"))
    assert len(out.splitlines()) == 5
    record = json.loads((models / "vae" / "allegro-download.json").read_text())
    assert record["allegro_vae.safetensors"] == {
        "repository": ALLEGRO, "path": VAE, "revision": "main", "commit": COMMIT, "bytes": len(content(hub, VAE)),
        "checksum": hashlib.sha256(content(hub, VAE)).hexdigest(), "checked": "SHA-256 stated by the hub"}
    assert record["allegro_vae.config.json"]["checked"] == "git hash stated by the hub"
    hub.requests.clear()
    code, out, err = allegro("t2v", "--comfyui", comfyui)
    assert (code, out) == (0, ""), err
    assert "nothing to fetch" in err
    assert hub.requests == [], "what is there was asked for again"


def test_into_a_model_folder(hub: Hub, tmp_path: Path, allegro: Run) -> None:
    code, _, err = allegro("t2v", "--to", tmp_path / "Allegro")
    assert code == 0, err
    found = files_in(tmp_path / "Allegro")
    assert {"model_index.json", DIT, VAE, "text_encoder/model.safetensors", "tokenizer/spiece.model",
            "tokenizer/tokenizer_config.json"} <= set(found)
    assert "tokenizer/added_tokens.json" not in found, "the hub has none, and it need not be there"
    assert load_dit(tmp_path / "Allegro").config.num_layers > 0


def test_only_a_part(hub: Hub, tmp_path: Path, allegro: Run) -> None:
    assert allegro("t2v", "--to", tmp_path / "a", "--only", "tokenizer")[0] == 0
    assert files_in(tmp_path / "a") == [f"tokenizer/{name}" for name in (
        "allegro-download.json", "spiece.model", "tokenizer_config.json")]
    assert [path for path, _ in hub.contents() if "tokenizer" not in path] == []


def test_a_commit_is_kept_to(hub: Hub, comfyui: Path) -> None:
    plan = make_plan(comfyui_targets(released_files("t2v"), comfyui_folders(comfyui)))
    assert all(f"/resolve/{COMMIT}/" in item.remote.url for item in plan.items if item.remote)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_complete_and_small(model: str) -> None:
    for encoder in TEXT_ENCODERS:
        files = released_files(model, encoder)
        weights = [file.part for file in files if file.is_weights]
        assert weights == ["transformer", "vae", "text_encoder"], "each once"
        assert sum(file.num_bytes for file in files) < 17e9
        names = [file.comfyui for file in files if file.comfyui]
        assert len(set(names)) == len(names)
    places = {other: {file.comfyui for file in released_files(other) if file.part == "transformer"} for other in MODELS}
    assert all(not places[model] & places[other] for other in MODELS if other != model)


def test_files_in_other_folders_count_and_the_config_goes_beside_its_weights(hub: Hub, tmp_path: Path) -> None:
    folders = {key: [tmp_path / "models" / old, tmp_path / "models" / key, tmp_path / "extra" / key]
               for key, old in (("diffusion_models", "unet"), ("text_encoders", "clip"), ("vae", "vae"))}
    (tmp_path / "extra" / "diffusion_models").mkdir(parents=True)
    there = tmp_path / "extra" / "diffusion_models" / "allegro_dit.safetensors"
    there.write_bytes(content(hub, DIT))
    plan = make_plan(comfyui_targets(released_files("t2v"), folders))
    assert [item.present for item in plan.items if item.present] == [there]
    wanted = [item.target.path for item in plan.missing]
    assert there.with_name("allegro_dit.config.json") in wanted
    assert tmp_path / "models" / "text_encoders" / T5 in wanted, "clip is the old name of the folder"


def write_sparse_encoder(path: Path) -> None:
    """A T5 v1.1 XXL encoder of which only the header takes room."""
    shapes = json.loads((ROOT / "tests" / "data" / "manifests" / "t5_v1_1_xxl_encoder.json").read_text())["shapes"]
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)


def test_an_encoder_of_another_model_is_used(hub: Hub, comfyui: Path, allegro: Run) -> None:
    encoders = comfyui / "models" / "text_encoders"
    shutil.copytree(bundled_model("tiny") / "text_encoder", encoders / "small")  # too small
    code, out, _ = allegro("--comfyui", comfyui, "--only", "text_encoder", "--dry-run")
    assert code == 0
    assert "fetch" in out
    for place in ("clip/flux/t5.safetensors", "allegro/Allegro/text_encoder/model.safetensors"):
        write_sparse_encoder(comfyui / "models" / place)
        code, out, err = allegro("--comfyui", comfyui, "--only", "text_encoder")
        assert (code, out) == (0, "")
        assert f"have   {comfyui / 'models' / place} (in place of {T5})" in err
        assert not (encoders / T5).exists()
        (comfyui / "models" / place).unlink()


def test_dry_run_lists_and_fetches_nothing(hub: Hub, comfyui: Path, allegro: Run) -> None:
    code, out, _ = allegro("--comfyui", comfyui, "--dry-run")
    assert code == 0
    assert f"fetch  {dit_file(comfyui)}\n       3.8 MB, from {hub.url}/{ALLEGRO}/resolve/{COMMIT}/{DIT}" in out
    assert "5 of 5 files" in out
    assert hub.contents() == []
    assert files_in(comfyui) == []


def test_interpolators_are_explained(allegro: Run, comfyui: Path) -> None:
    code, out, _ = allegro("vfi", "--comfyui", comfyui)
    assert code == 0
    assert "Google Drive" in out
    assert f"convert-vfi ours_small_t.pkl {comfyui}/models/frame_interpolation/ours_small_t.safetensors" in out


# Connections that fail


@pytest.mark.parametrize("fault", ["cut 983040", "reset 1500000"])
def test_a_broken_connection_is_gone_on_with(hub: Hub, comfyui: Path, fault: str) -> None:
    hub.faults[DIT] = [fault, fault]
    assert get_transformer(comfyui) == "SHA-256 stated by the hub"
    assert dit_file(comfyui).read_bytes() == content(hub, DIT)
    spans = [span for _, span in hub.contents()]
    assert spans[0] == ""
    assert len(spans) == 3
    assert all(span.startswith("bytes=") for span in spans[1:])
    if fault.startswith("cut"):
        assert hub.served[DIT] == len(content(hub, DIT)), "bytes were fetched twice"


def test_a_cancelled_download_is_gone_on_with(hub: Hub, comfyui: Path) -> None:
    class Cancelled(Exception):
        pass

    @contextmanager
    def impatient(title: str) -> Iterator[Callable[[int, int], None]]:
        def progress(done: int, total: int) -> None:
            if done > 1_000_000:
                raise Cancelled

        yield progress

    with pytest.raises(Cancelled):
        get_transformer(comfyui, impatient)
    (part,) = dit_file(comfyui).parent.iterdir()
    assert part.name.startswith(".allegro_dit.safetensors.")
    assert part.suffix == ".part"
    done = part.stat().st_size
    assert done > 1_000_000
    reports: list[tuple[int, int]] = []

    @contextmanager
    def watch(title: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: reports.append((done, total))

    get_transformer(comfyui, watch)
    assert hub.contents()[-1] == (DIT, f"bytes={done}-")
    assert reports[0] == (done, len(content(hub, DIT)))
    assert dit_file(comfyui).read_bytes() == content(hub, DIT)
    assert not part.exists()


@pytest.mark.parametrize("fault", ["whole", "shift", "416"])
def test_a_server_that_cannot_resume(hub: Hub, comfyui: Path, fault: str) -> None:
    hub.faults[DIT] = ["cut 1000000", fault]
    get_transformer(comfyui)
    assert dit_file(comfyui).read_bytes() == content(hub, DIT)


def test_a_busy_server_is_waited_for(hub: Hub, comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(hub_module, "_wait", lambda seconds, tick: waited.append(seconds))
    hub.faults[DIT] = ["503", "429 Retry-After: 7", "500"]
    hub.head_faults[DIT] = ["503"]
    get_transformer(comfyui)
    assert waited[-3:] == [0.01, 7.0, 0.04]


def test_waiting_can_be_cancelled(hub: Hub, comfyui: Path) -> None:
    calls: list[int] = []

    @contextmanager
    def watch(title: str) -> Iterator[Callable[[int, int], None]]:
        def progress(done: int, total: int) -> None:
            calls.append(done)
            if len(calls) > 2:
                raise KeyboardInterrupt

        yield progress

    hub.faults[DIT] = ["429 Retry-After: 50"]
    with pytest.raises(KeyboardInterrupt):
        get_transformer(comfyui, watch)


@pytest.mark.parametrize("stalls", ["question", "content"])
def test_cancelling_need_not_wait_for_a_stalled_connection(hub: Hub, comfyui: Path, stalls: str) -> None:
    start = time.monotonic()

    def cancel() -> None:
        if time.monotonic() - start > 0.5:
            raise KeyboardInterrupt

    @contextmanager
    def watch(title: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: cancel()

    (hub.head_faults if stalls == "question" else hub.faults)[DIT] = ["stall 1000"[: 5 if stalls == "question" else None]]
    with pytest.raises(KeyboardInterrupt):
        fetch(make_plan(transformer_alone(comfyui), tick=cancel).missing[0], watch)
    assert time.monotonic() - start < 3
    assert not dit_file(comfyui).exists()


def test_a_server_that_never_sends_all(hub: Hub, comfyui: Path) -> None:
    hub.faults[DIT] = ["cut 65536"] + ["cut 0"] * 20
    with pytest.raises(DownloadError, match=r"6 attempts in a row failed: .*it goes on where it stopped"):
        get_transformer(comfyui)
    assert not dit_file(comfyui).exists()
    assert len(hub.contents()) == 6
    hub.faults.clear()
    get_transformer(comfyui)
    assert hub.contents()[-1] == (DIT, "bytes=65536-")


def test_nobody_answers(comfyui: Path, allegro: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    speak_to("http://127.0.0.1:9", monkeypatch)
    code, _, err = allegro("--comfyui", comfyui)
    assert code == 9
    assert re.search(r"could not be fetched, \d attempts in a row failed", err)
    assert f"http://127.0.0.1:9/{ALLEGRO}/resolve/main/{DIT} (about 5.5 GB) -> {dit_file(comfyui)}" in err


# Wrong content


def test_wrong_bytes_never_get_the_name(hub: Hub, comfyui: Path, allegro: Run) -> None:
    hub.faults[DIT] = ["wrong"]
    code, _, err = allegro("--comfyui", comfyui, "--only", "transformer")
    assert code == 9
    assert "SHA-256 is" in err
    assert files_in(comfyui) == []


def test_what_was_resumed_and_is_wrong_is_fetched_anew(hub: Hub, comfyui: Path) -> None:
    folder = dit_file(comfyui).parent
    folder.mkdir()
    etag = hashlib.sha256(content(hub, DIT)).hexdigest()
    (folder / f".allegro_dit.safetensors.{etag[:16]}.part").write_bytes(bytes(5000))
    (folder / ".allegro_dit.safetensors.0000000000000000.part").write_bytes(b"of another version")
    get_transformer(comfyui)
    assert [span for _, span in hub.contents()] == ["bytes=5000-", ""]
    assert files_in(folder) == ["allegro-download.json", "allegro_dit.safetensors"]


def test_more_than_announced(hub: Hub, comfyui: Path) -> None:
    hub.faults[DIT] = ["longer"]
    with pytest.raises(DownloadError, match="sent more than the"):
        get_transformer(comfyui)
    assert not dit_file(comfyui).exists()


def test_a_known_file_that_changed_is_not_even_begun(hub: Hub, comfyui: Path, allegro: Run) -> None:
    repository = TEXT_ENCODERS["fp16"].repository
    hub.files[repository, T5] = bytes(len(content(hub, T5, repository)))
    code, _, err = allegro("--comfyui", comfyui)
    assert code == 9
    assert "is not the file this program knows" in err
    assert hub.contents() == []


def test_without_a_checksum_the_header_is_checked(hub: Hub, comfyui: Path) -> None:
    hub.etags[DIT] = "of-a-mirror"
    assert get_transformer(comfyui).startswith("size and header")
    dit_file(comfyui).unlink()
    hub.faults[DIT] = ["wrong"]
    with pytest.raises(DownloadError, match="is not a safetensors file"):
        get_transformer(comfyui)
    assert not dit_file(comfyui).exists()


def test_another_model_under_the_name_is_refused(hub: Hub, comfyui: Path, allegro: Run) -> None:
    hub.files[ALLEGRO, DIT] = content(hub, VAE)
    code, _, err = allegro("--comfyui", comfyui, "--only", "transformer")
    assert code == 9
    assert "expected an Allegro text-to-video transformer" in err
    hub.files["rhymes-ai/Allegro-TI2V", DIT] = (bundled_model("tiny") / DIT).read_bytes()
    hub.files["rhymes-ai/Allegro-TI2V", "transformer/config.json"] = content(hub, "transformer/config.json")
    code, _, err = allegro("ti2v", "--comfyui", comfyui, "--only", "transformer")
    assert code == 9
    assert "it is another model (Allegro text-to-video transformer" in err


# Refusals


@pytest.mark.parametrize(("fault", "words"), [
    ("404 X-Error-Code: EntryNotFound", f"{ALLEGRO} has no file {DIT} at main"),
    ("404 X-Error-Code: RepoNotFound", f"{ALLEGRO} has no file"),
    ("404", f"{ALLEGRO} has no file"),
    ("403 X-Error-Code: GatedRepo", "accept its terms"),
    ("403", "was refused: HTTP status 403"),
])
def test_refusals_are_explained_and_not_repeated(hub: Hub, comfyui: Path, allegro: Run, fault: str, words: str) -> None:
    hub.head_faults[DIT] = [fault]
    code, _, err = allegro("--comfyui", comfyui)
    assert code == 9
    assert words in err
    assert "To fetch by hand:" in err
    assert [request for request in hub.requests if request[1] == DIT] == [("HEAD", DIT, "")]
    assert hub.contents() == [], "something was fetched before everything was asked for"


def test_an_answer_of_something_else_than_a_hub(comfyui: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_server, "COMMIT", "")
    with pytest.raises(DownloadError, match="does not answer as a model hub does"):
        get_transformer(comfyui)


def test_what_is_there_is_never_replaced_unasked(hub: Hub, comfyui: Path, allegro: Run) -> None:
    dit_file(comfyui).parent.mkdir()
    dit_file(comfyui).write_bytes(content(hub, DIT)[:5000])
    code, _, err = allegro("--comfyui", comfyui, "--only", "transformer")
    assert code == 9
    assert "is truncated" in err
    assert "was left as it is" in err
    assert dit_file(comfyui).stat().st_size == 5000
    assert allegro("--comfyui", comfyui, "--only", "transformer", "--force")[0] == 0
    assert dit_file(comfyui).read_bytes() == content(hub, DIT)


def test_no_room_is_said_before_anything_is_fetched(hub: Hub, comfyui: Path, allegro: Run,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(comfyui)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=66 * 2**20))
    code, _, err = allegro("--comfyui", comfyui)
    assert code == 5
    assert "has 69.2 MB left, and 7.7 MB are to be fetched" in err
    assert hub.contents() == []
    etag = hashlib.sha256(content(hub, DIT)).hexdigest()
    dit_file(comfyui).parent.mkdir()
    # What is there already needs no room.
    (dit_file(comfyui).parent / f".allegro_dit.safetensors.{etag[:16]}.part").write_bytes(content(hub, DIT))
    (comfyui / "models" / "vae").mkdir()
    etag = hashlib.sha256(content(hub, VAE)).hexdigest()
    (comfyui / "models" / "vae" / f".allegro_vae.safetensors.{etag[:16]}.part").write_bytes(content(hub, VAE)[:-1])
    code, _, err = allegro("--comfyui", comfyui)
    assert code == 0, err
    assert (VAE, f"bytes={len(content(hub, VAE)) - 1}-") in hub.contents()


def test_two_at_once(hub: Hub, comfyui: Path) -> None:
    @contextmanager
    def watch(title: str) -> Iterator[Callable[[int, int], None]]:
        with pytest.raises(DownloadError, match="by another program already"):
            get_transformer(comfyui)
        yield lambda done, total: None

    get_transformer(comfyui, watch)


def test_missing_package(comfyui: Path, allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = allegro("--comfyui", comfyui)
    assert code == 7
    assert "pip install huggingface_hub" in err
    assert f"t5xxl_fp16.safetensors of comfyanonymous/flux_text_encoders (about 9.8 GB) -> {comfyui}" in err
    code, out, _ = allegro("--comfyui", comfyui, "--dry-run")
    assert code == 0
    assert "about 5.5 GB" in out
    with pytest.raises(MissingDependency):
        hub_module.import_hub()


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("t2v",), 2, "--comfyui DIR"),
    (("t3v", "--to", "x"), 2, "invalid choice"),
    (("--comfyui", "nowhere"), 9, "is not the folder of a ComfyUI"),
    (("--comfyui", "ComfyUI", "--to", "x"), 2, "not allowed with"),
    (("--comfyui", "ComfyUI", "--only", "tokenizer"), 2, "ComfyUI brings its own tokenizer"),
    (("--to", "file"), 9, "is a file"),
])
def test_usage(comfyui: Path, allegro: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int,
               words: str) -> None:
    monkeypatch.chdir(comfyui.parent)
    Path("file").touch()
    found = allegro(*arguments)
    assert found[0] == code
    assert words in found[2]


# The settings of huggingface_hub, in processes of their own


def process(*arguments: object, limit: int | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from allegro_model.cli import main; sys.exit(main(sys.argv[1:]))"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); " + code
    command = [sys.executable, "-c", code, "download", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})


def test_a_mirror_and_the_offline_switch_are_respected(hub: Hub, comfyui: Path) -> None:
    offline = process("--comfyui", comfyui, "--only", "transformer", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline.returncode == 9
    assert f"{DIT} of {ALLEGRO} is missing, and HF_HUB_OFFLINE is set" in offline.stderr
    assert f"-> {dit_file(comfyui)}" in offline.stderr
    assert hub.requests == []
    done = process("--comfyui", comfyui, "--only", "transformer", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert "Fetching allegro_dit.safetensors: done" in done.stderr
    assert dit_file(comfyui).read_bytes() == content(hub, DIT)
    again = process("--comfyui", comfyui, "--only", "transformer", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, "everything is there, the network is not needed"


@pytest.mark.skipif(os.name == "nt", reason="no limits on file sizes there")
def test_a_disk_that_fills_up(hub: Hub, comfyui: Path) -> None:
    full = process("--comfyui", comfyui, "--only", "transformer", HF_ENDPOINT=hub.url, limit=1_000_000)
    assert full.returncode == 5, full.stderr
    assert "the file grew larger than this disk or account allows" in full.stderr
    assert "What was fetched so far is kept" in full.stderr
    assert not dit_file(comfyui).exists()
    assert process("--comfyui", comfyui, "--only", "transformer", HF_ENDPOINT=hub.url).returncode == 0
    assert (DIT, "bytes=1000000-") in hub.contents()


def test_a_read_only_folder(hub: Hub, comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dit_file(comfyui).parent.touch()  # a file has the name of the folder
    with pytest.raises(OutputError):
        get_transformer(comfyui)


def test_ctrl_c_says_how_to_go_on(hub: Hub, comfyui: Path, allegro: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "_write", interrupted)
    code, _, err = allegro("--comfyui", comfyui, "--only", "transformer")
    assert code == 130
    assert "Cancelled during: Fetching allegro_dit.safetensors" in err
    assert "run the same again to go on" in err


# What loaders say


def test_loaders_name_the_command(tmp_path: Path) -> None:
    (tmp_path / "m" / "transformer").mkdir(parents=True)
    (tmp_path / "m" / "text_encoder").mkdir()
    with pytest.raises(CheckpointError, match=r"no folder vae/.*python -m allegro_model download t2v --to .*m --only vae"):
        read_header(tmp_path / "m", subfolder="vae")
    sentence = released.how_to_get("transformer", "ti2v")
    assert "rhymes-ai/Allegro-TI2V (5.6 GB)" in sentence
    assert "models/diffusion_models/allegro_ti2v.safetensors" in sentence
    assert "download ti2v --comfyui DIR" in sentence


def test_snapshot_targets_keep_the_published_names(tmp_path: Path) -> None:
    targets = snapshot_targets(released_files("t2v-40x360p"), tmp_path)
    assert all(target.path == tmp_path / target.file.snapshot for target in targets)
    assert {target.file.repository for target in targets} == {"rhymes-ai/Allegro-T2V-40x360P", TEXT_ENCODERS["fp16"].repository}
