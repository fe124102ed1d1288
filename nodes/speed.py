"""Nodes that change how the transformer is computed, not what."""

from __future__ import annotations

from typing import Any

from ..allegro_model.attention import ATTENTIONS
from .bridge.speed import COMFYUI, compile_blocks, set_attention
from .schema import io, schema

CATEGORY = "optimization"


def _model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="The transformer, with or without LoRA and patches. It is not changed.")


class AllegroAttention(io.ComfyNode):
    """Another kernel for the attention of the transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroAttention",
            display_name="Allegro Attention",
            category=CATEGORY,
            description=("Chooses the kernel of the transformer's attention, where most of the time of a large clip is spent. "
                         "Without this node ComfyUI chooses. A kernel that cannot be used here is replaced by torch's own, and the log "
                         "says why."),
            search_aliases=["sage attention", "flash attention", "cudnn", "speed", "faster"],
            inputs=[
                _model_input(),
                io.Combo.Input("attention", options=[*ATTENTIONS, COMFYUI], default=ATTENTIONS[0], tooltip=(
                    "auto: measures the exact kernels that are installed, at the size of the clip, before the first step, and takes "
                    "the fastest. sage: SageAttention, which is approximate. sdpa-math: for short clips, to find out whether a kernel "
                    "is at fault. comfyui: ComfyUI's own choice.")),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with that attention, for a sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, attention: str) -> io.NodeOutput:
        return io.NodeOutput(set_attention(model, attention))


class AllegroCompile(io.ComfyNode):
    """torch.compile, block by block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroCompile",
            display_name="Allegro Compile",
            category=CATEGORY,
            description=("Runs the blocks of the transformer through torch.compile: one block is compiled for all, so that the first "
                         "step waits far less than for the whole model. Where compiling fails, the run goes on without it and the log "
                         "says why. The clip is the same within rounding."),
            search_aliases=["torch compile", "inductor", "speed", "faster"],
            inputs=[_model_input()],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with compiled blocks, for a sampler.")],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        return io.NodeOutput(compile_blocks(model))
