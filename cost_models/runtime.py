"""ONNX Runtime sessions as the backend configures them, found by name and without torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any


def session_settings() -> dict[str, str]:
    """The configuration entries of every session, as plain data."""
    # By name: cost models import no backend.
    settings: dict[str, str] = import_module("mopt.backends.onnx.options").SESSION_CONFIG
    return {**settings, "session.intra_op.allow_spinning": "1"}


def session_options(threads: int | None) -> Any:
    """``onnxruntime.SessionOptions`` for one session; None is the runtime's own choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in session_settings().items():
        options.add_session_config_entry(key, value)
    return options


def runtime_errors() -> tuple[type[Exception], ...]:
    """What loading or running a model may raise; the runtime's own errors have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
             "NotImplemented", "RuntimeException")  # fmt: skip
    return (*(getattr(state, name) for name in names), RuntimeError, ValueError)


def runtime_version() -> str:
    """The version of ONNX Runtime."""
    return version("onnxruntime")
