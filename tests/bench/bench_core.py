"""Speed and memory against diffusers: same weights, same inputs, runs taken in turn. By hand: `make bench`.

    python tests/bench/bench_core.py                     # every row, to the terminal
    python tests/bench/bench_core.py dit vae --rounds 5  # rows whose name contains one of the words
    python tests/bench/bench_core.py --write docs/benchmarks.md   # rows that are not run keep their line in the file

Each row has one process per side. A round runs ours, then theirs; the table has the medians. Nothing here asserts:
numbers depend on the machine and on what else it is doing, the ratio within one run does not.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIDES = ("ours", "diffusers")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Row:
    """One line of the table: a task of sides.py and its options."""

    name: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)


def rows() -> Iterator[Row]:
    for tokens, shape in ((3600, [1, 90, 160]), (14400, [4, 90, 160])):
        for dtype in ("float32", "bfloat16"):
            yield Row(f"DiT forward, {tokens:,} tokens, {dtype}", "dit", {"dtype": dtype, "shape": shape})
    # Tiles small enough for a few seconds each; four tiles are two along time and two along the width.
    tile, overlap = [8, 64, 64], [4, 24, 24]
    for direction in ("encode", "decode"):
        for count, size in ((1, [8, 64, 64]), (4, [12, 64, 104])):
            for dtype in ("float32", "bfloat16"):
                name = f"VAE {direction}, {count} tile{'s' if count > 1 else ''} of 8x64x64, {dtype}"
                yield Row(name, "vae", {"dtype": dtype, "direction": direction, "size": size, "tile": tile, "overlap": overlap})
        large = [8, 160, 160]  # nearer to the released 24x320x320
        yield Row(f"VAE {direction}, 1 tile of 8x160x160, float32", "vae",
                  {"dtype": "float32", "direction": direction, "size": large, "tile": large, "overlap": [4, 64, 64]})
    yield Row("load a 5.5 GB DiT", "load", {"read": False})
    yield Row("load a 5.5 GB DiT and read every weight", "load", {"read": True})
    yield Row("import, with torch already imported", "import", {"import": "package"})
    yield Row("import the extension, with ComfyUI already imported", "import", {"import": "extension"})


# Processes


class Side:
    """A running sides.py."""

    def __init__(self, name: str, python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / "sides.py"), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))})

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.process.args[-1]} process ended with code {self.process.wait()}")  # type: ignore[index]
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def pair(ours: str = sys.executable) -> Iterator[dict[str, Side]]:
    """Both processes; `ours` is the interpreter of our side."""
    sides = {"ours": Side("ours", ours), "diffusers": Side("diffusers")}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


@dataclass
class Result:
    row: Row
    seconds: dict[str, list[float]]
    peak: dict[str, int]
    difference: float | None  # relative, between the two sides' results

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])


def measure(row: Row, rounds: int, threads: int) -> Result:
    result = Result(row, {s: [] for s in SIDES}, dict.fromkeys(SIDES, 0), None)
    if row.task == "import":
        inside = row.options["import"] == "extension"
        for _ in range(rounds):
            with pair(os.environ.get("COMFYUI_PYTHON", sys.executable) if inside else sys.executable) as sides:
                for name, side in sides.items():
                    result.seconds[name].append(side.ask(**row.options)["seconds"])
        return result
    samples = {}
    with pair() as sides:
        for side in sides.values():
            side.ask(setup=row.task, options=row.options, threads=threads)
        for round_number in range(rounds + 1):  # the first one warms up
            for name, side in sides.items():
                numbers = side.ask(run=True)
                result.peak[name] = max(result.peak[name], numbers["peak"])
                samples[name] = numbers.get("sample")
                if round_number > 0:
                    result.seconds[name].append(numbers["seconds"])
    if samples["ours"]:
        a, b = samples["ours"], samples["diffusers"]
        scale = sum(y * y for y in b) ** 0.5
        result.difference = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 / scale
    return result


@contextmanager
def large_checkpoint() -> Iterator[str]:
    """A snapshot folder with the released DiT's sizes and random bfloat16 weights, 5.5 GB."""
    import torch
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

Each side runs in its own process; a round runs ours, then theirs, and the table has the medians over the rounds. Read the
ratio (ours / diffusers, below 1 = ours is faster): the seconds depend on the machine and on what else it was doing, and it was
busy here. Memory is the peak above the loaded model and its inputs. Difference is that of the two results, relative (root mean square); in
bfloat16 both differ from the exact result by about that much.

{HEADER}
{table}

- DiT: width 2304, 24 heads of 96, 2 of the released model's 32 layers; {512} text tokens of which 60 are kept. Ours drops the
  padded ones; a run with many steps also computes the text's keys and values once instead of at every step, which one forward
  does not show.
- VAE: the released network (128, 256, 512, 512 channels). Four tiles are two along time and two along the width.
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
        chosen = [r for r in chosen if r.options.get("import") != "extension"]
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
