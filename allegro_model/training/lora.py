"""Trains a LoRA for a frozen transformer of the family.

    python -m allegro_model.training.lora --out orange.safetensors

makes the bundled LoRA: it teaches the bundled model a colour that its objects never have. For a model and clips of
your own,

    python -m allegro_model.training.lora --model DIR --data CLIPS --steps 2000 --out style.safetensors --device cuda

reads CLIPS/NAME.safetensors (made by `allegro encode`) with the caption in CLIPS/NAME.txt. The file is read by
`allegro generate --lora` and by both LoRA loaders of ComfyUI. An interrupted run goes on where it was when the same
command is given again.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..attention import AttentionShape, choose_attention
from ..dit import AllegroTI2V
from ..errors import UnsupportedCheckpoint
from ..geometry import LatentShape, token_count
from ..loading import bundled_model, load_dit, load_text_encoder, load_vae
from ..pipeline import SMALL_MODEL_PARAMETERS
from .adapters import Adapters, choose_layers, write_lora
from .distributed import Workers, launch
from .dit_stage import TextToVideo, keep_float32, make_tokenise, plain_attention
from .lessons import FixedCaptions, encode_lessons, read_folder
from .loop import Loop, LoopSettings
from .palette import LORA_COLOUR

logger = logging.getLogger(__name__)

#: Where the prompt enters, and where the picture is composed.
TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
           "attn2.to_out.0")
_LESSONS = 400  # drawn clips
_SEED = 31


@dataclass(frozen=True)
class Task:
    """One run of the command; see its --help."""

    out: Path
    model: str = "tiny"
    data: Path | None = None
    rank: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    batch: int = 16
    device: str = "cpu"
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(
        steps=600, learning_rate=3e-3, warmup=20, decay=300, weight_decay=0.0, ema_decay=0.99, seed=_SEED))


def parse(arguments: list[str] | None = None) -> Task:
    """Parse the command line."""
    default = Task(Path())
    parser = argparse.ArgumentParser(prog="python -m allegro_model.training.lora", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the LoRA to write (.safetensors)")
    parser.add_argument("--model", default=default.model, metavar="DIR|tiny", help="model folder (default tiny)")
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help=f"latents and captions; without it, clips of {LORA_COLOUR} objects, for the bundled model only")
    parser.add_argument("--rank", type=int, default=default.rank, help=f"default {default.rank}")
    parser.add_argument("--alpha", type=float, help="the change is multiplied by alpha / rank (default: the rank)")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="NAME",
                        help="ends of the names of the layers (default: all of both attentions)")
    parser.add_argument("--steps", type=int, default=default.loop.steps, help=f"default {default.loop.steps}")
    parser.add_argument("--learning-rate", type=float, default=default.loop.learning_rate,
                        help=f"default {default.loop.learning_rate}; less for a large model, e.g. 0.0001")
    parser.add_argument("--batch", type=int, default=default.batch, help=f"clips per step (default {default.batch})")
    parser.add_argument("--device", default=default.device, help="cpu (default), cuda, ...")
    given = parser.parse_args(arguments)
    if given.data is None and given.model != "tiny":
        parser.error("--model needs --data: the drawn clips are for the bundled model only")
    if min(given.rank, given.steps, given.batch) < 1:
        parser.error("--rank, --steps and --batch must be at least 1")
    loop = replace(default.loop, steps=given.steps, learning_rate=given.learning_rate, decay=given.steps // 2)
    return Task(given.out, given.model, given.data, given.rank, given.alpha, tuple(given.targets), given.batch,
                given.device, loop)


def train(workers: Workers, task: Task) -> None:
    """Train and write the file; the checkpoint beside it lies there only until then."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    root = bundled_model("tiny") if task.model == "tiny" else Path(task.model)
    dit = _frozen(root, task.device)
    layers = choose_layers(dit, task.targets)
    generator = torch.Generator().manual_seed(task.loop.seed)
    adapters = Adapters(layers, task.rank, task.rank if task.alpha is None else task.alpha, generator)
    logger.info("%d layers, %d parameters", len(layers), sum(p.numel() for p in adapters.parameters()))
    loop = Loop({"lora": adapters}, task.loop, workers, task.out.with_suffix(".checkpoint.pt"))
    loop.run(_objective(dit, root, task))
    about = {"title": task.out.stem, "base_model": root.name, "steps": str(task.loop.steps)}
    write_lora(task.out, adapters, loop.ema.average["lora"], about)
    loop.path.unlink()
    logger.info("%s: %d bytes", task.out, task.out.stat().st_size)


def _frozen(root: Path, device: str) -> Any:
    """The transformer without gradients of its own, as its size allows: float32, or bfloat16 with less to keep."""
    dit = load_dit(root, dequantise=True)
    if isinstance(dit, AllegroTI2V):
        raise UnsupportedCheckpoint(f"{root} is the image-to-video variant, which this training has no clips for; "
                                    "expected a text-to-video model. Its LoRAs fit image to video as well.")
    small = sum(p.numel() for p in dit.parameters()) < SMALL_MODEL_PARAMETERS
    dit = dit.to(device, torch.float32 if small else torch.bfloat16)
    if small:
        dit.attention = plain_attention
        keep_float32(dit.pos_embed.proj)
        keep_float32(dit.proj_out)
    else:
        c = dit.config
        tokens = token_count(LatentShape(c.sample_size_t, *c.sample_size), c.patch_size)
        shape = AttentionShape(tokens, c.num_attention_heads, c.attention_head_dim)
        dit.attention = choose_attention("auto", torch.device(device), torch.bfloat16, shape).run
        for block in dit.transformer_blocks:
            _recompute(block)
    return dit


def _recompute(block: nn.Module) -> None:
    """Keep the input of a block only, and compute it again for the gradients: a large model would not fit otherwise."""
    forward = block.forward
    block.forward = lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def _objective(dit: Any, root: Path, task: Task) -> Any:
    """The loss of a step."""
    vae, text = load_vae(root), load_text_encoder(root, dtype=torch.float32)
    if task.data is not None:
        examples = read_folder(task.data, vae.config.scale_factor)
        return FixedCaptions(dit, examples, text.encode, task.batch)
    logger.info("drawing and encoding %d clips", _LESSONS)
    latents, attributes = encode_lessons(vae, _LESSONS, task.loop.seed)
    tokenise, _ = make_tokenise(root / "tokenizer")
    return TextToVideo(dit, text.model, tokenise, latents, attributes, task.batch)


def main(arguments: list[str] | None = None) -> None:
    """Run the command in a process of its own, whose settings suit small tensors."""
    launch(train, 1, parse(arguments))


if __name__ == "__main__":
    main()
