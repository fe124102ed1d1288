"""The T5 v1.1 text encoder, through transformers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointMismatch, MissingDependency, TextError, UnsupportedCheckpoint
from ..quantised import Layout, install
from ..tensors import check_tensors
from .tokenizer import Tokenizer, load_tokenizer
from .unicode_repair import join_surrogates

logger = logging.getLogger(__name__)

PAD_TOKEN = 0  # of every T5
REFERENCE_LENGTH = 512
"""Tokens the released models read."""

_EMBEDDING = "shared.weight"
_EMBEDDING_ALIAS = "encoder.embed_tokens.weight"
# Entries of config.json that shape the network; the others are about training, decoding or files.
_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_DETAILS = (
    "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj",
)  # fmt: skip


class TextEncoder:
    """Texts to embeddings. Keeps nothing between calls.

    Args:
        tokenizer: of `load_tokenizer`, or a T5 tokenizer of transformers.
        model: a `T5EncoderModel`, or what has its inputs and output.
        max_length: L, tokens per text; shorter ones are padded, longer ones cut.
    Raises:
        TextError: `max_length` < 1.
    """

    def __init__(self, tokenizer: Tokenizer, model: nn.Module, *, max_length: int = REFERENCE_LENGTH) -> None:
        if max_length < 1:
            raise TextError(f"max_length={max_length}, expected at least 1. The released models use {REFERENCE_LENGTH}.")
        self.tokenizer = tokenizer
        self.model = model
        self.max_length = max_length

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the model, in the order of their calls."""
        return list(self.model.encoder.block)  # type: ignore[union-attr,arg-type]

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token numbers and mask, on the CPU.

        Args:
            texts: B texts, as they are to be read (see `format_prompt`). A longer one than L tokens is cut with a
                warning; its last token is the end token all the same.
        Returns:
            input_ids int64 [B, L], padded at the end; mask bool [B, L], True up to and including the end token.
        Raises:
            TextError: there are no texts.
        """
        if isinstance(texts, str) or not texts:
            raise TextError(f"texts={texts!r}, expected a list of at least one text.")
        rows = self.tokenizer([join_surrogates(text) for text in texts])["input_ids"]
        input_ids = torch.full((len(rows), self.max_length), PAD_TOKEN, dtype=torch.long)
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.bool)
        for index, row in enumerate(rows):
            row = self._cut(list(row))
            input_ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        return input_ids, mask

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of texts; runs where the model is.

        Args:
            texts: as in `tokenize`. "" is one end token, the unconditional input of the released models.
            device: of the results; default the model's.
        Returns:
            prompt_embeds [B, L, C] in the model's dtype, the last hidden state after the final norm; zero where there
            is padding. prompt_mask bool [B, L], True = attend.
        Raises:
            TextError: there are no texts.
        """
        input_ids, mask = self.tokenize(texts)
        where = next(self.model.parameters()).device
        prompt_embeds = torch.stack([self._embed(ids[kept].to(where)) for ids, kept in zip(input_ids, mask, strict=True)])
        return prompt_embeds.to(device or where), mask.to(device or where)

    def _embed(self, ids: Tensor) -> Tensor:
        """[L, C] of one text of n tokens.

        The reference feeds the padding, too, under a mask. Leaving it out gives the same rows for several times less
        work, and one by one no text depends on its neighbours.
        """
        output = self.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
        rows: Tensor = output.last_hidden_state[0]
        return nn.functional.pad(rows, (0, 0, 0, self.max_length - len(rows)))

    def _cut(self, row: list[int]) -> list[int]:
        if len(row) <= self.max_length:
            return row
        logger.warning(
            "The prompt has %d tokens; the text encoder reads %d, so the last %d are left out.",
            len(row) - 1, self.max_length - 1, len(row) - self.max_length,
        )  # fmt: skip
        return [*row[: self.max_length - 1], row[-1]]


def build_text_encoder(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer_folder: str | Path,
    *,
    max_length: int = REFERENCE_LENGTH,
    layouts: Mapping[str, Layout] | None = None,
) -> TextEncoder:
    """A text encoder that uses the given tensors themselves: nothing is copied, so they may be mapped from a file.

    Args:
        config: a T5 `config.json`.
        tensors: weights under the names of `T5EncoderModel`, of one dtype and device (float32 for parity, bfloat16 as
            the reference; float16 overflows in T5). The embedding may be there under either or both of its two names.
        tokenizer_folder: see `load_tokenizer`.
        max_length: see `TextEncoder`.
        layouts: of the matrices among `tensors` that are packed; they stay so (see `QuantisedLayer`).
    Raises:
        MissingDependency: transformers, or the library the tokenizer needs, is not installed.
        UnsupportedCheckpoint: `config` lacks a size.
        CheckpointMismatch: tensors are missing, unexpected or of another shape, or the tokenizer has more tokens than
            the embedding has rows.
        CheckpointError: see `load_tokenizer`.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    model = empty_model(config)
    _assign(model, tensors, layouts or {})
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocabulary_size > rows:
        raise CheckpointMismatch(
            f"The tokenizer in {tokenizer_folder} has {tokenizer.vocabulary_size} tokens, the text encoder knows {rows}; "
            "they belong to different models. Use the folders tokenizer/ and text_encoder/ of one download."
        )
    return TextEncoder(tokenizer, model, max_length=max_length)


def empty_model(config: Mapping[str, Any]) -> Any:
    """A `T5EncoderModel` on the meta device."""
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError as error:
        raise MissingDependency(
            f"The text encoder needs the package transformers, which cannot be used here ({error}). "
            'Install it with: pip install "allegro-video[standalone]"'
        ) from error
    missing = [name for name in _SIZES if not isinstance(config.get(name), int)]
    if missing:
        raise UnsupportedCheckpoint(
            f"The config of the text encoder does not state {', '.join(missing)}; expected that of a T5 encoder. "
            "Download config.json again."
        )
    known = {name: config[name] for name in (*_SIZES, *_DETAILS) if config.get(name) is not None}
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**known, dropout_rate=0.0, use_cache=False, is_encoder_decoder=False))


def _assign(model: Any, tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> None:
    """Puts the tensors in the place of the model's parameters, strictly."""
    state = dict(tensors)
    alias = state.pop(_EMBEDDING_ALIAS, None)
    if alias is not None:
        state.setdefault(_EMBEDDING, alias)
    install(model, layouts, state)
    # Versions of transformers differ in whether the two names are one module.
    model.set_input_embeddings(model.shared)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
                if not name.startswith(_EMBEDDING_ALIAS)}
    check_tensors(expected, {name: tuple(tensor.shape) for name, tensor in state.items()}, what="the text encoder")
    aliases = {name.replace(_EMBEDDING, _EMBEDDING_ALIAS): tensor for name, tensor in state.items()
               if name.startswith(_EMBEDDING)}
    model.load_state_dict(state | aliases, strict=True, assign=True)
    model.set_input_embeddings(model.shared)
    model.requires_grad_(False).eval()
