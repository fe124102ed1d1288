"""Prompt -> frames, in stages that can be run, saved and resumed one by one.

    pipeline = AllegroPipeline.from_pretrained("tiny")
    frames = pipeline("a red circle moves right over a blue background", seed=1)  # [1, 3, T, H, W]

The stages are `encode_prompt` -> `sample` -> `decode_stream`. Networks are loaded when their stage begins;
the text encoder is dropped after it. With the image-to-video model, `condition` comes before `sample`:

    pipeline = AllegroPipeline.from_pretrained("tiny-ti2v")
    frames = pipeline("the circle moves right", given={0: image})  # [3, h, w] in [0, 1], of any size
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import BACKENDS, AttentionShape, Kernel, check_attention, choose_attention
from .compiling import CompiledBlocks
from .conditioning import GivenFrames, build_condition, sample_posterior
from .config import DiTConfig, SamplingConfig, VAEConfig
from .dit import AllegroDiT
from .errors import CheckpointMismatch, GeometryError, NonFiniteError, ScheduleError
from .geometry import (
    LATENT_CHANNELS,
    check_memory,
    check_size,
    estimate_sampling_bytes,
    frames_bytes,
    latent_shape,
    token_count,
)
from .loading import (
    apply_loras,
    bundled_model,
    bundled_models,
    dit_config_from_shapes,
    load_dit,
    load_sampling_defaults,
    load_text_encoder,
    load_vae,
    open_source,
    t5_config_from_shapes,
)
from .loading.files import cache_file, read_json
from .loading.source import config_of
from .memory import both_prompts_fit, free_bytes, is_out_of_memory
from .prompt_store import PromptStore, files_identity, prompt_key
from .sampling import (
    SAMPLERS,
    Denoiser,
    NoiseSource,
    Prompt,
    StepCache,
    StepInfo,
    keep_latents,
    reference_sigmas,
)
from .sampling.cache import BUNDLED, IDLE, CacheCalibration, check_cache
from .sampling.guidance import check_guidance
from .sampling.noise import MAX_SEED
from .sampling.samplers import Callback, Denoise
from .sampling.schedule import check_schedule
from .streaming import Streamed, layers_of_dit, streamed_bytes, whole_bytes
from .text import TextEncoder, format_negative, format_prompt
from .vae import (
    Tiling,
    VideoVAE,
    cells_of,
    decoding_bytes,
    denormalise,
    encoding_bytes,
    normalise,
    several_at_once,
)
from .vae.tiling import Progress

log = logging.getLogger(__name__)

# Below this size reduced precision gains nothing, and rounding of the noise prediction is amplified 157-fold
# in the first step.
SMALL_MODEL_PARAMETERS = 100_000_000
OFFLOADS = ("auto", "none", "stream")
# The text encoder's working memory for 512 tokens: a float32 map of attention for each head, and a 2.5 times wider layer.
_TEXT_WORKING_BYTES = 2**28


@dataclass(frozen=True)
class SampleSettings:
    """Everything that determines the latents besides the prompt.

    Attributes:
        width, height: pixels, multiples of 16.  num_frames: a multiple of 4.
        num_steps: model evaluations, at least 1.  guidance_scale: 1 turns guidance off.
        sampler: a key of `SAMPLERS`.  seed: 0 .. 2**64 - 1.
        denoise: in (0, 1]; below 1 given latents are only partly replaced.
        cache: one of `CACHE_LEVELS`; "off" evaluates the transformer at every step.
    """

    width: int
    height: int
    num_frames: int
    num_steps: int
    guidance_scale: float
    sampler: str = "euler_ancestral"
    seed: int = 0
    denoise: float = 1.0
    cache: str = "off"

    def check(self) -> None:
        """Raises unless a run with these settings is possible.

        Raises:
            GeometryError, ScheduleError: the first value outside its range.
        """
        check_size(self.width, self.height, self.num_frames)
        check_schedule(self.num_steps, self.denoise)
        check_guidance(self.guidance_scale)
        if self.sampler not in SAMPLERS:
            raise ScheduleError(f"sampler={self.sampler!r}: must be one of {', '.join(SAMPLERS)}.")
        check_cache(self.cache)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ScheduleError(f"seed={self.seed!r}: must be a whole number from 0 to {MAX_SEED}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class PromptEmbeds:
    """Both prompts, encoded, each with embeds [1, L, C] and mask [1, L]; the negative is None without guidance."""

    positive: Prompt
    negative: Prompt | None


@dataclass(frozen=True)
class SampleState:
    """A run after some of its steps: all that is needed to go on.

    Attributes:
        latents: [1, 4, t, h, w] float32, normalised; with the noise of `step` in them until the run is finished.
        step: steps done.
        settings: of the run.
        denoised: the last prediction, which two-step samplers look back on; None before the first step.
        condition: [1, 8, t, h, w] of `AllegroPipeline.condition`; None for a text-to-video model.
        kept: [1, 4, k, h, w], normalised: latent frames that are not to change; None for none.
        kept_start: the latent frame that the first of them is.
        skipped: what the step cache left out in these steps, for the user; empty without one.
        attention: the kernel of the steps done, which "auto" keeps for the others: kernels differ by rounding; empty before the first.
    """

    latents: Tensor
    step: int
    settings: SampleSettings
    denoised: Tensor | None = field(default=None, repr=False)
    condition: Tensor | None = field(default=None, repr=False)
    kept: Tensor | None = field(default=None, repr=False)
    kept_start: int = 0
    skipped: str = ""
    attention: str = ""

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.settings.num_steps


class AllegroPipeline:
    """A model folder, and the machine it runs on.

    Args:
        root: snapshot folder with `transformer/`, `vae/`, `text_encoder/` and `tokenizer/`.
        defaults: the settings the model was made for.
        device: where the networks run.
        dtype: of the transformer; None picks bfloat16 on an accelerator and float32 on a CPU.
        tiling: of the VAE; None takes the checkpoint's.
        loras: (path, strength) of LoRAs, merged into the transformer whenever it is loaded.
        transformer: another one than the folder's own: a file, or a folder of weights.
        attention: the kernel of the transformer, one of `ATTENTIONS`; "auto" measures the exact ones.

    Attributes:
        offload: one of `OFFLOADS`; see `from_pretrained`.
    """

    def __init__(self, root: Path, defaults: SamplingConfig, *, device: torch.device,
                 dtype: torch.dtype | None = None, tiling: Tiling | None = None,
                 loras: Sequence[tuple[str | Path, float]] = (), transformer: Path | None = None,
                 attention: str = "auto") -> None:
        check_attention(attention)
        self.root = root
        self.transformer = transformer or root / "transformer"
        self.defaults = defaults
        self.device = device
        self.dtype = dtype
        self.tiling = tiling
        self.loras = tuple(loras)
        self.attention = attention
        self.compiled: CompiledBlocks | None = None
        self.calibration: CacheCalibration | None = None  # of step caches; None takes that beside the weights
        self.offload = "auto"
        self.prompt_store: PromptStore | None = None
        self._kernels: dict[tuple[Any, ...], Kernel] = {}  # by what they were chosen for
        self._dit: AllegroDiT | None = None
        self._vae: VideoVAE | None = None

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str] = "tiny", *,  # noqa: PLR0913 (each is a choice of its own)
                        device: str | torch.device = "auto",
                        dtype: str | torch.dtype = "auto", tiling: Tiling | None = None,
                        loras: Sequence[tuple[str | Path, float]] = (),
                        transformer: str | PathLike[str] | None = None, attention: str = "auto",
                        compile_blocks: bool = False, offload: str = "auto",
                        prompt_cache: str | PathLike[str] | None = None) -> AllegroPipeline:
        """Opens a model; weights are read when they are first needed.

        Args:
            model: "tiny" or "tiny-ti2v" for a bundled model, or a snapshot folder.
            device: "auto" (an accelerator if there is one), or a torch device.
            dtype: "auto", "bf16", "fp16", "fp32" or a torch dtype; of the transformer.
            tiling: of the VAE; None takes the checkpoint's.
            loras: (path, strength) of LoRAs for the transformer, e.g. [("style.safetensors", 0.8)].
            transformer: a file or folder of weights that takes the place of the model's own: the released
                image-to-video model differs from Allegro in this part alone. Default settings follow it.
            attention: the kernel of the transformer, one of `allegro_model.attention.ATTENTIONS`; "auto" measures those
                that are there and exact, once for each size of clip, and takes the fastest.
            compile_blocks: run the blocks of the transformer through torch.compile, and without where that fails.
            offload: where the weights of the transformer and the text encoder are while they run. "none": on the device.
                "stream": where they are, and each layer is brought to the device when it is called. "auto": streamed where
                they do not fit, and on a CPU where the file has another type than the run. The result is the same.
            prompt_cache: a folder where encoded prompts are kept, at most 1 GB, so that the same one never needs the text
                encoder again; None keeps nothing.
        Raises:
            ScheduleError: there is no such attention or offload.
            UnsupportedCheckpoint: not a model folder.
            CheckpointMismatch: `transformer` was made for another text encoder.
        """
        root = bundled_model(str(model)) if str(model) in bundled_models() else Path(model)
        part = None if transformer is None else Path(transformer)
        if part is not None:
            _check_text_width(root, part)
        pipeline = cls(root, load_sampling_defaults(root, part), device=resolve_device(device),
                       dtype=resolve_dtype(dtype), tiling=tiling, loras=loras, transformer=part, attention=attention)
        pipeline.compiled = CompiledBlocks() if compile_blocks else None
        if offload not in OFFLOADS:
            raise ScheduleError(f"offload={offload!r}: must be one of {', '.join(OFFLOADS)}.")
        pipeline.offload = offload
        pipeline.prompt_store = None if prompt_cache is None else PromptStore(prompt_cache)
        return pipeline

    # Networks: memory-mapped when something about them is asked, moved to the device when they run

    def _load_dit(self) -> AllegroDiT:
        if self._dit is None:
            dit = load_dit(self.transformer)
            # In the dtype of the run: what a LoRA adds would be rounded twice in a smaller one of the file.
            apply_loras(dit, self.loras, dtype=self._run_dtype(dit))
            self._dit = dit
        return self._dit

    def _load_vae(self) -> VideoVAE:
        if self._vae is None:
            self._vae = load_vae(self.root, dtype=torch.float32)
        return self._vae

    @property
    def image_to_video(self) -> bool:
        """Whether the transformer is the image-to-video one; reads headers only."""
        return open_source(self.transformer, "allegro-dit", subfolder="transformer").info.variant == "ti2v"

    def check_given(self, given: object) -> None:
        """Raises when something is given to a model that cannot take it.

        Raises:
            GeometryError: names the model that can.
        """
        if given and not self.image_to_video:
            raise GeometryError(f"{self.transformer} is the text-to-video model, which takes no given frames. Use the "
                                "image-to-video one: rhymes-ai/Allegro-TI2V (its transformer is enough, as --transformer "
                                'or transformer=), or the bundled "tiny-ti2v".')

    @property
    def dit_config(self) -> DiTConfig:
        """Shape of the transformer, which is mapped for it; float8 weights are converted, too."""
        return self._load_dit().config

    @property
    def vae_config(self) -> VAEConfig:
        """Shape and default tiles of the VAE, which is loaded for it into main memory (0.7 GB when released)."""
        return self._load_vae().config

    @property
    def dit_dtype(self) -> torch.dtype:
        """dtype the transformer runs in."""
        return self.dtype or self._run_dtype(self._load_dit())

    def _run_dtype(self, dit: AllegroDiT) -> torch.dtype:
        return dit_dtype(sum(p.numel() for p in dit.parameters()), self.device, self.dtype)

    @property
    def dit(self) -> AllegroDiT:
        """The transformer, on the pipeline's device."""
        return self._load_dit().to(self.device, self.dit_dtype)

    def kernel(self, settings: SampleSettings, used: str = "") -> Kernel:
        """The attention of a run; the choice, which may be measured, is made once for each size of clip.

        Args:
            settings: of the run.
            used: for the steps that are done, which "auto" keeps; empty for none.
        """
        config = self.dit_config
        tokens = token_count(latent_shape(settings.width, settings.height, settings.num_frames), config.patch_size)
        name = used if self.attention == "auto" and used in BACKENDS else self.attention
        key = (name, self.device, self.dit_dtype,
               AttentionShape(tokens, config.num_attention_heads, config.attention_head_dim))
        if key not in self._kernels:
            self._kernels[key] = choose_attention(*key)
        return self._kernels[key]

    @property
    def vae(self) -> VideoVAE:
        """The VideoVAE, float32 as the reference recommends, on the pipeline's device."""
        return self._load_vae().to(self.device)

    @property
    def text_dtype(self) -> torch.dtype:
        """dtype the text encoder runs in: the reference's bfloat16; float32 for a small one, or where the
        transformer was asked for in float32."""
        return text_dtype(self._text_parameters(), self.dtype)

    def _text_parameters(self) -> int:
        """Numbers in the text encoder; reads headers only."""
        source = open_source(self.root, "t5-encoder", subfolder="text_encoder")
        return sum(math.prod(shape) for shape in source.shapes.values())

    def load_text_encoder(self) -> TextEncoder:
        """The text encoder, mapped as it is stored; `encode_prompt` brings it to the device."""
        return load_text_encoder(self.root, dtype=None, max_length=self.defaults.text_length)

    @contextmanager
    def _running(self, network: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, working: int) -> Iterator[None]:
        """While this lasts, a network can run on the device: moved there as a whole, or layer by layer.

        Args:
            network: in main memory, mapped, if it is to be streamed; see `_must_stream`.
            layers: of the network, in the order of their calls.
            dtype: to run in.
            working: bytes that it needs beside its weights.
        """
        if not self._must_stream(network, dtype, working):
            network.to(self.device, dtype)
            yield
            return
        log.info("%s is streamed: its weights stay where they are, and each layer comes to %s when it is called.",
                 type(network).__name__, self.device)
        with Streamed(network, layers, self.device, dtype):
            yield

    def streams(self, settings: SampleSettings) -> bool:
        """Whether the transformer is not moved to the device for a run, and its layers come there one by one."""
        return self._must_stream(self._load_dit(), self.dit_dtype, self.sampling_bytes(settings))

    def _must_stream(self, network: nn.Module, dtype: torch.dtype, working: int) -> bool:
        return must_stream(self.offload, self.device, parameters=sum(p.numel() for p in network.parameters()),
                           missing=whole_bytes(network, self.device, dtype), working=working)

    # Stages

    def settings(self, **overrides: Any) -> SampleSettings:
        """The model's default settings with `overrides`; None keeps the default. Checked.

        Raises:
            GeometryError, ScheduleError: see `SampleSettings.check`.
        """
        d = self.defaults
        base = SampleSettings(d.width, d.height, d.num_frames, d.num_steps, d.guidance_scale, d.sampler)
        settings = replace(base, **{k: v for k, v in overrides.items() if v is not None})
        settings.check()
        return settings

    def encode_prompt(self, prompt: str, negative_prompt: str | None = None, *, guidance_scale: float,
                      template: bool | None = None, clean: bool = True) -> PromptEmbeds:
        """Encodes the texts, then drops the text encoder.

        Args:
            prompt: what the clip shows.
            negative_prompt: what guidance steers away from; None takes the model's default.
            guidance_scale: at 1 the negative prompt is not encoded.
            template: wrap the prompt in the official quality template; None takes the model's default.
            clean: apply the official caption cleaning.
        Raises:
            TextError: a prompt is too long.
        """
        template = self.defaults.prompt_template if template is None else template
        texts = [format_prompt(prompt, template=template, clean=clean)]
        if guidance_scale != 1.0:
            negative = self.defaults.negative_prompt if negative_prompt is None else negative_prompt
            texts.append(format_negative(negative, clean=clean))
        prompts = self._stored_or(self._encode, texts)
        return PromptEmbeds(prompts[0], prompts[1] if len(prompts) > 1 else None)

    def _encode(self, texts: list[str]) -> list[Prompt]:
        """Each text by the text encoder."""
        encoder = self.load_text_encoder()
        if self._must_stream(encoder.model, self.text_dtype, _TEXT_WORKING_BYTES) and self.device.type != "cpu":
            # Networks of an earlier run make room; they are mapped again when they are needed.
            self._dit = self._vae = None
        with self._running(encoder.model, encoder.layers, self.text_dtype, _TEXT_WORKING_BYTES):
            embeds, mask = encoder.encode(texts)
        return [Prompt(embeds[i : i + 1], mask[i : i + 1]) for i in range(len(texts))]

    def _stored_or(self, encode: Callable[[list[str]], list[Prompt]], texts: list[str]) -> list[Prompt]:
        """Each text from the store; those that are not there are encoded, and kept."""
        store = self.prompt_store
        if store is None:
            return encode(texts)
        source = open_source(self.root, "t5-encoder", subfolder="text_encoder")
        of_all = (files_identity(source.header.files), str(self.text_dtype), self.device.type, self.defaults.text_length)
        keys = [prompt_key(*of_all, text) or "" for text in texts]  # text is JSON: there is always a key
        found = {key: Prompt(tensors["embeds"], tensors["mask"]) for key in keys
                 if (tensors := store.get(key, embeds=3, mask=2)) is not None}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        for key, prompt in zip(missing, encode(list(missing.values())) if missing else [], strict=True):
            store.put(key, prompt._asdict())
            found[key] = prompt
        return [Prompt(*(x.to(self.device) for x in found[key])) for key in keys]

    def check_memory(self, settings: SampleSettings) -> None:
        """Raises before anything is allocated when the clip cannot fit.

        Raises:
            NotEnoughMemory: with the estimate, what is free, and what to try.
        """
        host = free_bytes(torch.device("cpu"))
        remedy = "fewer frames; a smaller width and height; closing other programs"
        if host is not None:
            clip = frames_bytes(settings.width, settings.height, settings.num_frames)
            check_memory(f"A clip of {settings.num_frames} frames of {settings.width}x{settings.height}",
                         clip, host, remedy)
        free = free_bytes(self.device)
        if free is not None:
            if self.offload == "none":
                check_memory("The text encoder", self._text_parameters() * self.text_dtype.itemsize, free,
                             "--offload auto (offload=); closing other programs")
            check_memory("Sampling", self._dit_bytes(settings) + self.sampling_bytes(settings), free,
                         f"--offload auto (offload=) if it is none; --dtype bf16 if it is not; {remedy}")
        self.check_tile_memory(settings.num_frames, settings.height, settings.width)

    def _dit_bytes(self, settings: SampleSettings) -> int:
        """What the transformer will take of the device's memory: nothing if it is there already."""
        dit = self._load_dit()
        if self.streams(settings):
            return streamed_bytes(dit, layers_of_dit(dit), self.dit_dtype)
        return whole_bytes(dit, self.device, self.dit_dtype)

    def check_tile_memory(self, num_frames: int, height: int, width: int) -> None:
        """Raises before anything is allocated when the VAE cannot run on a clip of this size.

        Raises:
            NotEnoughMemory: with the estimate, what is free, and what to try.
        """
        free = free_bytes(self.device)
        if free is not None:
            tiling = self._vae_tiling()
            if tiling.tiles_per_batch is None:  # where there is no room for several, one has to do
                tiling = replace(tiling, tiles_per_batch=1)
            cells = cells_of(self.vae_config, (num_frames, height, width))
            check_memory("The VAE", self._vae_bytes(decoding_bytes, tiling, cells), free,
                         "smaller tiles; fewer tiles per batch; closing other programs")

    def sampling_bytes(self, settings: SampleSettings) -> int:
        """Estimated working memory of a step, without the weights."""
        batch = 2 if settings.guidance_scale != 1.0 and self._batched(settings) else 1
        return self._evaluation_bytes(settings, batch)

    def _evaluation_bytes(self, settings: SampleSettings, batch: int) -> int:
        shape = latent_shape(settings.width, settings.height, settings.num_frames)
        return estimate_sampling_bytes(self.dit_config, shape, batch=batch, dtype_bytes=self.dit_dtype.itemsize)

    def _vae_bytes(self, needed: Callable[..., int], tiling: Tiling, cells: tuple[int, int, int]) -> int:
        """What the VAE needs beside its weights for latents of (t, h, w) cells: `decoding_bytes` or `encoding_bytes`."""
        return needed(self.vae_config, tiling, cells, device=self.device, dtype_bytes=4)

    def _vae_tiling(self) -> Tiling:
        return self.tiling or Tiling.from_config(self.vae_config)

    def condition(self, given: GivenFrames, *, posterior_noise: Tensor | None = None,
                  progress: Progress | None = None) -> Tensor:
        """What the image-to-video model learns of the given frames.

        The VAE's posterior is narrow: its mean gives the same clip every time, and a run needs no second kind of
        noise. The reference draws a sample of it.

        Args:
            given: the frames, of the clip's size; none is allowed, the model then follows the text alone.
            posterior_noise: [1, 4, t, h, w], standard normal, for a sample instead of the mean.
            progress: called with (tiles done, tiles in all); raising in it cancels.
        Returns:
            [1, 8, t, h, w] float32 on the CPU, for `start`.
        Raises:
            GeometryError: the model is not the image-to-video one, or a size that the VAE cannot encode.
        """
        self.check_given(given)
        mean, logvar = self._encode_frames(given.canvas(), progress)
        if posterior_noise is not None:
            mean = sample_posterior(mean, logvar, posterior_noise.to(mean))
        check_finite(mean, "the latents of the given frames", "other images; intact weights of the VAE (allegro inspect)")
        return build_condition(normalise(mean, self.vae_config.scale_factor), given).cpu()

    def start(self, settings: SampleSettings, init_latents: Tensor | None = None, *, condition: Tensor | None = None,
              kept: Tensor | None = None, kept_start: int = 0) -> SampleState:
        """The state before the first step: pure noise, or given latents with noise on top.

        Args:
            settings: of the run.
            init_latents: raw latents [1, 4, t, h, w] to start from when settings.denoise is below 1.
            condition: of the given frames; see `condition`. An image-to-video model always needs one.
            kept: raw latents [1, 4, k, h, w] that the result has from latent frame `kept_start` on, unchanged.
            kept_start: 0 goes on from a clip whose last latents are given, t - k puts something in front of one.
        Raises:
            GeometryError: `init_latents`, `condition` or `kept` is not of the settings' size.
            ScheduleError: denoise below 1 without `init_latents`.
        """
        settings.check()
        shape = (LATENT_CHANNELS, *latent_shape(settings.width, settings.height, settings.num_frames))
        sigma = reference_sigmas(settings.num_steps, settings.denoise)[0]
        x = NoiseSource([settings.seed], shape).draw() * sigma
        if init_latents is not None:
            _check_shape("init latents", init_latents, (1, *shape), settings)
            x = x + normalise(init_latents.float().cpu(), self.vae_config.scale_factor)
        elif settings.denoise < 1.0:
            raise ScheduleError(f"denoise={settings.denoise}: below 1 needs frames or latents to start from. "
                                "Give some, or use denoise 1.")
        if condition is not None:
            _check_shape("condition", condition, (1, 2 * LATENT_CHANNELS, *shape[1:]), settings)
        if kept is not None:
            most = shape[1] - kept_start if kept_start >= 0 else 0
            _check_shape("kept latents", kept, (1, shape[0], min(kept.shape[2], most), *shape[2:]), settings)
            kept = normalise(kept.float().cpu(), self.vae_config.scale_factor)
        return SampleState(x, 0, settings, None, condition, kept, kept_start)

    def sample(self, prompts: PromptEmbeds, state: SampleState, *, stop: int | None = None,
               callback: Callback | None = None) -> SampleState:
        """Runs the remaining steps. A step cache is empty at the start, also where an earlier run stopped: with one, two
        halves do not equal one run.

        Args:
            prompts: from `encode_prompt`.
            state: from `start`, or where an earlier run stopped.
            stop: step to stop at; None finishes the run.
            callback: called after each step; raising in it cancels.
        Returns:
            the state after the last step.
        Raises:
            NonFiniteError: NaN or Inf in the prediction.
        """
        s = state.settings
        s.check()
        sigmas = reference_sigmas(s.num_steps, s.denoise)
        noise = NoiseSource([s.seed], state.latents.shape[1:], skip=1 + state.step)
        if self._vae is not None and self.device.type != "cpu" and not fits(
                self._dit_bytes(s) + self.sampling_bytes(s), self.device):
            self._vae = None  # where frames were encoded; it is read again to decode
        cache = None if s.cache == "off" else StepCache(s.cache, self.cache_calibration())
        kernel, last = self.kernel(s, state.attention), state.denoised

        def after_step(info: StepInfo) -> None:
            nonlocal last
            # The one place of a step that waits for the device, so that progress is what was computed, not what was asked for.
            check_finite(info.denoised, f"step {info.step} of {info.num_steps}",
                         ("" if kernel.name == "sdpa" else f"the attention sdpa instead of {kernel.name}; ") +
                         "the transformer in bf16 or fp32 instead of fp16; intact weights (allegro inspect)")
            last = info.denoised
            if callback is not None:
                callback(info)

        with self._running_dit(s) as dit:
            dit.attention = kernel.run
            denoise: Denoise = Denoiser(dit, prompts.positive, prompts.negative, s.guidance_scale,
                                        batched=self._batched(s), condition=state.condition, cache=cache)
            if state.kept is not None:
                denoise = keep_latents(denoise, state.kept.to(self.device), state.kept_start)
            x = SAMPLERS[s.sampler](
                denoise, state.latents.to(self.device), sigmas, noise.draw, start=state.step, stop=stop,
                previous=None if last is None else last.to(self.device), callback=after_step)
        step = s.num_steps if stop is None else min(stop, s.num_steps)
        skipped = "" if cache is None else cache.summary()
        if skipped:
            log.info("%s", skipped)
        if cache is not None and cache.idle and stop is None:
            log.warning("%s", IDLE)
        return replace(state, latents=_settled(x.cpu(), state, step), step=step,
                       denoised=None if last is None else last.cpu(), skipped=skipped, attention=kernel.name)

    def cache_calibration(self) -> CacheCalibration:
        """Of the step caches: `calibration`, or the file beside the weights, or that of the bundled model.

        Raises:
            UnsupportedCheckpoint: the file is no calibration.
        """
        if self.calibration is None:
            self.calibration = read_calibration(self.transformer)
        return self.calibration

    @contextmanager
    def _running_dit(self, settings: SampleSettings) -> Iterator[AllegroDiT]:
        """The transformer, which can run for as long as this lasts."""
        if self.device.type != "cpu" and self.streams(settings):
            self._dit = None  # an earlier, smaller run may have left it on the device
        dit, working = self._load_dit(), self.sampling_bytes(settings)
        with ExitStack() as stack:
            stack.enter_context(self._running(dit, list(layers_of_dit(dit)), self.dit_dtype, working))
            if self.compiled is not None:
                stack.enter_context(self.compiled.applied(dit.transformer_blocks))
            yield dit

    def _batched(self, settings: SampleSettings) -> bool:
        """Whether both prompts go through the network at once."""
        return both_prompts_fit(self._evaluation_bytes(settings, 2), self.device)

    def raw_latents(self, state: SampleState) -> Tensor:
        """The latents of a finished run as the VAE takes them: [1, 4, t, h, w] float32, on the CPU.

        Raises:
            ScheduleError: steps are left.
        """
        if not state.finished:
            raise ScheduleError(f"{state.step} of {state.settings.num_steps} steps are done: the latents still hold "
                                "noise. Resume the run first.")
        return denormalise(state.latents, self.vae_config.scale_factor)

    def decode_stream(self, latents: Tensor, *, progress: Progress | None = None) -> Iterator[Tensor]:
        """Decodes raw latents in bounded memory; where it runs out all the same, once more with less.

        Args:
            latents: raw latents [1, 4, t, h, w].
            progress: called with (tiles done, tiles in all); raising in it cancels.
        Yields:
            [1, 3, k, H, W] float32 in [-1, 1], on the CPU, in order.
        Raises:
            NonFiniteError: NaN or Inf in the frames.
        """
        t, h, w = (int(n) for n in latents.shape[2:])
        tiling = self._vae_tiling()
        self._make_room(self._vae_bytes(decoding_bytes, tiling, (t, h, w)))
        handed_out = 0
        try:
            for frames in self._decode_from(0, latents, tiling, progress):
                handed_out += frames.shape[2]
                yield frames
            return
        except (MemoryError, RuntimeError) as error:
            if not self._room_to_gain(tiling, error):
                raise
        yield from self._decode_from(handed_out, latents, self._with_more_room("decoding", tiling), progress)

    def _room_to_gain(self, tiling: Tiling, error: BaseException) -> bool:
        """Whether memory ran out, and the VAE could do with less of it."""
        spare = several_at_once(tiling, self.device) or (self._dit is not None and self.device.type != "cpu")
        return spare and is_out_of_memory(error)

    def _with_more_room(self, stage: str, tiling: Tiling) -> Tiling:
        """Takes the transformer off the device; returns the same tiles, one at a time."""
        log.warning("Memory ran out while %s. Trying once more, one tile at a time and without the transformer.", stage)
        self._dit = None  # it is read again, from the memory map, when the next run needs it
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return replace(tiling, tiles_per_batch=1)

    def _decode_from(self, first: int, latents: Tensor, tiling: Tiling, progress: Progress | None) -> Iterator[Tensor]:
        """The frames from number `first` on."""
        position = 0
        for frames in self.vae.decode_stream(latents.to(self.device), tiling=tiling, progress=progress, output_device="cpu"):
            new = frames[:, :, max(0, first - position) :]
            position += frames.shape[2]
            if new.shape[2]:
                check_finite(new, "decoding", "other latents (are they finite?); intact weights of the VAE (allegro inspect)")
                yield new.clamp(-1, 1)
            del frames, new  # on a CPU they are a view of the window, and would keep it

    def _make_room(self, needed: int) -> None:
        """Takes the transformer off the device when the VAE would not fit beside it."""
        if self.device.type != "cpu" and not fits(needed, self.device):
            self._dit = None  # it is read again, from the memory map, when the next run needs it

    def encode(self, frames: Tensor, *, progress: Progress | None = None) -> Tensor:
        """Frames [1, 3, T, H, W] in [-1, 1] -> raw latents [1, 4, ceil(T/4), H/8, W/8] float32 (the mean).

        Raises:
            GeometryError: H or W is no multiple of 8.
        """
        mean, _ = self._encode_frames(frames, progress)
        return mean.cpu()

    def _encode_frames(self, frames: Tensor, progress: Progress | None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance; where memory runs out, once more with less."""
        T, H, W = frames.shape[2:]
        tiling = self._vae_tiling()
        self._make_room(self._vae_bytes(encoding_bytes, tiling, cells_of(self.vae_config, (T, H, W))))
        try:
            return self.vae.encode(frames, tiling=tiling, progress=progress, device=self.device)
        except (MemoryError, RuntimeError) as error:
            if not self._room_to_gain(tiling, error):
                raise
        smaller = self._with_more_room("encoding", tiling)
        return self.vae.encode(frames, tiling=smaller, progress=progress, device=self.device)

    def __call__(self, prompt: str, *, negative_prompt: str | None = None, template: bool | None = None,
                 clean: bool = True, callback: Callback | None = None, init_frames: Tensor | None = None,
                 given: GivenFrames | Mapping[int, Tensor] | None = None, **settings: Any) -> Tensor:
        """All stages at once.

        Args:
            prompt, negative_prompt, template, clean: see `encode_prompt`.
            callback: called after each step.
            init_frames: [1, 3, T, H, W] in [-1, 1] to start from, with denoise below 1.
            given: for the image-to-video model, the frames that are known: {position: image [C, h, w] in [0, 1]} with
                images of any size, cropped to the clip's aspect, and negative positions counting from the end; or
                `GivenFrames`, which has more ways to say it.
            **settings: fields of `SampleSettings`; what is absent is the model's default.
        Returns:
            frames [1, 3, T, H, W] float32 in [-1, 1], on the CPU.
        """
        chosen = self.settings(**settings)
        self.check_given(given)
        if self.image_to_video and not isinstance(given, GivenFrames):
            given = GivenFrames.fitted(given or {}, chosen.width, chosen.height, chosen.num_frames)
        self.check_memory(chosen)
        prompts = self.encode_prompt(prompt, negative_prompt, guidance_scale=chosen.guidance_scale,
                                     template=template, clean=clean)
        latents = None if init_frames is None else self.encode(init_frames)
        condition = self.condition(given) if isinstance(given, GivenFrames) else None
        state = self.sample(prompts, self.start(chosen, latents, condition=condition), callback=callback)
        frames = torch.empty((1, 3, chosen.num_frames, chosen.height, chosen.width))
        position = 0
        for part in self.decode_stream(self.raw_latents(state)):
            frames[:, :, position : position + part.shape[2]] = part
            position += part.shape[2]
        return frames


def read_calibration(transformer: Path) -> CacheCalibration:
    """Of the step caches of a transformer: the file beside its weights, or that of the bundled model.

    Args:
        transformer: a file, a folder of weights, or a model folder.
    Raises:
        UnsupportedCheckpoint: the file is no calibration.
    """
    path = cache_file(transformer)
    return CacheCalibration.from_dict(read_json(path), str(path)) if path.is_file() else BUNDLED


def dit_dtype(parameters: int, device: torch.device, asked: torch.dtype | None) -> torch.dtype:
    """Type that a transformer runs in.

    Args:
        parameters: numbers in it.
        device: where it runs.
        asked: by the user; None for bfloat16 on an accelerator and float32 on a CPU.
    """
    small = parameters < SMALL_MODEL_PARAMETERS
    return asked or (torch.float32 if small or device.type == "cpu" else torch.bfloat16)


def text_dtype(parameters: int, asked: torch.dtype | None) -> torch.dtype:
    """Type that a text encoder runs in; the arguments are as in `dit_dtype`."""
    return torch.float32 if parameters < SMALL_MODEL_PARAMETERS or asked is torch.float32 else torch.bfloat16


def must_stream(offload: str, device: torch.device, *, parameters: int, missing: int, working: int) -> bool:
    """Whether a network is brought to its device layer by layer.

    Args:
        offload: one of `OFFLOADS`.
        device: where it runs.
        parameters: numbers in it.
        missing: bytes that moving it as a whole would take on the device; see `whole_bytes`.
        working: bytes that it needs beside its weights.
    """
    if offload != "auto":
        return offload == "stream"
    if device.type == "cpu":  # converting it as a whole would take memory, converting a layer takes no time
        return missing > 0 and parameters >= SMALL_MODEL_PARAMETERS
    return not fits(missing + working, device)


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes are free; yes where nobody knows."""
    free = free_bytes(device)
    return free is None or needed < free


def check_finite(x: Tensor, where: str, remedy: str = "another copy of the file; the run that made it, again") -> None:
    """Raises when `x` holds NaN or Inf.

    Raises:
        NonFiniteError: names the place and what to try, most likely cure first.
    """
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"NaN or Inf appeared in {where}. Try, in this order: {remedy}.")


