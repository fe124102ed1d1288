"""One short function per kind of reference case: builds the module, runs it, names its outputs as the case does."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity.cases import Case, as_float32
from safetensors.torch import load_file
from torch import Tensor

from allegro_model.attention import Attention, sdpa
from allegro_model.conditioning import GivenFrames, build_condition, fit_images, sample_posterior
from allegro_model.config import DiTConfig, VAEConfig, VFIConfig
from allegro_model.dit import AllegroDiT, AllegroTI2V
from allegro_model.dit.embed import AdaLNSingle, timestep_sinusoid
from allegro_model.dit.rope import apply_rope, axis_angles, rope_tables
from allegro_model.sampling import SAMPLERS, Denoiser, Prompt, StepInfo, reference_sigmas, reference_timesteps
from allegro_model.sampling.samplers import Denoise
from allegro_model.text import TextEncoder
from allegro_model.vae import VideoVAE, normalise
from allegro_model.vae.blocks import TemporalBlock, per_frame
from allegro_model.vae.tiling import blend_weights, plan_axis
from allegro_model.vfi import EMAVFI, FrameFeatures
from allegro_model.vfi.emavfi.blocks import MLP, Block, InterFrameAttention
from allegro_model.vfi.emavfi.features import CrossScalePatchEmbed, OverlapPatchEmbed
from allegro_model.vfi.emavfi.flow import FlowHead, head_features
from allegro_model.vfi.emavfi.layers import Layers
from allegro_model.vfi.emavfi.refine import RefineNet
from allegro_model.vfi.emavfi.warp import warp, warp_pyramid
from allegro_model.vfi.emavfi.windows import window_mask

Outputs = dict[str, Tensor]


# The DiT


def run_dit_t2v(case: Case) -> Outputs:
    """Text inputs carry the reference's extra axis: [B, 1, L, C] and [B, 1, L]."""
    x = case.inputs
    honoured = "self_attention_mask" in x and case.config["sa_attention_mode"] != "flash"  # flash mode ignores it
    attention = masked_self_attention(x["self_attention_mask"], case.config["patch_size"]) if honoured else sdpa
    model = case.fill(AllegroDiT(DiTConfig.from_dict(case.config), attention=attention))
    eps = model(x["latents"], x["timestep"], x["text_embeds"].flatten(0, 1), x["text_mask"].flatten(0, 1))
    return {"noise_pred": eps}


def masked_self_attention(keep: Tensor, patch_size: int) -> Attention:
    """The model takes no self-attention mask (released weights never saw one); this kernel adds it from outside.

    Args:
        keep: [B, t, h, w], 1 = keep, on the latent grid.
        patch_size: latent cells per token.
    """
    tokens = F.max_pool2d(keep, patch_size).flatten(1)  # [B, N]
    bias = ((1 - tokens) * -10000.0)[:, None, None]  # [B, 1, 1, N]

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        return sdpa(q, k, v, heads, mask=bias if k.shape == q.shape else mask)

    return attention


def run_timestep(case: Case) -> Outputs:
    timesteps = case.inputs["timestep"]
    module = case.fill(AdaLNSingle(int(case.config["embedding_dim"]), torch.nn))
    modulation, embedded = module(timesteps, torch.float32)
    return {"sinusoid": timestep_sinusoid(timesteps), "embedded_timestep": embedded, "adaln6": modulation.flatten(1)}


def run_rope(case: Case) -> Outputs:
    """Tables are stored with each column twice, once per half of the pair."""
    c, q = case.config, case.inputs["q"]  # [B, heads, N, dh]
    out = {}
    for axis, length, scale in zip("thw", c["grid_thw"], c["scales_thw"], strict=True):
        angles = axis_angles(length, c["dim_per_axis"], scale)
        out[f"cos_{axis}"], out[f"sin_{axis}"] = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    grid, heads = tuple(c["q_grid_thw"]), q.shape[1]
    tables = rope_tables(grid, c["head_dim"], tuple(c["scales_thw"]), q.device)
    rotated = apply_rope(q.transpose(1, 2).flatten(2), heads, *tables)
    out["q_rotated"] = rotated.unflatten(-1, (heads, -1)).transpose(1, 2)
    t, h, w = grid
    out["positions"] = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T  # w fastest
    return out


