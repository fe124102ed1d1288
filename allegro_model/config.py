"""Every number that describes a checkpoint, and nothing else.

Two dialects of `config.json` are in circulation, the official one and the diffusers one. `from_dict` reads
both, ignores keys that change nothing (attention modes, class names, ...) and falls back to the released
88x720P values. Source: allegro config files and the diffusers port; see `DiTConfig.from_dict`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Generic, TypeVar

from .errors import UnsupportedCheckpoint

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Kind(Generic[Value]):
    """What a config.json may hold under a key.

    Attributes:
        expected: in words.
        read: gives the value, or raises any of the errors of a conversion.
    """

    expected: str
    read: Callable[[Any], Value]


def _whole(value: Any) -> int:
    if int(value) != value:
        raise ValueError
    return int(value)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return _whole(first), _whole(second)


_WHOLE = _Kind("a whole number", _whole)
_NUMBER = _Kind("a number", float)
_EDGE = _Kind("a whole number", lambda value: _whole(value[0] if isinstance(value, list | tuple) else value))
_PAIR = _Kind("two whole numbers", _pair)
_WHOLE_NUMBERS = _Kind("a list of whole numbers", lambda value: tuple(map(_whole, value)))
_NUMBERS = _Kind("a list of numbers", lambda value: tuple(map(float, value)))
_ROWS = _Kind("rows of numbers", lambda value: tuple(tuple(map(float, row)) for row in value))
_SWITCHES = _Kind("a list of true and false", lambda value: tuple(bool(_whole(v)) for v in value))


def _read(config: Mapping[str, Any], names: Sequence[str], kind: _Kind[Value], default: Value) -> Value:
    """The first of `names` that is present and not null, else `default`.

    Raises:
        UnsupportedCheckpoint: a value of another kind.
    """
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        return default
    try:
        return kind.read(config[name])
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise _wrong(name, config[name], kind.expected) from error


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise _wrong(name, value, expected)


def _wrong(name: str, value: object, expected: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(f"config: {name}={value!r}, expected {expected}. Check the config.json.")


# The DiT


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the diffusion transformer.

    Attributes:
        num_layers: transformer blocks.
        num_attention_heads, attention_head_dim: heads and their width; the width of a head is a multiple
            of 6, because 3-D RoPE splits it into three axes of pairs.
        in_channels, out_channels: latent channels.
        patch_size: latent cells per token along height and width.
        caption_channels: width of the text embeddings.
        sample_size: (height, width) the checkpoint was trained for, latent cells.
        sample_size_t: latent frames the checkpoint was trained for.
        interpolation_scale_t, _h, _w: positions are divided by these before the rotary angles.
        norm_eps: epsilon of the block LayerNorms.
        absolute_position: add a fixed sin/cos table of the token's (t, h, w) index after the patch
            embedding. Off for every released checkpoint; on for the bundled tiny one, which is too small
            to work out absolute position from relative position alone.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    patch_size: int
    caption_channels: int
    sample_size: tuple[int, int]
    sample_size_t: int
    interpolation_scale_t: float
    interpolation_scale_h: float
    interpolation_scale_w: float
    norm_eps: float
    absolute_position: bool

    def __post_init__(self) -> None:
        dh = self.attention_head_dim
        _require("attention_head_dim", dh, dh > 0 and dh % 6 == 0, "a positive multiple of 6")
        for name in ("num_layers", "num_attention_heads", "in_channels", "out_channels", "patch_size",
                     "caption_channels", "sample_size_t"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a positive integer")
        _require("sample_size", self.sample_size, min(self.sample_size) > 0, "positive integers")
        for axis in "thw":
            scale = getattr(self, f"interpolation_scale_{axis}")
            _require(f"interpolation_scale_{axis}", scale, math.isfinite(scale) and scale > 0, "a positive number")

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiTConfig:
        """Reads an official or diffusers `config.json`; unknown keys are ignored.

        Null interpolation scales are derived from the sample size, as the official constructor does.

        Raises:
            UnsupportedCheckpoint: a value no Allegro checkpoint can have.
        """
        base = DIT_88X720P
        height = _read(config, ("sample_height",), _WHOLE, base.sample_size[0])
        width = _read(config, ("sample_width",), _WHOLE, base.sample_size[1])
        sample_size = _read(config, ("sample_size",), _PAIR, (height, width))
        sample_size_t = _read(config, ("sample_size_t", "sample_frames"), _WHOLE, base.sample_size_t)
        patch_size_t = _read(config, ("patch_size_t",), _WHOLE, 1)
        _require("patch_size_t", patch_size_t, patch_size_t == 1, "1")
        scales = _scales(config, sample_size, sample_size_t)
        sizes = {name: _read(config, (name,), _WHOLE, getattr(base, name)) for name in (
            "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size",
            "caption_channels")}
        return cls(**sizes, **scales, sample_size=sample_size, sample_size_t=sample_size_t,
                   norm_eps=_read(config, ("norm_eps",), _NUMBER, base.norm_eps),
                   absolute_position=bool(config.get("absolute_position", False)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict(to_dict())` is the identity."""
        return {**asdict(self), "sample_size": list(self.sample_size)}


