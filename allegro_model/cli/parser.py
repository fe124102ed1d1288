"""The options of every sub-command."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from ..attention import ATTENTIONS
from ..conditioning import FITS
from ..loading import bundled_models
from ..loading.convert import FORMATS as WEIGHT_FORMATS
from ..loading.released import MODELS, PARTS, TEXT_ENCODERS
from ..media import FORMATS, QUALITIES
from ..pipeline import DTYPES, OFFLOADS
from ..sampling import CACHE_LEVELS, SAMPLERS
from ..vfi import DEFAULT_THRESHOLD, FLOW_SCALES
from .options import Parser, add_command, add_report, prepare, start_parser, triple
from .speed_options import add_bench, add_estimate
from .submit_options import add_submit

BUNDLED = "tiny"  # the default model

MODEL_LIST = "\n".join(f"  {name:<12} {title}" for name, title in MODELS.items())

_MAIN = """\
Text to video and image to video with Allegro.

examples:
  allegro generate "a red circle moves to the right on a blue background" -o clip.mp4
  allegro generate "the sun sets over the sea" -o sea.mp4 --model models/Allegro --seed 7
  allegro inspect clip.mp4

Each command explains itself: allegro generate --help
"""
_GENERATE = """\
Make a video from a prompt. The file appears when it is complete; an existing one is never overwritten
without --force. Whatever is not given is what the model was made for.

examples:
  allegro generate "a green square moves down on a white background" -o clip.mp4
  allegro generate "waves at night" -o waves.webm --model models/Allegro --save-latents waves.safetensors
  allegro generate "the same street in snow" -o snow.mp4 --init-video street.mp4 --denoise 0.7

With an image-to-video model, frames can be given. Pictures may have any size; of a video, the first frame is
taken. Positions count from 0, or from the end when negative:
  allegro generate "the sun rises" -o a.mp4 --model tiny-ti2v --first-frame sea.png
  allegro generate "the sun rises" -o b.mp4 --model tiny-ti2v --first-frame sea.png --last-frame day.png
  allegro generate "the sun rises" -o c.mp4 --model tiny-ti2v --keyframe 8=low.png --keyframe -4=high.png
  allegro generate "the sun rises" -o d.mp4 --model models/Allegro --transformer models/Allegro-TI2V --loop sea.png

--continue-from CLIP begins with the last frames of a clip and writes both as one video: no frame twice, colours
of the new part matched to the clip. --prepend-to puts something in front likewise. Given latents (.safetensors
of --save-latents or encode), the shared frames are kept as they are, both are decoded as one, and --save-latents
holds both, ready to be continued once more:
  allegro generate "the sun rises" -o long.mp4 --model tiny-ti2v --continue-from a.mp4
  allegro generate "clouds appear" -o longer.mp4 --model tiny-ti2v --continue-from long.safetensors --keep-frames 8

A storyboard has one prompt per line; what follows "all:" is added to each, and # begins a remark. Each clip goes on
from the one before, and all become one video:
  allegro generate --storyboard story.txt -o story.mp4 --model tiny-ti2v --first-frame sea.png

A long run in two halves, equal to one run:
  allegro generate "a lighthouse" --steps 100 --stop-at-step 50 --save-latents half.safetensors
  allegro generate --resume half.safetensors -o lighthouse.mp4

Ctrl-C stops within seconds, and nothing is lost. When sampling fails or is stopped, the steps that are done
are saved in --save-latents, or else beside the output as NAME.latents.safetensors, for --resume. When
decoding fails or is stopped, the finished latents are saved likewise, and `allegro decode` goes on from there.
"""
_DECODE = """\
Turn latents into a video. Frame rate and settings come from the file if they are in it.

examples:
  allegro decode waves.safetensors -o waves.mp4 --model models/Allegro
  allegro decode waves.safetensors -o waves.png --tile 24x256x256 --overlap 8x64x64
"""
_ENCODE = """\
Turn a video into latents, which `generate --init-video`, `decode` and ComfyUI's LoadLatent read. A video of
another shape is scaled and cropped to its centre.

examples:
  allegro encode street.mp4 -o street.safetensors
  allegro encode street.mp4 -o street.safetensors --width 640 --height 368 --frames 40