# The VideoVAE


def run_vae_block(case: Case) -> Outputs:
    c = case.config
    resample = "down" if c.get("down_sample") else "up" if c.get("up_sample") else "none"
    block = TemporalBlock(c["channels"], VAEConfig.from_dict({}).temporal_norm_num_groups, torch.nn, resample=resample)
    return {"y": case.fill(block)(case.inputs["x"])}


def vae_of(case: Case) -> VideoVAE:
    vae = VideoVAE(VAEConfig.from_dict(case.config))
    case.fill(vae)
    return vae


def run_vae_encoder(case: Case) -> Outputs:
    """The network on one tile."""
    vae = vae_of(case)
    out = vae.encode_tile(case.inputs["video"])
    return {"encoder_out": out, "moments": per_frame(vae.quant_conv, out)}


def run_vae_decoder(case: Case) -> Outputs:
    """The network on one tile, and the public call; the reference puts frames before channels."""
    vae, latents = vae_of(case), case.inputs["latent"]
    return {"decoder_out": vae.decode_tile(latents), "decode_sample": vae.decode(latents).transpose(1, 2)}


def run_vae_encode(case: Case) -> Outputs:
    mean, logvar = vae_of(case).encode(case.inputs["video"])
    return {"moments": torch.cat((mean, logvar), dim=1), "mean": mean, "std": torch.exp(0.5 * logvar)}


def run_vae_decode(case: Case) -> Outputs:
    return {"video_btchw": vae_of(case).decode(case.inputs["latent"]).transpose(1, 2)}


def run_blend(case: Case) -> Outputs:
    """Weights of the tiles named `w_ijk` in a grid of tiles, every `subsample`-th sample."""
    c = case.config
    axes = []
    for tile, overlap, count in zip(c["kernel"], c["overlap"], c["tiles"], strict=True):
        axes.append(blend_weights(plan_axis(tile + (count - 1) * (tile - overlap), tile, overlap), scale=1))
    out, step = {}, c["subsample"]
    for name in case.expected:
        t, h, w = (weights[int(i)][::step] for weights, i in zip(axes, name.removeprefix("w_"), strict=True))
        out[name] = t[:, None, None] * h[:, None] * w
    return out


# The text encoder


def run_t5(case: Case) -> Outputs:
    """Through our encoder, with a tokenizer that has the case's tokens for the text "0", "1", ...

    Our encoder leaves padding out, so the rows of padding, which mean nothing, come from the network alone.
    """
    transformers = pytest.importorskip("transformers", reason="the text encoder needs transformers")
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"].bool()
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    model = transformers.T5EncoderModel(transformers.T5Config(**case.config))
    case.fill(model, aliases={"encoder.embed_tokens.weight": "shared.weight"})
    encoder = TextEncoder(lambda texts: {"input_ids": [rows[int(t)] for t in texts]}, model, max_length=ids.shape[1])
    embeds, kept = encoder.encode([str(i) for i in range(len(rows))])
    assert torch.equal(kept, mask)
    padding = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return {"last_hidden_state": torch.where(mask[..., None], embeds, padding)}


# Sampling


def run_scheduler(case: Case) -> Outputs:
    """Tables named `<table>_<steps>`, or a trajectory with given model outputs and noises."""
    if "initial_noise" in case.inputs:
        return run_trajectory(case)
    out = {}
    for name in case.expected:
        table, _, steps = name.rpartition("_")
        sigmas = reference_sigmas(int(steps))
        out[name] = {"timesteps": reference_timesteps(int(steps)), "sigmas": sigmas, "init_noise_sigma": sigmas[:1]}[table]
    return out


