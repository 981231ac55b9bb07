"""What quantization recipes cost three models: size, quality and speed in ONNX Runtime.

    python -m benchmarks.quantization_recipes --output results.json [--encoder FOLDER TEXT]

The models are the zoo's language model (bits per byte lost, and the divergence from float32 in bits
per byte, on 16 kB of held-out text), its digits CNN (accuracy on held-out images, cosine of the
logits) and, where its folder is given, a sentence encoder (see ``benchmarks.sentence_encoder``:
mean and least cosine, share of nearest neighbours that stay). Calibration data is drawn anew for
each seed; medians over the seeds.
Speed is that of one run of the example's shape on one thread: the float32 artifact's time over the
recipe's, run in turn, the median of the ratios. A recipe that leaves every layer as it was gets the
reason instead. What the output file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quantization import draw
from benchmarks.sentence_encoder import (
    JUDGED,
    Encoder,
    batches,
    embed,
    neighbours,
    read_sentences,
)
from mopt.calibration import Calibration
from mopt.files import write_file_atomic
from mopt.frontend import capture
from mopt.lowering import Loaded, lower
from mopt.models import digits_cnn, pydoc_gpt
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe

# Rows of the table: a name, the preset, and options changed in it.
ROWS: dict[str, tuple[str, list[str]]] = {
    "fp16-weight": ("fp16-weight", []),
    "int8-weight": ("int8-weight", []),
    "int8-dynamic": ("int8-dynamic", []),
    "int8-smooth": ("int8-smooth", []),
    "int8-outliers": ("int8-outliers", []),
    "int8-rotate": ("int8-rotate", []),
    "int8-split": ("int8-split", []),
    "int8-static": ("int8-static", []),
    "int8-static, percentile": ("int8-static", ["quantize-static.calibration=percentile"]),
    "int8-static, entropy": ("int8-static", ["quantize-static.calibration=entropy"]),
    "int8-static, min-max": ("int8-static", ["quantize-static.calibration=min-max"]),
    "int8-dfq": ("int8-dfq", []),
    "int4-weight": ("int4-weight", []),
    "int4-awq": ("int4-awq", []),
    "int4-gptq": ("int4-gptq", []),
    "int4-awq-gptq": ("int4-awq-gptq", []),
    "int4-hqq": ("int4-hqq", []),
    "int4-adaround": ("int4-adaround", ["quantize-adaround.steps=100"]),
    "int2-qat": ("int2-qat", ["quantize-qat.steps=100", "tune-scales.steps=100"]),
    "fp8-weight": ("fp8-weight", []),
    "nf4": ("nf4", []),
    "mxfp4": ("mxfp4", []),
    "nvfp4": ("nvfp4", []),
    "bitmod": ("bitmod", []),
    "twin-log": ("twin-log", []),
}
Entry = dict[str, Any]
_WINDOWS = 48
_JUDGED_WINDOWS = 64


class Subject(Protocol):
    """A model with its data: ``draw`` calibrates, ``judge`` maps what was loaded to numbers.

    ``once`` runs a loaded model on the example's shape.
    """

    program: Program

    def once(self, run: Callable[..., Any]) -> Any: ...

    def draw(self, seed: int) -> Iterable[Any]: ...

    def judge(self, run: Callable[..., Any], seed: int) -> dict[str, float]: ...


class Language:
    """The zoo's language model on its held-out text."""

    def __init__(self) -> None:
        example = pydoc_gpt.example_inputs()
        self.once = lambda run: run(*example)
        self.program = capture(pydoc_gpt.build(), example, pydoc_gpt.dynamic_shapes())
        self._ids = pydoc_gpt.windows(load_file(pydoc_gpt.TEXT)["heldout"])[:_JUDGED_WINDOWS]
        self._float = self._logarithms(self.program.run)

    def draw(self, seed: int) -> Iterable[Any]:
        return draw(seed, _WINDOWS)

    def judge(self, run: Callable[..., Any], seed: int) -> dict[str, float]:
        found = self._logarithms(run)
        right = self._ids[:, 1:, None]
        lost = float((self._float - found).gather(-1, right).mean()) / math.log(2)
        each = (self._float.exp() * (self._float - found)).sum(-1)
        return {"bits per byte lost": lost, "divergence": float(each.mean()) / math.log(2)}

    @torch.no_grad()
    def _logarithms(self, run: Callable[..., Any]) -> Tensor:
        parts = [torch.as_tensor(run(ids)) for ids in self._ids[:, :-1].contiguous().split(2)]
        return torch.cat(parts).float().log_softmax(-1)