def _scales(config: Mapping[str, Any], sample_size: tuple[int, int], frames: int) -> dict[str, Any]:
    """Interpolation scales: the released values when the key is absent, derived when it is null."""
    derived = {
        "interpolation_scale_t": frames / 16 if frames % 2 == 0 else (frames - 1) // 16 + 1,
        "interpolation_scale_h": sample_size[0] / 30,
        "interpolation_scale_w": sample_size[1] / 40,
    }
    return {name: _read(config, (name,), _NUMBER, float(value if name in config else getattr(DIT_88X720P, name)))
            for name, value in derived.items()}


# The VideoVAE

# Field -> its names in the dialects, ours first.
VAE_NAMES: Mapping[str, tuple[str, ...]] = {
    "temporal_down": ("temporal_down", "blocks_tempdown_li", "temporal_downsample_blocks"),
    "temporal_up": ("temporal_up", "blocks_tempup_li", "temporal_upsample_blocks"),
    "scale_factor": ("scale_factor", "scaling_factor"),
    "tile_size": ("tile_size", "sample_size"),
    "tile_frames": ("tile_frames", "chunk_len"),
    "overlap_frames": ("overlap_frames", "t_over"),
}


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the VideoVAE and the tiles it was trained on.

    Attributes:
        block_out_channels: channels of the four levels, finest first.
        layers_per_block: ResNets per encoder level (the decoder has one more).
        latent_channels: channels of a latent.
        norm_num_groups: groups of the spatial GroupNorms.
        temporal_norm_num_groups: groups of the temporal GroupNorms; 32 in the official code, whatever
            `norm_num_groups` says.
        temporal_down, temporal_up: levels that halve / double the frame count, encoder / decoder order.
        scale_factor: normalised latents = raw latents * scale_factor.
        tile_size: edge of a square tile, pixels.
        tile_overlap: (height, width) overlap of neighbouring tiles, pixels.
        tile_frames, overlap_frames: the same along time, frames.
        latent_rgb_factors, latent_rgb_factors_bias: colours in [-1, 1] = normalised latents @ factors [C, 3] + bias
            [3], for previews; empty where nobody has fitted them.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    temporal_norm_num_groups: int
    temporal_down: tuple[bool, ...]
    temporal_up: tuple[bool, ...]
    scale_factor: float
    tile_size: int
    tile_overlap: tuple[int, int]
    tile_frames: int
    overlap_frames: int
    latent_rgb_factors: tuple[tuple[float, ...], ...] = ()
    latent_rgb_factors_bias: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        _require("block_out_channels", self.block_out_channels, min(self.block_out_channels, default=0) > 0,
                 "positive integers")
        for name in ("layers_per_block", "latent_channels", "norm_num_groups", "temporal_norm_num_groups", "tile_size",
                     "tile_frames"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a positive integer")
        for name in ("temporal_down", "temporal_up"):
            _require(name, getattr(self, name), len(getattr(self, name)) == levels, f"{levels} entries")
        _require("scale_factor", self.scale_factor, self.scale_factor > 0, "a positive number")
        factors, bias = self.latent_rgb_factors, self.latent_rgb_factors_bias
        _require("latent_rgb_factors", factors, not factors or [len(row) for row in factors] == [3] * self.latent_channels,
                 f"{self.latent_channels} rows of 3 numbers")
        _require("latent_rgb_factors_bias", bias, len(bias) == 3, "3 numbers")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along height and width: 8 when released."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame: 4 when released."""
        return int(2 ** sum(self.temporal_down))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Reads an official or diffusers `config.json`; unknown keys are ignored.

        `scaling_factor` 0.13, the diffusers class default, is a rounding of the 0.13235 the latents were
        trained with, and is read as such.

        Raises:
            UnsupportedCheckpoint: a value no VideoVAE can have.
        """
        base = VAE_720P

        def read(field: str, kind: _Kind[Value]) -> Value:
            return _read(config, VAE_NAMES.get(field, (field,)), kind, getattr(base, field))

        scale = read("scale_factor", _NUMBER)
        return cls(
            block_out_channels=read("block_out_channels", _WHOLE_NUMBERS),
            layers_per_block=read("layers_per_block", _WHOLE),
            latent_channels=read("latent_channels", _WHOLE),
            norm_num_groups=read("norm_num_groups", _WHOLE),
            temporal_norm_num_groups=read("temporal_norm_num_groups", _WHOLE),
            temporal_down=read("temporal_down", _SWITCHES),
            temporal_up=read("temporal_up", _SWITCHES),
            scale_factor=base.scale_factor if scale == 0.13 else scale,
            tile_size=read("tile_size", _EDGE),
            tile_overlap=read("tile_overlap", _PAIR),
            tile_frames=read("tile_frames", _WHOLE),
            overlap_frames=read("overlap_frames", _WHOLE),
            latent_rgb_factors=read("latent_rgb_factors", _ROWS),
            latent_rgb_factors_bias=read("latent_rgb_factors_bias", _NUMBERS),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict(to_dict())` is the identity."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


# The frame interpolator


@dataclass(frozen=True)
class VFIConfig:
    """Shape of an EMA-VFI frame interpolator (arXiv 2303.00440).

    Attributes:
        base_channels: channels of the first stage, doubled by each of the next four; F in the paper.
        depth: layers of the five stages: convolutions in the first three, transformer blocks in the last two.
        window: edge of an attention window, cells; 7 in every released model.
        arbitrary_time: trained for every position between two frames; False: for the middle alone.
    """

    base_channels: int
    depth: tuple[int, int, int, int, int]
    window: int
    arbitrary_time: bool

    def __post_init__(self) -> None:
        F = self.base_channels
        _require("base_channels", F, F == 2 or (F > 0 and F % 4 == 0), "2 or a positive multiple of 4")
        _require("depth", self.depth, len(self.depth) == 5 and min(self.depth) > 0, "five positive integers")
        for stage in (4, 5):
            blocks, heads = self.depth[stage - 1], self.heads(stage)
            _require(f"depth of stage {stage}", blocks, self.channels(stage) % (blocks * heads) == 0,
                     f"a number by which {self.channels(stage)} channels and {heads} heads can be divided")
        _require("window", self.window, self.window > 1, "2 or more")

    def channels(self, stage: int) -> int:
        """Channels of a stage, 1 to 5; appearance and, in stages 4 and 5, motion."""
        return int(self.base_channels * 2 ** (stage - 1))

    def heads(self, stage: int) -> int:
        """Attention heads of a stage, 4 or 5; a head is 32 wide, or as wide as a stage that is narrower."""
        return max(1, self.channels(stage) // VFI_HEAD_DIM)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], *, arbitrary_time: bool = False) -> VFIConfig:
        """Derives the sizes from the tensors of a checkpoint, under our names.

        Args:
            shapes: tensor name -> shape.
            arbitrary_time: this and the window, which is 7, cannot be seen in the tensors.
        Raises:
            UnsupportedCheckpoint: no EMA-VFI model has tensors like these.
        """
        first = shapes.get("feature_bone.block1.conv.0.weight", ())
        _require("feature_bone.block1.conv.0.weight", list(first), len(first) == 4, "the first convolution of EMA-VFI")
        convolutions = [sum(1 for name, shape in shapes.items() if len(shape) == 4
                            and re.fullmatch(rf"feature_bone\.block{stage}\.conv\.\d+\.weight", name))
                        for stage in (1, 2, 3)]
        blocks = [sum(1 for name in shapes if re.fullmatch(rf"feature_bone\.block{stage}\.\d+\.norm1\.weight", name))
                  for stage in (4, 5)]
        return cls(first[0], (*convolutions, *blocks), VFI_WINDOW, arbitrary_time)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "depth": list(self.depth)}


VFI_HEAD_DIM = 32
VFI_WINDOW = 7

# The four released models: MCG-NJU/EMA-VFI. "_t" has the tensors of its namesake and was trained otherwise.
VFI_PRESETS: dict[str, VFIConfig] = {
    "ours": VFIConfig(32, (2, 2, 2, 4, 4), VFI_WINDOW, False),
    "ours_t": VFIConfig(32, (2, 2, 2, 4, 4), VFI_WINDOW, True),
    "ours_small": VFIConfig(16, (2, 2, 2, 2, 2), VFI_WINDOW, False),
    "ours_small_t": VFIConfig(16, (2, 2, 2, 2, 2), VFI_WINDOW, True),
}


# Fields that say how to use a VideoVAE, not what its latents mean.
_USE = ("tile_size", "tile_overlap", "tile_frames", "overlap_frames", "latent_rgb_factors", "latent_rgb_factors_bias")


def fingerprint(config: DiTConfig | VAEConfig) -> str:
    """A short hash of what makes two networks the same kind, wherever their files lie and whatever they are called."""
    content = {name: value for name, value in config.to_dict().items() if name not in _USE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


# How a model wants to be used


@dataclass(frozen=True)
class SamplingConfig:
    """The settings a model was made for: the defaults of the command line and of scripts.

    Attributes:
        width, height: pixels.  num_frames: frames.  fps: frames per second.
        num_steps: denoising steps.  guidance_scale: classifier-free guidance weight.
        sampler: a key of `sampling.SAMPLERS`.
        prompt_template: wrap the prompt in the official quality template.
        negative_prompt: used when the caller gives none.
        text_length: tokens a prompt is padded or cut to.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    num_steps: int
    guidance_scale: float
    sampler: str
    prompt_template: bool
    negative_prompt: str
    text_length: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SamplingConfig:
        """Reads the "allegro_sampling" entry of a `model_index.json`; what is absent is the released value."""
        known = {f.name for f in fields(cls)}
        return replace(SAMPLING_88X720P, **{k: v for k, v in config.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict(to_dict())` is the identity."""
        return asdict(self)


@dataclass(frozen=True)
class ModelPreset:
    """One released model."""

    dit: DiTConfig
    vae: VAEConfig
    sampling: SamplingConfig


DIT_88X720P = DiTConfig(
    num_layers=32, num_attention_heads=24, attention_head_dim=96, in_channels=4, out_channels=4, patch_size=2,
    caption_channels=4096, sample_size=(90, 160), sample_size_t=22, interpolation_scale_t=2.2,
    interpolation_scale_h=2.0, interpolation_scale_w=2.0, norm_eps=1e-6, absolute_position=False,
)
VAE_720P = VAEConfig(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32,
    temporal_norm_num_groups=32, temporal_down=(True, True, False, False),
    temporal_up=(False, True, True, False), scale_factor=0.13235, tile_size=320, tile_overlap=(120, 80),
    tile_frames=24, overlap_frames=8,
)
DEFAULT_NEGATIVE_PROMPT = (
    "\nnsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, \nlow quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.\n"
)
SAMPLING_88X720P = SamplingConfig(
    width=1280, height=720, num_frames=88, fps=15.0, num_steps=100, guidance_scale=7.5,
    sampler="euler_ancestral", prompt_template=True, negative_prompt=DEFAULT_NEGATIVE_PROMPT, text_length=512,
)
TI2V_GUIDANCE_SCALE = 8.0  # the default of the reference's image-to-video script

# The 40-frame entries are deduced from the training stages in the paper (arXiv 2410.15458); a config.json
# beside the weights always wins over them.
PRESETS: dict[str, ModelPreset] = {
    "88x720P": ModelPreset(DIT_88X720P, VAE_720P, SAMPLING_88X720P),
    "40x720P": ModelPreset(
        replace(DIT_88X720P, sample_size_t=10, interpolation_scale_t=1.0),
        VAE_720P,
        replace(SAMPLING_88X720P, num_frames=40),
    ),
    "40x360P": ModelPreset(
        replace(DIT_88X720P, sample_size_t=10, sample_size=(46, 80), interpolation_scale_t=1.0,
                interpolation_scale_h=1.0, interpolation_scale_w=1.0),
        replace(VAE_720P, tile_size=256, tile_overlap=(144, 64)),
        replace(SAMPLING_88X720P, num_frames=40, width=640, height=368),
    ),
}
