"""The released models, file by file: what there is, how large it is, and where it belongs.

Named files only. The repositories hold more: a text encoder of 19 GB in fp32, in one of them twice, for which
the single file that other models use as well stands in here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_ALLEGRO, _TI2V = "rhymes-ai/Allegro", "rhymes-ai/Allegro-TI2V"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# The commits of the model repositories could not be looked up when this was written; what "main" stood for is
# recorded beside the files instead.
_NEWEST = "main"
# Commit, sizes and checksums of the text encoders: several public installers agree on them.
_T5_REPOSITORY, _T5_COMMIT = "comfyanonymous/flux_text_encoders", "6af2a98e3f615bdfa612fbd85da93d1ed5f69ef5"


@dataclass(frozen=True)
class _Model:
    """A released model: what it makes, where it is published, where its VAE and tokenizer are, its names in ComfyUI."""

    title: str
    repository: str
    shared: str
    dit: str
    vae: str
    dit_bytes: int = 5_500_000_000


def _forty_frames(name: str, size: str) -> _Model:
    repository = f"{_ALLEGRO}-T2V-{name}"
    stem = f"allegro_{name.lower()}"
    return _Model(f"text to video, 40 frames of {size}", repository, repository, f"{stem}_dit", f"{stem}_vae")


_MODELS = {
    "t2v": _Model("text to video, 88 frames of 1280x720", _ALLEGRO, _ALLEGRO, "allegro_dit", "allegro_vae"),
    "t2v-40x720p": _forty_frames("40x720P", "1280x720"),
    "t2v-40x360p": _forty_frames("40x360P", "640x368"),
    # It shares everything but the transformer with text to video. Source: its public instructions.
    "ti2v": _Model(
        "image to video, 88 frames of 1280x720", _TI2V, _ALLEGRO, "allegro_ti2v", "allegro_vae", 5_600_000_000
    ),
}
MODELS = {name: model.title for name, model in _MODELS.items()}
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
COMMAND = "python -m allegro_model download"
INTERPOLATOR_SOURCE = (
    "The EMA-VFI weights lie on no model hub: its authors share a Google Drive folder, linked from the page of "
    "MCG-NJU/EMA-VFI. Take ours_small_t.pkl (fast) or ours_t.pkl (best), and convert it once: "
    "python -m allegro_model convert-vfi ours_small_t.pkl {target}"
)


@dataclass(frozen=True)
class ReleasedFile:
    """One file of a released model.

    Attributes:
        part: of the model: one of `PARTS`, or "model" for what describes the whole.
        repository, path: where it is published.
        snapshot: its name in a model folder as published.
        comfyui: ComfyUI's key of the folder it goes to, and its name there; None if it is not needed there.
        num_bytes: its size; exact where there is a checksum, else rounded, and of weights calculated from their number.
        revision: commit, or branch where no commit is known.
        sha256: of the content; None where it is not known, then the hub's own is used.
        optional: some models have it, some do not.
    """

    part: str
    repository: str
    path: str
    snapshot: str
    comfyui: tuple[str, str] | None
    num_bytes: int
    revision: str = _NEWEST
    sha256: str | None = None
    optional: bool = False

    @property
    def is_weights(self) -> bool:
        return self.path.endswith(".safetensors")


TEXT_ENCODERS = {
    "fp16": ReleasedFile(
        "text_encoder", _T5_REPOSITORY, "t5xxl_fp16.safetensors", "text_encoder/model.safetensors",
        ("text_encoders", "t5xxl_fp16.safetensors"), 9_787_841_024, _T5_COMMIT,
        "6e480b09fae049a72d2a8c5fbccb8d3e92febeb233bbe9dfe7256958a9167635"),
    "fp8": ReleasedFile(
        "text_encoder", _T5_REPOSITORY, "t5xxl_fp8_e4m3fn_scaled.safetensors", "text_encoder/model.safetensors",
        ("text_encoders", "t5xxl_fp8_e4m3fn_scaled.safetensors"), 5_157_348_688, _T5_COMMIT,
        "a498f0485dc9536735258018417c3fd7758dc3bccc0a645feaa472b34955557a"),
}  # fmt: skip


def released_files(model: str, text_encoder: str = "fp16") -> list[ReleasedFile]:
    """The files of a released model, each once.

    Args:
        model: one of `MODELS`.
        text_encoder: one of `TEXT_ENCODERS`.
    """
    of = _MODELS[model]
    files = [
        ReleasedFile("model", of.repository, "model_index.json", "model_index.json", None, 1_000, optional=True),
        *_part("transformer", of.repository, ("diffusion_models", of.dit), of.dit_bytes),
        *_part("vae", of.shared, ("vae", of.vae), 700_000_000),
        TEXT_ENCODERS[text_encoder],
    ]
    tokenizer = {"spiece.model": 800_000, "tokenizer_config.json": 21_000, "special_tokens_map.json": 3_000,
                 "added_tokens.json": 3_000}  # fmt: skip
    for name, num_bytes in tokenizer.items():
        path = f"tokenizer/{name}"
        files.append(ReleasedFile("tokenizer", of.shared, path, path, None, num_bytes, optional=name != "spiece.model"))
    return files


def how_to_get(part: str, model: str = "t2v") -> str:
    """A sentence that says what is missing, where it is published, how large it is, and how to get it.

    Args:
        part: one of `PARTS`.
        model: one of `MODELS`.
    """
    file = next(file for file in released_files(model) if file.part == part and not file.optional)
    where = f"models/{'/'.join(file.comfyui)}" if file.comfyui else file.snapshot
    return (
        f"The released one is {file.path} of {file.repository} ({about(file.num_bytes)}), to be saved as {where}; "
        f"this fetches it: {COMMAND} {model} --comfyui DIR, or the node Allegro Download."
    )


def fetch_part(folder: object, part: str) -> str:
    """What to do when a model folder lacks a part."""
    total = sum(file.num_bytes for file in released_files("t2v") if file.part == part)
    return (
        f"Download the folder {part}/ of the model into it; for the released one ({about(total)}): "
        f"{COMMAND} t2v --to {folder} --only {part}"
    )


def how_to_get_folder(model: str = "t2v") -> str:
    """The same for a whole model folder."""
    total = sum(file.num_bytes for file in released_files(model))
    return f"This fetches one ({about(total)}): {COMMAND} {model} --to DIR"


def about(num_bytes: int) -> str:
    """A size as the pages of files give it: 9.8 GB."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


def _part(part: str, repository: str, comfyui: tuple[str, str], num_bytes: int) -> list[ReleasedFile]:
    """Weights and the config.json that says what their shapes do not."""
    key, stem = comfyui
    path = f"{part}/{_WEIGHTS}"
    weights = ReleasedFile(part, repository, path, path, (key, f"{stem}.safetensors"), num_bytes)
    path = f"{part}/config.json"
    return [weights, replace(weights, path=path, snapshot=path, comfyui=(key, f"{stem}.config.json"), num_bytes=1_000)]