class Digits:
    """The zoo's digits CNN on its held-out images."""

    def __init__(self) -> None:
        example = digits_cnn.example_inputs()
        self.once = lambda run: run(*example)
        self.program = capture(digits_cnn.build().eval(), example, digits_cnn.dynamic_shapes())
        self._images, self._labels = digits_cnn.split("heldout")
        self._float = self.program.run(self._images)

    def draw(self, seed: int) -> Iterable[Any]:
        images = digits_cnn.split("training")[0]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        count = digits_cnn.BATCH * digits_cnn.CALIBRATION_BATCHES
        return [(batch,) for batch in images[order[:count]].split(digits_cnn.BATCH)]

    def judge(self, run: Callable[..., Any], seed: int) -> dict[str, float]:
        logits = torch.as_tensor(run(self._images))
        right = float((logits.argmax(1) == self._labels).float().mean())
        cosine = float(torch.cosine_similarity(logits, self._float).mean())
        return {"accuracy": right, "cosine": cosine}


class Sentences:
    """A sentence encoder; each seed judges and calibrates on sentences of its own."""

    def __init__(self, folder: Path, text: Path) -> None:
        from transformers import AutoTokenizer

        encoder = Encoder(folder, 1)
        self.program = encoder.program
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._sentences = read_sentences(text)
        self._cut = lambda texts, size: batches(tokenizer, encoder.names, texts, size)
        example = self._cut(self._sentences[:1], 1)[0]
        self.once = lambda run: run(**example)
        self._float: dict[int, Tensor] = {}

    def draw(self, seed: int) -> Iterable[Any]:
        return self._cut(self._drawn(seed)[JUDGED:], 4)

    def judge(self, run: Callable[..., Any], seed: int) -> dict[str, float]:
        judged = self._cut(self._drawn(seed)[:JUDGED], 1)
        if seed not in self._float:
            self._float[seed] = embed(lambda batch: self.program.run(**batch), judged)
        wanted, found = self._float[seed], embed(lambda batch: run(**batch), judged)
        cosine = (wanted * found).sum(1)
        same = float((neighbours(wanted) == neighbours(found)).float().mean())
        return {"cosine": float(cosine.mean()), "least": float(cosine.min()), "neighbours": same}

    def _drawn(self, seed: int) -> list[str]:
        order = torch.randperm(len(self._sentences), generator=torch.Generator().manual_seed(seed))
        return [self._sentences[at] for at in order[: JUDGED + 64].tolist()]


def speed(plain: Loaded, made: Loaded, once: Callable[[Loaded], Any], seconds: float) -> float:
    """How many times faster ``made`` is, both run in turn for about that long."""
    ratios = []
    end = time.perf_counter() + seconds
    for run in (plain, made, plain, made):
        once(run)
    while len(ratios) < 9 or (time.perf_counter() < end and len(ratios) < 200):
        times = []
        for run in (plain, made):
            started = time.perf_counter()
            once(run)
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def unchanged_because(program: Program) -> str | None:
    """Why a recipe left every layer as it was; None where it did not."""
    lossy = [step for step in program.steps if step.numerics == "lossy"]
    if any(step.changed for step in lossy):
        return None
    reasons = Counter(skip.reason for step in lossy for skip in step.skipped)
    return reasons.most_common(1)[0][0] if reasons else "it has no such layers"


