"""Give damaged files to everything that reads strangers' files, and count what comes of it.

    python benchmarks/fuzzing.py --minutes 10            # each parser gets an equal share
    python benchmarks/fuzzing.py --only report,csv --minutes 1 --seed 7
    python benchmarks/fuzzing.py --engine atheris        # guided by coverage; pip install atheris

Each parser runs in a child process with a limit on its memory, ten seconds for each input, and an
audit hook that sees every file opened for writing, process, connection and unpickled name. A
finding is an input after which something else than an answer or an error of mopt came out; it is
kept in the folder that ``--findings`` names. Prints one line of JSON for each parser.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SECONDS_EACH = 10
MEMORY = 3 << 30
_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class",
    "socket.connect", "socket.bind", "ctypes.dlopen", "os.symlink", "os.link",
)  # fmt: skip
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")


class Forbidden(Exception):
    """A parser did what no parser may do."""


class Hang(Exception):
    """An input took too long."""


class Watch:
    """The audit hook; armed while one input is read."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = str(allowed)
        self.armed = False
        self.seen: str | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        wrong = event in _FORBIDDEN
        if event == "open" and isinstance(arguments[0], str):
            flags = arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            wrong = bool(writes) and not self._inside(arguments[0])
        elif event in _CHANGES:
            wrong = isinstance(arguments[0], str) and not self._inside(arguments[0])
        if wrong:
            self.seen = f"{event} {arguments!r}"

    def _inside(self, path: str) -> bool:
        return path == os.devnull or os.path.realpath(path).startswith(self.allowed)


def child(options: argparse.Namespace) -> None:
    """Fuzz one parser for a while; the counts go to stdout as JSON."""
    from tests.mutations import mutate
    from tests.parsers import check, make_parser

    def too_long(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS_EACH} s")

    scratch = Path(options.scratch)
    place = scratch / "inputs"
    place.mkdir()
    parser = make_parser(options.child, scratch)
    for data in parser.seeds:
        check(parser, data, place)  # imports what it needs before anything is forbidden
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, too_long)
    watch = Watch(scratch.resolve())
    chance = random.Random(f"{options.seed} {parser.name}")
    counts = {"inputs": 0, "read": 0, "refused": 0, "findings": 0}
    slowest, started = 0.0, time.monotonic()
    last = (scratch / "last").open("wb", buffering=0)

    def one(data: bytes) -> None:
        nonlocal slowest
        last.seek(0)
        last.write(len(data).to_bytes(8, "little") + data)
        begun, wrong = time.monotonic(), None
        # Seconds of the processor: the machine may be busy with something else.
        signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
        watch.armed = True
        try:
            counts["read" if check(parser, data, place) else "refused"] += 1
        except Exception:  # whatever it is, it is what is looked for
            wrong = traceback.format_exc()
        finally:
            watch.armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        wrong = wrong or watch.seen
        watch.seen = None
        slowest = max(slowest, time.monotonic() - begun)
        counts["inputs"] += 1
        if wrong:
            counts["findings"] += 1
            keep(options.findings, parser.name, data, wrong)

    def result() -> str:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return json.dumps({
            "parser": parser.name, "engine": options.engine, **counts,
            "seconds": round(time.monotonic() - started, 1),
            "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
            "slowest_s": round(slowest, 3), "peak_rss_mb": round(used.ru_maxrss / 1e3),
        })  # fmt: skip

    if options.engine == "atheris":
        _with_atheris(parser, one, options, result)
        return
    while time.monotonic() - started < options.seconds:
        one(mutate(parser.seeds, chance))
    print(result(), flush=True)


def _with_atheris(parser: Any, one: Any, options: argparse.Namespace, result: Any) -> None:
    import atheris

    corpus = Path(options.scratch) / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(parser.seeds):
        (corpus / str(index)).write_bytes(seed)
    started = time.monotonic()

    def target(data: bytes) -> None:
        one(data)
        if time.monotonic() - started > options.seconds:
            print(result(), flush=True)
            os._exit(0)

    for name, module in list(sys.modules.items()):
        if name.startswith("mopt.") and name.count(".") <= 3:
            _instrument(atheris, module)
    atheris.Setup([sys.argv[0], "-max_len=65536", f"-seed={options.seed + 1}", str(corpus)], target)
    atheris.Fuzz()


def _instrument(atheris: Any, module: Any) -> None:
    for name, value in list(vars(module).items()):
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and (
            hasattr(value, "__code__")
        ):  # fmt: skip
            setattr(module, name, atheris.instrument_func(value))


def keep(folder: str, parser: str, data: bytes, wrong: str) -> None:
    """Store an input and what came of it; one file for each place that failed."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    where = "".join(wrong.splitlines()[-6:])
    name = f"{parser}-{hashlib.sha256(where.encode()).hexdigest()[:12]}"
    if not (place / f"{name}.txt").exists():
        (place / f"{name}.bin").write_bytes(data)
        (place / f"{name}.txt").write_text(wrong)


def run(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One parser in a child; a child that died is a finding."""
    with tempfile.TemporaryDirectory(prefix="mopt-fuzz-") as scratch:
        command = [
            sys.executable, __file__, "--child", name, "--seconds", str(seconds),
            "--seed", str(options.seed), "--scratch", scratch, "--findings", options.findings,
            "--engine", options.engine,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + 7200, cwd=scratch,
                env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": f"{scratch}/cache"},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            done = subprocess.CompletedProcess(command, -1, "", f"did not end: {error}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0 and lines:
            found: dict[str, Any] = json.loads(lines[-1])
            return found
        last = Path(scratch) / "last"
        data = last.read_bytes() if last.exists() else b""
        size = int.from_bytes(data[:8], "little")
        keep(options.findings, name, data[8 : 8 + size],
             f"the child ended with {done.returncode}\n{done.stderr[-3000:]}")  # fmt: skip
        return {"parser": name, "died": done.returncode, "findings": 1}


def main() -> int:
    """Fuzz every parser in turn; 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="for all parsers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of parsers, separated by commas")
    parser.add_argument("--engine", choices=["random", "atheris"], default="random")
    parser.add_argument("--findings", default=str(ROOT / "out" / "fuzzing"))
    for hidden in ("--child", "--scratch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return 0
    from tests.parsers import NAMES

    names = options.only.split(",") if options.only else list(NAMES)
    findings = 0
    for name in names:
        found = run(name, options, 60 * options.minutes / len(names))
        findings += found["findings"]
        print(json.dumps(found), flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
