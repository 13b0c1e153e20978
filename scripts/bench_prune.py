"""Time and memory of pruning a checkpoint of random weights, beside copying the result with cp.

    python scripts/bench_prune.py --shape 8b runs/bench-prune

Prune and cp alternate, each from files that are not in the page cache and with a sync inside the
time; a prune is a whole process, imports included. This process samples the anonymous memory of
the pruning one (RssAnon of /proc/PID/status; mapped files are not in it). Then a prune is killed
midway (kill -9), what it left is looked at, and a rerun has to complete. Needs three times the
checkpoint's size on disk. Writes prune_<shape>_* to docs/results/importance.json with --record.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from figures import record
from make_checkpoint import make
from random_model import SHAPES

from minipuzzle.architecture import Architecture, FFNLayer, MambaLayer
from minipuzzle.checkpoint import Checkpoint
from minipuzzle.errors import UserError
from minipuzzle.files import TEMPORARY
from minipuzzle.model import read_architecture
from minipuzzle.prune.slice import differing_tensor, slice_checkpoint
from minipuzzle.selection import LayerSelection, Selection

SAMPLE_SECONDS = 0.01
KILL_AT = 0.5  # of the output's bytes
GIB = 2**30


def example_selection(architecture: Architecture, seed: int = 0) -> Selection:
    """Random units, so that kept rows and columns lie scattered: the hard case for the reader.

    FFN 16/21 of the width (21504 -> 16384), 7/8 of each group's Mamba heads (128 -> 112), and one
    layer of both kinds removed.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(units: int, kept: int) -> torch.Tensor:
        return torch.randperm(units, generator=generator)[:kept].sort().values

    layers: list[LayerSelection | None] = []
    for layer in architecture.layers:
        if isinstance(layer, FFNLayer):
            layers.append({"width": tuple(some(layer.width, layer.width * 16 // 21).tolist())})
        elif isinstance(layer, MambaLayer):
            size = layer.heads // layer.groups
            heads = [some(size, size * 7 // 8) + i * size for i in range(layer.groups)]
            layers.append({"heads": tuple(torch.cat(heads).tolist())})
        else:
            layers.append({})
    for kind in ("mamba", "ffn"):
        places = [i for i, layer in enumerate(architecture.layers) if layer.kind == kind]
        layers[places[len(places) * 3 // 4]] = None
    return Selection(tuple(layers))


@dataclass
class Bench:
    """The folders of one measurement, and what is done with them."""

    work: Path
    shape: str

    def __post_init__(self) -> None:
        self.source, self.target = self.work / f"random-{self.shape}", self.work / "pruned"
        self.copy, self.plan = self.work / "copy", self.work / "selection.json"
        if not self.source.exists():
            make(self.shape, self.source)
        _, _, self.architecture = read_architecture(self.source)
        self.selection = example_selection(self.architecture)
        self.plan.write_text(json.dumps(self.selection.to_json()))

    def start_prune(self) -> subprocess.Popen[bytes]:
        """A process that prunes."""
        folders = [str(self.source), str(self.target), str(self.plan)]
        return subprocess.Popen([sys.executable, __file__, "--child", *folders])

    def prune(self) -> tuple[float, float]:
        """Seconds of one prune, and the most anonymous memory it held, in GiB."""
        peak = 0.0

        def run() -> None:
            nonlocal peak
            process = self.start_prune()
            while process.poll() is None:
                peak = max(peak, anonymous_gib(process.pid))
                time.sleep(SAMPLE_SECONDS)
            assert process.returncode == 0, "the prune failed"

        seconds = self._timed(self.target, run)
        assert peak > 0, "no memory was seen"
        return seconds, peak

    def cp(self) -> float:
        """Seconds of copying the finished output."""
        command = ["cp", "-r", str(self.target), str(self.copy)]
        return self._timed(self.copy, lambda: subprocess.run(command, check=True))

    def _timed(self, result: Path, action: Callable[[], object]) -> float:
        """Seconds of an action and of a sync, after what it makes was removed, files cold."""
        shutil.rmtree(result, ignore_errors=True)
        os.sync()
        for folder in (self.source, self.target):
            forget(folder)
        started = time.perf_counter()
        action()
        os.sync()
        return time.perf_counter() - started

    def killed(self) -> None:
        """Kill a prune midway and check that nothing looks finished and a rerun completes."""
        expected = Checkpoint.open(self.target)
        whole = expected.fingerprint()
        shutil.rmtree(self.target)
        process = self.start_prune()
        while self._unfinished_bytes() < KILL_AT * expected.total_bytes:
            assert process.poll() is None, "the prune ended before it could be killed"
            time.sleep(SAMPLE_SECONDS)
        process.kill()
        process.wait()
        assert not self.target.exists(), "a killed prune left its target"
        left = self._leftovers()
        assert left, "a killed prune left no trace: was it killed midway?"
        for folder in left:
            assert not (folder / "config.json").exists()
            assert not opens(folder), f"{folder} can be read as a checkpoint"
        self.prune()
        assert not self._leftovers(), "the rerun did not clear what the killed one left"
        assert Checkpoint.open(self.target).fingerprint() == whole

    def _leftovers(self) -> list[Path]:
        return list(self.work.glob(f"{self.target.name}{TEMPORARY}*"))

    def _unfinished_bytes(self) -> int:
        files = [file for folder in self._leftovers() for file in folder.glob("*.safetensors")]
        try:
            return sum(file.stat().st_size for file in files)
        except FileNotFoundError:  # renamed this moment
            return 0


def anonymous_gib(pid: int) -> float:
    """Anonymous memory of a process now, 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    kib = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return sum(kib) * 2**10 / GIB


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache; they must be synced."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def opens(folder: Path) -> bool:
    """Whether a folder can be read as a checkpoint."""
    try:
        Checkpoint.open(folder)
    except UserError:
        return False
    return True


def report(bench: Bench, repeats: int) -> dict[str, tuple[float, str]]:
    """Measure all of it and print a table; the figures."""
    prunes: list[float] = []
    copies: list[float] = []
    peaks: list[float] = []
    print(f"{'run':<6}{'prune s':>10}{'cp s':>10}{'ratio':>8}{'peak GiB':>10}", flush=True)
    for i in range(repeats):
        seconds, peak = bench.prune()
        copied = bench.cp()
        prunes.append(seconds)
        copies.append(copied)
        peaks.append(peak)
        row = f"{i + 1:<6}{seconds:>10.1f}{copied:>10.1f}{seconds / copied:>8.2f}{peak:>10.3f}"
        print(row, flush=True)
    prune, copy = statistics.median(prunes), statistics.median(copies)
    print(f"{'median':<6}{prune:>10.1f}{copy:>10.1f}{prune / copy:>8.2f}{max(peaks):>10.3f}")
    shutil.rmtree(bench.copy)
    started = time.perf_counter()
    assert differing_tensor(bench.source, bench.target, bench.selection) is None
    check = time.perf_counter() - started
    sizes = [Checkpoint.open(folder).total_bytes for folder in (bench.source, bench.target)]
    print(f"{sizes[0] / GIB:.2f} -> {sizes[1] / GIB:.2f} GiB; slices compared in {check:.1f} s")
    bench.killed()
    print("killed midway: nothing looks finished, the rerun completes with the same content")
    stem = f"prune_{bench.shape}"
    return {
        f"{stem}_peak_gib": (round(max(peaks), 3), "GiB"),
        f"{stem}_over_cp": (round(prune / copy, 3), "ratio"),
        f"{stem}_seconds": (round(prune, 1), "s"),
        f"{stem}_check_seconds": (round(check, 1), "s"),
    }


def main() -> None:
    """Measure in the folder that the command line names."""
    if sys.argv[1:2] == ["--child"]:
        source, target, plan = map(Path, sys.argv[2:])
        slice_checkpoint(source, target, Selection.from_json(json.loads(plan.read_text())))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the figures to docs/results")
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    figures = report(Bench(options.work, options.shape), options.repeats)
    if options.record:
        print(f"written to {record('importance', figures)}")


if __name__ == "__main__":
    main()
