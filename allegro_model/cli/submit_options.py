"""The options of `allegro submit`."""

from __future__ import annotations

import argparse
import math

from .options import Parser, add_command, add_report

SERVER = "http://127.0.0.1:8188"  # where ComfyUI listens unless it is told otherwise

_SUBMIT = """\
Make videos on ComfyUI servers that have this extension: a prompt, a workflow in API form, or a whole list. Needs
nothing but Python, also where the server is another machine. Progress is shown as it happens, each result is fetched
as soon as it is there, and Ctrl-C stops this program's own runs at the servers, nobody else's.

examples:
  allegro submit "a red circle moves right over a blue background"
  allegro submit "a harbour at dawn" --model released --server http://gpu1:8188 -o harbour --preview preview.jpg
  allegro submit "the sun rises" --first-frame sea.png --last-frame day.png
  allegro submit --workflow my.json --set "KSampler.steps=30" --set 12.image=photo.png

Lists: a prompt on each line of a .txt file, or a .csv file (.jsonl: objects) whose columns are options (prompt,
negative, seed, steps, cfg, width, height, frames, first_frame, last_frame, transformer, text_encoder, vae), name (of
the result), or NODE.INPUT. Options given here hold for all rows that do not say otherwise:
  allegro submit --list prompts.txt --model released --server http://gpu1:8188 --server http://gpu2:8188
  allegro submit --list shots.csv --workflow my.json --seed 7

What was done is kept in the file allegro-jobs.jsonl beside the results. The same command again, after a crash, Ctrl-C
or --no-wait, does only what is missing, and first asks the servers for runs that have finished meanwhile:
  allegro submit --list prompts.txt --no-wait
  allegro submit --list prompts.txt
"""


def add_submit(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the sub-command."""
    parser = add_command(commands, "submit", "make videos on ComfyUI servers", _SUBMIT)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the video shows")
    parser.add_argument("--list", metavar="FILE", help="many jobs: .txt, .csv or .jsonl")
    parser.add_argument("--workflow", metavar="FILE", help="a workflow in API form (.json); else one is built for the prompt")
    _add_servers(parser)
    _add_settings(parser)
    group = parser.add_argument_group("results")
    group.add_argument("-o", "--output", metavar="DIR", default="outputs", help="folder for them (default outputs)")
    group.add_argument("--name", metavar="NAME", help="of the result, without extension; default made of the prompt")
    group.add_argument("--force", action="store_true", help="replace existing files")
    group.add_argument("--again", action="store_true", help="do finished jobs again")
    group.add_argument("--preview", metavar="FILE", help="a picture that shows the latest preview, written anew at every step")
    add_report(parser)


def _add_servers(parser: Parser) -> None:
    group = parser.add_argument_group("servers")
    group.add_argument("--server", action="append", metavar="URL",
                       help=f"of a ComfyUI; repeat it to share the work (default {SERVER})")
    group.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True,
                       help="wait for the results, or only submit (default: wait)")
    group.add_argument("--retries", type=_count, metavar="N", default=2,
                       help="submit a job again, so often, after it failed or its server died (default 2)")
    group.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="cancel a run that takes longer")
    group.add_argument("--patience", type=_seconds, metavar="SECONDS", default=300.0,
                       help="give up when no server has answered for so long (default 300)")


def _add_settings(parser: Parser) -> None:
    group = parser.add_argument_group("what to draw; default: what the workflow says, or the model was made for")
    group.add_argument("--model", metavar="tiny|released|NAME",
                       help="the small bundled model (default), the released files as the README names them, or a folder in "
                            "the server's models/allegro; not with --workflow")
    group.add_argument("--negative", metavar="TEXT", help="what to steer away from")
    group.add_argument("--seed", type=int, help="the same seed gives the same video (default 42)")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    group.add_argument("--cfg", type=float, metavar="X", help="how closely to follow the prompt")
    group.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 16")
    group.add_argument("--frames", type=int, metavar="N", help="a multiple of 4")
    group.add_argument("--first-frame", metavar="FILE", help="a picture here that the video begins with; it is uploaded")
    group.add_argument("--last-frame", metavar="FILE", help="a picture that it ends with")
    group.add_argument("--transformer", metavar="NAME", help="as the server's Load Allegro DiT lists it")
    group.add_argument("--text-encoder", metavar="NAME", help="as Load Allegro T5 lists it")
    group.add_argument("--vae", metavar="NAME", help="as Load Allegro VAE lists it")
    group.add_argument("--set", action="append", type=_assignment, default=[], metavar="NODE.INPUT=VALUE",
                       help="any input of a node, by its id, title or type; a file here is uploaded for LoadImage and its like")


def _assignment(text: str) -> tuple[str, str]:
    target, equals, value = text.partition("=")
    node, dot, key = target.strip().rpartition(".")
    if not (equals and dot and node and key):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NODE.INPUT=VALUE, such as 7.steps=30")
    return target.strip(), value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 1000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return value
