"""torch.compile(model, backend="mopt"): a training step within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from mopt.errors import UsageError
from mopt.training import TrainingOptions, TrainingSession

# The options object of a torch.compile call stands for the call: all graphs of one model see the
# same one, and share a session.
_SESSIONS: list[tuple[Mapping[str, Any], TrainingSession]] = []
_KEPT = 16


def mopt_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The dynamo backend; ``options`` are the fields of ``mopt.training.TrainingOptions``."""
    session = _session(options or {})
    if session.options.update_at_once:
        raise UsageError(
            "update_at_once needs an optimizer", code="training-option",
            hint="mopt.fit(model, loss, batch, optimizer=..., update_at_once=True)",
        )  # fmt: skip
    return compile_with(session, module, example_inputs)


def _session(options: Mapping[str, Any]) -> TrainingSession:
    for known, session in _SESSIONS:
        if known is options:
            return session
    session = TrainingSession(TrainingOptions.of(options))
    _SESSIONS.append((options, session))
    del _SESSIONS[:-_KEPT]
    return session


def session_of(options: Mapping[str, Any]) -> TrainingSession | None:
    """The session of the options object given to ``torch.compile``: its plans, for reports."""
    return next((session for known, session in _SESSIONS if known is options), None)


def compile_with(
    session: TrainingSession, module: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Compile one graph of dynamo's; forward and backward follow the session's plan."""
    session.prepare(module, example_inputs)
    if session.options.codegen == "inductor":
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        patches = {"custom_partitioner_fn": _Partitioner(session)}
        # What PyTorch keeps of whole steps between processes is found without asking for a plan.
        with config.patch(enable_autograd_cache=False):
            compiled: Callable[..., Any] = compile_fx(
                module, list(example_inputs), config_patches=patches
            )
        return compiled
    backend = aot_autograd(
        fw_compiler=boxed, bw_compiler=boxed, partition_fn=session.partition
    )  # fmt: skip
    return backend(module, example_inputs)


def boxed(module: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """Run a graph call by call and let go of every value, inputs included, after its last use."""
    module.graph.set_codegen(fx.graph._BoxedCodeGen())
    module.recompile()
    forward = module.forward

    def run(arguments: list[Any]) -> Any:
        return forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Partitioner(CustomPartitionerFn):
    """The session's partition function in the form that Inductor takes."""

    def __init__(self, session: TrainingSession) -> None:
        self.session = session

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self.session.partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any | None:
        """None: code made under one budget must not be found under another."""
        return None
