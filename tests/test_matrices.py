"""Products with symmetric results, Newton-Schulz on top of them, and the plans of products with symmetric matrices."""

import itertools
import json
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import tritonsym
import tritonsym.functional as T
from tritonsym import blocks
from tritonsym import plan as planning

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_within_rule(got, *dense, truth):
    """Check that the largest and RMS errors are at most twice torch's in the same dtype, plus one rounding."""
    assert got.shape == truth.shape and got.dtype == dense[0].dtype
    if not truth.numel():
        return
    if got.dtype == truth.dtype:
        return torch.testing.assert_close(got, truth)
    for norm in (lambda t: t.abs().amax(), lambda t: t.abs().square().mean().sqrt()):
        allowed = 2 * max(norm(d.to(truth.dtype) - truth) for d in dense) + torch.finfo(got.dtype).eps * norm(truth)
        assert norm(got.to(truth.dtype) - truth) <= allowed


def symmetric(*shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=dtype)
    return torch.where(torch.ones(shape[-2:]).tril().bool(), x, x.mT)


def dense_newton_schulz(g, triples=((3.4445, -4.7750, 2.0315),) * 5):
    """The iteration of `torch.optim.Muon`, in the dtype of g."""
    x = g.mT if g.shape[0] > g.shape[1] else g
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in triples:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[0] > g.shape[1] else x


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(1, 20),
    st.integers(0, 20),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_products_are_symmetric_to_the_bit_and_right(batch, m, k, dtype, transposed, seed):
    torch.manual_seed(seed)
    x = torch.randn(*batch, k, m).to(dtype).mT if transposed else torch.randn(*batch, m, k).to(dtype)
    c = T.gram(x)
    assert torch.equal(c, c.mT)
    assert_within_rule(c, x @ x.mT, truth=x.double() @ x.double().mT)
    a = symmetric(*batch, m, m, dtype=dtype)
    wide = a.double()
    for alpha, beta in ((1, 0), (-1.5, 1), (2.0315, -4.775)):
        d = T.symmetric_mm(a, alpha, beta)
        assert torch.equal(d, d.mT)
        flat = a.reshape(-1, m, m)
        dense = torch.baddbmm(flat, flat, flat, alpha=alpha, beta=beta).reshape(a.shape)
        assert_within_rule(d, dense, truth=beta * wide + alpha * wide @ wide)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_special_values_stand_on_both_sides(value):
    x = torch.zeros(4, 2)
    x[1, 0] = x[3, 0] = value
    c = T.gram(x)
    assert torch.equal(c.view(torch.int32), c.mT.contiguous().view(torch.int32))


def test_an_unread_matrix_does_not_matter():
    a = torch.full((3, 3), float("nan"))
    assert T.symmetric_mm(a, 0.0, 1.0).isnan().all()
    assert torch.equal(T.symmetric_mm(torch.eye(3), 2), 2 * torch.eye(3))


def test_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    for function, argument in (
        (T.gram, x),
        (lambda t: T.gram(t.mT), x),
        (lambda t: T.symmetric_mm(t, 0.5, -2.0), a),
        (T.symmetric_mm, a),
        (lambda t: T.newton_schulz(t, 2), x),
    ):
        gradcheck(function, argument, check_forward_ad=True)
        gradgradcheck(function, argument)
    y, upstream = T.gram(x), torch.randn(2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], (upstream + upstream.mT) @ x)


def test_transforms():
    torch.manual_seed(0)
    x, a = torch.randn(3, 4, 5, dtype=torch.float64), symmetric(3, 4, 4).double()
    torch.testing.assert_close(vmap(T.gram, in_dims=1, out_dims=1)(x.mT), T.gram(x.mT.movedim(1, 0)).movedim(0, 1))
    torch.testing.assert_close(vmap(T.symmetric_mm)(a), T.symmetric_mm(a))
    torch.testing.assert_close(vmap(T.newton_schulz)(x), T.newton_schulz(x))
    per_sample = vmap(grad(lambda t: T.gram(t).square().sum()))(x)
    torch.testing.assert_close(per_sample, 4 * T.gram(x) @ x)
    torch.testing.assert_close(jvp(T.gram, (x,), (x,))[1], 2 * T.gram(x))
    assert T.gram(x.to("meta")).shape == (3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert T.gram(x.float()).dtype == T.symmetric_mm(a.float(), 1, 1).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 7), (16, 16), (40, 12), (3, 64)])
