"""Scripts that talk to ComfyUI servers, here to ones that fail in every way they can. One real test: tests/comfy/test_client.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comfy_server import PREVIEW, FakeComfy, running
from commands import run_command

from allegro_model.client import (
    JOURNAL,
    Batch,
    ComfyServer,
    Event,
    Job,
    Limits,
    Watcher,
    batch,
    build_job,
    server,
    text_to_video,
)
from allegro_model.client.events import Listener
from allegro_model.client.journal import Journal
from allegro_model.errors import (
    AllegroError,
    Cancelled,
    OutputError,
    PromptRefused,
    RunFailed,
    RunInterrupted,
    RunLost,
    ServerError,
    ServerUnreachable,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(batch, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(batch, "_LONGEST_WAIT", 0.1)
    monkeypatch.setattr(batch, "GRACE_SECONDS", 0.5)


@pytest.fixture
def comfy() -> Iterator[FakeComfy]:
    fake = FakeComfy()
    with running(fake):
        yield fake


@pytest.fixture
def pair() -> Iterator[tuple[FakeComfy, FakeComfy]]:
    fakes = FakeComfy(), FakeComfy()
    with running(*fakes):
        yield fakes


def jobs(*prompts: str, **options: Any) -> list[Job]:
    return [build_job("tiny", {"prompt": prompt, **options}, {}) for prompt in prompts]


def text(prompt: str) -> bytes:
    return prompt.encode() * 100


def wait_until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def contents(found: Sequence[Job]) -> list[bytes]:
    return [path.read_bytes() for job in found for path in job.files]


# One run


def test_a_run_tells_its_steps_and_gives_its_files(comfy: FakeComfy, tmp_path: Path) -> None:
    events: list[Event] = []
    comfy.step_seconds = 0.1  # the socket has time to open
    (file,) = ComfyServer(comfy.url).run(text_to_video("the sun rises"), events.append)
    assert file.filename.endswith(".mp4")
    steps = [(event.node, event.done, event.total) for event in events if event.total]
    assert ("sampler", 3, 3) in steps
    assert steps == sorted(steps)
    assert PREVIEW in [event.preview for event in events]
    path = ComfyServer(comfy.url).download(file, tmp_path / "clip.mp4")
    assert path.read_bytes() == text("the sun rises")
    with pytest.raises(OutputError, match="already exists"):
        ComfyServer(comfy.url).download(file, path)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(("prompt", "error", "words"), [
    ("refuse", PromptRefused, r"node sampler \(AllegroSampler\): Value too small: steps: 0"),
    ("half", PromptRefused, "Value too small"),
    ("fail", RunFailed, r"node sampler \(AllegroSampler\) failed with RuntimeError: too hot$"),
])
def test_what_goes_wrong_is_explained(comfy: FakeComfy, prompt: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ComfyServer(comfy.url).run(text_to_video(prompt))
    assert not comfy.queue


def test_what_a_node_refuses_is_said_once(comfy: FakeComfy) -> None:
    """ComfyUI repeats it for every input that the node looks at."""
    errors = [{"type": "custom_validation_failed", "message": "Custom validation failed for node", "details": f"{name} - width=100: no"}
              for name in ("width", "height")]
    answer = {"node_errors": {"sampler": {"errors": [*errors, {"message": "Value too small", "details": "steps: 0"}]}}}
    comfy.faults["POST /prompt"] = [json.dumps(answer)]
    with pytest.raises(PromptRefused) as refused:
        ComfyServer(comfy.url).run(text_to_video("a"))
    where = "node sampler (AllegroSampler): "
    assert str(refused.value).endswith(f"refused the workflow: {where}width=100: no; {where}Value too small: steps: 0")


def test_cancelling_touches_only_the_own_run(comfy: FakeComfy) -> None:
    client = ComfyServer(comfy.url)
    other, own, waiting = (client.submit(text_to_video(prompt)) for prompt in ("forever a", "forever b", "c"))
    wait_until(lambda: comfy.running == other)
    client.cancel(own)
    assert client.state(own).status == "unknown"
    assert client.state(other).status == "running"
    assert client.state(waiting).ahead == 1
    client.cancel(other)
    with pytest.raises(RunInterrupted):
        client.wait(other)
    assert client.wait(waiting)


def test_waiting_can_be_stopped_and_limited(comfy: FakeComfy) -> None:
    client = ComfyServer(comfy.url)
    prompt_id = client.submit(text_to_video("forever"))
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        client.wait(prompt_id, stop=stop)
    assert time.monotonic() - start < 2
    with pytest.raises(RunFailed, match=r"did not finish the run in 0\.3 s"):
        client.wait(prompt_id, timeout=0.3)
    assert client.state(prompt_id).status == "ended"
    with pytest.raises(RunLost, match="does not know the run"):
        client.wait("nobody")


def test_a_lost_socket_costs_only_steps(comfy: FakeComfy) -> None:
    comfy.faults["GET /ws"] = ["500", "reset"]
    assert ComfyServer(comfy.url).run(text_to_video("a"))


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:x", "file:///etc/passwd", "http://a:1/?q=2"])
def test_only_addresses_of_servers_are_taken(url: str) -> None:
    with pytest.raises(AllegroError, match="is no address of a server"):
        ComfyServer(url)


def test_an_address_may_be_short_and_keeps_its_password_to_itself() -> None:
    assert ComfyServer("gpu1:8188").url == "http://gpu1:8188"
    assert ComfyServer("https://me:se%20cret@gpu1/comfy/").url == "https://gpu1:443/comfy"
    assert "cret" not in repr(ComfyServer("https://me:secret@gpu1"))
    with pytest.raises(AllegroError, match=r"'http://\.\.\.@gpu1:99999' is no address"):
        ComfyServer("http://me:secret@gpu1:99999")


def test_answers_that_are_no_comfyui(comfy: FakeComfy) -> None:
    comfy.faults["GET /queue"] = ["404", "302", "503", "cut", "reset"]
    for error, words in ((ServerError, "404"), (ServerError, "sends GET /queue on to"), (ServerUnreachable, "503"),
                         (ServerUnreachable, "cannot be reached"), (ServerUnreachable, "cannot be reached")):
        with pytest.raises(error, match=words):
            ComfyServer(comfy.url).check()
    ComfyServer(comfy.url).check()


@pytest.mark.parametrize(("path", "answer"), [
    ("GET /queue", []), ("GET /queue", [7]), ("GET /queue", {"queue_running": 3}), ("GET /queue", {"queue_running": [[]]}),
    ("GET /queue", {"queue_pending": [[1, "a"], ["b", "c"]]}), ("GET /history/a", {"a": []}), ("GET /history/a", {"a": {"status": 1}}),
    ("GET /history/a", {"a": {"outputs": [1]}}), ("GET /history/a", {"a": {"status": {"status_str": "error", "messages": [[1]]}}}),
    ("POST /prompt", {"node_errors": [1]}), ("POST /prompt", {"node_errors": {"1": 2}}),
])
def test_json_that_is_not_a_comfyui_s(comfy: FakeComfy, path: str, answer: Any) -> None:
    comfy.faults[path] = [json.dumps(answer)] * 2
    with pytest.raises(ServerError, match=r"answered /[a-z]+.* with .*which a ComfyUI does not"):
        ComfyServer(comfy.url).run(text_to_video("a")) if "prompt" in path else ComfyServer(comfy.url).wait("a")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "3", None, [1]])
def test_steps_that_are_no_numbers(value: Any) -> None:
    events: list[Event] = []
    message = json.dumps({"type": "progress", "data": {"prompt_id": "a", "value": value, "max": value}})
    listener = Listener("a", lambda path: ())
    assert not any(listener._ends(found, events.append) for found in (message, "[" * 100_000, "[1]", '{"type": [], "data": 1}'))
    assert events == [Event()]


def test_a_result_that_does_not_fit_the_disk(comfy: FakeComfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = ComfyServer(comfy.url).run(text_to_video("a" * 21_000))  # 2 MiB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OutputError, match=r"about 2\.0 MiB are needed and the disk has 1\.0 MiB left\. Free some space"):
        ComfyServer(comfy.url).download(file, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_an_upload_is_named_by_its_content(comfy: FakeComfy, tmp_path: Path) -> None:
    content = bytes(range(256)) * 50 + b"\r\n--x\r\n"
    (tmp_path / "a b.PNG").write_bytes(content)
    name = ComfyServer(comfy.url).upload(tmp_path / "a b.PNG")
    assert name.endswith(".png")
    assert comfy.uploads == {name: content}
    with pytest.raises(AllegroError, match="Check the path"):
        ComfyServer(comfy.url).upload(tmp_path / "none.png")


# Many jobs


def run(found: Sequence[Job], fakes: Sequence[FakeComfy], folder: Path, **options: Any) -> list[Job]:
    limits = Limits(**{"patience": 5.0, **options.pop("limits", {})})
    return Batch(found, [ComfyServer(fake.url) for fake in fakes], folder, limits=limits, **options).run()


def test_two_servers_share_the_work(pair: tuple[FakeComfy, FakeComfy], tmp_path: Path) -> None:
    for fake in pair:
        fake.step_seconds = 0.03
    prompts = [f"prompt {number}" for number in range(10)]
    found = run(jobs(*prompts, prompts[0]), pair, tmp_path / "new" / "folder")
    assert contents(found) == [text(prompt) for prompt in prompts]
    assert sorted(pair[0].runs + pair[1].runs) == sorted(prompts)
    assert min(len(fake.runs) for fake in pair) >= 3


def test_a_server_that_dies_loses_nothing(pair: tuple[FakeComfy, FakeComfy], tmp_path: Path) -> None:
    """Its job is done by the other; when it comes back it takes part again."""
    first, second = pair
    first.mortal, first.dead_seconds = True, 1.2
    second.step_seconds = 0.1
    prompts = ["die", *(f"prompt {number}" for number in range(10))]
    found = run(jobs(*prompts), pair, tmp_path)
    assert contents(found) == [text(prompt) for prompt in prompts]
    assert second.runs.count("die") == 1
    assert sorted(first.runs[1:] + second.runs) == sorted(prompts), "something was done twice"
    assert len(first.runs) > 1, "it never came back"


def test_a_single_server_is_waited_for(comfy: FakeComfy, tmp_path: Path) -> None:
    comfy.mortal, comfy.dead_seconds = True, 0.8
    found = run(jobs("die", "b"), [comfy], tmp_path)
    assert contents(found) == [text("die"), text("b")]
    assert comfy.runs == ["die", "die", "b"]


def test_patience_has_an_end_and_nothing_done_is_lost(comfy: FakeComfy, tmp_path: Path) -> None:
    comfy.mortal = True
    with pytest.raises(ServerUnreachable, match=r"No server has answered for 0\.7 s"):
        run(jobs("a", "die"), [comfy], tmp_path, limits={"patience": 0.7})
    comfy.start()
    assert contents(run(jobs("a", "die"), [comfy], tmp_path)) == [text("a"), text("die")]
    assert comfy.runs == ["a", "die", "die"]


def test_a_run_is_gone_on_with_after_a_short_break(pair: tuple[FakeComfy, FakeComfy], tmp_path: Path) -> None:
    """The connection is gone for a moment; the run is neither given to the idle server nor submitted again."""
    first, second = pair
    batch_jobs = jobs("hold")
    batch_jobs[0].runs.clear()
    thread_result: list[list[Job]] = []
    thread = threading.Thread(target=lambda: thread_result.append(run(batch_jobs, pair, tmp_path)))
    thread.start()
    wait_until(lambda: first.runs or second.runs)
    busy = first if first.runs else second
    busy.faults["GET *"] = ["reset"] * 3
    wait_until(lambda: not busy.faults["GET *"] or len(busy.faults["GET *"]) == 0)
    busy.release.set()
    thread.join(10)
    assert contents(thread_result[0]) == [text("hold")]
    assert first.runs + second.runs == ["hold"]


def test_the_copy_of_a_run_that_was_taken_over_is_cancelled(pair: tuple[FakeComfy, FakeComfy], tmp_path: Path) -> None:
    """A network that is gone for long: the server works on, unseen, until it can be told."""
    first, second = pair
    results: list[list[Job]] = []
    thread = threading.Thread(target=lambda: results.append(run(jobs("hold", "hold too"), pair, tmp_path)))
    thread.start()
    wait_until(lambda: first.running and second.running)
    mine, theirs = first.runs[0], second.runs[0]
    first.faults["GET *"] = ["reset"] * 10_000
    second.release.set()
    wait_until(lambda: second.runs == [theirs, mine])
    second.release.clear()
    first.faults.clear()
    wait_until(lambda: first.history)
    second.release.set()
    thread.join(10)
    assert sorted(contents(results[0])) == sorted([text(mine), text(theirs)])
    assert [entry["status"]["messages"][0][0] for entry in first.history.values()] == ["execution_interrupted"]


@pytest.mark.parametrize("fault", ["500", "reset", "deaf", "503"])
@pytest.mark.parametrize("request_", ["POST /prompt", "GET /view", "GET /queue", "GET *"])
def test_nothing_is_done_twice_when_an_answer_is_lost(comfy: FakeComfy, tmp_path: Path, request_: str, fault: str) -> None:
    first = [] if request_ in ("POST /prompt", "GET /view") else [""]  # the question at the start, whether anybody is there
    comfy.faults[request_] = [*first, fault, fault]
    found = run(jobs("a", "b"), [comfy], tmp_path)
    assert contents(found) == [text("a"), text("b")]
    assert comfy.runs == ["a", "b"]


@pytest.mark.parametrize("request_", ["POST /upload/image", "GET /view"])
def test_a_server_that_always_fails_at_one_thing_ends_the_job(comfy: FakeComfy, tmp_path: Path, request_: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_MOST_BREAKS", 4)
    comfy.faults[request_] = ["500"] * 100
    (tmp_path / "a.png").write_bytes(b"a")
    found = jobs("a", first_frame=tmp_path / "a.png")
    (job,) = run(found, [comfy], tmp_path / "out", limits={"retries": 1})
    assert "500" in str(job.error)
    assert 80 < len(comfy.faults[request_]) < 100


def test_half_a_file_is_no_result(comfy: FakeComfy, tmp_path: Path) -> None:
    comfy.faults["GET /view"] = ["cut", "cut"]
    assert contents(run(jobs("a"), [comfy], tmp_path)) == [text("a")]
    assert comfy.runs == ["a"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_tried_again_and_what_is_not(comfy: FakeComfy, tmp_path: Path) -> None:
    found = run(jobs("fail once", "refuse", "fail always", "b", "half"), [comfy], tmp_path)
    assert [type(job.error) for job in found] == [type(None), PromptRefused, RunFailed, type(None), PromptRefused]
    assert [comfy.runs.count(prompt) for prompt in ("fail once", "refuse", "fail always", "b")] == [2, 0, 3, 1]
    assert comfy.requests.count("POST /prompt") == 2 + 1 + 3 + 1 + 1
    assert contents(found) == [text("fail once"), text("b")]


def test_a_run_that_somebody_cancels_stays_cancelled(comfy: FakeComfy, tmp_path: Path) -> None:
    threading.Timer(0.4, lambda: comfy.interrupt(None)).start()
    (job,) = run(jobs("forever"), [comfy], tmp_path)
    assert isinstance(job.error, RunInterrupted)
    assert comfy.runs == ["forever"]


def test_a_run_that_never_ends_is_cancelled_and_tried_again(comfy: FakeComfy, tmp_path: Path) -> None:
    (job,) = run(jobs("forever"), [comfy], tmp_path, limits={"timeout": 0.3, "retries": 1})
    assert "did not finish the run" in str(job.error)
    assert comfy.runs == ["forever"] * 2
    assert not comfy.running


def test_each_result_is_there_at_once(comfy: FakeComfy, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: run(jobs("a", "hold"), [comfy], tmp_path))
    thread.start()
    wait_until(lambda: list(tmp_path.glob("a-*.mp4")))
    assert comfy.runs[:1] == ["a"]
    comfy.release.set()
    thread.join(10)


# The journal


def test_finished_work_is_not_done_again(comfy: FakeComfy, tmp_path: Path) -> None:
    first = run(jobs("a", "b"), [comfy], tmp_path)
    again = run(jobs("c", "b", "a"), [comfy], tmp_path)
    assert contents(again) == [text("c"), text("b"), text("a")]
    assert comfy.runs == ["a", "b", "c"]
    first[0].files[0].unlink()
    assert contents(run(jobs("a"), [comfy], tmp_path)) == [text("a")]
    assert comfy.runs == ["a", "b", "c"], "the server still has it"
    run(jobs("a"), [comfy], tmp_path, force=True)
    assert comfy.runs == ["a", "b", "c"]
    run(jobs("a"), [comfy], tmp_path, again=True)
    assert comfy.runs == ["a", "b", "c", "a"]


def test_finished_work_needs_no_server(comfy: FakeComfy, tmp_path: Path) -> None:
    run(jobs("a"), [comfy], tmp_path)
    comfy.die()
    assert contents(run(jobs("a"), [comfy], tmp_path)) == [text("a")]
    with pytest.raises(ServerUnreachable, match="cannot be reached"):
        run(jobs("b"), [comfy], tmp_path)


def test_the_server_is_asked_what_finished_meanwhile(comfy: FakeComfy, tmp_path: Path) -> None:
    Batch(jobs("a", "b"), [ComfyServer(comfy.url)], tmp_path).submit()
    wait_until(lambda: comfy.runs == ["a", "b"])
    Batch(jobs("a", "b"), [ComfyServer(comfy.url)], tmp_path).submit()
    assert contents(run(jobs("a", "b"), [comfy], tmp_path)) == [text("a"), text("b")]
    assert comfy.runs == ["a", "b"]


@pytest.mark.parametrize("torn", [b"", b'{"job": "x", "ev', b"\xff\xfe\n{}\n[1]\n"])
def test_a_crash_at_any_line_is_survived(comfy: FakeComfy, tmp_path: Path, torn: bytes) -> None:
    """The journal is cut after each of its lines; what it does not say must come from the server."""
    run(jobs("a", "b"), [comfy], tmp_path)
    whole = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    for count in range(1, len(whole) + 1):
        (tmp_path / JOURNAL).write_bytes(b"".join(whole[:count]) + torn)
        for path in tmp_path.glob("*.mp4"):
            if path.name.encode() not in b"".join(whole[:count]):
                path.unlink()
        assert contents(run(jobs("a", "b"), [comfy], tmp_path)) == [text("a"), text("b")]
    assert comfy.runs.count("a") == 1


def test_a_line_that_was_torn_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"job": "a", "ev')
    journal = Journal(tmp_path)
    journal.submitting("a", "http://x", "1")
    journal.close()
    again = Journal(tmp_path)
    assert again.of("a").runs == {"http://x": "1"}
    again.close()


@pytest.mark.parametrize("system", ["fcntl", "msvcrt"])
def test_two_processes_do_not_work_in_one_folder(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "nt" and system == "fcntl":
        pytest.skip("Windows has no fcntl")
    if os.name != "nt" and system == "msvcrt":
        import fcntl

        def locking(descriptor: int, mode: int, count: int) -> None:
            assert (os.lseek(descriptor, 0, os.SEEK_CUR), mode, count) == (2**30, 2, 1)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PermissionError(13, "Permission denied") from None

        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    journal = Journal(tmp_path)
    with pytest.raises(OutputError, match="Another process is working"):
        Journal(tmp_path)
    journal.submitting("a", "http://x", "1")
    journal.close()
    again = Journal(tmp_path)
    assert again.of("a").runs == {"http://x": "1"}
    again.close()


def test_a_foreign_file_is_never_replaced(comfy: FakeComfy, tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"mine\.mp4 already exists"):
        run(jobs("a", name="mine"), [comfy], tmp_path)
    assert comfy.runs == []
    assert (tmp_path / "mine.mp4").read_bytes() == b"precious"
    assert contents(run(jobs("a", name="mine"), [comfy], tmp_path, force=True)) == [text("a")]
    assert contents(run(jobs("b", name="mine.2"), [comfy], tmp_path)) == [text("b")]
    (tmp_path / "mine.mp4").unlink()
    assert contents(run(jobs("c", name="mine"), [comfy], tmp_path)) == [text("c")], "mine.2.mp4 is not one of its results"
    with pytest.raises(AllegroError, match="would both be called 'X'"):
        Batch([*jobs("a", name="x"), *jobs("b", name="X")], [], tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", "x.", "x ", "a\nb", "c:x", "é" * 150, "NUL", "con.a", "Com1 .x", "lpt²", "a+2"])
def test_a_name_is_that_of_a_file_in_the_folder(name: str) -> None:
    with pytest.raises(AllegroError, match="is no name for a result"):
        jobs("a", name=name)


@pytest.mark.parametrize("name", ["a.2", "a-2", "a+b", "console", "com", "x con", "nul-1"])
def test_a_name_that_may_be_used(name: str) -> None:
    assert jobs("a", name=name)[0].name == name


def test_names_from_a_server_cannot_leave_the_folder() -> None:
    def names(*filenames: str) -> list[str]:
        return batch.result_names("clip", [server.RemoteFile("1", name, "", "output") for name in filenames])

    assert names("a.mp4", "../../b.MP4", "c.latent") == ["clip.mp4", "clip+2.mp4", "clip.latent"]
    assert names("x./../../etc", "y.mp4/../../z", "w", "v.mp4\\..\\u.p/ng") == ["clip.bin", "clip+2.bin", "clip+3.bin", "clip+4.bin"]


# The command


def submit(capsys: pytest.CaptureFixture[str], comfy: FakeComfy, *words: str) -> tuple[int, str, str]:
    return run_command(capsys, ["submit", "--server", comfy.url, *words])


def test_command(comfy: FakeComfy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comfy.step_seconds = 0.1
    words = ["a Red  circle!", "-o", str(tmp_path / "out"), "--preview", str(tmp_path / "p.jpg"), "--json", str(tmp_path / "r.json")]
    code, out, err = submit(capsys, comfy, *words)
    assert code == 0, err
    (path,) = (tmp_path / "out").glob("*.mp4")
    assert out.strip() == str(path)
    assert path.name.startswith("a-red-circle-")
    assert (tmp_path / "p.jpg").read_bytes() == PREVIEW
    assert "done in" in err
    (facts,) = json.loads((tmp_path / "r.json").read_text())["jobs"]
    assert facts["files"] == [str(path)]
    assert facts["submissions"] == 1
    code, out, err = submit(capsys, comfy, "a Red  circle!", "-o", str(tmp_path / "out"))
    assert (code, out.strip()) == (0, str(path))
    assert "was done before" in err
    assert len(comfy.runs) == 1


def test_command_with_a_list(comfy: FakeComfy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("# two\nfirst\n\nrefuse this\n third\n", encoding="utf-8")
    code, out, err = submit(capsys, comfy, "--list", str(tmp_path / "list.txt"), "-o", str(tmp_path))
    assert code == 10
    assert len(out.split()) == 2
    assert "1 of 3 jobs failed: refuse-this-" in err
    assert "Value too small" in err
    assert "(3 of 3)" in err


@pytest.mark.parametrize(("words", "code", "said"), [
    (["refuse"], 3, "Value too small: steps: 0"),
    (["fail", "--retries", "0"], 10, "too hot"),
    (["a", "--list", "x.txt"], 2, "for one video"),
    ([], 2, "Say what to make"),
    (["a", "--server", "nowhere://x"], 3, "is no address"),
    (["--workflow", "none.json"], 3, "Check the path"),
    (["a", "--set", "steps=3"], 2, "expected NODE.INPUT=VALUE"),
    (["a", "--timeout", "0"], 2, "above 0"),
])
def test_command_exit_codes(comfy: FakeComfy, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int,
                            said: str) -> None:
    found, _, err = submit(capsys, comfy, *words, "-o", str(tmp_path))
    assert found == code
    assert said in err


def test_no_wait_then_wait(comfy: FakeComfy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = submit(capsys, comfy, "hold", "-o", str(tmp_path), "--no-wait")
    assert (code, out) == (0, "")
    assert "submitted to" in err
    comfy.release.set()
    code, out, _ = submit(capsys, comfy, "hold", "-o", str(tmp_path))
    assert Path(out.strip()).read_bytes() == text("hold")
    assert comfy.runs == ["hold"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_ctrl_c_cancels_the_own_run_without_pytorch(comfy: FakeComfy, tmp_path: Path, stop: str) -> None:
    """In a process of its own, where importing PyTorch, numpy or safetensors fails."""
    import signal

    # Signals as a terminal has them: a run of tests in the background has SIGINT ignored, and so would this.
    code = ("import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfor name in ('torch', 'numpy', 'safetensors'): sys.modules[name] = None\n"
            "from allegro_model.cli import main\nsys.exit(main())")
    other = ComfyServer(comfy.url).submit(text_to_video("hold"))
    command = [sys.executable, "-c", code, "submit", "--server", comfy.url, "-o", str(tmp_path), "--list", str(tmp_path / "l.txt")]
    (tmp_path / "l.txt").write_text("forever\nnever begun")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(comfy.queue) == 2, 30)
            comfy.release.set()
            wait_until(lambda: "forever" in comfy.runs)
            process.send_signal(getattr(signal, stop))
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()  # else a failure would wait for it for ever
    assert process.returncode == 130, err
    assert "Cancelled" in err
    assert "the same command does the rest" in err
    assert "Traceback" not in err
    assert comfy.runs == ["hold", "forever"]
    assert ComfyServer(comfy.url).wait(other)
    assert comfy.runs == ["hold", "forever"]
    assert [found["status"]["status_str"] for found in comfy.history.values()] == ["success", "error"]


def test_the_package_gives_its_names_without_loading_pytorch_before() -> None:
    code = ("import sys, allegro_model, allegro_model.client\nassert not {'torch', 'numpy'} & set(sys.modules)\n"
            "for name in allegro_model.__all__: assert getattr(allegro_model, name)\n"
            "assert 'torch' in sys.modules\nassert not hasattr(allegro_model, 'Allegro')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_watcher_may_do_nothing(comfy: FakeComfy, tmp_path: Path) -> None:
    assert run(jobs("nothing"), [comfy], tmp_path, watcher=Watcher())[0].files == []


def test_other_commands_say_that_pytorch_is_missing() -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom allegro_model.cli import main\nsys.exit(main(['inspect', 'a']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("PyTorch is missing.")
