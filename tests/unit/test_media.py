"""Clips: every format round-trips, and a file is either complete or not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from allegro_model import media
from allegro_model.atomic import atomic_file, check_output
from allegro_model.errors import AllegroError, MissingDependency, NonFiniteError, OutputError
from allegro_model.media import (
    check_clip_output,
    check_free_space,
    open_writer,
    probe_clip,
    read_frames,
    read_image,
    read_metadata,
    stream_frames,
    to_uint8,
)
from allegro_model.media.ffmpeg import ffmpeg_exe

pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg is not installed (extra: standalone)")

HARD_TEXT = 'a "quoted" prompt; with = # \\ signs,\nlines, \u00fcml\u00e4ute, \u732b and \U0001f408'
SETTINGS = {"prompt": HARD_TEXT, "negative": "", "seed": 2**53, "cfg": 7.5, "model": "tiny", "version": "0.1.0"}


def smooth_clip(frames: int = 12, height: int = 48, width: int = 64) -> Tensor:
    """[3, T, H, W] in [-1, 1]: coloured gradients that drift."""
    t = torch.linspace(0, 1, frames)[:, None, None]
    y = torch.linspace(-1, 1, height)[None, :, None]
    x = torch.linspace(-1, 1, width)[None, None, :]
    channels = [torch.sin(2 * x + 3 * t) * torch.cos(y), torch.cos(x - y + t), torch.sin(2 * y - 2 * t) + 0 * x]
    return torch.stack([c.expand(frames, height, width) for c in channels]) * 0.9


def write(path: Path, frames: Tensor, **options: object) -> Path:
    options.setdefault("fps", 15)
    with open_writer(path, frames.shape[3], frames.shape[2], **options) as writer:  # type: ignore[arg-type]
        for chunk in frames.split(5, dim=1):
            writer.write(chunk)
    return path


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(4.0 / (a - b).square().mean()))


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".part") or name.startswith(".")]


# Round trips


@pytest.mark.parametrize(("name", "decibel"), [("a.mp4", 38.0), ("a.webm", 35.0), ("a.gif", 28.0)])
@pytest.mark.parametrize("fps", [15, 7.5])
def test_round_trip(tmp_path: Path, name: str, decibel: float, fps: float) -> None:
    frames = smooth_clip()
    path = write(tmp_path / name, frames, fps=fps, metadata=SETTINGS)
    back, rate = read_frames(path)
    assert back.shape == frames.shape
    assert back.dtype == torch.float32
    assert rate == pytest.approx(fps, rel=0.03)  # .gif counts in hundredths of a second
    assert psnr(back, frames) > decibel
    assert read_metadata(path) == SETTINGS
    assert leftovers(tmp_path) == []


def test_small_is_smaller_and_still_good(tmp_path: Path) -> None:
    frames = smooth_clip() + 0.05 * torch.randn(3, 12, 48, 64, generator=torch.Generator().manual_seed(0))
    for extension in (".mp4", ".webm"):
        high = write(tmp_path / f"high{extension}", frames)
        small = write(tmp_path / f"small{extension}", frames, quality="small")
        assert small.stat().st_size < 0.7 * high.stat().st_size
        assert psnr(read_frames(small)[0], frames) > 25


def test_quality_takes_a_rate_factor(tmp_path: Path) -> None:
    frames = smooth_clip()
    assert write(tmp_path / "n.mp4", frames, quality=10).read_bytes() == write(
        tmp_path / "h.mp4", frames, quality="high").read_bytes()
    for bad in ("best", 52, -1, "1.5"):
        with pytest.raises(AllegroError, match=r"rate factor from 0 \(best\) to 51"):
            write(tmp_path / "bad.mp4", frames, quality=bad)
    assert sorted(os.listdir(tmp_path)) == ["h.mp4", "n.mp4"]


@pytest.mark.parametrize(("extension", "shape"), [(".mp4", (48, 66)), (".webm", (47, 65)), (".gif", (47, 65))])
def test_odd_sizes(tmp_path: Path, extension: str, shape: tuple[int, int]) -> None:
    frames = smooth_clip(4, 47, 65)
    path = write(tmp_path / f"odd{extension}", frames)
    back, _ = read_frames(path)
    assert tuple(back.shape[2:]) == shape
    assert psnr(back[:, :, :47, :65], frames) > 28


def test_pure_colours_survive(tmp_path: Path) -> None:
    """A wrong matrix or range shifts saturated colours by tens of levels."""
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1], [0.5, -0.2, 0.1]])
    frames = colours.T.reshape(3, 6, 1, 1).expand(3, 6, 32, 32).contiguous()
    for extension in (".mp4", ".webm"):
        back, _ = read_frames(write(tmp_path / f"c{extension}", frames))
        assert ((back - frames).abs().amax() * 127.5) < 4


def test_mp4_is_tagged_and_starts_fast(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", smooth_clip())
    said = subprocess.run([ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True, check=False).stderr
    assert "h264" in said
    assert "yuv420p(tv, bt709" in said
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_webm_is_vp9(tmp_path: Path) -> None:
    path = write(tmp_path / "a.webm", smooth_clip(4))
    said = subprocess.run([ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True, check=False).stderr
    assert "vp9" in said
    assert "yuv420p(tv, bt709" in said


def decode_png(path: Path) -> np.ndarray:
    """[H, W, 3] of a PNG, by ffmpeg: another implementation than the writer's."""
    frames, _ = read_frames(path)
    return to_uint8(frames[:, 0])