def test_newton_schulz_is_the_dense_iteration(shape, dtype):
    torch.manual_seed(0)
    g = torch.randn(8, 9, *shape).to(dtype)
    got = T.newton_schulz(g)
    dense = torch.stack([dense_newton_schulz(t) for t in g.flatten(0, 1)]).view_as(g)
    truth = torch.stack([dense_newton_schulz(t.double()) for t in g.flatten(0, 1)]).view_as(g)
    assert_within_rule(got, dense, truth=truth)
    for triples in ([(1.5, -0.5, 0.0)] * 2, [(4.0, -6.0, 3.0), (2, -1.5, 0.5)], []):
        one, coefficients = g[0, 1], triples[0] if len({*triples}) == 1 else triples
        assert_within_rule(
            T.newton_schulz(one, len(triples), coefficients),
            dense_newton_schulz(one, triples),
            truth=dense_newton_schulz(one.double(), triples),
        )
    if dtype == torch.float32:
        torch.manual_seed(0)
        values = torch.linalg.svdvals(T.newton_schulz(torch.randn(2, 3, *shape)))
        assert ((values > 0.3) & (values < 1.3)).all()


def test_newton_schulz_of_matrices_of_many_shapes():
    """Small ones are padded with zeros, which changes nothing; large ones run by themselves."""
    shapes = [(5, 7), (7, 5), (2, 3, 33, 20), (32, 32), (1, 64), (129, 300), (300, 129), (0, 4), (2, 0, 3)]
    gradients = [torch.randn(shape, dtype=dtype) for dtype in (torch.float32, torch.float64) for shape in shapes]
    found = T.newton_schulz(gradients, coefficients=[(4.0, -6.0, 3.0), (2, -1.5, 0.5)])
    for g, got in zip(gradients, found, strict=True):
        assert (got.shape, got.dtype) == (g.shape, g.dtype)
        if g.numel():
            triples = [(4.0, -6.0, 3.0), (2, -1.5, 0.5)]
            expected = [dense_newton_schulz(m, triples) for m in g.reshape(-1, *g.shape[-2:])]
            torch.testing.assert_close(got.reshape(-1, *g.shape[-2:]), torch.stack(expected))
    assert T.newton_schulz([]) == []
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (4, 2))]
    gradcheck(lambda *g: tuple(T.newton_schulz(g, 2)), leaves)


def test_newton_schulz_of_large_values():
    """Their norm overflows float16."""
    gradient = 100 * torch.randn(700, 700).sign()
    torch.testing.assert_close(T.newton_schulz(gradient.half()).float(), T.newton_schulz(gradient), rtol=0.1, atol=0.01)


def test_newton_schulz_of_nothing():
    assert not T.newton_schulz(torch.zeros(3, 4)).any()
    assert T.newton_schulz(torch.zeros(0, 3, 4)).shape == (0, 3, 4) and T.newton_schulz(torch.zeros(3, 0)).shape == (
        3,
        0,
    )
    assert torch.equal(T.newton_schulz(torch.eye(2), 0), torch.eye(2) / torch.eye(2).norm())


def test_the_examples_muon_trains_as_torchs_does():
    path = Path(__file__).parent / "examples" / "muon.py"
    example = runpy.run_path(str(path))
    length = path.read_text().split("class Muon")[1].split("if __name__")[0].strip().count("\n")
    assert length < 40, "short enough to copy"

    def train(optimiser):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 30), nn.Linear(30, 20), nn.Linear(20, 1))
        params = [layer.weight for layer in model[2:4]]
        others = [p for p in model.parameters() if all(p is not q for q in params)]
        optimisers = [torch.optim.Adam(others, 1e-2), optimiser(params, lr=0.02, weight_decay=0.01)]
        x = torch.randn(64, 8)
        target, losses = x.prod(1, keepdim=True).sin() + x[:, :1], []
        for _ in range(40):
            loss = (model(x) - target).square().mean()
            losses.append(loss.item())
            model.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
        return losses

    got, expected = train(example["Muon"]), train(torch.optim.Muon)
    assert got[-1] < 0.2 * got[0]
    assert got[:5] == pytest.approx(expected[:5], rel=1e-2)
    assert got[-1] < 1.5 * expected[-1] + 0.01
    model = nn.Linear(3, 3)
    assert example["Muon"]([model.weight]).step(lambda: torch.tensor(2.0)) == 2


