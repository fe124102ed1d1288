"""Checks of the report and of previews that need ComfyUI's Python objects; see checks.py."""

import re

import latent_preview
import torch
from bootstrap import Host
from checks import empty, ksampler, parts, sample
from torch import Tensor


def stages(h: Host) -> list[str]:
    """Names of the stages in the report, in order."""
    text = h.nodes["AllegroReport"].execute(after=None).args[1]
    return [re.split(r"\s{2,}", line)[0] for line in text.splitlines()[2:-1]]


def check_report_counts_every_stage_of_a_run(h: Host) -> None:
    """Whatever came in is handed on; the samplers of ComfyUI count, too."""
    progress = h.module("nodes.bridge.progress")
    progress._stages.clear()
    nothing = h.nodes["AllegroReport"].execute(after=1)
    assert nothing.args[:2] == (1, "No stage of Allegro has run yet")
    latent = {"samples": sample(h, steps=2)}
    ksampler(h, parts(h)[0], steps=2)
    images = h.run("AllegroVideoVAEDecode", vae=parts(h)[2], samples=latent, tile_size=0, overlap=0, temporal_size=0,
                   temporal_overlap=0)
    out = h.nodes["AllegroReport"].execute(after=images)
    assert out.args[0] is images
    assert stages(h)[-3:] == ["sampling", "sampling", "VAE decode"], out.args[1]
    seconds = [float(line[20:30]) for line in out.args[1].splitlines()[2:]]
    assert abs(sum(seconds[:-1]) - seconds[-1]) < 0.06 * len(seconds)
    chart = out.args[2]
    assert chart.shape[0] == 1
    assert chart.shape[2:] == (640, 3)
    assert 0 <= float(chart.min()) < float(chart.max()) <= 1
    assert out.ui["images"]
    assert out.ui["text"] == (out.args[1],)


def check_report_of_a_run_in_which_nothing_was_computed(h: Host) -> None:
    progress = h.module("nodes.bridge.progress")
    sample(h, steps=1)
    real = progress._run_id
    progress._run_id = lambda: "the next run"
    try:
        text = h.nodes["AllegroReport"].execute(after=None).args[1]
    finally:
        progress._run_id = real
    assert "run before" in text.splitlines()[0]
    assert "sampling" in text


def check_previews_move_through_the_clip(h: Host) -> None:
    """ComfyUI's own previewer gets another frame at every step; one that plays all frames gets all of them."""
    prepare, get = latent_preview.prepare_callback, latent_preview.get_previewer
    matrix = latent_preview.Latent2RGBPreviewer([[1.0] * 3] * 4)
    seen: dict[str, list[Tensor]] = {"matrix": [], "player": []}
    try:
        for name, previewer in (("matrix", matrix), ("player", object())):
            latent_preview.get_previewer = lambda *_, previewer=previewer: previewer
            latent_preview.prepare_callback = lambda *_, name=name: lambda step, x0, x, total: seen[name].append(x0.clone())
            sample(h, steps=4)
    finally:
        latent_preview.prepare_callback, latent_preview.get_previewer = prepare, get
    frames = empty(h)["samples"].shape[2]
    for step, (one, whole) in enumerate(zip(seen["matrix"], seen["player"], strict=True)):
        assert whole.shape[2] == frames > 2
        assert torch.equal(one, whole[:, :, step % frames, None])