@pytest.mark.parametrize("size", [(48, 64), (1, 1), (33, 17)])
def test_pictures_are_lossless(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with open_writer(tmp_path / "p.png", size[1], size[0], fps=15, metadata=SETTINGS) as writer:
        writer.write(frames)
    assert [f.name for f in writer.files] == ["p_00000.png", "p_00001.png", "p_00002.png"]
    assert sorted(os.listdir(tmp_path)) == [f.name for f in writer.files]
    for index, file in enumerate(writer.files):
        assert np.array_equal(decode_png(file), to_uint8(frames[:, index]))
        assert read_metadata(file) == SETTINGS


def test_long_metadata(tmp_path: Path) -> None:
    """A prompt of 100,000 characters is longer than an argument of a command line may be."""
    settings = {"prompt": "\u732b x" * 50_000}
    for name in ("a.mp4", "a.webm", "a.gif"):
        assert read_metadata(write(tmp_path / name, smooth_clip(2), metadata=settings)) == settings


def test_metadata_of_foreign_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.gif", smooth_clip(2))
    assert read_metadata(plain) == {}
    command = [ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "testsrc=s=32x32", "-frames:v", "2"]
    subprocess.run([*command, "-metadata", 'comment={"prompt": "other"}', str(tmp_path / "other.mp4")], check=True)
    subprocess.run([*command[:-1], "1", "-update", "1", str(tmp_path / "other.png")], check=True)
    assert read_metadata(tmp_path / "other.mp4") == {}
    assert read_metadata(tmp_path / "other.png") == {}
    (tmp_path / "cut.gif").write_bytes(plain.read_bytes()[:40])
    (tmp_path / "text.mp4").write_text("not a clip")
    assert read_metadata(tmp_path / "cut.gif") == {}
    assert read_metadata(tmp_path / "text.mp4") == {}
    with pytest.raises(AllegroError, match=r"Cannot read .*: No such file"):
        read_metadata(tmp_path / "none.mp4")


def test_same_frames_same_file(tmp_path: Path) -> None:
    for extension in (".mp4", ".webm", ".gif"):
        a = write(tmp_path / f"a{extension}", smooth_clip(), metadata=SETTINGS)
        b = write(tmp_path / f"b{extension}", smooth_clip(), metadata=SETTINGS)
        assert psnr(read_frames(a)[0], read_frames(b)[0]) == float("inf")


def test_rounding_and_clamping() -> None:
    levels = torch.tensor([-1.0, 1.0, -5.0, 5.0, 0.0, -1 + 2 * 10.4 / 255, -1 + 2 * 10.6 / 255])
    pixels = to_uint8(levels.reshape(1, 1, 7).expand(3, 1, 7))
    assert pixels[0, :, 0].tolist() == [0, 255, 0, 255, 128, 10, 11]
    every = torch.arange(256).reshape(1, 1, 256).expand(3, 1, 256)
    assert np.array_equal(to_uint8(every / 127.5 - 1)[0, :, 1], np.arange(256))
    assert np.array_equal(to_uint8((every / 127.5 - 1).to(torch.float64))[0, :, 1], np.arange(256))


# Reading


def test_reading_scales_crops_and_changes_the_rate(tmp_path: Path) -> None:
    wide = torch.full((3, 30, 32, 96), -1.0)
    wide[:, :, :, 32:64] = 1.0  # the centre third is white
    path = write(tmp_path / "wide.mp4", wide, fps=30)
    frames, fps = read_frames(path, width=16, height=16, fps=15)
    assert frames.shape == (3, 15, 16, 16)
    assert fps == 15
    assert frames[:, :, :, 2:-2].mean() > 0.95
    assert read_frames(path, max_frames=7)[0].shape == (3, 7, 32, 96)
    info = probe_clip(path)
    assert (info.width, info.height, info.fps) == (96, 32, 30)
    assert [c.shape[1] for c in stream_frames(path, info, chunk_frames=8)] == [8, 8, 8, 6]


def test_unreadable_videos(tmp_path: Path) -> None:
    with pytest.raises(AllegroError, match=r"There is no video .*none\.mp4"):
        read_frames(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("not a clip")
    with pytest.raises(AllegroError, match=r"Cannot read .*text\.mp4 as a video \(ffmpeg: "):
        read_frames(tmp_path / "text.mp4")
    path = write(tmp_path / "good.mp4", smooth_clip())
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:200])
    with pytest.raises(AllegroError, match="as a video"):
        read_frames(tmp_path / "cut.mp4")
    with pytest.raises(AllegroError, match="must be above 0"):
        read_frames(path, fps=float("nan"))
    subprocess.run([ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=0.1", str(tmp_path / "s.wav")],
                   check=True)
    with pytest.raises(AllegroError, match="as a video"):
        read_frames(tmp_path / "s.wav")


def test_names_that_look_like_options_or_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "pipe:1.mp4", "a %05d [x] 'q'.gif", "\u732b.webm"):
        if os.name == "nt" and ":" in name:
            continue
        write(Path(name), smooth_clip(3), metadata=SETTINGS)
        assert read_frames(name)[0].shape[1] == 3
        assert read_metadata(name) == SETTINGS