# --- by blocks --------------------------------------------------------------------------------------------------------


def products(s, x, dy):
    """x S, and its gradients for x and for S, of which two entries are one value."""
    pairs = x.mH @ dy
    return x @ s, dy @ s.mH, torch.where(torch.eye(len(s), dtype=torch.bool), pairs, pairs + pairs.mT)


def widened(*tensors):
    return [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]


def in_small_blocks(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(blocks, name, value)
    blocks._pieces.cache_clear()


@pytest.mark.parametrize("edge, cache", [(128, 1 << 20), (4, 40), (1, 1)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.complex64])
def test_products_by_blocks(monkeypatch, dtype, edge, cache):
    in_small_blocks(monkeypatch, EDGE=edge, CACHE=cache)
    sizes = (1, 2, 3, 127, 128, 255, 256, 257, 385) if edge > 4 else range(1, 14)
    for n, shape in zip(sizes, itertools.cycle([(), (3,), (0,), (2, 5)]), strict=False):
        s, x, dy = (
            symmetric(n, n, dtype=dtype),
            torch.randn(n, *shape).to(dtype).movedim(0, -1),
            torch.randn(n).to(dtype),
        )
        dy = dy.expand(*shape, n)
        packed, bias = tritonsym.pack(s).requires_grad_(), torch.zeros(n, dtype=dtype).requires_grad_()
        x.requires_grad_()
        with tritonsym.path("blocks"):
            y = T.symmetric_linear(x, packed, bias)
        got = torch.autograd.grad(y, [x, packed, bias], dy)
        rows, drows = x.detach().reshape(-1, n), dy.reshape(-1, n)
        found = y.detach(), got[0], tritonsym.unpack(got[1])
        truths = products(*widened(s, rows, drows))
        dense = zip(products(s, rows, drows), products(s.mT, rows, drows), strict=True)  # S^T: in another order
        for one, both, truth in zip(found, dense, truths, strict=True):
            assert_within_rule(one.reshape(truth.shape), *both, truth=truth)
        torch.testing.assert_close(got[2], drows.sum(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_by_blocks(monkeypatch, dtype):
    in_small_blocks(monkeypatch, EDGE=2)
    leaves = [
        torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 1, 5), tritonsym.packing.packed_shape(5), 5)
    ]
    with tritonsym.path("blocks"):
        for function, inputs in (
            (T.symmetric_linear, leaves),
            (lambda x, p: T.symmetric_matmul(p, x.mT, left=True), leaves[:2]),
            (T.gram, leaves[:1]),
            (lambda a: T.symmetric_mm(a[..., :5].mT @ a, 0.5, -2.0), leaves[:1]),
        ):
            gradcheck(function, inputs, fast_mode=True)
            gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("edge", [1, 3, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.complex64])
def test_symmetric_results_by_blocks(monkeypatch, dtype, edge):
    monkeypatch.setattr(blocks, "EDGE", edge)
    for shape in ((1, 1), (5, 3), (2, 0, 4, 4), (2, 7, 7), (3, 4, 0), *(((300, 40), (256, 256)) if edge > 3 else ())):
        x = torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).mT
        a = symmetric(*shape[:-1], shape[-2], dtype=dtype)
        with tritonsym.path("blocks"):
            found = T.gram(x), T.symmetric_mm(a, 0.5, -2.0), T.symmetric_mm(a, -1.5)
        wide_x, wide = widened(x, a)
        truths = wide_x @ wide_x.mT, 0.5 * wide @ wide - 2 * wide, -1.5 * wide @ wide
        for got, dense, truth in zip(found, (x @ x.mT, 0.5 * (a @ a) - 2 * a, -1.5 * (a @ a)), truths, strict=True):
            assert torch.equal(got, got.mT)
            assert_within_rule(got, dense, truth=truth)


