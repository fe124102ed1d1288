"""The backbone: one frame at a time to an eighth of the size, from there on both frames of a pair together.

Attribute names equal the published checkpoint keys. Source: EMA-VFI (arXiv 2303.00440), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...config import VFIConfig
from .blocks import BLOCK_EPS, Block
from .layers import Layers

PATCH_EPS = 1e-5


class FrameStages(NamedTuple):
    """What the backbone knows of frames by themselves.

    Attributes:
        maps: stages 1 to 3, [B, C, H, W] at full, half and quarter size.
        tokens: [B, h, w, C] at an eighth, the input of stage 4.
    """

    maps: tuple[Tensor, Tensor, Tensor]
    tokens: Tensor


class PairFeatures(NamedTuple):
    """What the backbone knows of pairs of frames; [2B, C, H, W], the first half belongs to the first frames.

    Attributes:
        appearance: stages 1 to 5, at 1, 1/2, 1/4, 1/8 and 1/16 of the size.
        motion: stages 4 and 5.
    """

    appearance: tuple[Tensor, ...]
    motion: tuple[Tensor, Tensor]


class ConvBlock(nn.Module):
    """Convolutions that keep the size, each followed by its PReLU."""

    def __init__(self, in_channels: int, channels: int, depth: int, layers: Layers) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(depth):
            parts += layers.conv_prelu(channels if i else in_channels, channels)
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, channels, H, W]."""
        return self.conv(x)


class CrossScalePatchEmbed(nn.Module):
    """Tokens at an eighth of the size from stages 1 to 3, each seen at one or more dilations."""

    def __init__(self, base: int, layers: Layers) -> None:
        super().__init__()
        # (stage, dilation); the stride brings a stage's map to an eighth
        self.plan = ((3, 1), (2, 1), (2, 2), (1, 1), (1, 2), (1, 3), (1, 4))
        self.layers = nn.ModuleList(
            layers.conv(base * 2 ** (stage - 1), base, stride=2 ** (4 - stage), dilation=dilation)
            for stage, dilation in self.plan)
        self.proj = layers.conv(len(self.plan) * base, 8 * base, kernel=1)
        self.norm = layers.norm(8 * base, PATCH_EPS)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Stages 1 to 3 -> [B, h, w, 8 * base]."""
        x = torch.cat([layer(maps[stage - 1]) for layer, (stage, _) in zip(self.layers, self.plan, strict=True)], dim=1)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class OverlapPatchEmbed(nn.Module):
    """Tokens at half the size of a map."""

    def __init__(self, in_channels: int, channels: int, layers: Layers) -> None:
        super().__init__()
        self.proj = layers.conv(in_channels, channels, stride=2)
        self.norm = layers.norm(channels, PATCH_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, H/2, W/2, channels], rounded up."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Backbone(nn.Module):
    """The feature extractor of EMA-VFI.

    Args:
        config: sizes of the checkpoint.
        layers: builds the layers.
    """

    def __init__(self, config: VFIConfig, layers: Layers) -> None:
        super().__init__()
        C = [config.channels(stage) for stage in range(1, 6)]
        self.block1 = ConvBlock(3, C[0], config.depth[0], layers)
        self.patch_embed2 = layers.conv_prelu(C[0], C[1], stride=2)
        self.block2 = ConvBlock(C[1], C[1], config.depth[1], layers)
        self.patch_embed3 = layers.conv_prelu(C[1], C[2], stride=2)
        self.block3 = ConvBlock(C[2], C[2], config.depth[2], layers)
        self.patch_embed4 = CrossScalePatchEmbed(C[0], layers)
        self.block4 = self._blocks(4, config, layers)
        self.norm4 = layers.norm(C[3], BLOCK_EPS)
        self.patch_embed5 = OverlapPatchEmbed(C[3], C[4], layers)
        self.block5 = self._blocks(5, config, layers)
        self.norm5 = layers.norm(C[4], BLOCK_EPS)

    @staticmethod
    def _blocks(stage: int, config: VFIConfig, layers: Layers) -> nn.ModuleList:
        width, depth = config.channels(stage), config.depth[stage - 1]
        return nn.ModuleList(
            Block(width, width // depth, config.window, config.window // 2 if j % 2 else 0, layers)
            for j in range(depth))

    def frame(self, x: Tensor) -> FrameStages:
        """The part that depends on one frame: compute it once per frame, not once per pair.

        Args:
            x: [B, 3, H, W] in [0, 1], sides multiples of 16.
        """
        first = self.block1(x)  # [B, F, H, W]
        second = self.block2(self.patch_embed2(first))  # [B, 2F, H/2, W/2]
        third = self.block3(self.patch_embed3(second))  # [B, 4F, H/4, W/4]
        maps = (first, second, third)
        return FrameStages(maps, self.patch_embed4(maps))

    def pair(self, first: FrameStages, second: FrameStages) -> PairFeatures:
        """The part in which two frames meet.

        Args:
            first, second: of `frame`, of the frames before and after.
        """
        x = torch.cat((first.tokens, second.tokens))  # [2B, H/8, W/8, 8F]
        fourth, motion4 = self._stage(x, self.block4, self.norm4)  # [2B, 8F, H/8, W/8] both
        fifth, motion5 = self._stage(self.patch_embed5(fourth), self.block5, self.norm5)  # [2B, 16F, H/16, W/16] both
        maps = (torch.cat(both) for both in zip(first.maps, second.maps, strict=True))
        return PairFeatures((*maps, fourth, fifth), (motion4, motion5))

    @staticmethod
    def _stage(x: Tensor, blocks: nn.ModuleList, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Tokens [2B, h, w, C] -> appearance and motion, [2B, C, h, w]."""
        motions = []
        for block in blocks:
            x, motion = block(x)
            motions.append(motion)
        return norm(x).permute(0, 3, 1, 2), torch.cat(motions, dim=-1).permute(0, 3, 1, 2)
