"""The transformer as a native MODEL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...allegro_model.config import VAE_720P, DiTConfig, VAEConfig
from ...allegro_model.dit import AllegroDiT, AllegroTI2V
from ...allegro_model.dit.model import trim_text
from ...allegro_model.errors import GeometryError, TextError, UnsupportedCheckpoint
from ...allegro_model.geometry import LatentShape, estimate_sampling_bytes
from ...allegro_model.loading import check_tensors, component_folder, dit_config_from_shapes
from ...allegro_model.loading.files import read_json
from ...allegro_model.pipeline import SMALL_MODEL_PARAMETERS
from ...allegro_model.quantised import install
from .cache import calibration_of, reuse_of
from .compat import (
    PackedPatcher,
    assign_option,
    cut_to_window,
    patcher_class,
    quantisation,
    remember_loader,
    settle_dtypes,
)
from .conditioning import concat_condition, has_given_frames, in_training_order
from .paths import snapshot_root
from .progress import check_cancelled
from .sampling import SAMPLING_SETTINGS, AllegroSampling, timed
from .weights import OpenedFile, open_file

logger = logging.getLogger(__name__)
Options = dict[str, Any]

# Widget value -> (dtype of the weights, multiply in fp8). None lets ComfyUI choose.
WEIGHT_DTYPES: dict[str, tuple[torch.dtype | None, bool]] = {
    "default": (None, False),
    "bf16": (torch.bfloat16, False),
    "fp32": (torch.float32, False),
    "fp8_e4m3fn": (torch.float8_e4m3fn, False),
    "fp8_e5m2": (torch.float8_e5m2, False),
    "fp8_e4m3fn_fast": (torch.float8_e4m3fn, True),
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class ComfyDiT(AllegroDiT):
    """AllegroDiT with ComfyUI's calling convention and the hooks that other nodes use.

    Args:
        config: sizes of the checkpoint.
        dtype, device, operations: from ComfyUI.
    """

    def __init__(self, config: DiTConfig, *, dtype: torch.dtype | None = None, device: Any = None,
                 operations: Any = nn) -> None:
        super().__init__(config, operations=operations, cast_param=comfy.ops.cast_to_input, device=device, dtype=dtype)
        self.dtype = dtype  # ComfyUI reads it as the dtype of the weights
        if dtype in FLOAT8:
            _keep_small_weights_dense(self)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, attention_mask: Tensor | None = None,
                transformer_options: Options | None = None, **kwargs: Any) -> Tensor:
        """Predicts the noise, through the wrappers that nodes have put round the model.

        Args:
            x: [B, 4, t, h, w] in the compute dtype, with the condition 12 channels; any h and w.
            timestep: [B] float32.
            context: [B, L, C] text embeddings.
            attention_mask: [B, L], 1 = attend; None attends to everything.
            transformer_options: patches and wrappers.
        Returns:
            eps [B, 4, t, h, w].
        """
        options = transformer_options or {}
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self,
            comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options),
        ).execute(x, timestep, context, attention_mask, options, **kwargs)

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, attention_mask: Tensor | None,
                 transformer_options: Options, **kwargs: Any) -> Tensor:
        if context.shape[-1] != self.config.caption_channels:
            raise TextError(f"the text embeddings are {context.shape[-1]} wide, this model reads "
                            f"{self.config.caption_channels}. Load the text encoder that belongs to the model.")
        height, width = x.shape[-2:]
        p = self.config.patch_size
        if height % p or width % p:
            x = F.pad(x, (0, -width % p, 0, -height % p, 0, 0), mode="replicate")
        return self._blocks(x, timestep, context, attention_mask, transformer_options)[..., :height, :width]

    def _blocks(self, latents: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None,
                transformer_options: Options) -> Tensor:
        """`AllegroDiT.forward`, one block after the other so that weights can be streamed, with the patches."""
        grid = self.grid(latents)
        x = self.embed(latents)  # [B, N, D]
        modulation, time = self.adaln_single(timestep, x.dtype)  # [B, 6, D], [B, D]
        embeds, bias = trim_text(context, mask)
        text = self.caption_projection(embeds)  # [B, L', D]
        rope = self.rope(grid, x.device)
        options = {**transformer_options, "block_type": "double", "total_blocks": len(self.transformer_blocks)}
        replacements = options.get("patches_replace", {}).get("dit", {})
        patches = options.get("patches", {}).get("double_block", [])
        reuse = reuse_of(options)
        for i, block in enumerate(self.transformer_blocks):
            if not torch.compiler.is_compiling():
                check_cancelled()  # a step can take longer than anybody wants to wait
            options["block_index"] = i
            kernel = attention_with(options)

            def original(args: Options, block: Any = block, kernel: Any = kernel, i: int = i) -> Options:
                keys_values = block.attn2.project(args["txt"])
                return {"img": block(args["img"], args["vec"], args["pe"], keys_values, bias, kernel,
                                     None if reuse is None else reuse(i))}

            inputs = {"img": x, "txt": text, "vec": modulation, "pe": rope, "transformer_options": options}
            replace = replacements.get(("double_block", i))
            x = (original(inputs) if replace is None else replace(inputs, {"original_block": original}))["img"]
            for patch in patches:
                x = patch({"img": x, "txt": text, "x": latents, "block_index": i,
                           "transformer_options": options})["img"]
        return self.unembed(x, self.output_time(time, latents), grid)


class ComfyTI2V(ComfyDiT, AllegroTI2V):
    """The image-to-video transformer. Its mask arrives in order of time, so that context windows can cut it."""

    def embed(self, latents: Tensor) -> Tensor:
        """[B, 12, t, h, w] with the mask in order of time -> tokens [B, N, D]."""
        rest, mask = latents.split((2 * self.config.in_channels, self.config.in_channels), dim=1)
        return super().embed(torch.cat((rest, in_training_order(mask)), dim=1))


def attention_with(options: Options) -> Callable[..., Tensor]:
    """ComfyUI's attention in our contract; `options` carries what other nodes want to put in its place."""

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        module = comfy.ldm.modules.attention  # looked up at each call: other packs replace these functions
        if mask is None:
            return module.optimized_attention(q, k, v, heads, transformer_options=options)
        return module.optimized_attention_masked(q, k, v, heads, mask=mask, transformer_options=options)

    return attention


