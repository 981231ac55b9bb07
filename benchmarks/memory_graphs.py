"""Order and offsets of whole graphs: how far plans are from the proved bound, and in what time.

    python -m benchmarks.memory_graphs [--models unet2d,hf:gpt2] [--joint] [--write]

Without ``--joint`` the inference graphs (arena plans, 60 s at most), simplified as every compile
does; with it the joint forward and backward graphs of AOTAutograd, weights, inputs and gradients
coming in not counted.
``hf:`` models are transformers' architectures with all their layers in small widths and random
weights: the graphs are those of the full models, the bytes are not. Offsets are checked.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils import _pytree as pytree

from mopt.call_cost import estimate
from mopt.driver import BASELINE
from mopt.frontend import capture
from mopt.joint_graph import read_joint
from mopt.memory import Buffer, MemoryProblem
from mopt.memory_check import require_legal
from mopt.models import load, names
from mopt.passes.schedule._order import best_order
from mopt.passes.schedule._order_problem import OrderProblem
from mopt.passes.schedule._plan import plan_program
from mopt.passes.schedule._split import lifetimes
from mopt.passes.schedule.offsets import place
from mopt.pipeline import Pipeline
from mopt.recipe import Recipe
from mopt.recompute import RecomputeProblem

RESULTS = Path(__file__).parent / "results"
SECONDS = 60.0
HF = (
    "bert", "distilbert", "gpt2", "llama", "qwen2", "mixtral", "qwen2-moe", "t5", "bart", "whisper",
    "vit", "clip",
)  # fmt: skip


class _Found(Exception):
    """Ends the compilation with the joint graph."""


def main() -> None:
    """Plan, print a line for each graph, and write the results where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    everything = [one.name for one in names()] + [f"hf:{name}" for name in HF]
    parser.add_argument("--models", default=",".join(everything))
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "memory-graphs.json"
    stored = json.loads(path.read_text())["graphs"] if options.write and path.exists() else []
    rows = {(row["model"], row["graph"]): row for row in stored}
    for name in options.models.split(","):
        row = _joint(name) if options.joint else _inference(name)
        rows[row["model"], row["graph"]] = row
        print(json.dumps(row), flush=True)
        if options.write:
            data = {"command": "python -m benchmarks.memory_graphs", "torch": torch.__version__,
                    "date": time.strftime("%Y-%m-%d"), "graphs": list(rows.values())}  # fmt: skip
            path.write_text(json.dumps(data, indent=2) + "\n")