"""
_INTERPOLATE = """\
Make the motion of a video smoother: new frames between its own, which stay as they are. Sound is kept. Where the
scene changes nothing is blended. The default model is the small one that comes with the program.

examples:
  allegro interpolate clip.mp4 -o smooth.mp4 --factor 2
  allegro interpolate clip.mp4 -o smooth.mp4 --fps 60 --model ours_small_t.safetensors
  allegro interpolate large.mp4 -o smooth.mp4 --factor 2 --model ours.safetensors --flow-scale 0.5
"""
_CONVERT = """\
Write a transformer or a T5 text encoder in fewer bits, or a whole model folder with both of them so. One tensor after
the other is read, so that little memory is needed. The matrices of the blocks are packed; what is small or sensitive
stays as it is. The result is read by this program and its ComfyUI nodes, and says what each tensor lost.

formats, bytes for a number, relative error of normally distributed weights:
  bf16       2      0.2 %
  fp8        1      2.6 %    float8 (e4m3) with a scale; ComfyUI reads it by itself
  int8       1      0.9 %    a scale for each row
  gguf-q8_0  1.06   0.5 %    the most exact of the small ones
  gguf-q5_k  0.69   3.6 %
  gguf-q4_k  0.56   7.2 %    the smallest

examples:
  allegro convert models/Allegro/transformer allegro_dit_int8.safetensors --format int8
  allegro convert t5xxl_fp16.safetensors t5xxl_q8_0.gguf --format gguf-q8_0
  allegro convert models/Allegro models/Allegro-Q5 --format gguf-q5_k
"""
_CONVERT_VFI = """\
Make a safetensors file of a published EMA-VFI checkpoint (ours.pkl, ours_small.pkl, ours_t.pkl, ours_small_t.pkl).
Nothing in the pickle is run.

examples:
  allegro convert-vfi ours_small_t.pkl ours_small_t.safetensors
"""
_CALIBRATE = """\
Measure the step caches (generate --cache, Allegro Cache in ComfyUI) on a model of your own: a few clips with every step,
then the same with fewer and fewer evaluations, until the clips differ too much. The result lies beside the weights and is
used from then on. It takes hours with the released models; stopped, the same command goes on.

examples:
  allegro calibrate --model models/Allegro
  allegro calibrate --model models/Allegro --prompts prompts.txt --steps 50
"""
_DOWNLOAD = f"""\
Fetch the released weights: named files only, into ComfyUI's model folders or a model folder of their own. What is
there already is not fetched again, what was begun is gone on with, and a file appears when it is complete and checked.
A T5 v1.1 XXL encoder that is there for another model is used as it is.

models:
{MODEL_LIST}
  vfi          frame interpolation (EMA-VFI): says where to get it, since it lies on no model hub

examples:
  allegro download t2v --comfyui ComfyUI
  allegro download t2v --comfyui ComfyUI --text-encoder fp8 --dry-run
  allegro download t2v --to models/Allegro
  allegro download ti2v --to models/Allegro-TI2V --only transformer

Mirrors (HF_ENDPOINT), the offline switch (HF_HUB_OFFLINE) and proxies are those of huggingface_hub.
"""
_INSPECT = """\
Say what a file is, without loading it: weights (family, variant, type, size), a model folder, latents, or a
clip and the settings it was made with.

examples:
  allegro inspect models/Allegro
  allegro inspect transformer/diffusion_pytorch_model.safetensors
  allegro inspect clip.mp4 --json