def _keep_small_weights_dense(model: nn.Module) -> None:
    """Only the matrices of the blocks are worth storing in 8 bits; the rest is small and sensitive."""
    for path, module in model.named_modules():
        for name in ("weight", "bias", "scale_shift_table"):
            param = getattr(module, name, None)
            if name == "weight" and (".attn" in path or ".ff." in path):
                continue
            if isinstance(param, nn.Parameter):
                setattr(module, name, nn.Parameter(param.to(torch.bfloat16), requires_grad=False))
            elif hasattr(module, f"{name}_comfy_model_dtype"):  # allocated only when it is loaded
                setattr(module, f"{name}_comfy_model_dtype", torch.bfloat16)


# ComfyUI's descriptions of a model


class AllegroLatentFormat(comfy.latent_formats.LatentFormat):
    """Four channels, 4x8x8 smaller than the clip. The only place inside ComfyUI where latents are scaled."""

    scale_factor = VAE_720P.scale_factor
    latent_channels = 4
    latent_dimensions = 3
    spacial_downscale_ratio = 8
    temporal_downscale_ratio = 4

    def __init__(self, vae: VAEConfig = VAE_720P) -> None:
        super().__init__()
        self.scale_factor = vae.scale_factor
        # The released VAE was trained from one of the SDXL family (arXiv 2410.15458), whose colours are the nearest that
        # are published; fitting its own takes its weights (allegro_model.training.preview), and a config.json brings them.
        family = comfy.latent_formats.SDXL()
        self.latent_rgb_factors = family.latent_rgb_factors
        self.latent_rgb_factors_bias = family.latent_rgb_factors_bias
        if vae.latent_rgb_factors:
            self.latent_rgb_factors = [list(row) for row in vae.latent_rgb_factors]
            self.latent_rgb_factors_bias = list(vae.latent_rgb_factors_bias)


class AllegroModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about a model before it builds it.

    Args:
        config: of the transformer.
        vae: of the VAE it was trained with.
        image_to_video: the variant that takes given frames.
        small: the whole model is small: compute in float32, as the command line does.
    """

    unet_config: Options = {}  # noqa: RUF012 (ComfyUI's names and form)
    unet_extra_config: Options = {}  # noqa: RUF012
    latent_format = AllegroLatentFormat
    sampling_settings = SAMPLING_SETTINGS
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012

    def __init__(self, config: DiTConfig, vae: VAEConfig, *, image_to_video: bool = False, small: bool = False) -> None:
        super().__init__({"config": config})
        self.image_to_video = image_to_video
        self.latent_format = AllegroLatentFormat(vae)
        if small:
            self.supported_inference_dtypes = [torch.float32]

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> AllegroModel:
        """Builds the model, empty."""
        return (AllegroImageModel if self.image_to_video else AllegroModel)(self, device)

    def inpaint_model(self) -> bool:
        """It has none of the channels that ComfyUI's inpainting fills."""
        return False


class AllegroModel(comfy.model_base.BaseModel):
    """ComfyUI's wrapper round the network: conditions in, denoised latents out."""

    network: type[ComfyDiT] = ComfyDiT

    def __init__(self, model_config: AllegroModelConfig, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=self.network)
        self.model_sampling = AllegroSampling(model_config)

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> int:
        """Bytes that an evaluation needs beside the weights, for latents of `input_shape` [B, 4, t, h, w].

        ComfyUI's own formula gives twice as much for this model, and with that would take the prompts one by one where
        both fit. Attention counts with its result: kernels that need more, ComfyUI fits to what is free.
        """
        batch, _, *cells = (int(n) for n in input_shape)
        dtype: torch.dtype = self.manual_cast_dtype or self.get_dtype()
        return estimate_sampling_bytes(self.diffusion_model.config, LatentShape(*cells), batch=batch,
                                       dtype_bytes=dtype.itemsize)

    def extra_conds(self, **kwargs: Any) -> Options:
        """The mask of the prompt goes to the network beside its embeddings."""
        out = super().extra_conds(**kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        return out

    def concat_cond(self, **kwargs: Any) -> Tensor | None:
        """Nothing.

        Raises:
            GeometryError: frames are given that this model would ignore for the whole run.
        """
        if has_given_frames(kwargs):
            raise GeometryError("given frames need the image-to-video transformer (Allegro-TI2V), this is the text-to-video "
                                "one. Choose the other in Load Allegro DiT, or connect the prompts without the image node.")
        return None


class AllegroImageModel(AllegroModel):
    """The same for the image-to-video network."""

    network = ComfyTI2V

    def concat_cond(self, **kwargs: Any) -> Tensor:
        """[B, 8, t, h, w]: scaled latents of the given frames, and their mask; grey and ones where there are none."""
        if not has_given_frames(kwargs) and kwargs.get("prompt_type") == "positive":
            logger.warning("Allegro: no frame is given to the image-to-video model, which was trained with one. Connect "
                           "Allegro Image to Video, or load the text-to-video model.")
        return concat_condition(kwargs, kwargs["noise"], self.process_latent_in)

    def _apply_model(self, x: Tensor, t: Tensor, c_concat: Tensor, c_crossattn: Any = None, control: Any = None,
                     transformer_options: Options | None = None, **kwargs: Any) -> Tensor:
        options = transformer_options or {}
        return super()._apply_model(x, t, cut_to_window(c_concat, x, options), c_crossattn, control, options, **kwargs)


# Loading


def load_dit(path: str, weight_dtype: str = "default", disable_dynamic: bool = False) -> Any:
    """Loads a transformer.

    Args:
        path: a .safetensors or .gguf file, or a folder.
        weight_dtype: a key of `WEIGHT_DTYPES`.
        disable_dynamic: for ComfyUI: give a patcher without dynamic memory.
    Returns:
        a model patcher, ComfyUI's MODEL.
    Raises:
        CheckpointError, UnsupportedCheckpoint, CheckpointMismatch: with a sentence for the user.
    """
    opened = open_file(path, "allegro-dit")
    source, weights = opened.source, opened.weights
    config = dit_config_from_shapes(source.shapes, source.header.config)
    image_to_video = source.info.variant == "ti2v"
    network = AllegroTI2V if image_to_video else AllegroDiT
    expected = {name: tuple(p.shape) for name, p in network(config, device="meta").state_dict().items()}
    check_tensors(expected, source.shapes, what=f"{path}, {source.info.title},")
    parameters = source.info.num_parameters
    model_config = AllegroModelConfig(config, vae_config_of(path), image_to_video=image_to_video,
                                      small=parameters < SMALL_MODEL_PARAMETERS)
    quantised = _choose_dtypes(model_config, opened, parameters, weight_dtype)
    model = model_config.get_model(weights)
    install(model.diffusion_model, opened.layouts, weights)
    new_patcher = PackedPatcher if opened.layouts else patcher_class(disable_dynamic)
    patcher = new_patcher(model, load_device=comfy.model_management.get_torch_device(),
                          offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights(weights, "", **assign_option(model.load_model_weights, patcher))
    if not quantised:
        settle_dtypes(patcher)
    model.diffusion_model.requires_grad_(False).eval()
    model.cache_calibration = calibration_of(path)
    remember_loader(patcher, load_dit, (path, weight_dtype))
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "allegro", timed)
    logger.info("Loaded %s: %s, weights %s%s%s", path, source.info.title, model.get_dtype(),
                f" and {opened.packed_as}" * bool(opened.layouts),
                ", staged dynamically" if assign_option(model.load_model_weights, patcher).get("assign") else "")
    return patcher


def _choose_dtypes(model_config: AllegroModelConfig, opened: OpenedFile, parameters: int, weight_dtype: str) -> bool:
    """Sets what the weights, or those that are not packed, are stored and computed in; True if ComfyUI is to multiply
    scaled ones.

    Raises:
        UnsupportedCheckpoint: another dtype than the default is wanted of packed weights.
    """
    if opened.layouts and weight_dtype != "default":
        raise UnsupportedCheckpoint(f"{opened.source.path} is packed as {opened.packed_as} and stays so in memory; weight_dtype "
                                    f"is {weight_dtype}, expected default. Choose default, or a bf16 file.")
    weights = {name: tensor for name, tensor in opened.weights.items() if name not in opened.layouts}
    quantised = {} if opened.layouts else quantisation(opened.weights)
    for name, value in quantised.items():
        setattr(model_config, name, value)
    dtype, fast = WEIGHT_DTYPES[weight_dtype]
    supported = model_config.supported_inference_dtypes
    if dtype is None:
        stored = None if quantised else comfy.utils.weight_dtype(weights)
        dtype = comfy.model_management.unet_dtype(model_params=parameters, supported_dtypes=supported,
                                                  weight_dtype=stored)
    device = comfy.model_management.get_torch_device()
    cast_from = None if "quant_config" in quantised else dtype
    model_config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(cast_from, device, supported))
    if fast:
        model_config.optimizations["fp8"] = True
    return bool(quantised)


def vae_config_of(path: str) -> VAEConfig:
    """The VAE that belongs to a transformer; the released one where none lies beside it."""
    root = snapshot_root(path)
    config = component_folder(root, "vae") / "config.json" if root is not None else None
    return VAE_720P if config is None or not config.is_file() else VAEConfig.from_dict(read_json(config))