def run_trajectory(case: Case) -> Outputs:
    """`latents_i` is the state before step i, `scaled_input_i` what the network would see there."""
    x = case.inputs
    sigmas = reference_sigmas(case.config["steps"])
    out = {"latents_0": x["initial_noise"] * sigmas[0]}

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        step = int((sigmas == sigma).nonzero())
        out[f"scaled_input_{step}"] = latents / (sigma**2 + 1) ** 0.5
        return latents - sigma * x[f"model_output_{step}"]

    sample_ancestral(case, denoise, out["latents_0"], sigmas, out)
    return out


def sample_ancestral(case: Case, denoise: Denoise, latents: Tensor, sigmas: Tensor, out: Outputs) -> None:
    """Runs the reference sampler with the case's noises and stores the state after step i as `latents_<i + 1>`."""
    noises = iter(range(len(sigmas)))

    def store(info: StepInfo) -> None:
        out[f"latents_{info.step}"] = info.latents

    SAMPLERS["euler_ancestral"](denoise, latents, sigmas, lambda: case.inputs[f"noise_{next(noises)}"], callback=store)


def run_e2e_t2v(case: Case) -> Outputs:
    x, c = case.inputs, case.config
    dit = AllegroDiT(DiTConfig.from_dict(c["transformer"]))
    case.fill(dit)
    prompts = [Prompt(x[f"{name}_embeds"], x[f"{name}_mask"]) for name in ("prompt", "negative")]
    sigmas = reference_sigmas(c["steps"])
    out: Outputs = {}
    denoiser = Denoiser(dit, *prompts, c["guidance_scale"], batched=True)
    sample_ancestral(case, denoiser, x["initial_noise"] * sigmas[0], sigmas, out)
    return out


# Image to video


def run_dit_ti2v(case: Case) -> Outputs:
    """Text inputs carry the reference's extra axis, as in `run_dit_t2v`."""
    x = case.inputs
    model = case.fill(AllegroTI2V(DiTConfig.from_dict(case.config)))
    return {"noise_pred": model(x["latents"], x["timestep"], x["text_embeds"].flatten(0, 1), x["text_mask"].flatten(0, 1))}


def run_image_prep(case: Case) -> Outputs:
    out = {}
    for name, image in case.inputs.items():
        pixels = image.permute(2, 0, 1)[None].float() / 255
        out[name.replace("_hwc_uint8", "_chw")] = fit_images(pixels, case.config["width"], case.config["height"])[0]
    return out


def ti2v_condition(case: Case, vae: VideoVAE) -> Tensor:
    """[1, 8, t, h, w] from the case's images, at its indices, with its posterior noise."""
    given = GivenFrames.at(case.inputs["images"], case.config["indices"], case.config["num_frames"])
    latents = sample_posterior(*vae.encode(given.canvas()), case.inputs["posterior_noise"])
    return build_condition(normalise(latents, vae.config.scale_factor), given)


def run_ti2v_cond(case: Case) -> Outputs:
    vae = VideoVAE(VAEConfig.from_dict(case.config["vae"]))
    case.fill(vae)
    latents, mask = ti2v_condition(case, vae).chunk(2, dim=1)
    return {"mask": mask, "masked_video_latent": latents}


def run_e2e_ti2v(case: Case) -> Outputs:
    x, c = case.inputs, case.config
    vae = VideoVAE(VAEConfig.from_dict(c["vae"]))
    vae.load_state_dict(as_float32(load_file(case.folder / "vae_tiny_weights.safetensors")))
    dit = AllegroTI2V(DiTConfig.from_dict(c["transformer"]))
    case.fill(dit, prefix="transformer.")
    prompts = [Prompt(x[f"{name}_embeds"], x[f"{name}_mask"]) for name in ("prompt", "negative")]
    sigmas = reference_sigmas(c["steps"])
    out: Outputs = {}
    denoiser = Denoiser(dit, *prompts, c["guidance_scale"], batched=True, condition=ti2v_condition(case, vae))
    sample_ancestral(case, denoiser, x["initial_noise"] * sigmas[0], sigmas, out)
    return out
