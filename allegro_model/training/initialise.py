"""Starting values under which the untrained networks already do something useful.

The VAE starts as "mean colour per cell" and the DiT as "eps = its input", the right answer at high noise; training
only learns the corrections. A network this small needs thousands of steps to find these identities by itself.
Parameters are addressed by their published names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Constant that keeps the variance of a normalised group nearly independent of the colour it carries.
_VAE_CONSTANT = 2.0
_DIT_CONSTANT = 6.0
_COLOURS = 3
_GROUPS = 4


def _route(channels_in: int, channels_out: int) -> Tensor:
    """Return ``[out, in]``: channel j of norm group g goes to channel j of group g, for as many as both have."""
    wide_in, wide_out = channels_in // _GROUPS, channels_out // _GROUPS
    matrix = torch.zeros(channels_out, channels_in)
    for group in range(_GROUPS):
        for channel in range(min(wide_in, wide_out)):
            matrix[group * wide_out + channel, group * wide_in + channel] = 1.0
    return matrix


def _carry_in(conv: Any) -> None:
    """Make a 3x3 input convolution write colour c as [c, -c, K, -K] into norm group c; group 3 stays random."""
    wide = conv.out_channels // _GROUPS
    weight, bias = conv.weight, conv.bias
    weight[: _COLOURS * wide] = 0.0
    bias[: _COLOURS * wide] = 0.0
    for colour in range(_COLOURS):
        first = colour * wide
        weight[first, colour, 1, 1], weight[first + 1, colour, 1, 1] = 1.0, -1.0
        bias[first + 2], bias[first + 3] = _VAE_CONSTANT, -_VAE_CONSTANT


def _carry_out(conv: Any, mean_square: float) -> None:
    """Make the last 3x3 convolution read the colours back: silu(x) - silu(-x) = x.

    Args:
        conv: convolution after GroupNorm and SiLU.
        mean_square: typical mean square of a colour, which with the constant sets the group's deviation.
    """
    wide = conv.in_channels // _GROUPS
    deviation = math.sqrt(2 * (mean_square + _VAE_CONSTANT**2) / wide)
    conv.weight.mul_(0.1)
    conv.bias.zero_()
    for colour in range(_COLOURS):
        conv.weight[colour] = 0.0
        conv.weight[colour, colour * wide, 1, 1] = deviation
        conv.weight[colour, colour * wide + 1, 1, 1] = -deviation


def _silence(conv: Any) -> None:
    """Zero a layer, so that the residual branch it ends starts as nothing."""
    for parameter in conv.parameters():
        parameter.zero_()


_BRANCH_ENDS = ("conv2", "conv4.2", "temp_conv_in", "temp_conv_out", "to_out.0")


def _is_branch_end(name: str) -> bool:
    if name.endswith("conv2"):
        return "resnets" in name
    return name.endswith(_BRANCH_ENDS[1:])


def _diagonal(conv: Any, taps: Tensor) -> None:
    """Make a convolution act on every channel alone with the spatial kernel ``taps``."""
    conv.weight.zero_()
    for channel in range(conv.out_channels):
        conv.weight[channel, channel] = taps
    conv.bias.zero_()


_MEAN_2X2 = torch.tensor([[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 0.0]])
_SMOOTH = torch.tensor([0.25, 0.5, 0.25]).outer(torch.tensor([0.25, 0.5, 0.25]))


@torch.no_grad()
def initialise_vae(vae: Any, *, mean_square: float = 0.5, log_variance: float = -6.0) -> None:
    """Start a small VideoVAE as a pass-through: the latent is the mean colour of each 8x8 cell.

    Needs four norm groups and no 1x1 bottleneck narrower than four channels per group.

    Args:
        vae: a ``VideoVAE`` whose parameters carry the published names.
        mean_square: mean square of a colour in [-1, 1] over the data.
        log_variance: log variance that the encoder predicts at the start.
    """
    for name, module in vae.named_modules():
        if _is_branch_end(name):
            _silence(module)
        elif name.endswith("conv_shortcut"):
            module.weight.copy_(_route(module.in_channels, module.out_channels)[..., None, None])
            module.bias.zero_()
        elif name.endswith("downsamplers.0.conv"):
            _diagonal(module, _MEAN_2X2)
        elif name.endswith("upsamplers.0.conv"):
            _diagonal(module, _SMOOTH)
    encoder, decoder = vae.encoder, vae.decoder
    _carry_in(encoder.conv_in)
    _carry_in(decoder.conv_in)
    _carry_out(encoder.conv_out, mean_square)
    _carry_out(decoder.conv_out, mean_square)
    latent = vae.post_quant_conv.weight.shape[0]
    encoder.conv_out.weight[latent:] = 0.0
    encoder.conv_out.bias[latent:] = log_variance
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0]).reshape(conv.weight.shape))
        conv.bias.zero_()


def _local_bias(head_dim: int, strengths: tuple[float, float, float]) -> Tensor:
    """Return the bias of one head's queries and keys that favours near tokens along each axis.

    Rotary positions turn a constant query and key into a kernel of the distance: the logit of distance d along an axis
    is the sum of b_k^2 cos(d f_k) / sqrt(head_dim). Two frequencies per axis share the wanted logit at d = 0.
    """
    wide = head_dim // 3
    bias = torch.zeros(head_dim)
    for axis, strength in enumerate(strengths):
        bias[axis * wide : axis * wide + 2] = math.sqrt(strength * math.sqrt(head_dim) / 2)
    return bias


_KERNELS = ((4.0, 4.0, 4.0), (1.0, 6.0, 6.0), (8.0, 1.0, 1.0))


def _initialise_block(block: Any, heads: int) -> None:
    table = block.scale_shift_table
    table.zero_()
    table[2], table[5] = 1.0, 1.0  # gates of attention and feed-forward
    width = table.shape[1]
    bias = torch.cat([_local_bias(width // heads, _KERNELS[h % len(_KERNELS)]) for h in range(heads)])
    for layer in (block.attn1.to_q, block.attn1.to_k):
        nn.init.xavier_uniform_(layer.weight, gain=0.3)
        layer.bias.copy_(bias)
    for layer in (block.attn1.to_v, block.attn2.to_q, block.attn2.to_k, block.attn2.to_v, block.ff.net[0].proj):
        nn.init.xavier_uniform_(layer.weight)
        layer.bias.zero_()
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        _silence(layer)


def _embedding_deviation(dit: Any) -> float:
    """Return the typical deviation over the channels of an embedded token of pure noise."""
    config = dit.config
    shape = (4, config.in_channels, config.sample_size_t, *config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return float(dit.embed(noise).std(dim=-1, correction=0).mean())


@torch.no_grad()
def initialise_dit(dit: Any) -> None:
    """Start a small AllegroDiT as ``eps = latents``, with local attention ready and every branch output at zero.

    Channels 0-15 of a token carry its 16 patch values, 16-31 constants that keep the scale of the last norm nearly
    fixed; ``proj_out`` reads the patch values back. The position table leaves these channels alone.

    Args:
        dit: an ``AllegroDiT`` with a patch of 2 x 2 x 4 values and a width of at least 48.
    """
    config = dit.config
    patch, channels = config.patch_size, config.in_channels
    values = patch * patch * channels
    dit.pos_embed.proj.weight[: 2 * values].zero_()
    dit.pos_embed.proj.bias.zero_()
    nn.init.normal_(dit.pos_embed.proj.weight[2 * values :], std=0.1)
    dit.pos_embed.proj.bias[values : 2 * values] = _DIT_CONSTANT * torch.tensor([1.0, -1.0]).repeat(values // 2)
    dit.proj_out.weight.zero_()
    dit.proj_out.bias.zero_()
    for row in range(patch):
        for column in range(patch):
            for channel in range(channels):
                dit.pos_embed.proj.weight[(row * patch + column) * channels + channel, channel, row, column] = 1.0
    gain = _embedding_deviation(dit)
    dit.proj_out.weight[:, :values] = gain * torch.eye(values)
    # The constants average to minus the mean that the norm subtracts: adding it back leaves the patch value.
    dit.proj_out.weight[:, values : 2 * values] = -gain / values
    dit.scale_shift_table.zero_()
    embedder = dit.adaln_single.emb.timestep_embedder
    nn.init.normal_(embedder.linear_1.weight, std=0.05)
    nn.init.normal_(embedder.linear_2.weight, std=0.01)
    nn.init.normal_(dit.adaln_single.linear.weight, std=0.01)
    for layer in (embedder.linear_1, embedder.linear_2, dit.adaln_single.linear):
        layer.bias.zero_()
    for block in dit.transformer_blocks:
        _initialise_block(block, config.num_attention_heads)


@torch.no_grad()
def initialise_ti2v(dit: Any, text_to_video: Mapping[str, Tensor]) -> None:
    """Start an AllegroTI2V as the text-to-video model it goes on from: the condition adds nothing yet.

    Args:
        dit: an ``AllegroTI2V``.
        text_to_video: weights of an ``AllegroDiT`` of the same sizes.
    """
    dit.load_state_dict(text_to_video, strict=False)
    for extra in (dit.pos_embed_masked_video, dit.pos_embed_mask, dit.pos_embed_first_frame):
        extra[0].proj.load_state_dict(dit.pos_embed.proj.state_dict())
        extra[1].weight.zero_()
