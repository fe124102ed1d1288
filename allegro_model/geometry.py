"""Every rule about sizes lives here: what is legal, what it becomes in latent space, what it costs."""

from __future__ import annotations

from typing import NamedTuple

from .config import DiTConfig, VAEConfig
from .errors import GeometryError, NotEnoughMemory

# 8 pixels per latent cell x 2 cells per token, 4 frames per latent frame; the same for every Allegro model.
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4
LATENT_CHANNELS = 4
PIXEL_MULTIPLE = 16
# Far above anything the model can draw; a guard against typing errors and forged requests.
MAX_PIXELS = 8192
MAX_FRAMES = 4096


class LatentShape(NamedTuple):
    """(t, h, w): latent frames, rows, columns."""

    frames: int
    height: int
    width: int


def nearest_multiples(value: int, multiple: int) -> tuple[int, int]:
    """The largest legal value not above, and the smallest not below `value`; both at least `multiple`."""
    below = max(multiple, value // multiple * multiple)
    above = max(multiple, -(-value // multiple) * multiple)
    return below, above


def check_multiple(name: str, value: int, multiple: int, maximum: int) -> None:
    """Raises unless `value` is a multiple of `multiple` in [multiple, maximum].

    Raises:
        GeometryError: names the two nearest legal values.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise GeometryError(f"{name}={value!r}: must be a whole number, a multiple of {multiple}.")
    if multiple <= value <= maximum and value % multiple == 0:
        return
    below, above = nearest_multiples(min(max(value, 0), maximum), multiple)
    nearest = f"{below}" if below == above else f"{below} or {above}"
    raise GeometryError(f"{name}={value}: must be a multiple of {multiple} from {multiple} to {maximum}; "
                        f"nearest: {nearest}.")


def check_size(width: int, height: int, num_frames: int) -> None:
    """Raises unless a clip of this size can be generated.

    Args:
        width, height: pixels, multiples of 16.
        num_frames: frames, a multiple of 4.
    Raises:
        GeometryError: the first illegal value, with the two nearest legal ones.
    """
    check_multiple("width", width, PIXEL_MULTIPLE, MAX_PIXELS)
    check_multiple("height", height, PIXEL_MULTIPLE, MAX_PIXELS)
    check_multiple("num_frames", num_frames, TEMPORAL_FACTOR, MAX_FRAMES)


def latent_shape(width: int, height: int, num_frames: int) -> LatentShape:
    """(t, h, w) of a legal clip size; see `check_size` for what is legal.

    Raises:
        GeometryError: see `check_size`.
    """
    check_size(width, height, num_frames)
    return LatentShape(num_frames // TEMPORAL_FACTOR, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)


def token_count(shape: LatentShape, patch_size: int = 2) -> int:
    """N, the tokens the DiT attends over: 79,200 for 88 frames of 720x1280."""
    return shape.frames * -(-shape.height // patch_size) * -(-shape.width // patch_size)


# Memory. Estimates of activations, in bytes; weights come on top. A test holds them against the tensors that are alive
# during a run; what kernels take and give back by themselves, such as the workspace of a convolution, is not in them.

# Of the frames that a 2-D layer of the VAE gets at once: two at 320 x 320 with 128 channels in float32. More takes more
# memory, fewer keep a GPU less busy.
FRAMES_BYTES = 2**27


def estimate_sampling_bytes(config: DiTConfig, shape: LatentShape, *, batch: int, dtype_bytes: int,
                            prompts: int = 0, text_length: int = 512) -> int:
    """Peak activation memory of one DiT evaluation.

    The peak is where the keys get their positions, 8 widths per token; the feed-forward, whose hidden layer is 4 wide,
    stays a width below that.

    Args:
        batch: videos evaluated at once, counting both halves of guidance.
        dtype_bytes: bytes per activation.
        prompts: whose keys and values are kept for all steps.
        text_length: tokens of a prompt, at most.
    """
    tokens = batch * token_count(shape, config.patch_size) * config.width * 8
    text = prompts * text_length * config.width * 2 * config.num_layers
    return (tokens + text) * dtype_bytes


def estimate_decode_bytes(config: VAEConfig, tile: tuple[int, int, int], *, tiles: int, dtype_bytes: int) -> int:
    """Peak activation memory of decoding `tiles` tiles at once.

    The peak is at full resolution. In a temporal block its input lives together with two tensors that have a frame more
    at either end; in a ResNet before, its wider input and its output, and what a few frames need on their way.

    Args:
        tile: (frames, height, width) of a tile, pixels.
        tiles: tiles per batch.
        dtype_bytes: bytes per activation.
    """
    frames, height, width = tile
    narrow, wide = (tiles * frames * height * width * c * dtype_bytes for c in config.block_out_channels[:2])
    few = min(wide, (3 if tiles == 1 else 4) * FRAMES_BYTES // 2)  # frames of several tiles have to be brought together
    return max(narrow + 2 * narrow * (frames + 2) // frames, narrow + wide + few)


def estimate_encode_bytes(config: VAEConfig, tile: tuple[int, int, int], *, tiles: int, dtype_bytes: int) -> int:
    """Peak activation memory of encoding; arguments as for `estimate_decode_bytes`.

    The same temporal blocks; the ResNets have no wider input.
    """
    frames, height, width = tile
    narrow = tiles * frames * height * width * config.block_out_channels[0] * dtype_bytes
    few = (1 if tiles == 1 else 2) * min(FRAMES_BYTES, narrow)
    return max(narrow + 2 * narrow * (frames + 2) // frames, 2 * narrow + few)


def frames_bytes(width: int, height: int, num_frames: int) -> int:
    """Memory of a whole clip of float32 RGB frames."""
    return width * height * num_frames * 3 * 4


def check_memory(stage: str, needed: int, free: int, remedy: str) -> None:
    """Raises when a stage cannot fit.

    Args:
        stage: what would run, for the message.
        needed, free: bytes.
        remedy: what to try, most likely cure first.
    Raises:
        NotEnoughMemory: `needed` exceeds `free`.
    """
    if needed > free:
        gib = 1024**3
        raise NotEnoughMemory(f"{stage} needs about {needed / gib:.1f} GiB, {free / gib:.1f} GiB are free. "
                              f"Try, in this order: {remedy}.")


# Frame interpolation


def centred_padding(width: int, height: int, multiple: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) pixels that make both sides multiples of `multiple`; the odd one right and below."""
    across, down = -width % multiple, -height % multiple
    return across // 2, across - across // 2, down // 2, down - down // 2
