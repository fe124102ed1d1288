"""Loader nodes: files in ComfyUI's model folders, or the bundled model, as native MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Collection

from ..allegro_model.errors import AllegroError, UnsupportedCheckpoint
from .bridge import paths
from .bridge.model import WEIGHT_DTYPES, load_dit
from .bridge.text import DEVICES, load_t5
from .bridge.vae import DTYPES, load_vae
from .schema import io, schema

paths.register_folders()

_WHERE = ("Files go to models/{key} (a single .safetensors file, or a folder with the parts of a sharded model), or a "
          "whole model folder to models/allegro. The bundled model needs no download; Allegro Download fetches the released "
          "ones.")


class LoadAllegroDiT(io.ComfyNode):
    """The transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadAllegroDiT",
            display_name="Load Allegro DiT",
            category="loaders",
            description=("Loads the Allegro transformer, text to video or image to video (TI2V). The file is recognised by its "
                         "tensors, not by its name. " + _WHERE.format(key="diffusion_models")),
            search_aliases=["allegro model", "text to video"],
            inputs=[
                io.Combo.Input("model_name", options=paths.choices("transformer"), tooltip=(
                    "The transformer, in bf16, fp16, fp32, fp8, int8 or GGUF. " + _WHERE.format(key="diffusion_models"))),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=(
                    "How the weights are kept. default = ComfyUI's choice, bf16 on most GPUs. fp8 halves their memory "
                    "and changes the picture slightly; the _fast kind also multiplies in fp8 where the GPU can. fp32 "
                    "doubles the memory. int8 and GGUF files stay as they are and need default. Start with default.")),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip=(
                "The transformer, for the Allegro Sampler or any sampler of ComfyUI."))],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None, weight_dtype: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem("transformer", model_name, weight_dtype, WEIGHT_DTYPES)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        _check("transformer", model_name, weight_dtype, WEIGHT_DTYPES)
        return io.NodeOutput(load_dit(paths.resolve("transformer", model_name), weight_dtype))


class LoadAllegroT5(io.ComfyNode):
    """The text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadAllegroT5",
            display_name="Load Allegro T5",
            category="loaders",
            description=("Loads the text encoder: any T5 v1.1 XXL encoder file (bf16, fp16, fp8, scaled fp8, int8, GGUF), also "
                         "one you already have for another model. " + _WHERE.format(key="text_encoders")),
            search_aliases=["t5xxl", "text encoder", "clip"],
            inputs=[
                io.Combo.Input("clip_name", options=paths.choices("text_encoder"), tooltip=(
                    "The T5 encoder that belongs to the transformer: T5 v1.1 XXL for the released models, the bundled "
                    "one for the bundled model. " + _WHERE.format(key="text_encoders"))),
                io.Combo.Input("device", options=list(DEVICES), default="default", tooltip=(
                    "Where the text is encoded. cpu leaves the GPU's memory to the transformer and takes longer, once "
                    "per prompt. Start with default.")),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip=(
                "The text encoder, for T5 Encode (Allegro) or ComfyUI's CLIP Text Encode."))],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str | None = None, device: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem("text_encoder", clip_name, device, DEVICES)

    @classmethod
    def execute(cls, clip_name: str, device: str) -> io.NodeOutput:
        _check("text_encoder", clip_name, device, DEVICES)
        return io.NodeOutput(load_t5(paths.resolve("text_encoder", clip_name), device))


class LoadAllegroVAE(io.ComfyNode):
    """The video autoencoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadAllegroVAE",
            display_name="Load Allegro VAE",
            category="loaders",
            description=("Loads the Allegro VideoVAE, which ComfyUI's own VAE loader does not know. "
                         + _WHERE.format(key="vae")),
            search_aliases=["videovae"],
            inputs=[
                io.Combo.Input("vae_name", options=paths.choices("vae"), tooltip=(
                    "The VideoVAE. " + _WHERE.format(key="vae"))),
                io.Combo.Input("dtype", options=list(DTYPES), default="default", tooltip=(
                    "What it computes in. default = fp32, as the model's authors recommend, unless ComfyUI was started "
                    "with another type for VAEs. bf16 needs half the memory and loses some precision.")),
            ],
            outputs=[io.Vae.Output(display_name="VAE", tooltip=(
                "The VideoVAE, for the Allegro VAE nodes or ComfyUI's own, plain or tiled."))],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None, dtype: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem("vae", vae_name, dtype, DTYPES)

    @classmethod
    def execute(cls, vae_name: str, dtype: str) -> io.NodeOutput:
        _check("vae", vae_name, dtype, DTYPES)
        return io.NodeOutput(load_vae(paths.resolve("vae", vae_name), dtype))


def _check(part: str, choice: str | None, option: str | None, options: Collection[str]) -> None:
    """The browser offers only what is there, scripts can send anything."""
    if choice is not None:
        paths.resolve(part, choice)
    if option is not None and option not in options:
        raise UnsupportedCheckpoint(f"{option!r} is not one of: {', '.join(options)}. Choose one of these.")


def _problem(part: str, choice: str | None, option: str | None, options: Collection[str]) -> bool | str:
    """True, or what is wrong."""
    try:
        _check(part, choice, option, options)
    except AllegroError as error:
        return str(error)
    return True