# Frame interpolation

TINY_VFI = VFIConfig(base_channels=4, depth=(1, 1, 1, 2, 2), window=7, arbitrary_time=True)


def vfi_of(case: Case) -> EMAVFI:
    config = TINY_VFI
    if case.entry["weights"] == "formula":
        config = VFIConfig(case.config["F"], tuple(case.config["depth"]), case.config["W"], arbitrary_time=True)
    model = EMAVFI(config)
    case.fill(model)
    return model


def run_vfi_backbone(case: Case) -> Outputs:
    return pair_outputs(vfi_of(case), case)


def pair_outputs(model: EMAVFI, case: Case) -> Outputs:
    """Appearance `af0` to `af4` and motion `mf3`, `mf4` of the five stages."""
    frames = (model.extract_features(case.inputs[name]) for name in ("img0", "img1"))
    pair = model.feature_bone.pair(*(features.stages for features in frames))
    return {f"af{i}": x for i, x in enumerate(pair.appearance)} | {f"mf{i}": x for i, x in enumerate(pair.motion, 3)}


def unpadded(model: EMAVFI, frame: Tensor, flow_scale: float, *, tta: bool = False) -> FrameFeatures:
    found = model.features(frame, flow_scale, model.dtype)
    return replace(found, turned=model.features(frame.flip(2, 3), flow_scale, model.dtype)) if tta else found


def run_vfi(case: Case) -> Outputs:
    """Plain, with augmentation, or with flow estimated at a fraction of the size; as the case says.

    The public call pads to 32 pixels and more; these values were computed without.
    """
    c, x, model = case.entry, case.inputs, vfi_of(case)
    scale, tta = c.get("down_scale", 1.0), c.get("tta", case.kind == "tta")
    features = [unpadded(model, x[name], scale, tta=tta) for name in ("img0", "img1")]
    found, = model.predict(*features, [c["timestep"]])
    out = {"pred": found.frame, "merged": found.merged, "flow": found.flow, "mask_logit": found.mask}
    pair = model.feature_bone.pair(*((f.small or f).stages for f in features))
    frames = [(f.small or f).frame for f in features]
    out["flow_small"], out["mask_logit_small"] = model.estimate(*frames, pair, c["timestep"])
    coarse = head_features(pair.motion[1], pair.appearance[4], c["timestep"])
    out["flow_stage0"] = model.block[0](coarse, torch.cat(frames, dim=1)).flow
    if case.kind == "full_formula":
        out |= pair_outputs(model, case)
    return out


def run_vfi_padded(case: Case) -> Outputs:
    """Through the public call, which pads."""
    return {"pred": vfi_of(case)(case.inputs["img0"], case.inputs["img1"], case.entry["timestep"])}


def run_vfi_multi(case: Case) -> Outputs:
    model, x, c = vfi_of(case), case.inputs, case.entry
    cache = {name: unpadded(model, x[name], c["down_scale"]) for name in ("img0", "img1")}
    return {"preds": model.forward_multi_timestep(x["img0"], x["img1"], c["time_list"], cache=cache)}


def run_vfi_block(case: Case) -> Outputs:
    c = case.entry
    size = (c["H"], c["W"])
    block = case.fill(Block(c["dim"], c["motion_dim"], 7, c["shift"], Layers()), prefix=c["prefix"])
    out, motion = block(case.inputs["x"].unflatten(1, size))
    found = {"out": out.flatten(1, 2), "motion": motion.flatten(1, 2)}
    mask = window_mask(*size, 7, c["shift"], out.device)
    return found if mask is None else found | {"mask_i8": mask}


