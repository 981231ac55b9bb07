"""Break compiles in every way that happens, and say what came of it.

    python benchmarks/reliability.py                         # everything, one line each
    python benchmarks/reliability.py --only kills --kills 20 --seed 3

Every part runs the command line in processes of its own, in a folder of its own, and prints one
line of JSON. Exit code 1 if something is not as docs/reliability.md says.
"""

from __future__ import annotations

import argparse
import ctypes
import filecmp
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from mopt.cli.main import main; main()"]
# What a report says of the machine, the times of steps and the log are about one run, not the
# result; the page shows them.
ABOUT_THE_RUN = {"report.json", "report.html", "log.txt"}


def wide_layers() -> dict[str, Any]:
    """Twelve layers of four million weights: rounding each takes long enough to enter the cache."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(12):
        inputs, outputs = (1024, 4096) if index % 2 == 0 else (4096, 1024)
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(0, inputs**-0.5, generator=generator)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    example = torch.randn(4, 1024, generator=generator)
    return {"model": nn.Sequential(*layers), "example_inputs": (example,)}


class Place:
    """A folder with a cache, outputs and temporary files of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("cache", "tmp"):
            (folder / name).mkdir(parents=True)

    def start(
        self, *arguments: str, limit: Callable[[], None] | None = None, said: Any = subprocess.PIPE,
        **variables: str,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """A command line of mopt."""
        env = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"),
               "TMPDIR": str(self.folder / "tmp"), **variables}  # fmt: skip
        return subprocess.Popen(
            [*COMMAND, *arguments], cwd=self.folder, env=env, text=True, preexec_fn=limit,
            stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip

    def run(self, *arguments: str, **options: Any) -> tuple[int, str, float]:
        """Exit code, what it said on stderr, seconds."""
        started = time.monotonic()
        process = self.start(*arguments, **options)
        _, said = process.communicate(timeout=3600)
        return process.returncode, said, time.monotonic() - started

    def left_over(self) -> list[str]:
        """Temporaries that nobody removed."""
        return sorted(path.name for path in (self.folder / "tmp").iterdir()) + sorted(
            path.name for path in self.folder.iterdir() if path.name.startswith(".")
        )


def compile_arguments(options: argparse.Namespace, output: str) -> list[str]:
    """What is compiled, with one thread and without timing, so that the result is one."""
    return ["compile", options.model, "-r", options.recipe, "--no-measure", "--threads", "1",
            "-o", output]  # fmt: skip


def differences(a: Path, b: Path) -> list[str]:
    """Files of two artifacts that differ in a byte, besides what is about the run."""
    names = {str(p.relative_to(root)) for root in (a, b) for p in root.rglob("*") if p.is_file()}
    kept = sorted(names - ABOUT_THE_RUN)
    return [
        name for name in kept
        if not ((a / name).is_file() and (b / name).is_file()
                and filecmp.cmp(a / name, b / name, shallow=False))
    ]  # fmt: skip


def same_report(a: Path, b: Path) -> list[str]:
    """Keys of two reports that differ, besides seconds and the environment."""
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (a, b))
    for report in (first, second):
        report.pop("environment")
        for step in report["steps"]:
            step.pop("seconds")
    return [key for key in first if first[key] != second.get(key)]


@contextmanager
def places() -> Iterator[Callable[[str], Place]]:
    with tempfile.TemporaryDirectory(prefix="mopt-reliability-") as folder:
        yield lambda name: Place(Path(folder) / name)


