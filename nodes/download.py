"""The download node: the released weights into ComfyUI's model folders, when somebody asks for it."""

from __future__ import annotations

import time

from ..allegro_model.errors import DownloadError
from ..allegro_model.loading.released import INTERPOLATOR_SOURCE, MODELS, TEXT_ENCODERS
from .bridge.download import download
from .schema import io, schema

INTERPOLATOR = "vfi"
NO_ENCODER = "none"


class AllegroDownload(io.ComfyNode):
    """Fetches files, or lists them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroDownload",
            display_name="Allegro Download",
            category="loaders",
            description=("Fetches the released weights into ComfyUI's model folders: named files only, resumed after a break, "
                         "checked, and complete or not there at all. What is there already is not fetched again. Nothing else "
                         "in this extension ever downloads anything."),
            search_aliases=["allegro weights", "get model", "hugging face"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("model", options=[*MODELS, INTERPOLATOR], default="t2v", tooltip=(
                    "t2v: text to video, 88 frames of 1280x720; 40x720p and 40x360p: the smaller ones with 40 frames; ti2v: "
                    "image to video. vfi says where to get the frame interpolator, which lies on no model hub. Start with "
                    "t2v.")),
                io.Combo.Input("text_encoder", options=[*TEXT_ENCODERS, NO_ENCODER], default="fp16", tooltip=(
                    "T5 v1.1 XXL, the same for all models: fp16 is 9.8 GB, fp8 5.2 GB and slightly less precise. Neither is "
                    "fetched when one is there for another model. none: leave it out, for example when you have a GGUF file.")),
                io.Boolean.Input("download", default=False, tooltip=(
                    "Off: only list files, sizes and places. On: fetch them. Off by default, so that a workflow of somebody "
                    "else fetches nothing by itself.")),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What is there, what was fetched, and how it was checked.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        """Never the same: files come and go while the inputs stay."""
        return time.time_ns()

    @classmethod
    def validate_inputs(cls, model: str | None = None, text_encoder: str | None = None) -> bool | str:
        """Before anything is asked. An input that is linked is None here and checked in `execute`."""
        try:
            _check(model or "t2v", text_encoder or NO_ENCODER)
        except DownloadError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: str, text_encoder: str, download: bool) -> io.NodeOutput:
        _check(model, text_encoder)
        report = _run(model, None if text_encoder == NO_ENCODER else text_encoder, fetch=download)
        return io.NodeOutput(report, ui={"text": (report,)})


def _run(model: str, text_encoder: str | None, *, fetch: bool) -> str:
    if model == INTERPOLATOR:
        return INTERPOLATOR_SOURCE.format(target="models/frame_interpolation/ours_small_t.safetensors")
    return download(model, text_encoder, fetch=fetch)


def _check(model: str, text_encoder: str) -> None:
    """The browser offers only what there is, scripts can send anything."""
    for name, value, options in (("model", model, (*MODELS, INTERPOLATOR)),
                                 ("text_encoder", text_encoder, (*TEXT_ENCODERS, NO_ENCODER))):
        if value not in options:
            raise DownloadError(f"{name}={value!r}: must be one of {', '.join(options)}.")
