"""Graphs and jobs from options, workflows and lists; and the socket that listens."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allegro_model.client import (
    OPTIONS,
    apply_options,
    base_graph,
    build_job,
    override,
    read_graph,
    read_rows,
    text_to_video,
)
from allegro_model.client.graphs import find_node
from allegro_model.client.server import upload_name
from allegro_model.client.websocket import WebSocket
from allegro_model.errors import AllegroError
from allegro_model.loading import bundled_model, load_sampling_defaults

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "day.png"
    path.write_bytes(b"a picture")
    return path


# Graphs


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("model", ["tiny", "released", "Folder"])
def test_built_graphs_have_inputs_of_the_shipped_ones(model: str, given: bool) -> None:
    shipped: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            shipped.setdefault(node["class_type"], set()).update(node["inputs"])
    graph = base_graph(model, given_frames=given)
    for node in graph.values():
        assert node["inputs"].keys() <= shipped[node["class_type"]], node["class_type"]
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph


def test_a_built_graph_has_the_settings_of_its_model() -> None:
    defaults = load_sampling_defaults(bundled_model("tiny-ti2v"))
    graph = base_graph("tiny", given_frames=True)
    assert graph["sampler"]["inputs"]["cfg"] == defaults.guidance_scale
    assert graph["sampler"]["inputs"]["steps"] == defaults.num_steps
    assert graph["transformer"]["inputs"]["model_name"] == "allegro-tiny-ti2v (bundled)"
    released = base_graph("released", given_frames=False)
    assert released["size"]["inputs"] == {"width": 1280, "height": 720, "length": 88, "batch_size": 1}
    (shipped,) = [json.loads(path.read_text(encoding="utf-8")) for path in WORKFLOWS if path.stem.endswith("text_to_video")]
    for kind, key in (("LoadAllegroDiT", "model_name"), ("LoadAllegroT5", "clip_name"), ("LoadAllegroVAE", "vae_name"),
                      ("AllegroSampler", "cfg"), ("AllegroSampler", "steps"), ("CreateVideo", "fps")):
        (wanted,) = [node["inputs"][key] for node in shipped.values() if node["class_type"] == kind]
        assert released[find_node(released, kind)]["inputs"][key] == wanted
    assert base_graph("Mine", given_frames=True)["transformer"]["inputs"]["model_name"] == "Mine/transformer"


def test_options_reach_every_node_they_concern(picture: Path) -> None:
    graph = base_graph("tiny", given_frames=True)
    uploads = apply_options(graph, {
        "prompt": "p", "negative": "", "seed": "7", "steps": 3, "cfg": "2", "width": 64, "height": 48, "frames": 8,
        "first_frame": picture, "last_frame": None, "transformer": "t", "text_encoder": "e", "vae": "v"})
    assert [graph["prompt"]["inputs"]["text"], graph["negative"]["inputs"]["text"]] == ["p", ""]
    assert {key: graph["sampler"]["inputs"][key] for key in ("seed", "steps", "cfg")} == {"seed": 7, "steps": 3, "cfg": 2.0}
    assert [graph["size"]["inputs"][key] for key in ("width", "height", "length")] == [64, 48, 8]
    assert [graph["transformer"]["inputs"]["model_name"], graph["text_encoder"]["inputs"]["clip_name"],
            graph["vae"]["inputs"]["vae_name"]] == ["t", "e", "v"]
    assert graph["first_frame"] == {"class_type": "LoadImage", "inputs": {"image": upload_name(picture)}}
    assert graph["size"]["inputs"]["start_image"] == ["first_frame", 0]
    assert "end_image" not in graph["size"]["inputs"]
    assert uploads == {upload_name(picture): picture}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_seed_can_be_set_in_every_shipped_workflow(path: Path) -> None:
    graph = read_graph(path)
    samplers = [node for node in graph.values() if "seed" in node["inputs"]]
    if samplers:
        apply_options(graph, {"seed": 1234})
    assert all(node["inputs"]["seed"] == 1234 for node in samplers)


def test_a_prompt_is_found_through_other_nodes_and_never_guessed() -> None:
    def text(value: str) -> dict[str, Any]:
        return {"class_type": "CLIPTextEncode", "inputs": {"text": value}}

    graph = {"1": text("old"), "2": text("bad"), "3": {"class_type": "Guide", "inputs": {"conditioning": ["1", 0]}},
             "4": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "negative": ["2", 0]}}, "5": text("unused")}
    apply_options(graph, {"prompt": "new"})
    assert [graph[key]["inputs"]["text"] for key in "125"] == ["new", "bad", "unused"]
    graph["6"] = {"class_type": "KSampler", "inputs": {"positive": ["5", 0], "negative": ["2", 0]}}
    with pytest.raises(AllegroError, match=r"several: nodes 1 \('new'\), 5 \('unused'\)"):
        apply_options(graph, {"prompt": "x"})
    apply_options(graph, {"negative": "x"})
    graph["3"]["inputs"]["conditioning"] = ["3", 0]  # a circle
    apply_options(graph, {"prompt": "y"})
    assert graph["5"]["inputs"]["text"] == "y"


@pytest.mark.parametrize(("options", "words"), [
    ({"steps": "many"}, "steps: 'many' is no whole number"),
    ({"cfg": "x"}, "cfg: 'x' is no number"),
    ({"first_frame": "none.png"}, "has no node AllegroImageToVideo"),
    ({"colour": 1}, "no option 'colour'"),
    ({"steps": 20.7}, "steps: 20.7 is no whole number"),
    ({"steps": [1]}, r"steps: \[1\] is no whole number"),
    ({"steps": float("inf")}, "steps: inf is no whole number"),
    ({"cfg": "nan"}, "cfg: 'nan' is no number"),
    ({"seed": 10**400}, "seed: 1000"),
    ({"cfg": True}, "cfg: True is no number"),
    ({"vae": 1}, "vae: 1 is no text"),
    ({"prompt": ["a"]}, r"prompt: \['a'\] is no text"),
])
def test_options_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AllegroError, match=words):
        apply_options(text_to_video("p"), options)
    with pytest.raises(AllegroError, match="No node of the workflow takes steps"):
        apply_options({"1": {"class_type": "LoadImage", "inputs": {}}}, {"steps": 1})


@pytest.mark.parametrize(("target", "value", "expected"), [
    ("sampler.steps", "30", 30), ("AllegroSampler.cfg", "3", 3), ("my title.cfg", "3.5", 3.5),
    ("prompt.clean_caption", "False", False), ("prompt.text", "12", "12"), ("size.length", '["9", 0]', ["9", 0]),
    ("sampler.positive", '["negative", 0]', ["negative", 0]),
])
def test_override(target: str, value: str, expected: object) -> None:
    graph = text_to_video("p")
    graph["sampler"]["_meta"] = {"title": "My title"}
    override(graph, target, value)
    name, _, key = target.rpartition(".")
    found = graph[find_node(graph, name)]["inputs"][key]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("target", "value", "words"), [
    ("sampler.steps", "3.5", "is not a whole number"), ("sampler.steps", "x", "is not a whole number"),
    ("sampler.cfg", "x", "is not a number"), ("prompt.clean_caption", "1", "is not true or false"),
    ("AllegroT5Encode.text", "x", r"several nodes 'AllegroT5Encode': expected the id of one of prompt \(AllegroT5Encode\), negative"),
    ("99.text", "x", "no node '99'"), ("sampler.stepps", "3", "has no input 'stepps' in the workflow, but model, positive"),
    ("sampler.positive", "x", "is not a link"),
])
def test_override_that_cannot_be_done(target: str, value: str, words: str) -> None:
    with pytest.raises(AllegroError, match=words):
        override(text_to_video("p"), target, value)


def test_a_file_here_is_uploaded_for_a_loader_only(picture: Path) -> None:
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "old.png"}},
             "2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    assert override(graph, "1.image", "day.png", picture.parent) == {upload_name(picture): picture}
    assert graph["1"]["inputs"]["image"] == upload_name(picture)
    assert override(graph, "1.image", "there.png", picture.parent) == {}
    assert graph["1"]["inputs"]["image"] == "there.png"
    assert override(graph, "2.filename_prefix", "day.png", picture.parent) == {}


@pytest.mark.parametrize(("content", "words"), [
    ('{"nodes": [], "links": []}', r"Export \(API\)"), ("{", "is no JSON file"), ("[]", "is no workflow in API form"),
    ("{}", "is no workflow"), ('{"1": {"class_type": "A"}}', "is no workflow"),
])
def test_other_files_are_no_workflows(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(AllegroError, match=words):
        read_graph(tmp_path / "w.json")


# Jobs


def test_a_job_is_known_by_its_content(picture: Path) -> None:
    first = build_job("tiny", {"prompt": "p", "first_frame": "day.png"}, {}, folder=picture.parent)
    copy = picture.with_name("copy.png")
    copy.write_bytes(picture.read_bytes())
    assert build_job("tiny", {"prompt": "p", "first_frame": copy}, {}).key == first.key
    copy.write_bytes(b"another")
    assert build_job("tiny", {"prompt": "p", "first_frame": copy}, {}).key != first.key
    assert build_job("tiny", {"prompt": "p", "seed": 42}, {}).key == build_job("tiny", {"prompt": "p"}, {}).key
    assert first.name == f"p-{first.key[:8]}"
    with pytest.raises(AllegroError, match="There is no prompt"):
        build_job("tiny", {}, {})
    with pytest.raises(AllegroError, match="first_frame: 5 is no path of a picture"):
        build_job("tiny", {"prompt": "p", "first_frame": 5}, {})
    base = text_to_video("p")
    build_job(base, {"seed": 1}, {})
    assert base == text_to_video("p"), "the workflow that was given is changed"


def rows(tmp_path: Path, name: str, content: str) -> list[dict[str, Any]]:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return [row for _, row in read_rows(path)]


def test_lists(tmp_path: Path) -> None:
    assert rows(tmp_path, "a.txt", "\ufeffone\n\n# no\r\n two \u2028 lines\n") == [
        {"prompt": "one"}, {"prompt": "two \u2028 lines"}]
    assert rows(tmp_path, "a.csv", 'prompt,first-frame,4.x\n"a, ""b""\nc",,3\n\n,p.png,\n') == [
        {"prompt": 'a, "b"\nc', "4.x": "3"}, {"first_frame": "p.png"}]
    assert rows(tmp_path, "a.jsonl", '{"prompt": "a", "seed": 7}\n\n{"1.s": [1, 2]}') == [
        {"prompt": "a", "seed": 7}, {"1.s": [1, 2]}]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.csv", "prompt,colour\na,b\n", f"line 2: 'colour' is no option: expected {', '.join(OPTIONS)}, name, or"),
    ("a.csv", "prompt\na,b\n", "more cells than columns"),
    ("a.csv", 'prompt\n"' + 200_000 * "a", "Is a quote open"),
    ("a.jsonl", '{"prompt": "a"}\n{', "line 2 is no JSON"),
    ("a.jsonl", "[1]", "expected an object"),
    ("a.xls", "", "expected a list that ends in"),
])
def test_lists_that_make_no_sense(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(AllegroError, match=words):
        rows(tmp_path, name, content)
    with pytest.raises(AllegroError, match="Check the path"):
        list(read_rows(tmp_path / "none.txt"))


# The socket

Script = Callable[[socket.socket], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], int]]:
    """Accepts one connection, shakes hands, and does what a script says."""
    listeners: list[socket.socket] = []

    def start(script: Script, accept: str | None = None) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def work() -> None:
            connection, _ = listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(1)
                key = head.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                answer = accept if accept is not None else base64.b64encode(hashlib.sha1(key).digest()).decode()
                connection.sendall(f"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nsec-websocket-accept: {answer}\r\n\r\n".encode())
                script(connection)

        threading.Thread(target=work, daemon=True).start()
        return int(listener.getsockname()[1])

    yield start  # type: ignore[misc]
    for listener in listeners:
        listener.close()


def connect(port: int) -> WebSocket:
    return WebSocket("127.0.0.1", port, "/ws", timeout=5)


def test_messages_of_every_size_in_pieces(serve: Callable[..., int]) -> None:
    large = bytes(range(256)) * 300

    def script(connection: socket.socket) -> None:
        frames = (b"\x81\x02hi" + b"\x82\x7e" + struct.pack(">H", 1000) + bytes(1000) + b"\x82\x7f" + struct.pack(">Q", len(large)) + large
                  + b"\x01\x03one" + b"\x89\x01!" + b"\x00\x03two" + b"\x80\x01." + b"\x81\x00")
        for start in range(0, len(frames), 997):
            connection.sendall(frames[start : start + 997])
        pong = b""
        while len(pong) < 7:
            pong += connection.recv(7 - len(pong))
        mask, masked = pong[2:6], pong[6:]
        assert pong[:2] == b"\x8a\x81"
        connection.sendall(b"\x81\x01" + bytes([masked[0] ^ mask[0]]) + b"\x88\x00")

    client = connect(serve(script))
    received = [client.receive(5) for _ in range(6)]
    assert received == ["hi", bytes(1000), large, "onetwo.", "", "!"]
    with pytest.raises(ConnectionError, match="closed the connection"):
        client.receive(5)
    client.close()


@pytest.mark.parametrize(("host", "name"), [("gpu1", b"gpu1"), ("::1", b"[::1]")])
def test_a_request_names_its_host(monkeypatch: pytest.MonkeyPatch, host: str, name: bytes) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(socket, "create_connection", lambda *_: ours)
    with theirs:
        theirs.sendall(b"HTTP/1.1 404 no\r\n\r\n")
        with pytest.raises(ConnectionError, match="opens no WebSocket"):
            WebSocket(host, 8188, "/ws")
        assert b"\r\nHost: " + name + b":8188\r\n" in theirs.recv(10_000)


def test_a_message_that_is_slow_is_not_lost(serve: Callable[..., int]) -> None:
    go = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(b"\x81\x05he")
        go.wait(5)
        connection.sendall(b"llo")
        go.clear()
        go.wait(5)

    client = connect(serve(script))
    assert client.receive(0.1) is None
    assert client.receive(0.01) is None
    go.set()
    assert client.receive(5) == "hello"
    go.set()


@pytest.mark.parametrize(("frame", "words"), [
    (b"\xc1\x00", "does not allow"), (b"\x81\x80abcd", "does not allow"), (b"\x82\x7f" + struct.pack(">Q", 2**40), "more than"),
    (b"", "ended the connection"),
])
def test_a_server_that_breaks_the_rules(serve: Callable[..., int], frame: bytes, words: str) -> None:
    client = connect(serve(lambda connection: connection.sendall(frame)))
    with pytest.raises(ConnectionError, match=words):
        client.receive(5)


def test_no_websocket_at_the_other_end(serve: Callable[..., int]) -> None:
    with pytest.raises(ConnectionError, match="opens no WebSocket"):
        connect(serve(lambda connection: None, accept="wrong"))
