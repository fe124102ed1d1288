"""The step cache node."""

from __future__ import annotations

from typing import Any

from ..allegro_model.errors import ScheduleError
from ..allegro_model.sampling import CACHE_LEVELS
from ..allegro_model.sampling.cache import check_cache
from .bridge.cache import add_cache
from .schema import io, schema


class AllegroCache(io.ComfyNode):
    """Fewer evaluations of the transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroCache",
            display_name="Allegro Cache",
            category="sampling",
            description=("Makes sampling faster by leaving out evaluations of the transformer whose result would hardly differ from "
                         "the one before. Works with the Allegro Sampler and with ComfyUI's own; what was left out is in the log "
                         "after each run."),
            search_aliases=["teacache", "first block cache", "attention broadcast", "speed", "faster"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, with or without LoRA and patches. It is not changed."),
                io.Combo.Input("level", options=list(CACHE_LEVELS), default="safe", tooltip=(
                    "safe, fast, draft: each faster, and further from the exact clip. More steps are left out when there are "
                    "more of them. broadcast: the attention broadcast published for Allegro, which needs tens of GB at full "
                    "size. off: the exact clip.")),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with the cache, for a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, level: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        try:
            check_cache("off" if level is None else level)
        except ScheduleError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, level: str) -> io.NodeOutput:
        return io.NodeOutput(add_cache(model, level))
