"""Packed storage of symmetric matrices, compared as integers: every conversion copies bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from tritonsym import pack, pack_tril, pack_triu, unpack, unpack_tril, unpack_triu
from tritonsym.packing import order_of, packed_shape

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.complex64: torch.int64,
}
SIZES = [*range(65), 97, 128, 201]


def bits(x):
    """The numbers of x as integers of the same width, which tell -0.0 from 0.0 and one NaN from another."""
    return x.contiguous().view(INTEGERS[x.dtype])


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def random_symmetric(n, dtype=torch.float32):
    """Random bit patterns, with NaNs with payloads and -0.0, which arithmetic could lose."""
    info = torch.iinfo(INTEGERS[dtype])
    generator = torch.Generator().manual_seed(n)
    lower = torch.randint(info.min, info.max, (n, n), generator=generator, dtype=INTEGERS[dtype])
    minus_zero, payload = bits(torch.tensor([-0.0, float("nan")]).to(dtype))
    special = torch.randint(0, 4, (n, n), generator=generator)
    lower = lower.where(special != 0, minus_zero).where(special != 1, payload + 1)
    full = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), lower, lower.mT)
    return full.view(dtype)


def literal_pack(matrix):
    """LAPACK's rectangular full packed format, lower and row-major, one entry at a time."""
    n = len(matrix)
    columns, odd = -(-n // 2), n % 2
    packed = [[None] * columns for _ in range(2 * (n // 2) + 1)]
    for i in range(n):
        for j in range(i + 1):
            row, column = (i + 1 - odd, j) if j < columns else (j - columns, i - columns + odd)
            assert packed[row][column] is None, "one entry per place"
            packed[row][column] = matrix[i][j]
    return packed


@pytest.mark.parametrize("n", SIZES)
def test_packing_is_lapacks_and_every_conversion_keeps_the_bits(n):
    full = random_symmetric(n)
    packed = torch.tensor(literal_pack(bits(full).tolist()), dtype=torch.int32).view(torch.float32)
    tril, triu = full[tuple(torch.tril_indices(n, n))], full[tuple(torch.triu_indices(n, n))]
    assert packed.shape == packed_shape(n) and order_of(packed) == n
    assert_same_bits(pack(full, "lower"), packed)
    assert_same_bits(pack(full, "upper"), packed)
    assert_same_bits(pack_tril(tril), packed)
    assert_same_bits(pack_triu(triu), packed)
    assert_same_bits(unpack(packed), full)
    assert_same_bits(unpack_tril(packed), tril)
    assert_same_bits(unpack_triu(packed), triu)


@settings(max_examples=10)
@given(st.integers(65, 400))
def test_so_it_is_for_larger_matrices(n):
    test_packing_is_lapacks_and_every_conversion_keeps_the_bits(n)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_dtype_keeps_its_bits(dtype, n):
    full = random_symmetric(n, dtype)
    packed = pack(full, "lower")
    assert_same_bits(unpack(packed), full)
    assert_same_bits(pack_tril(unpack_tril(packed)), packed)
    assert_same_bits(pack_triu(unpack_triu(packed)), packed)


@pytest.mark.parametrize(
    ("n", "table"),
    [
        (5, "00 33 43, 10 11 44, 20 21 22, 30 31 32, 40 41 42"),
        (6, "33 43 53, 00 44 54, 10 11 55, 20 21 22, 30 31 32, 40 41 42, 50 51 52"),
    ],
)
def test_layout_is_the_table_in_lapacks_documentation(n, table):
    """UPLO = 'L', TRANSR = 'N' in the notes of LAPACK's DTRTTF; the digits of an entry are its row and column."""
    row, column = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    expected = [[int(entry) for entry in line.split()] for line in table.split(", ")]
    assert pack(10 * row + column, "lower").tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_strides_do_not_matter(n):
    full = random_symmetric(n)
    packed = pack(full, "lower")
    wide = torch.empty(packed.shape[1], 2 * packed.shape[0])[:, ::2].mT.copy_(packed)
    assert n == 1 or not wide.is_contiguous()
    assert_same_bits(unpack(wide), full)
    assert_same_bits(unpack_tril(wide), unpack_tril(packed))
    assert_same_bits(unpack_triu(wide), unpack_triu(packed))
    assert_same_bits(pack_tril(unpack_tril(packed).repeat_interleave(2)[::2]), packed)
    assert_same_bits(pack(full.repeat_interleave(2, 1)[:, ::2], "lower"), packed)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10])
def test_gradients(n):
    torch.manual_seed(n)
    packed = torch.randn(packed_shape(n), dtype=torch.float64, requires_grad=True)

    def quadratic(p):
        return unpack(p) @ unpack(p)

    assert gradcheck(quadratic, packed)
    assert gradgradcheck(quadratic, packed)
    (gradient,) = torch.autograd.grad(unpack(packed).sum(), packed)
    off_diagonal = 2 - torch.eye(n, dtype=torch.float64)  # a value used twice gets both gradients
    torch.testing.assert_close(gradient, pack(off_diagonal), rtol=0, atol=0)


def test_batches_are_packed_one_by_one():
    full = torch.randn(2, 0, 5, 5), torch.randn(2, 3, 4, 4)
    for s in full:
        s = s + s.mT
        packed = pack(s)
        assert packed.shape == (*s.shape[:2], *packed_shape(s.shape[-1]))
        assert_same_bits(unpack(packed), s)
        for to, back in ((pack_tril, unpack_tril), (pack_triu, unpack_triu)):
            vectors = torch.stack([back(p) for p in packed.flatten(0, 1)]) if s.numel() else back(packed)
            assert_same_bits(back(packed).flatten(0, 1), vectors.flatten(0, -2))
            assert_same_bits(to(back(packed)), packed)


@pytest.mark.parametrize("n", range(1, 14))
def test_skew_symmetric_matrices(n):
    """n(n-1)/2 values, one entry at a time; minus signs are exact."""
    full = random_symmetric(n).tril(-1)
    full = full - full.mT
    packed = pack(full, "lower", skew=True)
    i, j = torch.tril_indices(n, n, -1)
    assert packed.numel() == n * (n - 1) // 2
    assert_same_bits(unpack_tril(packed), full[i, j])
    assert_same_bits(pack_tril(full[i, j]), packed)
    got = unpack(packed, skew=True)
    assert torch.equal(got[i, j].isnan(), got[j, i].isnan())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in ((got, full), (got, -got.mT)))
    matrix = torch.randn(n, n)
    assert torch.equal(unpack(pack(matrix, "average", skew=True), skew=True), (matrix - matrix.mT) / 2)
    assert torch.equal(unpack(pack(matrix, "upper", skew=True), skew=True), matrix.triu(1) - matrix.triu(1).mT)
    assert torch.equal(pack(matrix - matrix.mT, skew=True), pack(matrix - matrix.mT, "lower", skew=True))
    with pytest.raises(ValueError, match=r"not skew-symmetric: \|S \+ S\^T\| reaches"):
        pack(torch.eye(n), skew=True)
    gradcheck(lambda p: unpack(p, skew=True), torch.randn(packed.shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("n", [1, 4, 5])
def test_symmetrize(n):
    torch.manual_seed(n)
    full = torch.randn(n, n)
    assert torch.equal(unpack(pack(full, "average")), (full + full.mT) / 2)
    assert torch.equal(unpack(pack(full, "lower")), full.tril() + full.tril(-1).mT)
    assert torch.equal(unpack(pack(full, "upper")), full.triu() + full.triu(1).mT)
    symmetric = full + full.mT
    assert torch.equal(unpack(pack(symmetric)), symmetric)


def test_special_values_of_a_symmetric_matrix_do_not_make_it_asymmetric():
    full = torch.tensor([[1.0, float("inf")], [float("inf"), float("nan")]])
    assert_same_bits(unpack(pack(full)), full)


def test_tolerance():
    full = torch.tensor([[1.0, 2.0], [2.25, 3.0]])
    assert unpack(pack(full, tolerance=0.25)).tolist() == [[1, 2.25], [2.25, 3]]
    with pytest.raises(ValueError, match=r"^pack: .*\|S - S\^T\| reaches 0.25, tolerance 0.2; pass symmetrize="):
        pack(full, tolerance=0.2)


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (pack, (3, 2), r"^pack: expected a square matrix \(n, n\), got shape \(3, 2\)"),
        (pack, (3,), r"^pack: expected a square matrix"),
        (unpack, (4, 4), r"^unpack: .*shape \(4, 4\).*pack a full matrix first"),
        (unpack, (10,), r"^unpack: .*10 values fit n = 4, which is stored as \(5, 2\); .*pack_tril or pack_triu"),
        (unpack, (2, 5), r"^unpack: .*10 values fit n = 4, which is stored as \(5, 2\)"),
        (unpack, (1, 11), r"^unpack: .*nearest: n = 4 as \(5, 2\), n = 5 as \(5, 3\)"),
        (unpack_tril, (3, 3), r"^unpack_tril: "),
        (unpack_triu, (3, 3), r"^unpack_triu: "),
        (pack_tril, (11,), r"^pack_tril: .*got shape \(11,\); nearest lengths: 10 \(n = 4\) and 15 \(n = 5\)"),
        (pack_triu, (11,), r"^pack_triu: "),
        (pack_tril, (5, 2), r"^pack_tril: expected a vector .*got shape \(5, 2\)"),
    ],
)
def test_wrong_shapes_are_refused(function, shape, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape))


@pytest.mark.parametrize("dtype, large", [(torch.float16, 4e4), (torch.float32, 3e38)])
def test_an_average_of_large_values_does_not_overflow(dtype, large):
    matrix = torch.tensor([[large, large], [large / 2, -large]], dtype=dtype)
    expected = matrix.double()
    expected = ((expected + expected.mT) / 2).to(dtype)
    torch.testing.assert_close(unpack(pack(matrix, "average")), expected)
