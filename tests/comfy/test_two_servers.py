"""`allegro submit` with two real servers of which one is killed. Everything else about it: test_client.py."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from comfy.client import Server
from comfy.test_client import PROMPT
from PIL import Image

from allegro_model.client import Batch, ComfyServer, Event, Job, Limits, Watcher, batch, build_job
from allegro_model.media import read_frames

pytestmark = pytest.mark.comfy


class Seen(Watcher):
    """Keeps what is told, and calls `at_begin` when a job begins."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.remarks: list[str] = []
        self.begins: list[str] = []
        self.at_begin = lambda: None

    def begun(self, job: Job) -> None:
        self.begins.append(job.server)
        self.at_begin()

    def event(self, job: Job, event: Event) -> None:
        self.events.append(event)

    def remark(self, text: str) -> None:
        self.remarks.append(text)


def test_two_servers_of_which_one_is_killed(server: Server, bare: Server, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a run: all clips are there in the end, and no other run took place twice."""
    monkeypatch.setattr(batch, "GRACE_SECONDS", 1.0)
    before, before_bare = (each.log.count("got prompt") for each in (server, bare))
    jobs = [build_job("tiny", {"prompt": PROMPT, "seed": seed, "steps": 20}, {}) for seed in range(1, 7)]
    seen = Seen()

    def kill_the_second() -> None:
        if seen.begins.count(bare.url) == 2 and bare.process is not None:
            threading.Timer(0.3, bare.process.kill).start()

    seen.at_begin = kill_the_second
    found = Batch(jobs, [ComfyServer(server.url), ComfyServer(bare.url)], tmp_path / "out", watcher=seen,
                  limits=Limits(patience=60)).run()
    assert [job.error for job in found] == [None] * 6
    clips = [read_frames(path)[0] for job in found for path in job.files]
    assert [tuple(clip.shape) for clip in clips] == [(3, 24, 64, 96)] * 6
    assert any("cannot be reached" in text for text in seen.remarks), "it was killed too late"
    runs = server.log.count("got prompt") - before, bare.log.count("got prompt") - before_bare
    assert runs[1] == 2
    assert sum(runs) == 7
    assert [job.server for job in found].count(bare.url) == 1
    steps = [(event.done, event.total) for event in seen.events if event.node == "sampler"]
    assert (20, 20) in steps
    pictures = [Image.open(io.BytesIO(event.preview)) for event in seen.events if event.preview is not None]
    assert len(pictures) > 20
    assert np.asarray(pictures[-1].convert("RGB")).std() > 1