def _check_shape(what: str, x: Tensor, expected: tuple[int, ...], settings: SampleSettings) -> None:
    if tuple(x.shape) != expected:
        raise GeometryError(f"{what} of shape {list(x.shape)}: expected {list(expected)} for {settings.num_frames} frames of "
                            f"{settings.width}x{settings.height}.")


def _settled(latents: Tensor, state: SampleState, step: int) -> Tensor:
    """The latents after `step`; in finished ones the kept frames are themselves to the last bit."""
    if state.kept is None or step < state.settings.num_steps:
        return latents
    end = state.kept_start + state.kept.shape[2]
    return torch.cat((latents[:, :, : state.kept_start], state.kept, latents[:, :, end:]), dim=2)


def _check_text_width(root: Path, transformer: Path) -> None:
    """Raises when a transformer cannot read what the text encoder of a model writes."""
    dit = config_of(open_source(transformer, "allegro-dit", subfolder="transformer"), dit_config_from_shapes)
    text = config_of(open_source(root, "t5-encoder", subfolder="text_encoder"), t5_config_from_shapes)
    if dit.caption_channels != text["d_model"]:
        raise CheckpointMismatch(f"{transformer} was made for a text encoder of width {dit.caption_channels}; that of {root} has "
                                 f"{text['d_model']}. Give the folder of the model it belongs to with --model (model=).")


def resolve_device(device: str | torch.device) -> torch.device:
    """"auto" -> the accelerator torch reports, else the CPU."""
    if device != "auto":
        return torch.device(device)
    if not hasattr(torch, "accelerator"):  # PyTorch before 2.6
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
}


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A name of `DTYPES` or a torch dtype -> torch dtype, None for "auto".

    Raises:
        ScheduleError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ScheduleError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
