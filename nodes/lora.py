"""The LoRA loader node."""

from __future__ import annotations

from typing import Any

from ..allegro_model.errors import AllegroError
from ..allegro_model.loading.lora import check_strength
from .bridge import paths
from .bridge.lora import add_lora
from .schema import io, schema

MAX_STRENGTH = 100.0


class AllegroLoraLoader(io.ComfyNode):
    """A LoRA on top of a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroLoraLoader",
            display_name="Load Allegro LoRA",
            category="loaders",
            description=("Puts a LoRA on an Allegro model, whatever program trained it: names of diffusers, peft, kohya and "
                         "ComfyUI are understood, alpha and rank are per layer. Several can be chained."),
            search_aliases=["lora", "peft", "style", "adapter"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, with or without other LoRAs. It is not changed."),
                io.Combo.Input("lora_name", options=paths.lora_choices(), tooltip=(
                    "A .safetensors file in models/loras that was trained for Allegro. The bundled one teaches the bundled "
                    "model the colour orange.")),
                io.Float.Input("strength_model", default=1.0, min=-MAX_STRENGTH, max=MAX_STRENGTH, step=0.01, tooltip=(
                    "How much of the LoRA is added. 1 is what it was trained for, 0 leaves the model as it is, a negative "
                    "number steers away from it. Beyond 2 the picture usually breaks.")),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip=(
                "The model with the LoRA, for a sampler or the next LoRA."))],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, strength_model: float | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        try:
            _check(lora_name, strength_model)
        except AllegroError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength_model: float) -> io.NodeOutput:
        _check(lora_name, strength_model)
        return io.NodeOutput(add_lora(model, paths.resolve_lora(lora_name), strength_model))


def _check(lora_name: str | None, strength_model: float | None) -> None:
    """The browser offers only what is there, scripts can send anything."""
    if lora_name is not None:
        paths.resolve_lora(lora_name)
    if strength_model is not None:
        check_strength(strength_model)
