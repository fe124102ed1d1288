"""The reference's denoising loop in diffusers, with given noise; prints nothing.

    python diffusers_loop.py TRANSFORMER_FOLDER GIVEN.safetensors RESULT.safetensors

GIVEN: noise [steps, B, 4, t, h, w], the first for the start, the others for each step but the last; cfg; positive and
negative [1, L, C] with their masks [1, L]. RESULT: latents [B, 4, t, h, w], scaled as the network sees them.
"""

import inspect
import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from safetensors.torch import load_file, save_file
from torch import Tensor

# The defaults of the released scheduler_config.json.
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def load_network(folder: Path) -> diffusers.AllegroTransformer3DModel:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = inspect.signature(diffusers.AllegroTransformer3DModel).parameters
    height, width = config["sample_size"]
    sizes = {"sample_height": height, "sample_width": width, "sample_frames": config["sample_size_t"],
             "cross_attention_dim": config["num_attention_heads"] * config["attention_head_dim"]}
    network = diffusers.AllegroTransformer3DModel(**{k: v for k, v in config.items() if k in known}, **sizes)
    network.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return network.eval()


def rotary(latents: Tensor, head_dim: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What diffusers' pipeline hands to its transformer; the scales of this model are 1."""
    grid = (latents.shape[3] // 2, latents.shape[4] // 2)
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=head_dim, crops_coords=((0, 0), grid), grid_size=grid, temporal_size=latents.shape[2],
        interpolation_scale=(1.0, 1.0, 1.0), device=torch.device("cpu"))
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(tables), tuple(positions)


@torch.inference_mode()
def main(folder: str, given: str, result: str) -> None:
    inputs = load_file(given)
    network, noise, cfg = load_network(Path(folder)), inputs["noise"], float(inputs["cfg"])
    steps, clips = noise.shape[:2]
    text, mask = (torch.cat([inputs[f"negative{part}"], inputs[f"positive{part}"]]).repeat_interleave(clips, dim=0)
                  for part in ("", "_mask"))
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    # Its only source of noise; the last step multiplies it by zero.
    to_come = iter([*noise[1:], torch.zeros_like(noise[0])])
    scheduling_euler_ancestral_discrete.randn_tensor = lambda *args, **kwargs: next(to_come)
    x = noise[0] * scheduler.init_noise_sigma
    rope = rotary(x, network.config.attention_head_dim)
    for t in scheduler.timesteps:
        eps = network(hidden_states=scheduler.scale_model_input(torch.cat((x, x)), t), encoder_hidden_states=text,
                      timestep=t.expand(2 * clips), encoder_attention_mask=mask.float(), image_rotary_emb=rope, return_dict=False)[0]
        negative, positive = eps.chunk(2)
        x = scheduler.step(negative + cfg * (positive - negative), t, x, return_dict=False)[0]
    assert next(to_come, None) is None, "the scheduler drew another number of noises"
    save_file({"latents": x}, result)


if __name__ == "__main__":
    main(*sys.argv[1:4])
