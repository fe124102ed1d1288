"""Both sides of the benchmark in one process: `python sides.py`, driven over stdin and stdout.

Each line in is a JSON object: {"setup": task, "options": {...}, "threads": N}, {"run": side} or {"import": side, "what":
"package"|"extension"}. Each line out is a JSON object with the seconds, the peak of the resident memory above its value before,
and a part of the result.
"""

import asyncio
import ctypes
import gc
import importlib
import importlib.util
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIT = {"num_layers": 1, "num_attention_heads": 24, "attention_head_dim": 96, "caption_channels": 4096,
       "cross_attention_dim": 2304, "interpolation_scale_t": 2.2, "interpolation_scale_h": 2.0,
       "interpolation_scale_w": 2.0}
TEXT_TOKENS, KEPT_TOKENS = 512, 60
Run = Callable[[], Any]


def memory_peak(reset: bool = False) -> int:
    """Peak resident bytes since the last reset (Linux; elsewhere 0)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024


def release_heap() -> None:
    """Gives memory that is free back to the system, so that what comes next does not hide in it (glibc only)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def random_weights(module: Any) -> None:
    """The same weights on both sides: names and shapes are the same, so the order of draws is, too."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.normal_(generator=generator, std=fan_in**-0.5)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)


def noise(*shape: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def dit_inputs(shape: list[int]) -> tuple[Any, Any, Any, Any]:
    """Latents [1, 4, t, h, w], a timestep, text embeddings and a mask that keeps the first tokens."""
    import torch

    mask = torch.arange(TEXT_TOKENS)[None] < KEPT_TOKENS
    return noise(1, 4, *shape), torch.tensor([505.25]), noise(1, TEXT_TOKENS, 4096), mask


# Our side


def ours_dit(dtype: Any, shape: list[int]) -> Run:
    from allegro_model.config import DiTConfig
    from allegro_model.dit import AllegroDiT

    latents, timesteps, embeds, mask = dit_inputs(shape)
    model = AllegroDiT(DiTConfig.from_dict(DIT))
    random_weights(model)
    model, latents, embeds = model.to(dtype).eval(), latents.to(dtype), embeds.to(dtype)
    return lambda: model(latents, timesteps, embeds, mask)


def ours_vae(dtype: Any, direction: str, size: list[int], tile: list[int], overlap: list[int]) -> Run:
    from allegro_model.config import VAEConfig
    from allegro_model.vae import Tiling, VideoVAE

    vae = VideoVAE(VAEConfig.from_dict({}))
    random_weights(vae)
    vae.to(dtype).eval()
    tiling, x = Tiling(*tile, *overlap), vae_input(direction, size).to(dtype)
    if direction == "encode":
        return lambda: vae.encode(x, tiling=tiling)[0]
    return lambda: vae.decode(x, tiling=tiling)


def ours_load(path: str, read: bool) -> Run:
    from allegro_model.loading import load_dit

    return lambda: read_all(load_dit(Path(path) / "transformer")) if read else load_dit(Path(path) / "transformer")


# Their side


def diffusers_dit(dtype: Any, shape: list[int]) -> Run:
    import torch
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    latents, timesteps, embeds, mask = dit_inputs(shape)
    model = AllegroTransformer3DModel(**DIT)
    random_weights(model)
    model, latents, embeds = model.to(dtype).eval(), latents.to(dtype), embeds.to(dtype)
    grid = (shape[1] // 2, shape[2] // 2)
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=96, crops_coords=((0, 0), grid), grid_size=grid, temporal_size=shape[0],
        interpolation_scale=(2.2, 2.0, 2.0), device=torch.device("cpu"))
    positions = tuple(torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous())
    keep = mask.to(dtype)
    return lambda: model(hidden_states=latents, encoder_hidden_states=embeds, timestep=timesteps,
                         encoder_attention_mask=keep, image_rotary_emb=(tuple(tables), positions), return_dict=False)[0]


def diffusers_vae(dtype: Any, direction: str, size: list[int], tile: list[int], overlap: list[int]) -> Run:
    from diffusers import AutoencoderKLAllegro

    vae = AutoencoderKLAllegro(scaling_factor=0.13235)
    random_weights(vae)
    vae.to(dtype).eval()
    vae.enable_tiling()
    vae.kernel = tuple(tile)  # fixed at 24 x 320 x 320 by its constructor
    vae.stride = tuple(k - v for k, v in zip(tile, overlap, strict=True))
    x = vae_input(direction, size).to(dtype)
    if direction == "encode":
        return lambda: vae.encode(x).latent_dist.mean
    return lambda: vae.decode(x).sample.transpose(1, 2)


def diffusers_load(path: str, read: bool) -> Run:
    import torch
    from diffusers import AllegroTransformer3DModel

    def load() -> Any:
        return AllegroTransformer3DModel.from_pretrained(path, subfolder="transformer", torch_dtype=torch.bfloat16)

    return lambda: read_all(load()) if read else load()


def vae_input(direction: str, size: list[int]) -> Any:
    """Frames [1, 3, T, H, W] or latents [1, 4, T/4, H/8, W/8] of a clip."""
    T, H, W = size
    return noise(1, 3, T, H, W).clamp(-1, 1) if direction == "encode" else noise(1, 4, T // 4, H // 8, W // 8)


def read_all(module: Any) -> Any:
    """Every weight read once, as the first evaluation would."""
    for parameter in module.parameters():
        parameter.view(-1).max()
    return module


# The process


def answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def measured(run: Run) -> tuple[Any, dict[str, Any]]:
    """(result of `run`, seconds and peak bytes above the start)."""
    release_heap()
    before = memory_peak(reset=True)
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "peak": memory_peak() - before}


def import_side(side: str, what: str) -> dict[str, Any]:
    """Seconds to import what a script needs with torch already there, or the extension with ComfyUI already there."""
    import torch  # noqa: F401 (both sides need it; its own import is not ours to judge)

    extension = side == "ours" and what == "extension"
    if extension:
        import_comfyui()
    start = time.perf_counter()
    if extension:
        import_extension()
    elif side == "ours":
        from allegro_model import AllegroPipeline
    else:
        from diffusers import AllegroPipeline  # noqa: F401
    return {"seconds": time.perf_counter() - start}


def import_comfyui() -> None:
    """What ComfyUI has imported by the time it loads extensions."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    for name in ("utils.install_util", "server", "nodes", "comfy_api.latest", "comfy.sd", "latent_preview"):
        importlib.import_module(name)


def import_extension() -> None:
    """As ComfyUI does it: by path, then ask for the nodes."""
    folder = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("extension", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["extension"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["extension"])

    async def nodes() -> list[Any]:
        found = sys.modules["extension"].comfy_entrypoint()
        extension = await found if inspect.isawaitable(found) else found
        return await extension.get_node_list()

    assert asyncio.run(nodes())


def prepared(message: dict[str, Any]) -> dict[str, Run]:
    """The runs of both sides, with the same weights and inputs."""
    import torch

    torch.set_num_threads(message["threads"])
    options = dict(message["options"])
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    return {side: globals()[f"{side}_{message['setup']}"](**options) for side in ("ours", "diffusers")}


def main() -> None:
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "import" in message:
            answer(**import_side(message["import"], message["what"]))
            continue
        import torch

        torch.set_grad_enabled(False)
        if "setup" in message:
            runs = prepared(message)
            answer(ready=True)
        else:
            result, numbers = measured(runs[message["run"]])
            if torch.is_tensor(result):
                numbers["sample"] = result.flatten()[:: max(1, result.numel() // 1000)].float().tolist()
            del result
            answer(**numbers)


if __name__ == "__main__":
    main()