@pytest.mark.parametrize("path", ["blocks", "reference"])
def test_the_family(monkeypatch, path):
    """Skew-symmetric and batched matrices, and quadratic forms, against dense products."""
    in_small_blocks(monkeypatch, EDGE=3, CACHE=64, WIDTH=5)
    for n, dtype in itertools.product((1, 2, 5, 8, 13), (torch.float64, torch.complex128)):
        a, x = torch.randn(2, 1, n, n, dtype=dtype), torch.randn(3, 4, n, dtype=dtype, requires_grad=True)
        dy, both = torch.randn(3, 4, n, dtype=dtype), torch.randn(2, 3, 4, n, dtype=dtype)
        for skew, s in ((False, a + a.mT), (True, a - a.mT)):
            s.requires_grad_()
            many = tritonsym.pack(s, skew=skew)
            one, dense, bias = many[0, 0], s[0, 0], torch.randn(n, dtype=dtype)
            with tritonsym.path(path):
                pairs = [
                    (T.symmetric_linear(x, one, bias, skew=skew), nn.functional.linear(x, dense, bias), dy),
                    (T.symmetric_matmul(one, x, skew=skew), x @ dense, dy),
                    (T.symmetric_matmul(one, x.mT, True, skew=skew), dense @ x.mT, dy.mT),
                    (T.symmetric_matmul(many, x, skew=skew), x @ s, both),
                    (T.symmetric_matmul(many, x.mT, True, skew=skew), s @ x.mT, both.mT),
                ]
                if not skew:
                    pairs += [
                        (T.quadratic_form(one, x), (x @ dense * x).sum(-1), dy[..., 0]),
                        (T.quadratic_form(many, x), (x @ s * x).sum(-1), both[..., 0]),
                        (T.quadratic_form(one, x[0, 0]), (x @ dense * x).sum(-1)[0, 0], dy[0, 0, 0]),
                    ]
            for got, expected, upstream in pairs:
                torch.testing.assert_close(got, expected)
                found, truth = (torch.autograd.grad(y, [x, s], upstream, retain_graph=True) for y in (got, expected))
                triangle = (truth[1] - truth[1].mT if skew else truth[1] + truth[1].mT).tril(-1)
                diagonal = torch.zeros_like(triangle) if skew else truth[1].diagonal(dim1=-2, dim2=-1).diag_embed()
                torch.testing.assert_close(found[0], truth[0])
                torch.testing.assert_close(found[1], triangle + diagonal)  # `pack` reads the lower triangle
    with tritonsym.path(path):
        assert T.symmetric_matmul(torch.ones(0, 3, 2), torch.ones(0, 2, 3)).shape == (0, 2, 3)
        gradgradcheck(T.quadratic_form, [torch.randn(s, requires_grad=True).double() for s in ((3, 2), (2, 3))])
        inputs = [torch.randn(s, requires_grad=True).double() for s in ((3, 2), (2, 4))]
        gradgradcheck(lambda p, x: T.symmetric_matmul(p, x, skew=True), inputs)


def test_a_packed_weight_with_infinities_and_the_other_triangle():
    """Values beside a diagonal block in the packed rectangle belong to the other triangle."""
    s = torch.eye(300)
    s[280, 290] = s[290, 280] = float("inf")
    x = torch.ones(1, 300)
    x[0, 280:] = 0
    with tritonsym.path("blocks"):
        y = T.symmetric_matmul(tritonsym.pack(s), x)[0]
    assert y[:280].isfinite().all() and y[[280, 290]].isnan().all()


def test_views_and_flags_by_blocks():
    """Slices, and conjugation and signs, which torch keeps as flags."""
    many, x = torch.randn(2, 5, 3, dtype=torch.complex64), torch.randn(3, 4, 8, dtype=torch.complex64)[1:, :, 3:]
    with tritonsym.path("blocks"):
        for p, t in ((many[1], x[1]), (many[1].conj(), x[1].conj()), (many[0].conj().imag, x[1].conj().imag)):
            torch.testing.assert_close(T.symmetric_matmul(p, t), t @ tritonsym.unpack(p))
            torch.testing.assert_close(T.quadratic_form(p, t), (t @ tritonsym.unpack(p) * t).sum(-1))


