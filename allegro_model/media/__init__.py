"""Clips on disk: writing .mp4, .webm, .gif and numbered .png, reading videos, and the settings kept inside.

This is the only part of the package that starts another program (ffmpeg, from imageio-ffmpeg). ComfyUI has
its own writers, so the nodes never import it.
"""

from ..atomic import atomic_file, check_free_space, check_output
from .ffmpeg import check_fps
from .metadata import read_metadata
from .readers import (
    ClipContents,
    ClipInfo,
    probe_clip,
    probe_contents,
    read_frames,
    read_image,
    stream_frames,
)
from .writers import (
    FORMATS,
    QUALITIES,
    ClipWriter,
    check_clip_output,
    keeps_audio,
    open_writer,
    parse_quality,
    to_uint8,
)

__all__ = [
    "FORMATS",
    "QUALITIES",
    "ClipContents",
    "ClipInfo",
    "ClipWriter",
    "atomic_file",
    "check_clip_output",
    "check_fps",
    "check_free_space",
    "check_output",
    "keeps_audio",
    "open_writer",
    "parse_quality",
    "probe_clip",
    "probe_contents",
    "read_frames",
    "read_image",
    "read_metadata",
    "stream_frames",
    "to_uint8",
]
