"""Speed and memory against diffusers: same weights, same inputs, runs taken in turn. By hand: `make bench`.

    python tests/bench/bench_core.py                     # every row, to the terminal
    python tests/bench/bench_core.py dit vae --rounds 5  # rows whose name contains one of the words
    python tests/bench/bench_core.py --write docs/benchmarks.md   # rows that are not run keep their line in the file

Each row has one process for both sides. A round runs ours, then theirs; the table has the medians. Rows are of sizes that this
processor does in seconds: there are as many rounds as fit in those, and on a processor without bfloat16 instructions, where
diffusers takes many times longer, its rows in that type are small or left out. Nothing here asserts: numbers depend on the
machine and on what else it is doing, the ratio within one run does not.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from allegro_model.ops import half_is_slow  # noqa: E402 (after the path)

SIDES = ("ours", "diffusers")
# Seconds of a first round that warms up and is not counted; what takes longer does not notice.
WARM_UP = 10.0


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for people.
        task: of sides.py.
        options: of the task.
        seconds: for all rounds, about; the first one is done if it takes longer.
    """

    name: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 25.0


def dit_rows(dtype: str, *sizes: tuple[int, tuple[int, int, int]]) -> Iterator[Row]:
    for tokens, shape in sizes:
        yield Row(f"DiT forward, {tokens:,} tokens, {dtype}", "dit", {"dtype": dtype, "shape": shape})


def vae_row(direction: str, dtype: str, size: tuple[int, int, int], tile: tuple[int, int, int], seconds: float = 25) -> Row:
    """Tiles overlap by half along time and by three eighths in a picture, as in the released model."""
    count = 1 if size == tile else 4
    overlap = (tile[0] // 2, tile[1] * 3 // 8, tile[2] * 3 // 8)
    name = f"VAE {direction}, {count} tile{'s' * (count > 1)} of {'x'.join(map(str, tile))}, {dtype}"
    return Row(name, "vae", {"dtype": dtype, "direction": direction, "size": size, "tile": tile, "overlap": overlap}, seconds)


def rows() -> Iterator[Row]:
    large = (3600, (1, 90, 160)), (14_400, (4, 90, 160))
    slow = half_is_slow(torch.bfloat16)
    yield from dit_rows("float32", *large)
    yield from dit_rows("bfloat16", *(((920, (1, 46, 80)),) if slow else large))
    # Four tiles are two along time and two along the width.
    for dtype in ("float32",) if slow else ("float32", "bfloat16"):
        for direction in ("encode", "decode"):
            yield vae_row(direction, dtype, (8, 64, 64), (8, 64, 64))
        yield vae_row("decode", dtype, (12, 64, 104), (8, 64, 64))
        yield vae_row("decode", dtype, (8, 128, 128), (8, 128, 128), 80)
    yield Row("load a 5.5 GB DiT", "load", {"read": False})
    yield Row("load a 5.5 GB DiT and read every weight", "load", {"read": True})
    yield Row("import, with torch already imported", "import", {"what": "package"})
    yield Row("import the extension, with ComfyUI already imported", "import", {"what": "extension"})


# Processes


class Worker:
    """A running sides.py."""

    def __init__(self, python: str = sys.executable) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [python, str(HERE / "sides.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path})

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"sides.py ended with code {self.process.wait()}")
        return json.loads(line)


@dataclass
class Result:
    row: Row
    seconds: dict[str, list[float]]
    peak: dict[str, int]
    difference: float | None  # relative, between the two sides' results

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])


def in_rounds(run: Callable[[str], dict[str, Any]], rounds: int, budget: float) -> Iterator[dict[str, dict[str, Any]]]:
    """What both sides answer in each counted round.

    Args:
        run: asks a side.
        rounds: at most.
        budget: seconds for all of them, about; there is at least one.
    """
    end, counted, first = time.monotonic() + budget, 0, True
    while counted < rounds:
        start = time.monotonic()
        numbers = {side: run(side) for side in SIDES}
        took = time.monotonic() - start
        if not first or took > WARM_UP:
            yield numbers
            counted += 1
        first = False
        if counted and time.monotonic() + took > end:
            return


def imported(what: str, side: str) -> dict[str, Any]:
    """By a fresh interpreter; for the extension by that of ComfyUI."""
    own = os.environ.get("COMFYUI_PYTHON", sys.executable) if what == "extension" and side == "ours" else sys.executable
    with Worker(own) as worker:
        return worker.ask(**{"import": side, "what": what})


def measure(row: Row, rounds: int, threads: int) -> Result:
    result = Result(row, {s: [] for s in SIDES}, dict.fromkeys(SIDES, 0), None)
    samples: dict[str, Any] = {}
    with Worker() as worker:
        if row.task == "import":
            asked = in_rounds(partial(imported, row.options["what"]), rounds, row.seconds)
        else:
            worker.ask(setup=row.task, options=row.options, threads=threads)
            asked = in_rounds(lambda side: worker.ask(run=side), rounds, row.seconds)
        for numbers in asked:
            for side, of_side in numbers.items():
                result.seconds[side].append(of_side["seconds"])
                result.peak[side] = max(result.peak[side], of_side.get("peak", 0))
                samples[side] = of_side.get("sample")
    if samples["ours"]:
        a, b = samples["ours"], samples["diffusers"]
        scale = sum(y * y for y in b) ** 0.5
        result.difference = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 / scale
    return result


