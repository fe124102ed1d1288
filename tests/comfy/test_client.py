"""`allegro submit` and its Python interface with real servers. How they fail: tests/unit/test_client.py."""

import time
from pathlib import Path

import numpy as np
import pytest
from comfy.client import PACK, Server
from commands import run_command
from PIL import Image

from allegro_model.client import ComfyServer, text_to_video
from allegro_model.errors import PromptRefused, RunInterrupted
from allegro_model.media import read_frames

pytestmark = pytest.mark.comfy

PROMPT = "a red circle moves right over a blue background"


def test_a_picture_is_uploaded_and_moved(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = np.zeros((64, 96, 3), np.uint8) + np.array([30, 60, 200], np.uint8)
    y, x = np.mgrid[:64, :96]
    picture[(y - 32) ** 2 + (x - 30) ** 2 < 144] = (220, 40, 40)
    Image.fromarray(picture).save(tmp_path / "day.png")
    (tmp_path / "shots.csv").write_text(f"prompt,first_frame,name,sampler.steps\n{PROMPT},day.png,moved,6\n", encoding="utf-8")
    words = ["submit", "--server", server.url, "--list", str(tmp_path / "shots.csv"), "-o", str(tmp_path / "out"),
             "--preview", str(tmp_path / "preview.jpg")]
    code, out, err = run_command(capsys, words)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "out" / "moved.mp4")
    frames = (np.asarray(read_frames(Path(out.strip()))[0]).transpose(1, 2, 3, 0) + 1) * 127.5  # [T, H, W, 3]
    assert len(frames) == 24
    assert np.abs(frames[0] - picture).mean() < 15
    assert Image.open(tmp_path / "preview.jpg").width > 1
    runs = server.log.count("got prompt")
    assert run_command(capsys, words[:-2])[:2] == (0, out)
    assert server.log.count("got prompt") == runs


def test_a_shipped_workflow_with_other_values(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workflow,) = (PACK / "workflows" / "api").glob("*text_to_video_tiny.json")
    code, out, err = run_command(capsys, [
        "submit", PROMPT, "--server", server.url, "--workflow", str(workflow), "--steps", "2", "--frames", "8", "--width", "64",
        "--set", "CreateVideo.fps=12", "-o", str(tmp_path)])
    assert code == 0, err
    frames, fps = read_frames(Path(out.strip()))
    assert tuple(frames.shape) == (3, 8, 64, 64)
    assert fps == 12


def test_a_refusal_says_what_is_wrong(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_command(capsys, ["submit", PROMPT, "--server", server.url, "--width", "650", "-o", str(tmp_path)])
    assert code == 3
    assert "node size (EmptyAllegroLatentVideo)" in err
    assert "width=650: must be a multiple of 16" in err
    with pytest.raises(PromptRefused, match=r"LoadAllegroVAE.*is not among the models"):
        ComfyServer(server.url).submit(text_to_video(PROMPT, vae="none.safetensors"))
    with pytest.raises(PromptRefused, match="NoSuchNode"):
        ComfyServer(server.url).submit({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_cancelling_touches_only_the_own_run(server: Server) -> None:
    client = ComfyServer(server.url)
    own = client.submit(text_to_video(PROMPT, steps=9000))
    waiting = client.submit(text_to_video(PROMPT, steps=9001))
    other = client.submit(text_to_video(PROMPT, steps=1, seed=99))
    end = time.monotonic() + 60
    while client.state(own).status != "running":
        assert time.monotonic() < end
        time.sleep(0.1)
    client.cancel(waiting)
    assert client.state(waiting).status == "unknown"
    assert client.state(own).status == "running"
    start = time.monotonic()
    client.cancel(own)
    assert time.monotonic() - start < 5
    with pytest.raises(RunInterrupted, match="somebody interrupted"):
        client.wait(own)
    assert [file.filename[-4:] for file in client.wait(other)] == [".mp4"]