# Complete or not there


@pytest.fixture(params=[".mp4", ".webm", ".gif", ".png"])
def extension(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_existing_file_stays(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"clip{extension}"
    write(path, smooth_clip(4))
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=r"already exists and was left as it is\. Add --force"):
        write(path, smooth_clip(2))
    assert listing(tmp_path) == before
    write(path, smooth_clip(3), force=True)
    after = listing(tmp_path)
    if extension == ".png":
        assert sorted(after) == ["clip_00000.png", "clip_00001.png", "clip_00002.png"]
    else:
        assert sorted(after) == sorted(before)
        assert read_frames(path)[0].shape[1] == 3


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"clip{extension}"
    other = tmp_path / ("clip_00001.png" if extension == ".png" else path.name)

    def interfere() -> None:
        with open_writer(path, 64, 48, fps=15) as writer:
            writer.write(smooth_clip(3))
            other.write_bytes(b"mine")

    with pytest.raises(OutputError, match="already exists"):
        interfere()
    assert listing(tmp_path) == {other.name: b"mine"}


@pytest.mark.parametrize("error", [RuntimeError("the decoder failed"), KeyboardInterrupt(), OSError(5, "other disk")])
def test_a_failure_leaves_nothing(tmp_path: Path, extension: str, error: BaseException) -> None:
    path = tmp_path / f"clip{extension}"
    write(path, smooth_clip(2))
    before = listing(tmp_path)

    def fail(name: Path, force: bool) -> None:
        with open_writer(name, 64, 48, fps=15, force=force) as writer:
            writer.write(smooth_clip(3))
            raise error

    for name in (path, tmp_path / f"new{extension}"):
        with pytest.raises(type(error)) as caught:
            fail(name, force=True)
        assert caught.value is error
    assert listing(tmp_path) == before


def test_nothing_shows_before_the_end(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"clip{extension}"
    with open_writer(path, 64, 48, fps=15) as writer:
        writer.write(smooth_clip(3))
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
    assert writer.files == [tmp_path / f"clip_0000{i}.png" for i in range(3)] if extension == ".png" else [path]
    with pytest.raises(ValueError, match="not open"):
        writer.write(smooth_clip(1))


def test_bad_frames(tmp_path: Path, extension: str) -> None:
    broken = smooth_clip(3)
    broken[1, 2, 5, 6] = float("nan")
    with pytest.raises(NonFiniteError, match="Frame 2: the decoder produced NaN or Inf"):
        write(tmp_path / f"nan{extension}", broken)
    with (pytest.raises(ValueError, match=r"expected \[3, n, 48, 64\]"),
          open_writer(tmp_path / f"shape{extension}", 64, 48, fps=15) as writer):
        writer.write(smooth_clip(3, 64, 48))
    with (pytest.raises(OutputError, match="there is no frame to write"),
          open_writer(tmp_path / f"empty{extension}", 64, 48, fps=15)):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9])