@contextmanager
def large_checkpoint() -> Iterator[str]:
    """A snapshot folder with the released DiT's sizes and random bfloat16 weights, 5.5 GB."""
    from safetensors.torch import save_file

    from allegro_model.config import PRESETS
    from allegro_model.dit import AllegroDiT

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "transformer"
        target.mkdir()
        model = AllegroDiT(PRESETS["88x720P"].dit, device="meta")
        block = torch.empty(2**22, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        weights = {k: block.repeat(v.numel() // len(block) + 1)[: v.numel()].view(v.shape).clone()
                   for k, v in model.state_dict().items()}
        save_file(weights, target / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "AllegroTransformer3DModel", "num_layers": 32}
        (target / "config.json").write_text(json.dumps(config))
        del weights
        yield folder


# The table


def gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB" if size >= 1024**3 / 10 else f"{size / 1024**2:.0f} MiB"


def line(result: Result) -> str:
    ours, theirs = (result.median(s) for s in SIDES)
    memory = f"{gib(result.peak['ours'])} | {gib(result.peak['diffusers'])}" if any(result.peak.values()) else "- | -"
    difference = f"{result.difference:.0e}" if result.difference is not None else "-"
    rounds = len(result.seconds["ours"])
    return (f"| {result.row.name} | {ours:.3g} s | {theirs:.3g} s | {ours / theirs:.2f} | {memory} | {difference} | "
            f"{rounds} |")


HEADER = """| what | ours | diffusers | ratio | memory, ours | memory, diffusers | difference | rounds |
|---|---|---|---|---|---|---|---|"""


SLOW = """- This processor has no bfloat16 instructions. Ours computes that type in float32, diffusers in plain loops: its DiT row is
  of a size that these do in seconds, and its VAE, which takes minutes for a tile, has none."""
NATIVE = "- This processor has bfloat16 instructions."


def merged(path: Path, results: list[Result]) -> list[str]:
    """Lines of the table: the new ones, and those of the file whose rows were not run."""
    lines = {r.row.name: line(r) for r in results}
    if path.exists():
        old = (text for text in path.read_text(encoding="utf-8").splitlines() if text.startswith("| "))
        lines = {text.split(" | ")[0].removeprefix("| "): text for text in old} | lines
    return [lines[r.name] for r in rows() if r.name in lines]


def other_sections(path: Path) -> str:
    """What other benchmarks have written into the file, below this one's part."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    start = text.find("\n## ")
    return text[start:] if start >= 0 else ""


def document(table: str, threads: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return f"""# Benchmarks

Written by `make bench` (`tests/bench/bench_core.py`). Against diffusers' Allegro port, with the same random weights and
inputs, on {os.cpu_count()} CPU cores ({platform.machine()}, {threads} threads); {versions}, Python {platform.python_version()}.

Both sides run in one process in turn; the table has the medians over the rounds. Read the ratio (ours / diffusers, below 1 = ours
is faster): the seconds depend on the machine and on what else it was doing. Memory is the peak above the loaded model and its
inputs. Difference is that of the two results, relative (root mean square); in bfloat16 both differ from the exact result by about
that much.

{HEADER}
{table}

- DiT: width 2304, 24 heads of 96, 1 of the released model's 32 layers, which are all alike; 512 text tokens of which 60 are kept. Ours drops the
  padded ones; a run with many steps also computes the text's keys and values once instead of at every step, which one forward
  does not show.
- VAE: the released network (128, 256, 512, 512 channels). Four tiles are two along time and two along the width.
{SLOW if half_is_slow(torch.bfloat16) else NATIVE}
- Loading maps the file; weights are read from disk when they are first used, hence the second row. The file is in the disk cache.
- Import is what a script needs to build a pipeline, after `import torch`; for the extension, what ComfyUI waits for when it
  starts (measured when `COMFYUI_PATH` and `COMFYUI_PYTHON` are set), against the same import of diffusers.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the rows whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    chosen = [r for r in rows() if not args.words or any(w in r.name for w in args.words)]
    if not os.environ.get("COMFYUI_PATH"):
        chosen = [r for r in chosen if r.options.get("what") != "extension"]
    results = []
    print(HEADER)
    with large_checkpoint() if any(r.task == "load" for r in chosen) else nullcontext("") as folder:
        for row in chosen:
            if row.task == "load":
                row = replace(row, options={**row.options, "path": folder})
            results.append(measure(row, args.rounds, args.threads))
            print(line(results[-1]), flush=True)
            if args.write:
                table = "\n".join(merged(args.write, results))
                args.write.write_text(document(table, args.threads) + other_sections(args.write), encoding="utf-8")


if __name__ == "__main__":
    main()
