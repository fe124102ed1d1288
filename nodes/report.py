"""The node that says what a run took."""

from __future__ import annotations

from typing import Any

from .bridge.report import report
from .schema import io, preview_image, schema


class AllegroReport(io.ComfyNode):
    """Seconds and peak memory of each stage of the last run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroReport",
            display_name="Allegro Report",
            category="utils",
            description=("Shows seconds and peak memory of each Allegro stage of a run: text encoding, sampling, VAE, "
                         "interpolation. Connect it behind the last node that is to be counted."),
            search_aliases=["time", "memory", "benchmark", "profile"],
            inputs=[io.AnyType.Input("after", tooltip=(
                "The output of the last node that is to be counted, for example the images of Video VAE Decode. It is "
                "handed through unchanged."))],
            outputs=[
                io.AnyType.Output(id="value", display_name="after", tooltip="What came in."),
                io.String.Output(display_name="text", tooltip="The report as a table, to show or to save."),
                io.Image.Output(display_name="chart", tooltip="The report as a small picture."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, after: Any = None) -> float:
        """Never equal to the last: every run has a report of its own."""
        return float("nan")

    @classmethod
    def execute(cls, after: Any) -> io.NodeOutput:
        text, chart = report()
        return io.NodeOutput(after, text, chart, ui={**preview_image(chart, cls), "text": (text,)})
