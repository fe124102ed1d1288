"""What the options of all sub-commands share. Needs no PyTorch, as not every command does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from .report import EXIT_USAGE, exit_code_table

EXIT_CODES = f"""\
exit codes:
{exit_code_table()}
"""


class Parser(argparse.ArgumentParser):
    """Errors point to the help of the right sub-command, and exit with the documented code."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\nTry: {self.prog} --help\n")


def start_parser(text: str) -> tuple[Parser, argparse._SubParsersAction[Parser]]:
    """The command line of `allegro` without sub-commands, and where they are added."""
    parser = Parser(prog="allegro", description=text, epilog=EXIT_CODES, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"allegro {__version__}")
    return parser, parser.add_subparsers(dest="command", required=True, metavar="COMMAND")


def prepare(argv: Sequence[str]) -> list[str]:
    """The words of a command line as argparse understands them.

    Args:
        argv: arguments without the program's name.
    """
    words = list(argv)
    prepared: list[str] = []
    for index, (word, following) in enumerate(zip(words, [*words[1:], ""], strict=True)):
        if word == "--":
            prepared += words[index:]
            break
        if prepared and prepared[-1] == "--keyframe" and re.match(r"-\d", word):
            # argparse alone would take -1=last.png, a position that counts from the end, for an option.
            prepared[-1] += f"={word}"
        elif word == "--json" and not _is_report(following):
            # The file is optional: argparse alone would take any word that follows, such as the prompt.
            prepared.append("--json=-")
        else:
            prepared.append(word)
    return prepared


def _is_report(word: str) -> bool:
    return word == "-" or word.lower().endswith(".json")


def _report_file(text: str) -> str:
    if not _is_report(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends in .json, or - for standard output")
    return text


def triple(text: str) -> tuple[int, int, int]:
    """FxHxW: frames, height, width."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected frames x height x width, such as 24x320x320")
    frames, height, width = map(int, found.groups())
    return frames, height, width


def add_command(commands: argparse._SubParsersAction[Parser], name: str, summary: str, text: str) -> Parser:
    """A sub-command with `summary` in the list of all and `text` on its own page."""
    return commands.add_parser(name, help=summary, description=text, epilog=EXIT_CODES, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)


def add_report(parser: Parser) -> None:
    """What every command offers for its report and messages."""
    group = parser.add_argument_group("what to say")
    group.add_argument("--json", nargs="?", const="-", type=_report_file, metavar="FILE.json",
                       help="a report of times, peak memory, versions and settings; without a name that ends in "
                            ".json on standard output")
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="nothing but errors")
    volume.add_argument("--verbose", action="store_true",
                        help="also log messages, and the traceback of an error")
