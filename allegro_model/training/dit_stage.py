"""Last stage: the DiT and the text encoder together, on cached latents and freshly worded captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..dit import AllegroDiT
from ..errors import MissingDependency
from ..sampling.schedule import alphas_cumprod
from ..text.prompts import DEFAULT_NEGATIVE, format_negative, format_prompt
from .captions import Attributes, write_caption
from .distributed import Workers
from .initialise import initialise_dit
from .latents import attributes_of, load_latents
from .loop import Loop, mixed_precision
from .losses import add_noise, drop_captions, eps_loss, object_weight, offset_noise, velocity_weight
from .recipe import TINY_DIT, TINY_TEXT, Recipe
from .tokenizer import load_tokenizer

_NOISE_OFFSET = 0.02
_WEIGHT_CAP = 1000.0
_TEMPLATE_STEPS = 0.12  # share of steps whose captions wear the positive template
_DROP = 0.06  # captions replaced by "" in plain steps
_DROP_TEMPLATE = 0.35  # captions replaced by the default negative in template steps

#: How often a clip is drawn, by kind: motion of clouds is the hardest to learn, the sea the easiest.
_KIND_WEIGHT = {"shape": 1.0, "sea": 0.75, "clouds": 1.75, "ball": 1.0}

Tokenise = Callable[[list[str]], tuple[Tensor, Tensor]]


def keep_float32(layer: nn.Module) -> None:
    """Take a layer out of autocast.

    The rounding of eps to bfloat16 (0.4 %) would be multiplied by sigma = 157 at the first sampling step.
    """
    forward = layer.forward

    def forward_float32(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    layer.forward = forward_float32


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """`Attention` written out; for some hundred tokens its backward pass on a CPU is several times faster than SDPA."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, dh]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, N, Nk]
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def build_text_model(vocabulary: int) -> nn.Module:
    """Return an untrained T5 v1.1 encoder of the tiny size."""
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError as error:
        raise MissingDependency("training the text encoder needs the transformers package; "
                                'install it with: pip install "allegro-video[standalone]"') from error
    return T5EncoderModel(T5Config(vocab_size=vocabulary, **TINY_TEXT))


def make_tokenise(folder: Path) -> tuple[Tokenise, int]:
    """Return a function from texts to (ids, mask), padded to the longest, and the vocabulary size."""
    tokenizer = load_tokenizer(folder)

    @lru_cache(maxsize=100_000)
    def ids_of(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text).ids)

    def tokenise(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [ids_of(text) for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
        return ids, ids != 0

    return tokenise, tokenizer.get_vocab_size()


@lru_cache(maxsize=100_000)
def _formatted(caption: str, template: bool) -> str:
    return format_prompt(caption, template=template, clean=True)


@dataclass
class TextToVideo:
    """Loss of one step: predicted noise against noise, given the caption.

    Attributes:
        dit: the network.
        text: T5 encoder.
        tokenise: texts to ids and mask.
        latents: normalised latents ``[N, 4, t, h, w]``.
        attributes: of each latent's clip.
        batch: clips per step.
    """

    dit: nn.Module
    text: nn.Module
    tokenise: Tokenise
    latents: Tensor
    attributes: list[Attributes]
    batch: int

    #: Share and range of the timesteps in which the prompt decides most.
    middle = (0.7, 250.0, 950.0)

    def __post_init__(self) -> None:
        self.alpha_bar = alphas_cumprod()
        self.negative = format_negative(DEFAULT_NEGATIVE, clean=True)
        self.weight = object_weight(self.latents)
        self.frequency = torch.tensor([_KIND_WEIGHT[a["kind"]] for a in self.attributes])

    def write(self, attributes: Attributes, rng: np.random.Generator) -> str:
        """Return a caption of a clip."""
        return write_caption(attributes, rng)

    def captions(self, indices: list[int], generator: torch.Generator) -> list[str]:
        """Return freshly worded captions; some steps wear the template, some captions are dropped."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        template = bool(rng.random() < _TEMPLATE_STEPS)
        texts = [_formatted(self.write(self.attributes[i], rng), template) for i in indices]
        if template:
            return drop_captions(texts, _DROP_TEMPLATE, self.negative, generator)
        return drop_captions(texts, _DROP, "", generator)

    def timesteps(self, generator: torch.Generator) -> Tensor:
        """Draw integer timesteps ``[B]``, more of them where the prompt decides."""
        share, low, high = self.middle
        anywhere = torch.rand(self.batch, generator=generator) * 1000
        middle = low + torch.rand(self.batch, generator=generator) * (high - low)
        chosen = torch.rand(self.batch, generator=generator) < share
        return torch.where(chosen, middle, anywhere).long()

    def predict(self, noisy: Tensor, timesteps: Tensor, captions: list[str]) -> Tensor:
        """Return predicted noise for captions given as text; gradients flow into both networks."""
        ids, mask = self.tokenise(captions)
        embeds = self.text(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        with mixed_precision():
            return self.dit(noisy, timesteps.float(), embeds, mask)

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        indices = torch.multinomial(self.frequency, self.batch, replacement=True, generator=generator)
        clean = self.latents[indices]
        noise = offset_noise(clean.shape, _NOISE_OFFSET, generator)
        timesteps = self.timesteps(generator)
        alpha_bar = self.alpha_bar[timesteps]
        captions = self.captions(indices.tolist(), generator)
        prediction = self.predict(add_noise(clean, noise, alpha_bar), timesteps, captions)
        return eps_loss(prediction, noise, sample_weight=velocity_weight(alpha_bar, _WEIGHT_CAP),
                        cell_weight=self.weight[indices])


def build(recipe: Recipe, tokenizer_folder: Path) -> tuple[AllegroDiT, Any, Tokenise]:
    """Return the freshly initialised DiT and text encoder, and the tokenise function."""
    tokenise, vocabulary = make_tokenise(tokenizer_folder)
    torch.manual_seed(recipe.seed + 1)
    dit = AllegroDiT(TINY_DIT, attention=plain_attention)
    initialise_dit(dit)
    keep_float32(dit.pos_embed.proj)
    keep_float32(dit.proj_out)
    return dit, build_text_model(vocabulary), tokenise


def train_dit(workers: Workers, recipe: Recipe, folder: Path) -> None:
    """Train DiT and text encoder together on the cached latents; writes ``dit.pt``."""
    latents, seeds = load_latents(folder)
    scale = 1.0 / float(latents.std())
    dit, text, tokenise = build(recipe, folder / "tokenizer")
    objective = TextToVideo(dit, text, tokenise, latents * scale, [attributes_of(s) for s in seeds], recipe.dit_batch)
    Loop({"dit": dit, "text": text}, recipe.dit, workers, folder / "dit.pt").run(objective)
