"""The storyboard node."""

from __future__ import annotations

from ..allegro_model.errors import AllegroError, TextError
from ..allegro_model.text import read_storyboard
from ..allegro_model.text.storyboard import MAX_CLIPS
from .schema import io, schema


class AllegroStoryboard(io.ComfyNode):
    """One text, one prompt per line, to the prompts of several clips."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroStoryboard",
            display_name="Allegro Storyboard",
            category="conditioning",
            description=("The prompts of several clips from one text: one line, one clip. Lines that begin with # are remarks; "
                         "what follows all: is added to every prompt."),
            search_aliases=["prompts", "shots", "long video"],
            inputs=[
                io.String.Input("storyboard", multiline=True, default=(
                    "# One line, one clip.\nall: soft morning light\na small boat leaves the harbour\n"
                    "the boat sails into a storm"), tooltip=(
                    "One prompt per line, in order. # begins a remark; what follows all: is added to every prompt, for example "
                    "a style. At most 100 clips.")),
                io.Int.Input("clip", default=1, min=1, max=MAX_CLIPS, step=1, tooltip=(
                    "Which line the output prompt is; the first is 1. Without effect on prompts. Start with 1.")),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The prompt of the chosen clip, for T5 Encode (Allegro)."),
                io.String.Output(display_name="prompts", is_output_list=True, tooltip=(
                    "All of them as a list: the nodes behind it run once for each, which makes one clip per line.")),
                io.Int.Output(display_name="count", tooltip="How many clips there are."),
            ],
        )

    @classmethod
    def validate_inputs(cls, storyboard: str | None = None, clip: int | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        try:
            if storyboard is not None and clip is not None:
                _choose(storyboard, clip)
        except AllegroError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, storyboard: str, clip: int) -> io.NodeOutput:
        prompts = _choose(storyboard, clip)
        return io.NodeOutput(prompts[clip - 1], prompts, len(prompts))


def _choose(storyboard: str, clip: int) -> list[str]:
    prompts = read_storyboard(storyboard)
    if not 1 <= clip <= len(prompts):
        raise TextError(f"clip={clip}: the storyboard has {len(prompts)} clips. Choose one from 1 to {len(prompts)}.")
    return prompts
