"""What choosing formats layer by layer gives, against every recipe that treats all layers alike.

    python -m benchmarks.chooser [--models pydoc-gpt,digits-cnn] [--recipes a,b] [--no-measure]
    python -m benchmarks.chooser --models '' --encoder MODEL TEXT    (as for sentence_encoder)
    python -m benchmarks.chooser --front 6 --no-rows     (the front of mopt pareto, built)

First the integer program alone: random models of 200 layers with 12 candidates and two budgets.
Then, for each trained model and each uniform recipe: the least loss of quality in the recipe's
size (and, measured, in its time), and the smallest result (and the fastest) of its quality. With
``--front N`` the points of ``mopt pareto --points N`` are built and each is held against every
recipe: one that is no larger, no slower and loses no more dominates it. Every result is compiled
and judged by the model's own metric. Speeds are ratios to the uncompressed model from alternated
pairs of processes; the load average stands beside them. Results go to
``benchmarks/results/chooser.json`` and as Markdown to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mopt
from benchmarks.sentence_encoder import JUDGED, batches, embed, read_sentences
from mopt import models
from mopt.driver import Settings
from mopt.errors import BudgetNotMet, MoptError
from mopt.front import solve_front
from mopt.hf_folder import load_hf_folder
from mopt.machine import machine_fingerprint
from mopt.models._entry import ZooModel
from mopt.passes.choose._program import Candidate, Group, Problem
from mopt.passes.choose._solver import solve

RECIPES = (
    "int8-dynamic", "int8-static", "int8-smooth", "int8-rotate", "int8-split", "int8-weight",
    "int4-weight", "fp16-weight",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "chooser.json"
CALIBRATED = 64
# What is asked for.
LOSS_TARGET, SPEED_TARGET, SIZE_TARGET = 0.40, 1.15, 1 / 0.85
GAP_TARGET, SECONDS_TARGET = 1e-3, 5.0


@dataclass(frozen=True)
class Result:
    """One compiled model: bytes, share of quality lost, time over the uncompressed model's."""

    size_bytes: int
    loss: float
    ratio: float | None
    low: float | None
    high: float | None
    budget_met: bool
    seconds: float
    load: float


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="pydoc-gpt,digits-cnn")
    parser.add_argument("--encoder", nargs=2, type=Path, metavar=("MODEL", "TEXT"))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rows", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--front", type=int, default=0, metavar="N")
    parser.add_argument("--problems", type=int, default=10)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    document: dict[str, Any] = {
        "machine": machine_fingerprint(options.threads),
        "measured": options.measure,
        "program": program_numbers(options.problems),
        "models": {},
        "fronts": {},
    }
    print(program_markdown(document["program"]))
    entries = [models.load(name) for name in filter(None, options.models.split(","))]
    if options.encoder:
        entries.append(sentence_encoder(*options.encoder))
    for entry in entries:
        rows: list[dict[str, Any]] = []
        document["models"][entry.name] = rows
        for row in compare(entry, options):
            rows.append(row)
            options.output.write_text(json.dumps(document, indent=1) + "\n")
        if options.rows:
            print(markdown(entry.name, rows), flush=True)
        if options.front:
            document["fronts"][entry.name] = points = front(entry, rows, options)
            print(front_markdown(entry.name, points, rows), flush=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


# ---- the integer program


def program_numbers(count: int) -> list[dict[str, Any]]:
    """Seconds, gap and status of the program of ``count`` random models."""
    found = []
    for seed in range(count):
        solution = solve(random_problem(seed))
        found.append({
            "seed": seed, "seconds": solution.seconds, "gap": solution.gap,
            "status": solution.status,
        })  # fmt: skip
    return found


def random_problem(seed: int, layers: int = 200, width: int = 12) -> Problem:
    """A model whose layers differ in size and sensitivity, limited in bytes and time."""
    rng = random.Random(seed)
    groups = []
    for layer in range(layers):
        weights, fragile = rng.lognormvariate(0, 1), rng.lognormvariate(0, 1.5)
        row = [Candidate("fp32", {"size": 4 * weights, "latency": weights, "loss": 0.0})]
        for index in range(1, width):
            bits = rng.choice((2, 3, 4, 6, 8, 16))
            row.append(Candidate(f"c{index}", {
                "size": weights * bits / 8 * rng.uniform(1, 1.2),
                "latency": weights * rng.uniform(0.2, 1.1),
                "loss": fragile * weights * 4.0 ** (4 - bits) * rng.uniform(0.5, 2),
            }))  # fmt: skip
        groups.append(Group(f"layer{layer:03}", tuple(row)))
    size = sum(group.candidates[0].amount("size") for group in groups)
    limits = {"size": size * rng.uniform(0.15, 0.4), "latency": size / 4 * rng.uniform(0.5, 0.8)}
    return Problem(tuple(groups), "loss", limits)


def program_markdown(rows: list[dict[str, Any]]) -> str:
    """The worst of all problems, beside what is asked for."""
    if not rows:
        return ""
    return (
        f"{len(rows)} programs of 200 layers x 12 candidates, 2 budgets: at most "
        f"{max(row['seconds'] for row in rows):.2f} s (asked: {SECONDS_TARGET:g}), gap at most "
        f"{max(row['gap'] for row in rows):.2e} (asked: {GAP_TARGET:g}), "
        f"{sum(row['status'] == 'optimal' for row in rows)} proved optimal within it\n"
    )


# ---- models


def sentence_encoder(folder: Path, text: Path) -> ZooModel:
    """A pretrained encoder whose metric is how close its embeddings stay to the original ones."""
    from transformers import AutoTokenizer

    module, examples, _, _ = load_hf_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sentences = read_sentences(text)
    drawn = batches(tokenizer, list(examples), sentences[: JUDGED + CALIBRATED], 1)
    judged, calibration = drawn[:JUDGED], drawn[JUDGED:]
    with torch.no_grad():
        reference = embed(lambda batch: module(**batch), judged)

    def evaluate(run: Callable[..., Any]) -> dict[str, object]:
        cosine = (embed(lambda batch: run(**batch), judged) * reference).sum(1)
        return {"metric": "cosine", "value": float(cosine.mean()), "higher_is_better": True}

    return ZooModel(
        name="sentence-encoder", summary="", trained=True, build=lambda: module,
        example_inputs=lambda: judged[0], calibration=lambda: calibration, evaluate=evaluate,
    )  # fmt: skip


def compare(entry: ZooModel, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per uniform recipe: the recipe, and what is chosen within its size, time, quality."""
    name = entry.name
    for recipe in options.recipes.split(","):
        try:
            uniform = compiled(entry, options, recipe=recipe)
        except MoptError as error:
            print(f"{name} {recipe}: {error.message}", file=sys.stderr)
            continue
        base = uniform.pop("base_bytes")
        kept = f"quality>={1 - uniform['loss']:.9f}x"
        size = f"size<={uniform['size_bytes']}B"
        budgets = {
            "in its size": [size, "minimize=loss"],
            "of its quality, smallest": [kept, "minimize=size"],
        }
        if uniform["ratio"] is not None:
            budgets["in its time"] = [f"latency<={uniform['ratio']:.4f}x", "minimize=loss"]
            budgets["of its quality, fastest"] = [kept, "minimize=latency"]
        row: dict[str, Any] = {"recipe": recipe, "base_bytes": base, "uniform": uniform}
        if not options.rows:
            yield row
            continue
        for title, budget in budgets.items():
            found = compiled(entry, options, budget=budget, allow_slower="size" in title)
            found.pop("base_bytes")
            row[title] = found
            print(f"{name} {recipe} {title}: {found}", file=sys.stderr, flush=True)
        yield row


def front(
    entry: ZooModel, rows: list[dict[str, Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The points of the front, built, with the recipes that dominate each."""
    found = []
    for point in solve_front(
        entry.build(), entry.example_inputs(), points=options.front, measure=options.measure,
        calibration=entry.calibration(), evaluate=entry.evaluate, threads=options.threads,
    ):  # fmt: skip
        built = compiled(entry, options, budget=[point["budget"], "minimize=loss"],
                         allow_slower=True)  # fmt: skip
        built["budget"] = point["budget"]
        built["estimated"] = {name: point[name] for name in ("size", "latency", "loss")}
        built["dominated_by"] = [row["recipe"] for row in rows if dominates(row["uniform"], built)]
        print(f"{entry.name} front {built}", file=sys.stderr, flush=True)
        found.append(built)
    return found


def dominates(recipe: dict[str, Any], point: dict[str, Any]) -> bool:
    """Whether a recipe is at least as good in everything and better in something."""
    keys = [k for k in ("size_bytes", "loss", "ratio") if None not in (recipe[k], point[k])]
    return all(recipe[k] <= point[k] for k in keys) and any(recipe[k] < point[k] for k in keys)


def compiled(entry: Any, options: argparse.Namespace, **how: Any) -> dict[str, Any]:
    """One compile, as numbers."""
    started, load = time.monotonic(), os.getloadavg()[0]
    settings = Settings(measure=options.measure, threads=options.threads, eager_beside=False)
    met = True
    try:
        artifact = mopt.compile(
            entry.build(), entry.example_inputs(), calibration=entry.calibration(),
            evaluate=entry.evaluate, settings=settings, name=entry.name, **how,
        )  # fmt: skip
    except BudgetNotMet as missed:
        artifact, met = missed.artifact, False
    assert artifact.report is not None
    data = artifact.report.data
    quality, speed = data["quality"], data["speed"]
    change = (quality["result"] - quality["baseline"]) / quality["baseline"]
    result = Result(
        artifact.size_bytes, -change if quality["higher_is_better"] else change,
        speed and speed["ratio"], speed and speed["ratio_low"], speed and speed["ratio_high"],
        met, time.monotonic() - started, load,
    )  # fmt: skip
    return {**asdict(result), "base_bytes": data["baseline"]["size_bytes"]}


def markdown(name: str, rows: list[dict[str, Any]]) -> str:
    """The table of one model."""
    lines = [
        f"### {name}", "",
        "| uniform recipe | size | loss | time | chosen in its size: loss removed | "
        "chosen of its quality: smaller | chosen in its time: loss removed | "
        "chosen of its quality: faster |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in rows:
        uniform = row["uniform"]
        time_ = "-" if uniform["ratio"] is None else f"{uniform['ratio']:.3f}x"
        lines.append(
            f"| {row['recipe']} | {uniform['size_bytes'] / row['base_bytes']:.3f}x | "
            f"{100 * uniform['loss']:.3f} % | {time_} | {removed(row, 'in its size')} | "
            f"{ratio(row, 'of its quality, smallest', 'size_bytes')} | "
            f"{removed(row, 'in its time')} | {ratio(row, 'of its quality, fastest', 'ratio')} |"
        )
    lines += [
        "",
        f"Asked for: {LOSS_TARGET:.0%} of the loss removed at equal time, or {SPEED_TARGET:g}x "
        f"faster, or {SIZE_TARGET:.3g}x smaller at equal quality. * is outside its budget.",
        "",
    ]
    return "\n".join(lines)


def front_markdown(name: str, points: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """The points beside the recipes they were held against."""
    lines = [
        f"### {name}: the front of {len(points)} points, built, beside {len(rows)} recipes", "",
        "| budget | size | loss | time | dominated by |", "|---|--:|--:|--:|---|",
    ]  # fmt: skip
    for point in points:
        time_ = "-" if point["ratio"] is None else f"{point['ratio']:.3f}x"
        lines.append(
            f"| {point['budget']} | {point['size_bytes'] / point['base_bytes']:.3f}x | "
            f"{100 * point['loss']:.3f} % | {time_} | {', '.join(point['dominated_by']) or '-'} |"
        )
    return "\n".join([*lines, ""])


def removed(row: dict[str, Any], title: str) -> str:
    """Share of the recipe's loss that the choice takes away."""
    found, loss = row.get(title), row["uniform"]["loss"]
    if found is None:
        return "-"
    star = "" if found["budget_met"] else " *"
    if loss <= 0:
        return f"none to remove ({100 * found['loss']:+.3f} %){star}"
    return f"{1 - found['loss'] / loss:.0%}{star}"


def ratio(row: dict[str, Any], title: str, key: str) -> str:
    """How many times smaller or faster the choice is than the recipe."""
    found = row.get(title)
    if found is None or not found[key]:
        return "-"
    return f"{row['uniform'][key] / found[key]:.2f}x{'' if found['budget_met'] else ' *'}"


if __name__ == "__main__":
    main()