def _model(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if name.startswith("hf:"):
        return _transformer(name[3:])
    entry = load(name)
    return entry.build(), tuple(entry.example_inputs())


def _transformer(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import transformers as hf

    tokens = torch.arange(64).reshape(1, 64)
    if name == "vit":
        vit = hf.ViTConfig(hidden_size=96, intermediate_size=192, image_size=64)
        return hf.ViTModel(vit).eval(), (torch.zeros(1, 3, 64, 64),)
    if name == "clip":
        clip = hf.CLIPConfig(
            text_config={"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 8,
                         "vocab_size": 512, "eos_token_id": 2, "bos_token_id": 1},
            vision_config={"hidden_size": 96, "intermediate_size": 192, "image_size": 64,
                           "num_attention_heads": 8},
        )  # fmt: skip
        return hf.CLIPModel(clip).eval(), (tokens, torch.zeros(1, 3, 64, 64))
    if name == "bart":
        bart = hf.BartConfig(
            d_model=96, encoder_ffn_dim=192, decoder_ffn_dim=192, vocab_size=512, use_cache=False
        )
        return hf.BartModel(bart).eval(), (tokens, None, tokens)
    if name == "whisper":
        whisper = hf.WhisperConfig(
            d_model=96, encoder_ffn_dim=192, decoder_ffn_dim=192, vocab_size=512,
            max_source_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, use_cache=False,
        )  # fmt: skip
        inputs = (torch.zeros(1, 80, 128), None, tokens % 64)
        return hf.WhisperModel(whisper).eval(), inputs
    if name == "t5":
        t5 = hf.T5Config(d_model=96, d_ff=192, d_kv=12, vocab_size=512, use_cache=False)
        return hf.T5Model(t5).eval(), (tokens, None, tokens)
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: hf.BertConfig(hidden_size=96, intermediate_size=192, vocab_size=512),
        "distilbert": lambda: hf.DistilBertConfig(dim=96, hidden_dim=192, vocab_size=512),
        "gpt2": lambda: hf.GPT2Config(n_embd=96, n_inner=192, vocab_size=512, use_cache=False),
        "llama": lambda: hf.LlamaConfig(
            hidden_size=96, intermediate_size=192, num_attention_heads=8, vocab_size=512,
            use_cache=False),
        "mixtral": lambda: hf.MixtralConfig(
            hidden_size=96, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4,
            num_hidden_layers=8, vocab_size=512, use_cache=False),
        "qwen2-moe": lambda: hf.Qwen2MoeConfig(
            hidden_size=96, intermediate_size=192, moe_intermediate_size=64,
            shared_expert_intermediate_size=128, num_attention_heads=8, num_key_value_heads=4,
            num_hidden_layers=8, num_experts=16, vocab_size=512, use_cache=False),
        "qwen2": lambda: hf.Qwen2Config(
            hidden_size=96, intermediate_size=192, num_attention_heads=8, num_key_value_heads=4,
            num_hidden_layers=24, vocab_size=512, use_cache=False),
    }  # fmt: skip
    return hf.AutoModel.from_config(configs[name]()).eval(), (tokens,)


def _inference(name: str) -> dict[str, Any]:
    module, inputs = _model(name)
    program = Pipeline(Recipe.load(BASELINE).passes()).run(capture(module, inputs, None))
    started = time.monotonic()
    found = plan_program(program, time_limit=SECONDS)
    took = time.monotonic() - started
    require_legal(found.problem, found.layout)
    peak, bound = found.data["peak_bytes"], found.data["lower_bound_bytes"]
    return {
        "model": name, "graph": "inference", "simplified": True, "nodes": len(program.nodes),
        "calls": len(found.data["steps"]), "peak_bytes": peak, "bound_bytes": bound,
        "input_order_bytes": found.data["input_order_bytes"], "gap": round(peak / bound - 1, 5),
        "order": found.order.rule, "seconds": round(took, 2),
    }  # fmt: skip


def _joint(name: str) -> dict[str, Any]:
    module, inputs = _model(name)
    joint, nodes = _joint_problem(module, inputs)
    problem = _order_problem(joint)
    started = time.monotonic()
    order = best_order(problem, SECONDS / 2)
    times = lifetimes(problem, order.order, ())
    buffers = [
        Buffer(str(s), times.lower[s], times.upper[s], problem.sizes[s], 64,
               alias=str(times.taken[s]) if s in times.taken else None)
        for s in sorted(times.lower, key=lambda s: (times.lower[s], s))
    ]  # fmt: skip
    memory = MemoryProblem(tuple(buffers))
    layout = place(memory, time_limit=max(SECONDS - (time.monotonic() - started), 1.0))
    took = time.monotonic() - started
    require_legal(memory, layout)
    # The bound of the order counts bytes, the layout whole units of 64.
    bound = order.lower_bound
    return {
        "model": name, "graph": "joint", "simplified": False, "nodes": nodes,
        "calls": problem.count, "peak_bytes": layout.peak, "bound_bytes": bound,
        "input_order_bytes": order.input_peak,
        "gap": round(layout.peak / bound - 1, 5), "order": order.rule, "seconds": round(took, 2),
    }  # fmt: skip


def _joint_problem(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[RecomputeProblem, int]:
    found: list[tuple[RecomputeProblem, int]] = []

    def partition(graph: Any, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
        joint = read_joint(graph, num_fwd_outputs, estimate)
        found.append((joint.problem, len(graph.graph.nodes)))
        raise _Found

    def step(*args: Any) -> Tensor:
        leaves = pytree.tree_leaves(module(*args))
        floats = [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]
        return floats[0].float().square().mean()

    module.train()
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, partition_fn=partition)
    try:
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _Found):
            raise
    return found[0]


def _order_problem(joint: RecomputeProblem) -> OrderProblem:
    calls = (*joint.forward, *joint.backward)
    maker = {s: v for v, call in enumerate(calls) for s in call.makes}
    before = tuple(
        tuple(sorted({maker[s] for s in call.reads if s in maker and maker[s] != v}))
        for v, call in enumerate(calls)
    )
    sizes = tuple(
        -(-size // 64) * 64 if s in maker else 0 for s, size in enumerate(joint.sizes)
    )  # fmt: skip
    return OrderProblem(
        before=before,
        makes=tuple(call.makes for call in calls),
        touches=tuple(
            tuple(sorted({s for s in (*call.reads, *call.makes) if s in maker})) for call in calls
        ),
        sizes=sizes,
        kept=frozenset(s for s in joint.results if s in maker),
        workspace=tuple(call.workspace for call in calls),
    )


if __name__ == "__main__":
    main()