"""


def build_parser() -> Parser:
    """The command line of `allegro`."""
    parser, commands = start_parser(_MAIN)
    _add_generate(commands)
    _add_decode(commands)
    _add_encode(commands)
    _add_interpolate(commands)
    _add_calibrate(commands)
    _add_convert(commands)
    _add_convert_vfi(commands)
    _add_download(commands)
    add_submit(commands)
    add_bench(commands)
    add_estimate(commands)
    inspect = add_command(commands, "inspect", "say what a file is", _INSPECT)
    inspect.add_argument("path", metavar="PATH", help="a file, a model folder, or a bundled model")
    add_report(inspect)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line; exits with a message when it cannot be understood.

    Args:
        argv: arguments without the program's name; default those of the process.
    """
    return build_parser().parse_args(prepare(sys.argv[1:] if argv is None else argv))


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "generate", "make a video from a prompt", _GENERATE)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the video shows")
    _add_clip(parser)
    _add_drawing(parser)
    _add_given(parser)
    _add_size_and_quality(parser)
    group = parser.add_argument_group("long runs")
    group.add_argument("--save-latents", metavar="FILE",
                       help="save the latents before decoding (.safetensors)")
    group.add_argument("--stop-at-step", type=int, metavar="K",
                       help="stop after step K and save the run to --save-latents")
    group.add_argument("--resume", metavar="FILE", help="go on with a saved run; takes no PROMPT or settings")
    group = parser.add_argument_group("smoother motion")
    group.add_argument("--interpolate", type=int, metavar="N",
                       help="so many frames for each, 2 to 64, at N times the rate; see allegro interpolate")
    group.add_argument("--interpolator", metavar="FILE",
                       help="the model for it (.safetensors); default tiny-vfi, the bundled small one")
    _add_model(parser, generate=True)
    _add_tiles(parser)
    add_report(parser)


def _add_drawing(parser: Parser) -> None:
    group = parser.add_argument_group("what to draw")
    group.add_argument("--storyboard", metavar="FILE",
                       help="in place of PROMPT: a text file with one prompt per line; each goes on from the clip before it, all "
                            "as one video (image-to-video models)")
    parser.set_defaults(prompts=None)
    group.add_argument("--negative", metavar="TEXT", help="what to steer away from; empty for nothing")
    group.add_argument("--template", action=argparse.BooleanOptionalAction,
                       help="wrap the prompt in the official quality words")
    group.add_argument("--no-clean", action="store_const", const=True,
                       help='keep the prompt as it is: the official cleaning deletes words such as "r2d2"')
    group.add_argument("--lora", action="append", type=_lora, default=[], metavar="FILE[:STRENGTH]",
                       help="merge a LoRA into the transformer, with this strength (default 1, may be negative); "
                            "repeat it for several")
    group.add_argument("--seed", type=int, help="0 or above; the same seed gives the same video (default 42)")
    group.add_argument("--init-video", metavar="FILE",
                       help="start from a video, or from latents made by encode")
    group.add_argument("--denoise", type=float, metavar="X",
                       help="share of --init-video that is drawn anew, above 0 to 1 (default 0.6)")


def _add_size_and_quality(parser: Parser) -> None:
    group = parser.add_argument_group("size and quality; default: what the model was made for")
    group.add_argument("--frames", type=int, metavar="N", help="a multiple of 4")
    group.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--steps", type=int, metavar="N",
                       help="denoising steps; more is slower and cleaner; released models need 50 or more")
    group.add_argument("--cfg", type=float, metavar="X",
                       help="how closely to follow the prompt; 1 is off and twice as fast")
    group.add_argument("--sampler", choices=list(SAMPLERS), help="the reference's is euler_ancestral")
    group.add_argument("--cache", choices=CACHE_LEVELS,
                       help="leave out evaluations whose result would hardly differ: safe, fast or draft, each faster and "
                            "further from the exact video; broadcast is the published attention broadcast, which needs much "
                            "memory (default off)")


def _add_given(parser: Parser) -> None:
    group = parser.add_argument_group("given frames, for image-to-video models")
    group.add_argument("--first-frame", metavar="FILE", help="the picture the video begins with")
    group.add_argument("--last-frame", metavar="FILE", help="the picture it ends with")
    group.add_argument("--keyframe", action="append", type=_keyframe, default=[], metavar="INDEX=FILE",
                       help="the picture at a frame: 0 is the first, -1 the last; repeat it for several")
    group.add_argument("--loop", metavar="FILE", help="the picture it both begins and ends with")
    clip = group.add_mutually_exclusive_group()
    clip.add_argument("--continue-from", metavar="CLIP",
                      help="a video or latents to go on from; the result is both as one video")
    clip.add_argument("--prepend-to", metavar="CLIP", help="a video or latents to put something in front of")
    group.add_argument("--keep-frames", type=int, metavar="K",
                       help="frames that the new part shares with CLIP (default 8); more carries over more of its motion")
    group.add_argument("--new-part", action="store_true", help="write the new frames only, to be put beside CLIP")
    group.add_argument("--fit", choices=FITS, help="how a picture of another shape is fitted: cut to the centre (default), "
                                                   "on a grey ground, or distorted")


