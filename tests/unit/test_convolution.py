"""Minimal filtering against torch's convolution, in float64."""

import pytest
import torch
import torch.nn.functional as F

from allegro_model import convolution
from allegro_model.convolution import convolve_wide


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("block", [2**9, 2**20])  # many blocks, one block
@pytest.mark.parametrize(("kernel", "padding"), [
    ((3, 1, 1), (1, 0, 0)), ((3, 1, 1), (0, 0, 0)), ((3, 3, 3), (0, 1, 1)), ((1, 3, 3), (0, 1, 1)), ((1, 3, 3), (0, 0, 0))])
@pytest.mark.parametrize("size", [(5, 7, 9), (4, 6, 8)])
def test_minimal_filtering_is_convolution(monkeypatch, block, kernel, padding, size):
    monkeypatch.setattr(convolution, "BLOCK_VALUES", block)
    x, weight, bias = noise(2, 6, *size), noise(5, 6, *kernel), noise(5)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), padding=padding)
    result = convolve_wide(x, weight, bias, padding)
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    plain = convolve_wide(x, weight, None, padding)
    torch.testing.assert_close(plain.double(), expected - bias.double()[:, None, None, None], rtol=1e-5, atol=1e-5)
