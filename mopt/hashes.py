"""Hashes of weights, computed once for as long as a weight does not change."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_hashes: WeakIdKeyDictionary = WeakIdKeyDictionary()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and content; remembered while the memory lives unchanged."""
    if tensor.is_inference():  # such tensors do not count their changes
        return _content_hash(tensor)
    known = _hashes.setdefault(tensor.untyped_storage(), {})
    place = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    version, digest = known.get(place, (None, ""))
    if version != tensor._version:
        digest = _content_hash(tensor)
        known[place] = (tensor._version, digest)
    return str(digest)


def _content_hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()
