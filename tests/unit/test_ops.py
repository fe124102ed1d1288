"""The default layers' own arithmetic against torch's."""

import pytest
import torch

from allegro_model import ops


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


LAYERS = [
    (ops.Linear(24, 40), (2, 30, 24)),
    (ops.Conv2d(8, 16, 3, stride=2), (3, 8, 9, 9)),
    (ops.Conv2d(256, 256, 3, padding=1), (3, 256, 14, 14)),
    (ops.Conv3d(64, 64, (3, 1, 1)), (1, 64, 5, 8, 8)),
    (ops.Conv3d(8, 8, (2, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1)), (1, 8, 4, 8, 8)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x))
@pytest.mark.parametrize("slow", [True, False])
def test_layers_equal_torch(monkeypatch, layer, shape, slow):
    """In float32 up to its rounding; in bfloat16 only the result is rounded where it is computed in float32."""
    x = noise(*shape)
    with torch.no_grad():
        expected = type(layer).__base__.forward(layer, x)
        assert relative(layer(x), expected) < 2e-6
        monkeypatch.setattr(ops, "half_is_slow", lambda dtype: slow and dtype == torch.bfloat16)
        half = layer.to(torch.bfloat16)
        result = half(x.bfloat16())
        layer.float()
    assert result.dtype == torch.bfloat16
    assert relative(result, expected) < 1e-2


def test_gradients_take_torchs_own_way():
    layer, x = ops.Conv3d(64, 64, (3, 1, 1)), noise(1, 64, 5, 8, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_only_16_bit_types_can_be_slow():
    assert not ops.half_is_slow(torch.float32)
    assert ops.half_is_slow(torch.bfloat16) in (True, False)
