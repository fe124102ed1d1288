"""Sampling nodes that equal the reference. ComfyUI's own samplers work with the model as well."""

from __future__ import annotations

from typing import Any

from ..allegro_model.errors import ScheduleError
from ..allegro_model.sampling import reference_sigmas
from ..allegro_model.sampling.guidance import check_guidance
from ..allegro_model.sampling.schedule import MAX_STEPS, check_schedule
from .bridge.sampling import RunSettings, run
from .schema import fraction, io, schema, seed

NOISE_SOURCES = ("reference", "comfy")
_STEPS = ("Denoising steps. More is slower and better: the released models were made for 100, below 50 they get noisy; "
          "the bundled one was made for 20 to 30.")


class AllegroScheduler(io.ComfyNode):
    """The reference's noise levels for ComfyUI's custom sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroScheduler",
            display_name="Allegro Scheduler",
            category="sampling",
            description=("The noise levels of the reference, number for number, for SamplerCustomAdvanced with the "
                         "euler_ancestral sampler. In KSampler the scheduler 'normal' is the same to five digits."),
            search_aliases=["sigmas", "allegro steps"],
            inputs=[
                io.Int.Input("steps", default=100, min=1, max=MAX_STEPS, step=1, tooltip=_STEPS),
                fraction("denoise", 1.0, "1 starts from noise. Less keeps that much of the latent you give: the last part "
                                         "of a longer schedule is run, with the same number of steps."),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="The noise levels, one more than steps.")],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None = None, denoise: float | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(steps=steps, denoise=denoise)

    @classmethod
    def execute(cls, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(reference_sigmas(steps, denoise))


class AllegroSampler(io.ComfyNode):
    """The reference's sampler: same steps, same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AllegroSampler",
            display_name="Allegro Sampler",
            category="sampling",
            description=("Makes the clip as the reference does: Euler ancestral steps on its schedule, all noise from one "
                         "generator on the CPU, so that a seed gives the same clip on every device and on the command "
                         "line. ComfyUI's own samplers work too, with other noise."),
            search_aliases=["allegro ksampler", "text to video"],
            inputs=[
                io.Model.Input("model", tooltip="The transformer, with or without LoRA and patches."),
                io.Conditioning.Input("positive", tooltip="What the clip shows."),
                io.Conditioning.Input("negative", tooltip="What it should not show. Not used at cfg 1."),
                io.Latent.Input("latent_image", tooltip=(
                    "The size of the clip: an empty latent; or an encoded clip to change, with denoise below 1. A noise "
                    "mask is honoured.")),
                seed("The clip is chosen by this number: same number, same clip. The items of a batch count up from it."),
                io.Int.Input("steps", default=100, min=1, max=MAX_STEPS, step=1, tooltip=_STEPS),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=(
                    "How strictly the clip follows the prompt. More is stricter and harsher, less is freer. 7.5 is what "
                    "the released model was made for, 8 the image-to-video one; 1 turns guidance off and takes half the time.")),
                fraction("denoise", 1.0, "1 starts from noise. Less keeps that much of the latent you give: the last part "
                                         "of a longer schedule is run, with the same number of steps."),
                io.Combo.Input("noise_source", options=list(NOISE_SOURCES), default="reference", tooltip=(
                    "reference: all noise from one generator on the CPU, equal on every device. comfy: the noise that "
                    "ComfyUI's KSampler draws for the seed, which depends on device and version.")),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The sampled latent, for a VAE decode node.")],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None = None, cfg: float | None = None, denoise: float | None = None,
                        noise_source: str | None = None) -> bool | str:
        """Before anything is loaded. An input that is linked is None here and checked in `execute`."""
        return _problem(steps=steps, cfg=cfg, denoise=denoise, noise_source=noise_source)

    @classmethod
    def execute(cls, model: Any, positive: list[Any], negative: list[Any], latent_image: dict[str, Any], seed: int,
                steps: int, cfg: float, denoise: float, noise_source: str) -> io.NodeOutput:
        _check(steps=steps, cfg=cfg, denoise=denoise, noise_source=noise_source)
        settings = RunSettings(seed, steps, cfg, denoise, noise_source)
        return io.NodeOutput(run(model, positive, negative, latent_image, settings))


def _check(steps: int | None = None, cfg: float | None = None, denoise: float | None = None,
           noise_source: str | None = None) -> None:
    if noise_source is not None and noise_source not in NOISE_SOURCES:
        raise ScheduleError(f"noise_source={noise_source!r}: must be one of {', '.join(NOISE_SOURCES)}.")
    check_schedule(1 if steps is None else steps, 1.0 if denoise is None else denoise)
    check_guidance(1.0 if cfg is None else cfg)


def _problem(**values: Any) -> bool | str:
    """True, or what is wrong."""
    try:
        _check(**values)
    except ScheduleError as error:
        return str(error)
    return True