def measure(subject: Subject, row: str, seed: int, plain: Loaded, seconds: float) -> Entry:
    """One recipe on one model with the calibration data of one seed."""
    preset, settings = ROWS[row]
    context = PassContext(calibration=Calibration(subject.draw(seed), subject.program), seed=seed)
    started = time.perf_counter()
    passes = Recipe.load(preset).with_settings(settings).passes()
    rounded = Pipeline(passes).run(subject.program, context)
    took = time.perf_counter() - started
    reason = unchanged_because(rounded)
    if reason is not None:
        return {"not_applicable": reason}
    artifact = lower(rounded, "onnx")
    with artifact.load(threads=1) as run:
        quality = subject.judge(run, seed)
        faster = speed(plain, run, subject.once, seconds)
    return {"quality": quality, "megabytes": artifact.size_bytes / 1e6, "speed": faster,
            "seconds": took}  # fmt: skip


def show(entries: list[Entry], name: str) -> None:
    """One model's table in Markdown."""
    own = [one for one in entries if one["model"] == name]
    names = next((list(one["quality"]) for one in own if "quality" in one), [])
    print(f"\n| {name} | MB | {' | '.join(names)} | speed | seconds | seeds |")
    print("|" + "---|" * (len(names) + 5))
    for row in ("none", *ROWS):
        found = [one for one in own if one["row"] == row]
        if not found:
            continue
        if "not_applicable" in found[0]:
            print(f"| `{row}` | not applicable: {found[0]['not_applicable']} |")
            continue
        middle = [statistics.median(one["quality"][key] for one in found) for key in names]
        size, faster, took = (
            statistics.median(one[key] for one in found)
            for key in ("megabytes", "speed", "seconds")
        )
        print(f"| `{row}` | {size:.2f} | {' | '.join(f'{one:.5f}' for one in middle)} | "
              f"{faster:.2f} | {took:.0f} | {len(found)} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["pydoc-gpt", "digits-cnn"])
    parser.add_argument("--encoder", nargs=2, type=Path, metavar=("FOLDER", "TEXT"))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="of timing one recipe")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Subject]] = {"pydoc-gpt": Language, "digits-cnn": Digits}
    wanted = list(options.models)
    if options.encoder:
        makers["sentence encoder"] = lambda: Sentences(*options.encoder)
        wanted.append("sentence encoder")
    entries: list[Entry] = []
    if options.output and options.output.exists():
        entries = json.loads(options.output.read_text(encoding="utf-8"))
    for name in wanted:
        known = {(one["row"], one["seed"]) for one in entries if one["model"] == name}
        free = {one["row"] for one in entries
                if one["model"] == name and "not_applicable" in one}  # fmt: skip
        todo = [
            (row, seed) for seed in range(options.seeds) for row in options.rows
            if (row, seed) not in known and row not in free and (seed == 0 or _draws(row))
        ]  # fmt: skip
        if not todo:
            continue
        subject = makers[name]()
        plain = Pipeline(Recipe.load("none").passes()).run(subject.program)
        baseline = lower(plain, "onnx")
        with baseline.load(threads=1) as run:
            for row, seed in todo:
                if seed and any("not_applicable" in one for one in entries
                                if (one["model"], one["row"]) == (name, row)):  # fmt: skip
                    continue
                entry = measure(subject, row, seed, run, options.seconds)
                entries.append({"model": name, "row": row, "seed": seed, **entry})
                entries[-1]["float_megabytes"] = baseline.size_bytes / 1e6
                print(json.dumps(entries[-1]), flush=True)
                if options.output:
                    text = json.dumps(entries, indent=1) + "\n"
                    write_file_atomic(options.output, text.encode())
    for name in wanted:
        show(entries, name)


def _draws(row: str) -> bool:
    """Whether a recipe reads calibration data."""
    recipe = Recipe.load(ROWS[row][0])
    return any(one.requires(None, PassContext()) for one in recipe.passes())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