def _add_decode(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "decode", "turn latents into a video", _DECODE)
    parser.add_argument("latents", metavar="LATENTS", help="a .safetensors file of latents")
    _add_clip(parser)
    _add_model(parser)
    _add_tiles(parser)
    add_report(parser)


def _add_encode(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "encode", "turn a video into latents", _ENCODE)
    parser.add_argument("clip", metavar="CLIP", help="a video file")
    parser.add_argument("-o", "--output", metavar="FILE", required=True,
                        help="latents to write (.safetensors)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    group = parser.add_argument_group("what to take; default: all of it, its size rounded down to 16")
    group.add_argument("--frames", type=int, metavar="N", help="so many from the beginning, a multiple of 4")
    group.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--fps", type=float, metavar="X", help="frames per second")
    _add_model(parser)
    _add_tiles(parser)
    add_report(parser)


def _add_interpolate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "interpolate", "make the motion of a video smoother", _INTERPOLATE)
    parser.add_argument("clip", metavar="CLIP", help="a video file")
    _add_clip(parser, fps="in place of --factor: frames per second, e.g. 24, 30 or 60")
    group = parser.add_argument_group("what to make")
    group.add_argument("--factor", type=int, metavar="N", help="so many frames for each, 2 to 64")
    group.add_argument("--hold-last", action=argparse.BooleanOptionalAction, default=True,
                       help="show the last frame as long as the others, which keeps the duration: N x factor frames; "
                            "else (N - 1) x factor + 1 (default: held)")
    group.add_argument("--scene-threshold", type=float, metavar="X", default=DEFAULT_THRESHOLD,
                       help="frames with less in common than this, 0 to 1, are a cut, where the nearer one is held; "
                            f"0 blends everything (default {DEFAULT_THRESHOLD:g})")
    group.add_argument("--flow-scale", type=float, metavar="X", default=1.0, choices=FLOW_SCALES,
                       help="look for motion at this share of the size: 1, 0.5 for 2K, 0.25 for 4K (default 1)")
    group.add_argument("--tta", action="store_true", help="slightly better, in twice the time")
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", metavar="FILE", help="an EMA-VFI model (.safetensors); default tiny-vfi, the bundled small one")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default auto)")
    group.add_argument("--dtype", default="auto", choices=list(DTYPES),
                       help="type to compute in (default auto: the fastest that does not show)")
    add_report(parser)


def _add_calibrate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "calibrate", "measure the step caches on a model", _CALIBRATE)
    parser.add_argument("-o", "--output", metavar="FILE.json", help="the file to write; default beside the transformer, where it is used")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    group = parser.add_argument_group("what to measure; default: what the model was made for")
    group.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line; default three of everyday scenes")
    group.add_argument("--frames", type=int, metavar="N", help="a multiple of 4")
    group.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    _add_model(parser, generate=True)
    _add_tiles(parser)
    add_report(parser)


def _add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "convert", "make a model smaller: fp8, int8 or GGUF", _CONVERT)
    parser.add_argument("source", metavar="IN", help="a file or folder of weights, or a whole model folder")
    parser.add_argument("output", metavar="OUT", help="the file to write, .safetensors or .gguf; of a whole model, a folder")
    parser.add_argument("--format", required=True, choices=list(WEIGHT_FORMATS), metavar="FORMAT",
                        help=", ".join(WEIGHT_FORMATS))
    parser.add_argument("--force", action="store_true", help="replace existing files")
    add_report(parser)


def _add_convert_vfi(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "convert-vfi", "make safetensors of an EMA-VFI checkpoint", _CONVERT_VFI)
    parser.add_argument("checkpoint", metavar="IN.pkl", help="the published file")
    parser.add_argument("output", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--arbitrary-time", action=argparse.BooleanOptionalAction, default=None,
                        help="trained for every position between two frames; default: if the name ends in _t")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    add_report(parser)


