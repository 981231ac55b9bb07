"""Cross-entropy of a linear layer without its logits in memory, forward and backward.

After Wijmans et al. 2025, "Cut Your Losses in Large-Vocabulary Language Models". The forward pass
keeps one number a token and chunk of the vocabulary. The backward pass computes each tile of logits
again and leaves out those whose gradients are all below the resolution of bf16. Each gradient has
one owner that adds it up, instead of locks: sums come out in the same order in every run, for one
more computation of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopt.backends.triton.kernel import compute_type
from mopt.backends.triton.launch import Launch, Runner, Tile, tile

# bf16 has 8 bits: a smaller gradient changes no sum it is added to (the paper, section 4.3).
FILTER = 2.0**-12
IGNORED = -100
_CHUNKS = 16
DEFAULT = tile(8, 3, BT=128, BV=128, BD=32)
DEFAULT_BACKWARD = tile(8, 2, BT=64, BV=128, BD=32)


@triton.jit
def _logits(e, c, token, word, tokens, words, width, CAP: tl.constexpr, cap, CT: tl.constexpr,
            BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """One tile of logits, before the mask of words that do not exist."""
    acc = tl.zeros((BT, BV), dtype=tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        have = d < width
        a = tl.load(e + token[:, None].to(tl.int64) * width + d[None, :],
                    mask=(token < tokens)[:, None] & have[None, :], other=0.0)  # fmt: skip
        b = tl.load(c + word[None, :].to(tl.int64) * width + d[:, None],
                    mask=(word < words)[None, :] & have[:, None], other=0.0)  # fmt: skip
        acc = tl.dot(a.to(CT), b.to(CT), acc, input_precision="tf32")
    if CAP:
        # tanh by the exponential: the interpreter has no other.
        small = tl.exp(-2.0 * tl.abs(acc) / cap)
        bent = (1.0 - small) / (1.0 + small)
        acc = tl.where(acc >= 0, bent, -bent) * cap
    return acc


@triton.jit(do_not_specialize=["rows", "share"])
def cross_entropy_forward(
    e, c, labels, level, target, rows, words, width, share, cap,
    CT: tl.constexpr, CAP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Some tokens and a chunk of the vocabulary: log of the sum, and the label's logit."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    chunk = tl.program_id(1)
    keep = token < rows
    label = tl.load(labels + token, mask=keep, other=-1)
    best = tl.full((BT,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BT,), dtype=tl.float32)
    wanted = tl.zeros((BT,), dtype=tl.float32)
    first = chunk * share
    for start in range(first, tl.minimum(first + share, words), BV):
        word = start + tl.arange(0, BV)
        score = _logits(e, c, token, word, rows, words, width, CAP, cap, CT, BT, BV, BD)
        wanted += tl.sum(tl.where(word[None, :] == label[:, None], score, 0.0), axis=1)
        score = tl.where((word < words)[None, :], score, float("-inf"))
        most = tl.maximum(best, tl.max(score, axis=1))
        total = total * tl.exp(best - most) + tl.sum(tl.exp(score - most[:, None]), axis=1)
        best = most
    line = chunk * rows.to(tl.int64) + token
    tl.store(level + line, best + tl.log(total), mask=keep)
    tl.store(target + line, wanted, mask=keep)


@triton.jit
def _slopes(e, c, labels, level, scale, token, word, tokens, words, width, CAP: tl.constexpr, cap,
            CT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The loss's derivatives by one tile of logits, and by what was bent by the cap."""
    score = _logits(e, c, token, word, tokens, words, width, CAP, cap, CT, BT, BV, BD)
    keep = token < tokens
    sums = tl.load(level + token, mask=keep, other=0.0)
    label = tl.load(labels + token, mask=keep, other=-1)
    share = tl.where((word < words)[None, :], tl.exp(score - sums[:, None]), 0.0)
    slope = share - tl.where(word[None, :] == label[:, None], 1.0, 0.0)
    if CAP:
        ratio = score / cap
        slope *= 1.0 - ratio * ratio
    weight = tl.load(scale + token, mask=keep, other=0.0)
    return tl.where(weight[:, None] != 0.0, slope, 0.0), weight


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_tokens(
    e, c, labels, level, scale, grad, rows, words, width, cap, least,
    CT: tl.constexpr, CAP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """The gradient of some tokens' vectors, which this block alone adds to."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    for start in range(0, words, BV):
        word = start + tl.arange(0, BV)
        slope, weight = _slopes(
            e, c, labels, level, scale, token, word, rows, words, width, CAP, cap, CT, BT, BV, BD
        )
        if tl.max(tl.max(tl.abs(slope), axis=1), axis=0) >= least:
            left = (slope * weight[:, None]).to(CT)
            for begin in range(0, width, BD):
                d = begin + tl.arange(0, BD)
                b = tl.load(c + word[:, None].to(tl.int64) * width + d[None, :],
                            mask=(word < words)[:, None] & (d < width)[None, :],
                            other=0.0)  # fmt: skip
                at = grad + token[:, None].to(tl.int64) * width + d[None, :]
                mask = (token < rows)[:, None] & (d < width)[None, :]
                acc = tl.load(at, mask=mask, other=0.0)
                tl.store(at, tl.dot(left, b.to(CT), acc, input_precision="tf32"), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_words(
    e, c, labels, level, scale, grad, rows, words, width, cap, least,
    CT: tl.constexpr, CAP: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """The gradient of some words' vectors, which this block alone adds to."""
    word = tl.program_id(0) * BV + tl.arange(0, BV)
    for start in range(0, rows, BT):
        token = start + tl.arange(0, BT)
        slope, weight = _slopes(
            e, c, labels, level, scale, token, word, rows, words, width, CAP, cap, CT, BT, BV, BD
        )
        if tl.max(tl.max(tl.abs(slope), axis=1), axis=0) >= least:
            left = tl.trans((slope * weight[:, None]).to(CT))
            for begin in range(0, width, BD):
                d = begin + tl.arange(0, BD)
                a = tl.load(e + token[:, None].to(tl.int64) * width + d[None, :],
                            mask=(token < rows)[:, None] & (d < width)[None, :],
                            other=0.0)  # fmt: skip
                at = grad + word[:, None].to(tl.int64) * width + d[None, :]
                mask = (word < words)[:, None] & (d < width)[None, :]
                acc = tl.load(at, mask=mask, other=0.0)
                tl.store(at, tl.dot(left, a.to(CT), acc, input_precision="tf32"), mask=mask)


def _constants(config: Tile, e: Tensor, cap: float | None) -> dict[str, object]:
    return {"CT": compute_type(e.dtype), "CAP": cap is not None, **config.constants}


def forward(
    run: Runner, e: Tensor, c: Tensor, labels: Tensor, *, cap: float | None = None,
    config: Tile = DEFAULT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss of each token, log of the sum of exponentials), fp32; loss 0 where ignored.

    ``e`` (tokens, width), ``c`` (words, width), ``labels`` int64, ``IGNORED`` for tokens that do
    not count; logits are ``cap * tanh(e @ c.T / cap)`` where a cap is given.
    """
    rows, words = e.shape[0], c.shape[0]
    bv = config["BV"]
    share = -(-words // (_CHUNKS * bv)) * bv
    chunks = -(-words // share)
    level = torch.empty((chunks, rows), dtype=torch.float32, device=e.device)
    target = torch.empty_like(level)
    if rows:
        run(
            Launch(
                cross_entropy_forward, (-(-rows // config["BT"]), chunks),
                {"e": e, "c": c, "labels": labels, "level": level, "target": target, "rows": rows,
                 "words": words, "width": e.shape[1], "share": share, "cap": float(cap or 1.0)},
                _constants(config, e, cap), ("level", "target"), config.warps, config.stages,
            )
        )  # fmt: skip
    sums = torch.logsumexp(level, 0)
    loss = torch.where(labels == IGNORED, torch.zeros_like(sums), sums - target.sum(0))
    return loss, sums


def backward(
    run: Runner, grad: Tensor, e: Tensor, c: Tensor, labels: Tensor, sums: Tensor, *,
    cap: float | None = None, exact: bool = False, config: Tile = DEFAULT_BACKWARD,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of ``e`` and ``c``, fp32, for ``grad`` (tokens) of the losses.

    Tiles of logits whose slopes are all below ``FILTER`` are left out unless ``exact``.
    """
    rows, width = e.shape
    scale = torch.where(labels == IGNORED, torch.zeros_like(grad), grad).float()
    found = []
    for function, owner, blocks in (
        (cross_entropy_tokens, e, -(-rows // config["BT"])),
        (cross_entropy_words, c, -(-c.shape[0] // config["BV"])),
    ):
        total = torch.zeros(owner.shape, dtype=torch.float32, device=e.device)
        if rows:
            run(
                Launch(
                    function, (blocks,),
                    {"e": e, "c": c, "labels": labels, "level": sums, "scale": scale,
                     "grad": total, "rows": rows, "words": c.shape[0], "width": width,
                     "cap": float(cap or 1.0), "least": 0.0 if exact else FILTER},
                    _constants(config, e, cap), ("grad",), config.warps, config.stages,
                )
            )  # fmt: skip
        found.append(total)
    return found[0], found[1]


def reference(e: Tensor, c: Tensor, labels: Tensor, *, cap: float | None = None) -> Tensor:
    """The loss of each token with logits in memory, differentiable."""
    logits = e @ c.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
