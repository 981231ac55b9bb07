"""Every pattern finds its sites, and the kernels in their place compute what the graph means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mopt
from mopt.backends.triton.interpreter import run_interpreted
from mopt.backends.triton.layers import KernelLayer
from mopt.backends.triton.lowerings._masks import Band, band_of
from mopt.backends.triton.plan import check
from mopt.backends.triton.rewrite import Left, all_lowerings, find_sites, kernels, replace
from mopt.backends.triton.runtime import FallbackTiles
from mopt.calibration import Calibration
from mopt.device import find_device
from mopt.models._bert import Encoder
from mopt.models._blocks import Decoder, SwiGLU
from mopt.pass_base import PassContext
from mopt.passes.factorize.factorize_linears import FactorizeLinears
from mopt.program import Program
from mopt.recipe import Recipe

IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


def decoder(dtype: torch.dtype = torch.float32) -> Program:
    """One block of a Llama-shaped model with grouped queries."""
    torch.manual_seed(0)
    model = Decoder(
        vocabulary=40, context=16, width=64, layers=1, heads=4, kv_heads=2,
        feed_forward=lambda: SwiGLU(64, 96),
    )  # fmt: skip
    return mopt.capture(model.eval().to(dtype), (IDS,))


def lowered(program: Program) -> tuple[nn.Module, list[KernelLayer], list[Left]]:
    """The graph with its kernels, to be run in the interpreter."""
    module = program.copy().graph_module
    sites, left = find_sites(module)
    layers = replace(module, sites)
    for layer in layers:
        layer.bind(run_interpreted, FallbackTiles({}), always=True)
    return module, layers, left


def agree(program: Program, *inputs: torch.Tensor, limit: float) -> Counter[str]:
    """Compare outputs relative to the largest; how many layers of each kernel there are."""
    module, layers, _ = lowered(program)
    with torch.no_grad():
        found, wanted = module(*inputs), program.run(*inputs)
    found = found[0] if isinstance(found, tuple | list) else found
    wanted = wanted[0] if isinstance(wanted, tuple | list) else wanted
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    gap = float((found.double() - wanted.double()).abs().max())
    assert gap <= limit * float(wanted.abs().max())
    return Counter(layer.kernel.name for layer in layers)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-2)])
def test_a_llama_block_goes_to_kernels_but_for_its_dense_products(
    dtype: torch.dtype, limit: float
) -> None:
    found = agree(decoder(dtype), IDS, limit=limit)
    # The first norm reads the embedding, the other two sums with a residual.
    assert found == {"rms-norm": 3, "rotary": 2, "flash-attention": 1, "swiglu": 1}


@pytest.mark.parametrize(("recipe", "count"), [("int8-static", 8), ("int8-dynamic", 5)])
def test_eight_bit_products_take_their_activation_along(recipe: str, count: int) -> None:
    program = decoder()
    context = PassContext(
        device=find_device("h200"), backend="triton", calibration=Calibration([(IDS,)], program)
    )
    found = agree(
        mopt.Pipeline(Recipe.load(recipe).passes()).run(program, context), IDS, limit=2e-3
    )
    assert found["linear-bytes"] == count and found["flash-attention"] == 1
    # silu is computed behind the product of the gate, so no gated activation is left.
    assert "swiglu" not in found
    # With known ranges a norm writes the codes itself.
    assert found["norm-quantize" if recipe == "int8-static" else "rms-norm"] == 3


def test_low_rank_pairs_and_the_feed_forward_block_between_them() -> None:
    thin = FactorizeLinears(
        method="plain", ranks="uniform", ratio=0.5, allow_slower=True, min_size=0
    )
    found = agree(mopt.Pipeline([thin]).run(decoder()), IDS, limit=5e-6)
    # q, k, v, out; gate, up and down are one kernel between their outer factors.
    assert found["linear-low-rank"] == 4 and found["flash-svd-ffn"] == 1
    assert "swiglu" not in found


def test_an_encoder_in_factors_never_widens_its_keys() -> None:
    torch.manual_seed(0)
    thin = FactorizeLinears(
        method="plain", ranks="uniform", ratio=0.5, allow_slower=True, min_size=0
    )
    real = torch.ones(2, 7, dtype=torch.int64)
    real[1, 4:] = 0
    ids = torch.randint(40, (2, 7))
    model = Encoder(layers=1, width=64, heads=2).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    program = mopt.Pipeline([thin]).run(mopt.capture(model, (ids, real)))
    found = agree(program, ids, real, limit=5e-6)
    assert found["flash-svd-attention"] == 1 and found["flash-svd-ffn"] == 1
    assert found["linear-low-rank"] == 1 and not found["flash-attention"]
    for site in find_sites(program.copy().graph_module)[0]:
        assert check(site, site.make(0), FallbackTiles({})) < 1e-4


class Factored(nn.Module):
    """Causal attention between low-rank q, k and v."""

    def __init__(self, rank: int, again: bool = False) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Linear(48, rank, bias=False), nn.Linear(rank, 48)) for _ in range(3)
        )
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (pair(x).unflatten(-1, (3, 16)).transpose(1, 2) for pair in self.pairs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y + k if self.again else y


@pytest.mark.parametrize(
    ("rank", "again", "count"), [(20, False, 1), (20, True, 0), (48, False, 0)]
)
def test_attention_between_factors_is_absorbed_where_they_are_thin_and_read_once(
    rank: int, again: bool, count: int
) -> None:
    x = torch.randn(2, 40, 48)
    program = mopt.capture(Factored(rank, again).eval(), (x,))
    found = agree(program, x, limit=5e-6)
    assert found["flash-svd-attention"] == count and found["flash-attention"] == 1 - count


class Attend(nn.Module):
    """Attention with chosen options."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)  # type: ignore[arg-type]