def run_vfi_attention(case: Case) -> Outputs:
    x, c = case.inputs, case.entry
    attention = InterFrameAttention(64, 32, Layers())
    case.fill(attention, prefix=c["prefix"])
    appearance, motion = attention(attention.q(x["x1"]), attention.kv(x["x2"]), x["cor"])
    return {"appearance": appearance, "motion": motion}


def run_vfi_part(case: Case) -> Outputs:
    """A part of the tiny model by itself."""
    c, x = case.entry, case.inputs
    if case.kind == "cross_scale_patch_embed":
        tokens = case.fill(CrossScalePatchEmbed(4, Layers()), prefix=c["prefix"])(list(x.values()))
        return {"tokens": tokens.flatten(1, 2)}
    if case.kind == "overlap_patch_embed":
        return {"tokens": case.fill(OverlapPatchEmbed(32, 64, Layers()), prefix=c["prefix"])(x["x"]).flatten(1, 2)}
    mlp = case.fill(MLP(32, Layers()), prefix=c["prefix"])
    return {"out": mlp(x["x"].unflatten(1, (c["H"], c["W"]))).flatten(1, 2)}


def run_vfi_head(case: Case) -> Outputs:
    c, x = case.entry, case.inputs
    extra = x["x"].shape[1] + (4 if "flow_in" in x else 0)
    head = FlowHead(x["motion_feature"].shape[1], extra, TINY_VFI.channels(3), c["scale"], Layers())
    flow, mask = case.fill(head, prefix=c["prefix"])(x["motion_feature"], x["x"], x.get("flow_in"))
    return {"flow": flow, "mask": mask}


def run_vfi_unet(case: Case) -> Outputs:
    """The stored value is after the sigmoid."""
    x = case.inputs
    unet = case.fill(RefineNet(TINY_VFI.base_channels, Layers()), prefix=case.entry["prefix"])
    images = [x[name] for name in ("img0", "img1", "warped0", "warped1", "mask", "flow")]
    maps = [[x[f"c{frame}_{level}"] for level in range(5)] for frame in (0, 1)]
    return {"out": torch.sigmoid(unet(images, *maps))}


def run_vfi_warp(case: Case) -> Outputs:
    return {"out": warp(case.inputs["image"], case.inputs["flow"])}


def run_vfi_warp_pyramid(case: Case) -> Outputs:
    x = case.inputs
    levels = warp_pyramid([x[f"feat{level}"] for level in range(5)], x["flow"])
    return {f"c{frame}_{level}": half for level, maps in enumerate(levels) for frame, half in enumerate(maps.chunk(2))}


KINDS: dict[str, Callable[[Case], Outputs]] = {
    "dit_t2v": run_dit_t2v,
    "timestep": run_timestep,
    "rope": run_rope,
    "vae_block": run_vae_block,
    "vae_encoder": run_vae_encoder,
    "vae_decoder": run_vae_decoder,
    "vae_encode": run_vae_encode,
    "vae_decode": run_vae_decode,
    "blend": run_blend,
    "t5": run_t5,
    "scheduler": run_scheduler,
    "e2e_t2v": run_e2e_t2v,
    "dit_ti2v": run_dit_ti2v,
    "image_prep": run_image_prep,
    "ti2v_cond": run_ti2v_cond,
    "e2e_ti2v": run_e2e_ti2v,
    "backbone": run_vfi_backbone,
    "full": run_vfi,
    "full_formula": run_vfi,
    "tta": run_vfi,
    "hr": run_vfi,
    "padded": run_vfi_padded,
    "multi": run_vfi_multi,
    "attn_block": run_vfi_block,
    "attention": run_vfi_attention,
    "cross_scale_patch_embed": run_vfi_part,
    "overlap_patch_embed": run_vfi_part,
    "mlp": run_vfi_part,
    "head": run_vfi_head,
    "unet": run_vfi_unet,
    "warp": run_vfi_warp,
    "warp_pyramid": run_vfi_warp_pyramid,
}
