"""Rewrites of an exported model, one per file, found by themselves.

A rewrite is a module with a function ``rewrite(model) -> int``: it changes an ``onnx_ir.Model`` in
place and returns at how many places. Modules run in the order of their ``ORDER``, then their name.
"""

from __future__ import annotations

from mopt.backends.onnx.rewrite._registry import Rewrite, all_rewrites, apply_rewrites

__all__ = ["Rewrite", "all_rewrites", "apply_rewrites"]
