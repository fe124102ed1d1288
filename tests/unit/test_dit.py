"""The transformer: what padding, positions and precision must not change."""

import weakref
from dataclasses import replace

import pytest
import torch
from tiny import DIT, tiny_dit

from allegro_model.dit import model as model_module
from allegro_model.dit.embed import position_table
from allegro_model.dit.model import trim_text
from allegro_model.dit.rope import apply_rope, rope_tables
from allegro_model.errors import GeometryError


def inputs(batch=1, length=12, shape=(3, 4, 6), seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, *shape, generator=g), torch.rand(batch, generator=g) * 999,
            torch.randn(batch, length, DIT.caption_channels, generator=g))


@torch.no_grad()
def test_padding_is_dropped_without_a_trace():
    dit = tiny_dit()
    x, t, text = inputs()
    mask = torch.arange(12)[None] < 5
    padded = dit(x, t, text, mask)
    assert torch.equal(padded, dit(x, t, text[:, :5]))
    garbage = text.clone()
    garbage[:, 5:] = 1e4
    assert torch.equal(padded, dit(x, t, garbage, mask))


@torch.no_grad()
def test_padding_of_a_shorter_neighbour_changes_nothing():
    dit = tiny_dit()
    x, t, text = inputs(batch=2)
    mask = torch.stack((torch.arange(12) < 5, torch.arange(12) < 9))
    together = dit(x, t, text, mask)
    for i in range(2):
        assert torch.allclose(together[i : i + 1], dit(x[i : i + 1], t[i : i + 1], text[i : i + 1], mask[i : i + 1]),
                              atol=1e-5)


def test_a_prompt_without_any_token_is_left_as_it_is():
    text = torch.zeros(1, 4, 8)
    embeds, bias = trim_text(text, torch.zeros(1, 4))
    assert embeds.shape == text.shape
    assert (bias == -10000).all()


@torch.no_grad()
def test_prepared_prompt_gives_the_same_as_forward():
    dit = tiny_dit()
    x, t, text = inputs()
    prepared = dit.prepare(text)
    for scale in (1.0, 0.5):
        assert torch.equal(dit.denoise(x * scale, t, prepared), dit(x * scale, t, text))


@torch.no_grad()
def test_tables_live_as_long_as_they_are_used(monkeypatch):
    """One size is kept from step to step, and nothing is when the weights move or the model is gone."""
    made = []

    def counted(*key):
        made.append(key)
        return rope_tables(*key)

    monkeypatch.setattr(model_module, "rope_tables", counted)
    dit = tiny_dit()
    x, t, text = inputs()
    for latents, count in ((x, 1), (x, 1), (x[..., :4], 2), (x, 3)):
        dit(latents, t, text)
        assert len(made) == count
    assert "rope" not in " ".join(dit.state_dict())
    kept = weakref.ref(dit.rope((3, 2, 3), torch.device("cpu"))[0])
    assert kept() is not None
    dit.double()
    assert kept() is None
    dit.float()(x, t, text)
    kept = weakref.ref(dit.rope((3, 2, 3), torch.device("cpu"))[0])
    del dit
    assert kept() is None


def test_rotation_keeps_lengths_and_depends_on_differences_only():
    cos, sin = rope_tables((4, 3, 5), 24, (2.2, 2.0, 2.0), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 48, generator=g).expand(1, 60, 48) for _ in range(2))
    q, k = apply_rope(q, 2, cos, sin), apply_rope(k, 2, cos, sin)
    assert torch.allclose(q.norm(dim=-1), q.norm(dim=-1)[:, :1].expand(1, 60), rtol=1e-5)
    scores = (q[0, :, :24] @ k[0, :, :24].T).view(4, 3, 5, 4, 3, 5)
    assert torch.allclose(scores[0, 0, 0, 1, 1, 1], scores[2, 1, 3, 3, 2, 4], atol=1e-4)
    assert not torch.allclose(scores[0, 0, 0, 1, 1, 1], scores[1, 0, 0, 0, 1, 1], atol=1e-2)


def test_axes_of_equal_length_keep_their_own_scale():
    cos, _ = rope_tables((4, 4, 4), 24, (2.2, 2.0, 1.0), torch.device("cpu"))
    cos = cos.view(4, 4, 4, 3, 4)
    assert not torch.equal(cos[1, 0, 0, 0], cos[0, 1, 0, 1])
    assert not torch.equal(cos[0, 1, 0, 1], cos[0, 0, 1, 2])


def test_rotation_is_float32_in_bfloat16():
    cos, sin = rope_tables((2, 2, 80), 24, (1.0, 1.0, 1.0), torch.device("cpu"))
    assert cos.dtype == torch.float32
    q = torch.ones(1, 320, 24)
    exact = apply_rope(q, 1, cos, sin)
    rounded = apply_rope(q.bfloat16(), 1, cos, sin)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 2**-7  # the rounding of the result alone


def test_absolute_position_adds_no_tensor_and_tells_tokens_apart():
    config = replace(DIT, absolute_position=True)
    with_table, without = tiny_dit(config), tiny_dit()
    assert with_table.state_dict().keys() == without.state_dict().keys()
    table = position_table((3, 2, 3), DIT.width, torch.device("cpu"))
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.5
    x, t, text = inputs()
    assert not torch.allclose(with_table(x, t, text), without(x, t, text))


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 4, 7)])
def test_odd_latents_are_refused_early(shape):
    with pytest.raises(GeometryError, match="multiples of 2 cells"):
        tiny_dit()(*inputs(shape=shape))


def test_cached_tables_serve_training_after_inference():
    dit = tiny_dit().requires_grad_(True)
    with torch.inference_mode():
        dit(*inputs(shape=(2, 6, 8)))
    dit(*inputs(shape=(2, 6, 8))).sum().backward()
    assert dit.proj_out.weight.grad is not None