def heads(count: int, tokens: int, width: int = 16) -> torch.Tensor:
    """Queries, keys or values."""
    return torch.randn(2, count, tokens, width)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, ((2, 5), (2, 9))),
        # PyTorch's causal mask starts at the first key, whatever the lengths.
        ({"is_causal": True}, ((2, 5), (2, 9))),
        ({"is_causal": True, "enable_gqa": True, "scale": 0.5}, ((6, 7), (2, 7))),
    ],
)
def test_attention_means_what_pytorch_means(options: dict, shapes: tuple) -> None:
    q, k = heads(*shapes[0]), heads(*shapes[1])
    program = mopt.capture(Attend(**options).eval(), (q, k, k.clone()))
    assert agree(program, q, k, k + 1, limit=5e-6) == {"flash-attention": 1}


def ahead(offset: int, window: int | None = None) -> torch.Tensor:
    """Which of 9 keys 5 queries see whose first one stands at ``offset``."""
    far = torch.arange(9)[None] - torch.arange(5)[:, None] - offset
    return (far <= 0) & (True if window is None else far > -window)


@pytest.mark.parametrize(
    ("mask", "band"),
    [
        (ahead(4), Band(True, 4)),
        (ahead(4, 3)[None, None].expand(2, 4, 5, 9), Band(True, 4, 3)),
        (torch.where(ahead(0, 2), 0.0, -torch.inf), Band(True, 0, 2)),
        (torch.where(ahead(2), 0.0, torch.finfo(torch.float32).min), Band(True, 2)),
        (torch.ones(5, 9, dtype=torch.bool), Band()),
        (~ahead(1), None),
        (torch.where(ahead(0), 0.5, -torch.inf), None),
        (torch.cat((ahead(4)[:4], ahead(4)[:1])), None),
        (torch.stack((ahead(4), ahead(3)))[:, None], None),
        (torch.arange(9)[None, None] < torch.tensor([[[9]], [[4]]])[:, None], None),
    ],
)
def test_stored_masks_become_numbers_where_they_are_bands(
    mask: torch.Tensor, band: Band | None
) -> None:
    q, k = heads(4, 5), heads(2, 9)
    assert band_of(mask, 5, 9) == band
    program = mopt.capture(Stored(mask).eval(), (q, k, k + 1))
    assert agree(program, q, k, k + 1, limit=5e-6) == {"flash-attention": 1}
    (site,) = find_sites(program.copy().graph_module)[0]
    assert len(site.inputs) == (4 if band is None else 3)
    assert check(site, site.make(0), FallbackTiles({})) < 1e-5


