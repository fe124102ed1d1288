"""The refinement network: what merging two warped frames cannot know. More than half of all the work.

Attribute names equal the published checkpoint keys. Source: EMA-VFI (arXiv 2303.00440), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Layers, join


class _Down(nn.Module):
    """Halves the size."""

    def __init__(self, in_channels: int, channels: int, layers: Layers) -> None:
        super().__init__()
        self.conv1 = layers.conv_prelu(in_channels, channels, stride=2)
        self.conv2 = layers.conv_prelu(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class RefineNet(nn.Module):
    """A U-Net that sees the warped features of both frames at every size.

    Args:
        base: F, channels of the backbone's first stage.
        layers: builds the layers.
    """

    def __init__(self, base: int, layers: Layers) -> None:
        super().__init__()
        c = 2 * base
        self.down0 = _Down(17 + c, 2 * c, layers)
        self.down1 = _Down(4 * c, 4 * c, layers)
        self.down2 = _Down(8 * c, 8 * c, layers)
        self.down3 = _Down(16 * c, 16 * c, layers)
        self.up0 = layers.up_prelu(32 * c, 8 * c)
        self.up1 = layers.up_prelu(16 * c, 4 * c)
        self.up2 = layers.up_prelu(8 * c, 2 * c)
        self.up3 = layers.up_prelu(4 * c, c)
        self.conv = layers.conv(c, 3)

    def forward(self, images: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Predicts the correction.

        Args:
            images: both frames, both warped, mask logit, flow: 17 channels of [B, *, H, W].
            first, second: five warped maps of the two frames, from full size to a sixteenth.
        Returns:
            [B, 3, H, W], before the sigmoid.
        """
        shown = torch.cat(list(images), dim=1).to(first[0].dtype)
        s0 = self.down0(join(shown, first[0], second[0]))  # [B, 2c, H/2, W/2]
        s1 = self.down1(join(s0, first[1], second[1]))  # [B, 4c, H/4, W/4]
        s2 = self.down2(join(s1, first[2], second[2]))  # [B, 8c, H/8, W/8]
        x = self.down3(join(s2, first[3], second[3]))  # [B, 16c, H/16, W/16]
        x = self.up0(join(x, first[4], second[4]))  # [B, 8c, H/8, W/8]
        x = self.up1(join(x, s2))  # [B, 4c, H/4, W/4]
        x = self.up2(join(x, s1))  # [B, 2c, H/2, W/2]
        x = self.up3(join(x, s0))  # [B, c, H, W]
        return self.conv(x)