def test_bad_rates(tmp_path: Path, fps: float) -> None:
    with pytest.raises(AllegroError, match="must be above 0 and at most 1000"):
        write(tmp_path / "a.mp4", smooth_clip(2), fps=fps)
    assert os.listdir(tmp_path) == []


def test_bad_outputs(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in {
        "a.avi": r"the extension \.avi is not a known format. Use one of \.mp4, \.webm, \.gif, \.png",
        "a": "no extension is not a known format",
        "folder.mp4": "a folder has that name",
        "missing/a.mp4": "missing does not exist. Create it first",
        "file/a.mp4": "is a file, not a folder",
        "file/b/a.png": "does not exist",
        "x" * 300 + ".mp4": "the file name is too long",
    }.items():
        with pytest.raises(OutputError, match=message):
            check_clip_output(tmp_path / name, force=True)
    if os.path.exists("/dev/null"):
        (tmp_path / "link.mp4").symlink_to("/dev/null")
        with pytest.raises(OutputError, match="already exists"):
            check_clip_output(tmp_path / "link.mp4", force=False)
        with pytest.raises(OutputError, match="it is a device"):
            check_output("/dev/null", force=True)
    assert leftovers(tmp_path) == []


def test_atomic_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with atomic_file(path, force=False) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    if os.name == "posix":
        probe = tmp_path / "probe"
        probe.touch()
        assert path.stat().st_mode == probe.stat().st_mode  # the usual permissions, not a temporary's
        probe.unlink()
    with pytest.raises(OutputError, match="already exists"), atomic_file(path, force=False):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == {"report.json": b"new"}


def test_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT and some network mounts have none."""
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    path = write(tmp_path / "a.mp4", smooth_clip(2))
    assert listing(tmp_path).keys() == {"a.mp4"}

    def interfere() -> None:
        with open_writer(tmp_path / "b.mp4", 64, 48, fps=15) as writer:
            writer.write(smooth_clip(3))
            shutil.copy(path, tmp_path / "b.mp4")

    with pytest.raises(OutputError, match="already exists"):
        interfere()
    assert (tmp_path / "b.mp4").read_bytes() == path.read_bytes()


# Disks that refuse


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A folder on a disk of 128 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def noise(frames: int) -> Tensor:
    return torch.rand(3, frames, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_full_disk(small_disk: Path, extension: str) -> None:
    kept = small_disk / f"kept{extension}"
    name = small_disk / ("kept_00000.png" if extension == ".png" else kept.name)
    name.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"Cannot write .*: the disk is full\. Free some space"):
        write(kept, noise(8), force=True)
    assert listing(small_disk) == {name.name: b"precious"}


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "a.mp4", 1)
    with pytest.raises(OutputError, match=r"about \d+\.0 MiB are needed and the disk has .* MiB left"):
        check_free_space(tmp_path / "a.mp4", 2**60)


def test_read_only_disk(small_disk: Path) -> None:
    (small_disk / "kept.mp4").write_bytes(b"precious")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("a.mp4", "kept.mp4", "a.png"):
        with pytest.raises(OutputError, match=r"the disk is read-only. Choose another folder"):
            check_clip_output(small_disk / name, force=True)
    assert listing(small_disk) == {"kept.mp4": b"precious"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="you have no permission to write there"):
        check_clip_output(tmp_path / "a.mp4", force=False)
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="file size limits are a POSIX feature")
@pytest.mark.parametrize("extension", [".mp4", ".png"])
def test_file_size_limit(tmp_path: Path, extension: str) -> None:
    code = f"""
        import resource, torch
        from allegro_model.errors import OutputError
        from allegro_model.media import open_writer
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            with open_writer("clip{extension}", 256, 256, fps=15) as writer:
                for _ in range(30):
                    writer.write(torch.rand(3, 1, 256, 256) * 2 - 1)
        except OutputError as error:
            print(error)
    """
    root = Path(media.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert "the file grew larger than this disk or account allows" in done.stdout
    assert os.listdir(tmp_path) == []


# ffmpeg missing, old or broken


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in whose behaviour a test writes as shell lines."""
    if os.name != "posix":
        pytest.skip("the stand-in is a shell script")
    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    media.ffmpeg._encoders.cache_clear()
    yield script
    media.ffmpeg._encoders.cache_clear()


ENCODERS = 'case "$*" in *-encoders*) echo " V....D libx264 H.264"; exit 0;; esac\n'


def test_missing_encoder(fake_ffmpeg: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no encoder libx264. Choose \.gif or \.png"):
        check_clip_output(tmp_path / "a.mp4", force=False)


@pytest.mark.parametrize(("lines", "message"), [
    ("echo 'av_write_frame(): No space left on device' >&2; exit 1", "the disk is full"),
    ("cat >/dev/null; echo 'Error: Permission denied' >&2; exit 1", "no permission to write there"),
    ("cat >/dev/null; echo 'strange trouble' >&2; exit 3", "ffmpeg failed: strange trouble"),
    ("cat >/dev/null; exit 3", "ffmpeg failed: it ended with status 3"),
    ("kill -9 $$", "ffmpeg failed: it ended with status -9"),
])
def test_failing_ffmpeg(fake_ffmpeg: Path, tmp_path: Path, lines: str, message: str) -> None:
    fake_ffmpeg.write_text(f"#!/bin/sh\n{ENCODERS}{lines}\n")
    with pytest.raises(OutputError, match=message):
        write(tmp_path / "a.mp4", noise(10))
    assert os.listdir(tmp_path) == ["ffmpeg"]


def test_unstartable_ffmpeg(fake_ffmpeg: Path, tmp_path: Path) -> None:
    fake_ffmpeg.chmod(0o644)
    with pytest.raises(MissingDependency, match="cannot be started"):
        check_clip_output(tmp_path / "a.mp4", force=False)


def test_no_imageio_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    for attempt in (lambda: check_clip_output(tmp_path / "a.mp4", force=False),
                    lambda: probe_clip(__file__)):
        with pytest.raises(MissingDependency, match=r'pip install "allegro-video\[standalone\]"'):
            attempt()
    with open_writer(tmp_path / "a.png", 64, 48, fps=15) as writer:  # pictures need nothing else
        writer.write(smooth_clip(1))
    assert zlib.crc32(writer.files[0].read_bytes()[12:29]).to_bytes(4, "big") == writer.files[0].read_bytes()[29:33]


def test_no_ffmpeg_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    def absent() -> str:
        raise RuntimeError("No ffmpeg exe could be found")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    with pytest.raises(MissingDependency, match=r"found no ffmpeg program for this machine\. Install ffmpeg"):
        check_clip_output(tmp_path / "a.mp4", force=False)


# Pictures


@pytest.mark.parametrize(("mode", "suffix", "options"), [
    ("RGB", "png", {}), ("RGBA", "png", {}), ("L", "png", {}), ("LA", "png", {}), ("P", "png", {}), ("RGB", "jpg", {"quality": 95}),
    ("L", "jpg", {"quality": 95}), ("RGB", "webp", {"lossless": True}), ("RGBA", "webp", {"lossless": True}), ("RGB", "bmp", {}),
])
def test_pictures_of_any_kind(tmp_path: Path, mode: str, suffix: str, options: dict) -> None:
    image = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[0:21, 0:33]
    pixels = np.stack([4 * x, 8 * y, 3 * (x + y), 255 - 5 * x], axis=-1).astype(np.uint8)
    picture = image.fromarray(pixels, "RGBA").convert(mode)
    file = tmp_path / f"picture.{suffix}"
    picture.save(file, **options)
    expected = torch.from_numpy(np.array(picture.convert("RGBA"))).permute(2, 0, 1) / 255
    found = read_image(file)
    assert found.shape == (4, 21, 33)
    assert (found - expected).abs().mean() < (0.02 if suffix == "jpg" else 1e-6)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255
    exif = image.Exif()
    exif[0x112] = 6  # the camera was held upright: turn to the right
    image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    found = read_image(tmp_path / "phone.jpg")
    assert found.shape == (4, 32, 16)
    assert found[0, :14].mean() > 0.9
    assert found[0, 18:].mean() < 0.1


def test_of_a_video_the_first_frame_is_the_picture(tmp_path: Path) -> None:
    with open_writer(tmp_path / "clip.mp4", 32, 32, fps=8) as writer:
        writer.write(torch.linspace(-1, 1, 6).view(1, -1, 1, 1).expand(3, 6, 32, 32))
    assert read_image(tmp_path / "clip.mp4")[:3].mean() < 0.02


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(AllegroError, match=r"(There is no picture|Cannot read) .*x\.png"):
        read_image(file)