class Stored(nn.Module):
    """Attention with grouped queries and a mask that the model holds."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_padding_are_read_as_they_come(dtype: torch.dtype) -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            seen = real.bool()[:, None, None, :].expand(-1, -1, x.shape[2], -1)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)

    x, real = heads(3, 7).to(dtype), torch.ones(2, 7, dtype=torch.int64)
    real[1, 4:] = 0
    limit = 5e-6 if dtype == torch.float32 else 2e-2
    found = agree(mopt.capture(Padded().eval(), (x, real)), x, real, limit=limit)
    assert found == {"flash-attention": 1}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda q: (Attend(), (q.double(),) * 3), "queries in torch.float64"),
        (lambda q: (Attend(), (q, q, q[..., :8])), "heads of keys and values differ"),
        (lambda q: (Attend(), (heads(1, 2, 300),) * 3), "heads of 300 values"),
        (lambda q: (Attend(), (q[0],) * 3), "not (batch, heads"),
    ],
)
def test_attention_without_a_kernel_says_why(make: Callable, reason: str) -> None:
    module, inputs = make(heads(2, 5))
    inputs = tuple(value.clone() for value in inputs)
    _, layers, left = lowered(mopt.capture(module.eval(), inputs))
    assert not layers and reason in left[0].reason


class LookAlike(nn.Module):
    """Rotations that are not one: the angles' halves differ, or a half is read once more."""

    def __init__(self, equal: bool, read: bool) -> None:
        super().__init__()
        table = torch.randn(5, 8)
        self.register_buffer("cos", torch.cat((table, table if equal else -table), -1))
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        y = x * self.cos + torch.cat((-right, left), -1) * self.cos
        return y + torch.cat((left, left), -1) if self.read else y


@pytest.mark.parametrize(
    ("equal", "read", "count"), [(True, False, 1), (False, False, 0), (True, True, 0)]
)
def test_only_a_whole_rotation_is_one(equal: bool, read: bool, count: int) -> None:
    x = heads(2, 5)
    program = mopt.capture(LookAlike(equal, read).eval(), (x,))
    assert agree(program, x, limit=5e-6)["rotary"] == count


class Thin(nn.Module):
    """Two linears in a row, the middle perhaps read twice."""

    def __init__(self, rank: int, twice: bool = False) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(40, rank, bias=False), nn.Linear(rank, 50)
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return self.outer(y) + y.sum() if self.twice else self.outer(y)


def test_pairs_of_linears_that_are_no_low_rank_layer() -> None:
    x = torch.randn(3, 40)
    for module, count in ((Thin(8), 1), (Thin(40), 0), (Thin(8, twice=True), 0)):
        _, layers, _ = lowered(mopt.capture(module.eval(), (x,)))
        assert len(layers) == count
    wide = nn.Sequential(nn.Linear(600, 300, bias=False), nn.Linear(300, 600))
    _, layers, left = lowered(mopt.capture(wide.eval(), (torch.randn(3, 600),)))
    assert not layers and "rank 300 does not fit registers" in left[0].reason


def test_few_rows_of_a_low_rank_layer_are_two_products() -> None:
    x = torch.randn(3, 40)
    program = mopt.capture(Thin(8).eval(), (x,))
    module = program.copy().graph_module
    (layer,) = replace(module, find_sites(module)[0])
    layer.bind(lambda launch: pytest.fail("a kernel ran"), FallbackTiles({}))
    with torch.no_grad():
        torch.testing.assert_close(module(x), program.run(x), rtol=0, atol=1e-6)


def test_shapes_that_vary_are_found_as_well() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    length = torch.export.Dim("length", min=2, max=16)
    model = Decoder(vocabulary=40, context=16, width=32, layers=1, heads=2,
                    feed_forward=lambda: SwiGLU(32, 48))  # fmt: skip
    shapes = {"ids": {0: batch, 1: length}}
    program = mopt.capture(model.eval(), (IDS,), dynamic_shapes=shapes)
    found = agree(program, IDS[:1, :5].clone(), limit=5e-6)
    assert found == {"rms-norm": 3, "rotary": 2, "flash-attention": 1, "swiglu": 1}


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, _ = find_sites(decoder().copy().graph_module)
    tiles = FallbackTiles({})
    for site in sites:
        assert check(site, site.make(0), tiles) <= 1e-4
    (attention,) = [s for s in sites if "attention" in str(s.node.target)]
    layer = type(attention.make(0))
    right = layer.compute
    monkeypatch.setattr(layer, "compute", lambda *a: right(*a) * 1.01)
    with pytest.raises(mopt.errors.LoweringError) as caught:
        check(attention, attention.make(0), tiles)
    assert caught.value.code == "kernel-wrong"


def test_lowerings_are_found_by_themselves() -> None:
    assert len(all_lowerings()) >= 9 and {"flash-attention", "linear-codes"} <= set(kernels())