def allocated(tmp_path, function):
    """The peak of the bytes that a call allocates, and its largest allocation."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    pieces = [e["args"]["Bytes"] for e in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])]
    return max(itertools.accumulate(pieces)), max(pieces)


@pytest.mark.parametrize("n", [2048, 2049])
def test_memory_by_blocks(tmp_path, n):
    x = torch.randn(4, n)
    layer, dense = tritonsym.nn.SymmetricLinear(n, n), nn.Linear(n, n)
    assert tritonsym.explain(layer, x).path == "blocks"

    def bytes_of(module):
        with torch.no_grad():
            most, _ = allocated(tmp_path, lambda: module(x))
        return sum(p.nbytes for p in module.parameters()) + most

    assert bytes_of(layer) < 0.6 * bytes_of(dense)
    _, largest = allocated(tmp_path, lambda: torch.autograd.grad(layer(x).sum(), [*layer.parameters()]))
    assert largest == layer.weight.nbytes


def test_a_matrix_that_is_never_unpacked_on_the_cpu():
    for dtype in (torch.float32, torch.float64):
        layer, x = tritonsym.nn.SymmetricLinear(7, 7, never_unpack=True, dtype=dtype), torch.randn(2, 7, dtype=dtype)
        assert "Never unpacked" in tritonsym.explain(layer, x).why
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_compilers_take_blocks_as_they_are():
    torch._dynamo.reset()
    layer, x = tritonsym.nn.SymmetricLinear(9, 9, never_unpack=True), torch.randn(4, 9, requires_grad=True)

    def loss(x):
        return (layer(x) @ T.symmetric_mm(T.gram(x.mT))).square().sum()

    with tritonsym.path("blocks"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), loss(x))
        leaves = [x, *layer.parameters()]
        torch.testing.assert_close(*(torch.autograd.grad(f(x), leaves) for f in (compiled, loss)))
    ops, x, (weight, bias) = torch.ops.tritonsym, x.detach(), (p.detach() for p in layer.parameters())
    torch.library.opcheck(ops.packed_product, (x, weight, bias, "relu", False, []))
    torch.library.opcheck(ops.packed_gradient, (x, x, True, []))
    torch.library.opcheck(ops.half_gram, (x[None], None, 1.0, 0.0, []))


# --- plans ------------------------------------------------------------------------------------------------------------


def linear(n, rows, dtype=torch.bfloat16, target="sm_90", **options):
    layer = tritonsym.nn.SymmetricLinear(n, n, device="meta", dtype=dtype, **options)
    return tritonsym.explain(layer, torch.empty(rows, n, device="meta", dtype=dtype), target)


def half(n, k, batch=1, dtype="bfloat16", target="sm_90"):
    return planning.plan(planning.gram_problem((batch, n, k), target, dtype))


def test_a_packed_matrix_is_multiplied_where_that_was_estimated_to_be_faster():
    pytest.importorskip("triton")
    for rows in (1, 16, 64, 65, 1024):
        plan = linear(4096, rows)
        assert plan.path == "implicit_gemm" and len(plan.tiles) == 2 and "estimate" in plan.why
        assert plan.flops == plan.dense_flops == 2 * rows * 4096**2
    assert linear(4096, 1 << 16).path == "reference"  # unpacking costs next to nothing there
    for n, words in ((2048, "vendor"), (256, "vendor"), (4100, "16"), (4097, "16")):
        plan = linear(n, 8)
        assert plan.path == "reference" and words in plan.why and "estimate" in plan.why
    assert linear(4096, 8, torch.float32).path == "reference"
    assert linear(4096, 8, torch.float64).path == "reference"
    assert linear(4096, 8, target="gfx942").path == linear(4096, 8, target="sm_86").path == "reference"
    assert linear(256, 8, never_unpack=True).path == linear(4097, 1 << 16, never_unpack=True).path == "implicit_gemm"
    assert linear(1024, 384, target="cpu").path == linear(4096, 1, torch.float64, "cpu").path == "blocks"
    assert linear(257, 1, target="cpu").path == linear(1024, 385, target="cpu").path == "reference"
    assert linear(7, 8, torch.float64, never_unpack=True).path == "blocks"
    with tritonsym.backend("triton"):
        assert linear(7, 3, target="cpu").path == "implicit_gemm"
        assert linear(7, 3, torch.float64).path == "reference"
    with tritonsym.backend("reference"):
        assert linear(4096, 8).path == "reference"
        with pytest.raises(NotImplementedError, match="never_unpack"):
            linear(4096, 8, never_unpack=True)
    with tritonsym.path("implicit_gemm"):
        assert linear(256, 8).path == "implicit_gemm"
        with pytest.raises(ValueError, match="'implicit_gemm' is forced"):
            linear(256, 8, target="cpu")
        with tritonsym.backend("triton"):
            assert linear(256, 8, target="cpu").path == "implicit_gemm"


def test_half_a_product_where_that_was_estimated_to_be_faster():
    pytest.importorskip("triton")
    for plan in (half(4096, 4096), half(8192, 1024), half(1024, 1024, batch=32)):
        assert plan.path == "implicit_gemm" and len(plan.tiles) == 1 and "estimate" in plan.why
        assert plan.dense_flops / 2 < plan.flops < 0.51 * plan.dense_flops
    for plan in (half(1024, 1024), half(128, 4096, 64), half(4096, 0), half(0, 5), half(4096, 4096, batch=0)):
        assert plan.path == "reference"
    assert half(4096, 4096, dtype="float32").path == half(383, 383, target="cpu").path == "reference"
    for n, edge in ((384, 96), (512, 128), (1000, 125), (1024, 128), (2048, 128)):
        plan = half(n, 100, 2, "float64", target="cpu")
        needed = n * (n + edge) // 2
        assert (plan.path, plan.flops, plan.dense_flops) == ("blocks", 400 * needed, 400 * n * n)
    with tritonsym.backend("triton"):
        assert half(3, 4, target="cpu").path == "implicit_gemm"
    with tritonsym.path("implicit_gemm"):
        assert half(3, 4).path == "implicit_gemm"
        for options in ({"target": "cpu"}, {"dtype": "float64"}):
            with pytest.raises(ValueError, match="'implicit_gemm' is forced, but it cannot compute gram"):
                half(3, 4, **options)
    with tritonsym.path("reference"):
        assert half(4096, 4096).path == "reference"
        assert torch.equal(T.gram(torch.eye(3)), torch.eye(3))


@pytest.mark.parametrize("target", ["cpu", "cuda", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_target_has_tiles(itemsize, target):
    from tritonsym.kernels.tiles import STRIP_ROWS, fits, pick_product, pick_square

    for rows in (0, 1, 16, 17, 33, 64, 65):
        tile = pick_product(rows, itemsize, target)
        assert fits(tile, itemsize, target)
        assert rows > STRIP_ROWS or tile.block_n >= rows
    square = pick_square(itemsize, target)
    assert square.block_m == square.block_n and fits(square, itemsize, target)


@pytest.mark.parametrize("skew", [False, True])
def test_blocks_of_float16_overflow_where_dense_matrices_do(skew):
    """Blocks whose products cancel, gradients on the diagonal, quadratic forms."""
    n = 300
    s = torch.full((n, n), 512.0).double()
    s = s.tril(-1) - s.triu(1) if skew else s
    x = torch.ones(1, n).double()
    x[:, n // 2 :] = -1
    of_200 = torch.full((1, n), 200.0).double()
    gradient = of_200.mT @ of_200
    gradient = gradient - gradient.mT if skew else gradient + gradient.mT - gradient.diag().diag()
    packed = tritonsym.pack(s, skew=skew).half()
    assert torch.equal(blocks.product(x.half(), packed, None, skew), (x @ s).half())
    found = blocks.gradient(of_200.half(), of_200.half(), skew)
    assert torch.equal(found, tritonsym.pack(gradient, "lower", skew=skew).half())
    if not skew:
        assert not blocks.quadratic_form(x.half(), packed)
