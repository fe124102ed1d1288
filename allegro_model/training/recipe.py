"""Every number of the bundled model: sizes, data, lengths of the stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config import DiTConfig, SamplingConfig, VAEConfig, VFIConfig
from .loop import LoopSettings
from .scenes import Canvas

CANVAS = Canvas(width=96, height=64, num_frames=24)

TINY_VAE = VAEConfig(
    block_out_channels=(16, 32, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    temporal_norm_num_groups=4, temporal_down=(True, True, False, False), temporal_up=(False, True, True, False),
    scale_factor=1.0, tile_size=96, tile_overlap=(32, 32), tile_frames=24, overlap_frames=8,
)
TINY_DIT = DiTConfig(
    num_layers=5, num_attention_heads=3, attention_head_dim=48, in_channels=4, out_channels=4, patch_size=2,
    caption_channels=64, sample_size=(8, 12), sample_size_t=6, interpolation_scale_t=1.0, interpolation_scale_h=1.0,
    interpolation_scale_w=1.0, norm_eps=1e-6, absolute_position=True,
)
TINY_TEXT: dict[str, Any] = {
    "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2, "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0, "is_encoder_decoder": False, "use_cache": False,
}
TINY_VFI = VFIConfig(base_channels=2, depth=(1, 1, 1, 1, 1), window=7, arbitrary_time=True)
SAMPLING = SamplingConfig(
    width=96, height=64, num_frames=24, fps=8, num_steps=30, guidance_scale=2.5, sampler="euler_ancestral",
    prompt_template=False, negative_prompt="", text_length=96,
)
TI2V_SAMPLING = replace(SAMPLING, guidance_scale=1.5, num_steps=10)  # more steps, and less of the picture comes back


@dataclass(frozen=True)
class Recipe:
    """Lengths of the stages of one training run.

    Attributes:
        vae: first stage, encoder and decoder together.
        vae_crop: (frames, edge in pixels) of the crops of the first stage.
        vae_full_share: last share of the first stage that trains on whole clips.
        decoder: second stage of the VAE, decoder alone on whole clips.
        num_latents: clips in the latent cache.
        dit: DiT and text encoder together.
        dit_batch: clips per process and step.
        ti2v: image-to-video transformer, from the text-to-video one.
        num_ti2v: clips in the image-to-video cache.
        ti2v_batch: clips per process and step.
        vfi: frame interpolator.
        vfi_batch: triplets per process and step.
        seed: of initial weights and data.
    """

    vae: LoopSettings
    decoder: LoopSettings
    dit: LoopSettings
    ti2v: LoopSettings
    vfi: LoopSettings
    vae_crop: tuple[int, int] = (16, 32)
    vae_batch: int = 2
    vae_full_share: float = 0.08
    num_latents: int = 4000
    dit_batch: int = 32
    num_ti2v: int = 2500
    ti2v_batch: int = 24
    vfi_batch: int = 8
    seed: int = 0


RECIPE = Recipe(
    vae=LoopSettings(steps=2400, learning_rate=6e-4, warmup=50, decay=1200, ema_decay=0.995, seed=11),
    decoder=LoopSettings(steps=300, learning_rate=3e-4, warmup=20, decay=250, ema_decay=0.99, seed=12),
    dit=LoopSettings(steps=10000, learning_rate=1.5e-3, warmup=100, drop=(2500, 0.5), decay=5000, ema_decay=0.999, seed=13),
    ti2v=LoopSettings(steps=7750, learning_rate=1e-3, warmup=100, decay=5000, ema_decay=0.999, seed=14),
    vfi=LoopSettings(steps=3800, learning_rate=7e-4, warmup=100, decay=2400, weight_decay=1e-4, ema_decay=0.995, seed=15),
)


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """Return the recipe with every stage ``factor`` times as long, and no more clips per step than steps, for trials."""
    def shorter(settings: LoopSettings) -> LoopSettings:
        return replace(settings, steps=max(2, round(settings.steps * factor)), decay=round(settings.decay * factor))

    dit, ti2v = shorter(recipe.dit), shorter(recipe.ti2v)
    return replace(recipe, vae=shorter(recipe.vae), decoder=shorter(recipe.decoder), dit=dit, ti2v=ti2v,
                   dit_batch=min(recipe.dit_batch, dit.steps), ti2v_batch=min(recipe.ti2v_batch, ti2v.steps),
                   num_ti2v=max(2, round(recipe.num_ti2v * factor)),
                   vfi=shorter(recipe.vfi), num_latents=max(2, round(recipe.num_latents * factor)))
