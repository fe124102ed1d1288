"""The attention contract, and which kernel is chosen."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from allegro_model import attention


def qkv(length=7):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 12, generator=g) for _ in range(3)]


def by_hand(q, k, v, heads, mask=None):
    q, k, v = (x.view(2, -1, heads, 12 // heads).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / (12 / heads) ** 0.5
    return ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2).reshape(2, -1, 12)


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_is_the_formula(masked):
    mask = torch.where(torch.arange(7) < 4, 0.0, -10000.0).expand(2, 1, 1, 7) if masked else None
    assert torch.allclose(attention.sdpa(*qkv(), 3, mask), by_hand(*qkv(), 3, mask), atol=1e-6)


@pytest.fixture
def flash_attn(monkeypatch):
    """Stands in for the package, which needs a GPU: the layout [B, N, heads, dh] of its documentation."""
    module = ModuleType("flash_attn")
    module.flash_attn_func = lambda q, k, v: F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.usefixtures("flash_attn")
def test_flash_has_the_same_contract():
    assert torch.allclose(attention.flash(*qkv(), 3), by_hand(*qkv(), 3), atol=1e-6)
    mask = torch.where(torch.arange(7) < 4, 0.0, -10000.0).expand(2, 1, 1, 7)
    assert torch.allclose(attention.flash(*qkv(), 3, mask), by_hand(*qkv(), 3, mask), atol=1e-6)


@pytest.mark.parametrize(("device", "dtype", "generation", "expected"), [
    ("cuda", torch.bfloat16, (8, 6), "flash"), ("cuda", torch.float32, (9, 0), "sdpa"),
    ("cpu", torch.bfloat16, (9, 0), "sdpa"), ("cuda", torch.bfloat16, (7, 5), "sdpa"),
])
@pytest.mark.usefixtures("flash_attn")
def test_flash_is_chosen_only_where_it_can_run(monkeypatch, device, dtype, generation, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    assert attention.best_attention(torch.device(device), dtype) is getattr(attention, expected)


def test_a_broken_flash_attn_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    assert attention.best_attention(torch.device("cuda"), torch.bfloat16) is attention.sdpa