def determinism(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """Two processes, two folders, two caches, two hash seeds."""
    folders, codes = [], []
    for name, seed in (("one", "1"), ("two", "77")):
        here = place(name)
        codes.append(here.run(*compile_arguments(options, "out"), PYTHONHASHSEED=seed)[0])
        folders.append(here.folder / "out")
    found = differences(*folders) + same_report(*folders)
    return {"good": codes == [0, 0] and not found, "differ": found}


def kills(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """Kill -9 at random moments, each time run again to the end with what the first left."""
    chance = random.Random(options.seed)
    whole = place("whole")
    code, said, seconds = whole.run(*compile_arguments(options, "out"))
    if code:
        return {"good": False, "said": said[-500:]}
    usual = set(whole.left_over())  # what libraries leave behind without a kill
    results = []
    for index in range(options.kills):
        here = place(f"kill-{index}")
        process = here.start(*compile_arguments(options, "out"))
        after = chance.uniform(0, seconds)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        was_done = (here.folder / "out").exists()
        entries = sum(1 for _ in (here.folder / "cache").rglob("*.safetensors"))
        again = 0.0
        if not was_done:
            code, said, again = here.run(*compile_arguments(options, "out"))
        good = code == 0 and not differences(whole.folder / "out", here.folder / "out")
        good = good and not same_report(whole.folder / "out", here.folder / "out")
        results.append({
            "after_s": round(after, 2), "good": good, "left": sorted(set(here.left_over()) - usual),
            "kept": entries, "was_done": was_done, "again_s": round(again, 2),
        })  # fmt: skip
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        shutil.rmtree(here.folder)
    good = [one for one in results if one["good"] and not one["left"]]
    return {
        "good": len(good) == len(results), "identical": len(good), "kills": len(results),
        "whole_s": round(seconds, 1), "moments": [one["after_s"] for one in results],
    }  # fmt: skip


def processes(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """Eight compiles at once in one cache, one of them killed."""
    here = place("shared")
    alone = place("alone")
    code, _, seconds = alone.run(*compile_arguments(options, "out"))
    started = [here.start(*compile_arguments(options, f"out-{i}")) for i in range(8)]
    time.sleep(seconds)
    started[0].send_signal(signal.SIGKILL)
    codes = []
    for process in started:
        process.communicate()
        codes.append(process.returncode)
    bad = [i for i in range(1, 8) if codes[i] or differences(
        alone.folder / "out", here.folder / f"out-{i}")]  # fmt: skip
    return {"good": code == 0 and not bad, "codes": codes, "wrong": bad}


def damaged_cache(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """Every entry of the cache torn or changed: dropped with a warning, the result is the same."""
    here = place("cache")
    here.run(*compile_arguments(options, "first"))
    records = here.folder / "cache" / "mopt" / "records"
    entries = sorted(p for p in records.rglob("*") if p.is_file())
    for index, path in enumerate(entries):
        data = bytearray(path.read_bytes())
        if index % 2:
            del data[len(data) // 2 :]
        else:
            data[-2] ^= 1
        path.write_bytes(data)
    code, said, _ = here.run(*compile_arguments(options, "second"))
    warned = said.count("is damaged: dropped, and made again")
    wrong = differences(here.folder / "first", here.folder / "second")
    return {
        "good": code == 0 and not wrong and bool(warned or not entries),
        "entries": len(entries), "warnings": warned, "differ": wrong,
    }  # fmt: skip


def full_disk(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """Outputs on a file system of 3 MB (needs root), and files limited to 100 kB."""
    here = place("disk")
    code, said, _ = here.run(*compile_arguments(options, "out"))
    before = (here.folder / "out" / "manifest.json").read_bytes()
    usual = set(here.left_over())  # what libraries leave behind anyway
    small = here.folder / "small"
    small.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    results: dict[str, Any] = {"sound": code == 0}
    if libc.mount(b"tmpfs", os.fsencode(small), b"tmpfs", 0, b"size=1m") == 0:
        try:
            code, said, _ = here.run(*compile_arguments(options, "small/out"))
            results["tmpfs"] = [code, _code_of(said), sorted(p.name for p in small.iterdir())]
        finally:
            libc.umount2(os.fsencode(small), 2)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code, said, _ = here.run(*compile_arguments(options, "out"), "--force", limit=limit)
    kept = (here.folder / "out" / "manifest.json").read_bytes() == before
    left = sorted(set(here.left_over()) - usual)
    results["limited"] = [code, _code_of(said), kept, left]
    good = results["limited"][0] == 2 and kept and not results["limited"][3]
    if "tmpfs" in results:
        good = good and results["tmpfs"] == [2, "disk-full", []]
    return {"good": good, **results}


def read_only(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """An output folder that may not be written to (as root: a read-only mount)."""
    here = place("read-only")
    closed = here.folder / "closed"
    closed.mkdir(mode=0o500)
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = libc.mount(b"tmpfs", os.fsencode(closed), b"tmpfs", 1, b"size=1m") == 0
    try:
        code, said, seconds = here.run(*compile_arguments(options, "closed/out"))
    finally:
        if mounted:
            libc.umount2(os.fsencode(closed), 2)
    return {"good": code == 2 and _code_of(said) == "output-read-only", "code": code,
            "error": _code_of(said), "seconds": round(seconds, 1)}  # fmt: skip


def _code_of(said: str) -> str:
    _, found, rest = said.partition("error[")
    return rest.partition("]")[0] if found else ""


def write_llama(folder: Path, *, width: int, inner: int, layers: int, vocabulary: int) -> int:
    """A Llama of that shape with random float32 weights, written one tensor at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=width // 128, vocab_size=vocabulary,
        max_position_embeddings=2048, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, tensor in tensors.items():
            value = torch.ones(tensor.shape)
            if "norm" not in name:
                value = torch.empty(tensor.shape).normal_(0, 0.02, generator=generator)
            file.write(memoryview(value.numpy()).cast("B"))  # type: ignore[arg-type]
    config.save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def large(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """A Llama of 1.3 billion parameters to int4 with at most 4 GiB of anonymous memory."""
    here = place("large")
    folder = Path(options.folder) if options.folder else here.folder / "llama"
    if not (folder / "config.json").exists():
        write_llama(folder, width=2048, inner=5504, layers=24, vocabulary=32_000)
    cache = options.cache or str(here.folder / "cache")
    inputs: list[str] = []
    if options.tokens:
        import numpy as np

        ids = np.random.default_rng(0).integers(3, 32_000, (1, options.tokens))
        np.savez(here.folder / "x.npz", input_ids=ids, attention_mask=np.ones_like(ids))
        inputs = ["--inputs", "x.npz"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (options.bytes, options.bytes))

    started = time.monotonic()
    process = here.start(
        "compile", f"hf:{folder}", "-r", "int4-weight", "--no-measure", "-v", "-o", "out",
        "--max-memory", f"{options.bytes}B", *inputs, limit=limit, said=sys.stderr,
        XDG_CACHE_HOME=cache,
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    process.communicate()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = sum(p.stat().st_size for p in (here.folder / "out").rglob("*") if p.is_file())
    return {
        "good": process.returncode == 0 and peak <= options.bytes and seconds < 15 * 60,
        "code": process.returncode, "anonymous_gib": round(peak / 2**30, 2),
        "limit_gib": round(options.bytes / 2**30, 2), "minutes": round(seconds / 60, 1),
        "processor_minutes": round((used.ru_utime + used.ru_stime) / 60, 1), "bytes": size,
    }  # fmt: skip


def _anonymous(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def report(options: argparse.Namespace, place: Callable[[str], Place]) -> dict[str, Any]:
    """The page of 200 layers with 20 candidates each: its size, and what a browser takes for it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from mopt.cli.report import render
    from tests.browser import Browser, find_browser
    from tests.cli import report_fixture as made

    rows = [made.layer(f"blocks.{i}.mlp", i, option="int8", why="cheapest",
                       candidates=made.candidates(20)) for i in range(200)]  # fmt: skip
    data = made.report(rows, training=made.training())
    page = place("report").folder / "report.html"
    page.write_text(render(made.write_artifact(page.parent / "a", data, made.plan()), "html"))
    path = find_browser()
    size, opened, errors = page.stat().st_size, [], [] if path else ["no Chromium"]
    if path:
        with Browser(path) as browser:
            for _ in range(5):
                browser.open(page)
                timing = browser.run("performance.getEntriesByType('navigation')[0].toJSON()")
                opened.append(round(timing["loadEventEnd"] / 1e3, 3))
            errors = browser.errors
    return {"good": size < 1.5e6 and not errors and max(opened) < 1,
            "bytes": size, "opened_s": opened, "errors": errors}  # fmt: skip


PARTS = {
    "determinism": determinism, "kills": kills, "processes": processes,
    "damaged-cache": damaged_cache, "full-disk": full_disk, "read-only": read_only, "large": large,
    "report": report,
}  # fmt: skip


def main() -> int:
    """Run the parts; 1 if one of them is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--model", default=f"{Path(__file__).resolve()}:wide_layers")
    parser.add_argument("--recipe", default="int4-weight")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="large: where the model lies, or is to be written")
    parser.add_argument("--cache", help="large: a cache to go on from")
    parser.add_argument("--tokens", type=int, help="large: length of the example text, else 128")
    parser.add_argument("--bytes", type=int, default=4 << 30, help="large: anonymous memory")
    options = parser.parse_args()
    good = True
    for name in options.only.split(","):
        with places() as place:
            started = time.monotonic()
            found = PARTS[name](options, place)
            seconds = round(time.monotonic() - started, 1)
            print(json.dumps({"part": name, **found, "seconds": seconds}), flush=True)
            good = good and found["good"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
