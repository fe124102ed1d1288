"""Starting values of the frame interpolator.

From random weights a network this small stayed at the blend of both frames for as long as it was tried. Its flow heads
have just the layers that a comparison of pictures takes, so they start as one: on shapes that training never saw, the
untrained network is already several dB better than the blend.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import nn

from ..vfi import EMAVFI

_SLOPE = 0.25  # of an untrained PReLU
_SIMILARITY = 4.0  # keys start as this many times the queries of the same content
_MOTION = 10.0  # motion is given in shares of the frame, so that without it a few pixels would count for nothing
_UNFOLDED = 16  # channels that a flow head unfolds into one channel of 4 x 4
_IMAGES, _WARPED = -6, -11  # where a head's last input channels begin to show both frames
_SEEN = (1.0, 0.6, -0.4)  # weights of red, green and blue; brightness alone cannot tell red from blue
_SHARPNESS = 1.3  # how soon a difference counts in full
_STEP = 0.7  # what it then counts, pixels of the picture that the head compares
_START = 0.1


def initialise_vfi(model: EMAVFI) -> None:
    """Start where learning is quick: activations keep their scale, attention finds what looks alike, the flow follows a
    comparison of the pictures, and little is corrected."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            up = isinstance(module, nn.ConvTranspose2d)
            seen = module.in_channels // module.groups * (4 if up else module.weight[0, 0].numel())
            nn.init.normal_(module.weight, std=(2 / (1 + _SLOPE**2) / seen) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    net: Any = model
    with torch.no_grad():
        for block in (*net.feature_bone.block4, *net.feature_bone.block5):
            width, motion = block.attn.q.in_features, block.attn.motion_proj.in_features
            nn.init.orthogonal_(block.attn.q.weight)
            block.attn.kv.weight[:width] = _SIMILARITY * block.attn.q.weight
            nn.init.normal_(block.attn.cor_embed.weight)
            nn.init.normal_(block.attn.motion_proj.weight, std=_MOTION * motion**-0.5)
            _show_position(block.attn.motion_proj)
        for head, images, stage in zip(net.block, (_IMAGES, _WARPED), (5, 4), strict=True):
            motion = model.config.channels(stage) // _UNFOLDED
            _match_pictures(head, head.conv[0][0].in_channels + images, (motion - 1, 2 * motion - 1))
        net.unet.conv.weight.mul_(_START)


def _show_position(projection: Any) -> None:
    """Make one unfolded channel of motion constant: scaled by time, it tells the flow head the time."""
    projection.weight[-_UNFOLDED:] = 0
    projection.bias[-_UNFOLDED:] = 1


def _match_pictures(head: Any, first: int, positions: tuple[int, int]) -> None:
    """Let a flow head start as a comparison of both frames, each moved one pixel, in opposite directions.

    Where the frames agree better when moved apart one way, the flow goes that way: to the first frame by the share
    ``t`` of a step, to the second by ``1 - t``. A slope of -1 makes a PReLU the absolute value, a slope of 1 nothing.
    ``|t + s| - |t - s|`` is twice the smaller of both, with the sign of ``s``.

    Args:
        head: a ``FlowHead``.
        first: the first of the six input channels that show the frames, the one before, then the one after.
        positions: input channels that show ``t`` and ``1 - t``.
    """
    compare, scale, last = (part[0].weight for part in head.conv)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur = torch.outer(line, line)
    last.mul_(_START)
    for weight, rows in ((compare, 6), (scale, 8), (last, 5)):
        weight[:rows] = 0
    for k, position in enumerate(positions):
        compare[4 + k, position, 1, 1] = 1
    for row, (axis, way) in enumerate(product((0, 1), (-1, 1))):
        for frame, side in ((0, 1), (1, -1)):
            place = (1, 1 + side * way) if axis == 0 else (1 + side * way, 1)
            compare[row, first + 3 * frame : first + 3 * frame + 3, place[0], place[1]] = side * torch.tensor(_SEEN)
        for target, sign in product((0, 1), (1, -1)):
            scale[4 * target + 2 * axis + (sign < 0), row] = sign * way * _SHARPNESS * blur
    for target, axis, sign in product((0, 1), (0, 1), (1, -1)):
        row = 4 * target + 2 * axis + (sign < 0)
        scale[row, 4 + target, 1, 1] = 1
        last[2 * target + axis, row] = sign * (2 * target - 1) * _STEP * blur
    head.conv[0][1].weight[:6] = torch.tensor([-1.0] * 4 + [1.0] * 2)
    head.conv[1][1].weight[:8] = -1.0
    head.conv[2][1].weight.fill_(1.0)  # flow has both signs