def _add_download(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "download", "fetch the released weights", _DOWNLOAD)
    parser.add_argument("model", nargs="?", default="t2v", choices=[*MODELS, "vfi"], metavar="MODEL",
                        help=f"{', '.join(MODELS)} or vfi (default t2v)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--comfyui", metavar="DIR", help="a ComfyUI, the folder that has main.py and models/ in it")
    place.add_argument("--to", metavar="DIR", help="a model folder as published, for --model")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART",
                        help=f"one part, repeatable: {', '.join(PARTS)}")
    parser.add_argument("--text-encoder", default="fp16", choices=list(TEXT_ENCODERS),
                        help="fp16 (9.8 GB, default), or fp8: half of that and slightly less precise")
    parser.add_argument("--dry-run", action="store_true", help="only list files, sizes and places")
    parser.add_argument("--force", action="store_true", help="replace existing files that cannot be used")
    add_report(parser)


def _add_clip(parser: Parser, *, fps: str = "frames per second") -> None:
    group = parser.add_argument_group("the file to write")
    group.add_argument("-o", "--output", metavar="FILE",
                       help=f"the video; {', '.join(FORMATS)} (numbered pictures)")
    group.add_argument("--fps", type=float, metavar="X", help=fps)
    group.add_argument("--quality", default="high", metavar="Q",
                       help=f"{' or '.join(QUALITIES)}, or a rate factor such as 18 (default high)")
    group.add_argument("--force", action="store_true", help="replace existing files")


def _add_model(parser: Parser, *, generate: bool = False) -> None:
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", metavar="DIR|tiny",
                       help=f"a model folder, or a bundled model: {', '.join(bundled_models())} (default {BUNDLED})")
    if generate:
        group.add_argument("--transformer", metavar="PATH",
                           help="a file or folder of weights that takes the place of the model's own transformer, e.g. "
                                "that of Allegro-TI2V in the folder of Allegro; default settings follow it")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default auto)")
    if generate:
        group.add_argument("--dtype", default="auto", choices=list(DTYPES),
                           help="of the transformer (default auto: bf16 for large models on a GPU)")
        group.add_argument("--attention", default="auto", choices=ATTENTIONS,
                           help="kernel of the transformer's attention (default auto: the fastest exact one, measured before the "
                                "first step; a resumed run keeps its own); sage is approximate; one that cannot be used here is replaced by sdpa")
        group.add_argument("--offload", default="auto", choices=OFFLOADS,
                           help="where the weights are: none, on the device; stream, in main memory, and each layer comes to the "
                                "device when it is called: less memory, the same video (default auto: stream where they do not fit)")
        group.add_argument("--prompt-cache", metavar="DIR",
                           help="keep encoded prompts in this folder, at most 1 GB, so that the same one never needs the text "
                                "encoder again; delete the folder to forget them")
        group.add_argument("--compile", action="store_true",
                           help="run the transformer's blocks through torch.compile, which takes a minute or more before the first "
                                "step; where it fails the run goes on without it")


def _add_tiles(parser: Parser) -> None:
    group = parser.add_argument_group("tiles of the VAE: smaller needs less memory and may show seams")
    group.add_argument("--tile", type=triple, metavar="FxHxW",
                       help="frames x height x width (released models: 24x320x320)")
    group.add_argument("--overlap", type=triple, metavar="FxHxW",
                       help="shared with the next tile (released models: 8x120x80; with --tile at most half of it)")
    group.add_argument("--tiles-per-batch", type=int, metavar="N",
                       help="tiles at once; more needs more memory (default: on CUDA what fits into a quarter of its memory, at "
                            "most 8; elsewhere one)")


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; the colon of a Windows drive belongs to the file."""
    found = re.fullmatch(r"(..+?):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if found:
        return found.group(1), float(found.group(2))
    if re.search(r"\.safetensors:", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FILE or FILE:STRENGTH, such as style.safetensors:0.8")
    return text, 1.0


def _keyframe(text: str) -> tuple[int, str]:
    found = re.fullmatch(r"(-?\d{1,6})=(.+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected INDEX=FILE, such as 12=picture.png or -1=last.png")
    return int(found.group(1)), found.group(2)
