"""Products in every way, against `F.linear` in float64; and which processor takes which."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from gptvae_cli import products
from gptvae_cli.products import FewProducts, PackedProducts, Products, SplitProducts, best_products

WAYS: dict[str, Callable[[torch.dtype], Products]] = {
    "plain": Products,
    "transposed": lambda dtype: Products(dtype, transpose=True),
    "by vector": lambda dtype: Products(dtype, by_vector=True),
    "few": FewProducts,
    "split": SplitProducts,
    "packed": lambda dtype: PackedProducts(dtype, 4),
}
TYPES = {
    "plain": (torch.float32, torch.bfloat16, torch.float64),
    "transposed": (torch.float32, torch.bfloat16, torch.float64),
    "by vector": (torch.bfloat16,),
    "few": (torch.float32,),
    "split": (torch.float32,),
    "packed": (torch.float32, torch.bfloat16),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}

needs_packing = pytest.mark.skipif(not products.packing_works(), reason="needs oneDNN, with bfloat16")
every_way = pytest.mark.parametrize(
    ("way", "dtype"),
    [
        pytest.param(way, dtype, marks=needs_packing if way == "packed" else ())
        for way, dtypes in TYPES.items()
        for dtype in dtypes
    ],
)


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every machine splits alike; torch computes with as many as it has."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@every_way
@pytest.mark.parametrize("rows", [1, 2, 70])
def test_products_are_those_of_linear_layers(way: str, dtype: torch.dtype, rows: int) -> None:
    """However many rows there are, onto and into tensors of another type, too."""
    ways, tolerance = WAYS[way](dtype), TOLERANCE[dtype]
    exact = torch.promote_types(dtype, torch.float32)
    for width_in, width_out in ((24, 192), (192, 24), (24, 103), (24, 128)):
        input_NI, weight_OI = numbers(rows, width_in, dtype=dtype), numbers(width_out, width_in)
        bias_O, onto_NO = numbers(width_out, dtype=dtype), numbers(rows, width_out, dtype=exact)
        matrix = ways.matrix(weight_OI)
        expected = F.linear(input_NI.double(), weight_OI.to(dtype).double())
        assert_near(ways.product(input_NI, matrix), expected, tolerance)
        assert_near(ways.product(input_NI, matrix, bias_O), expected + bias_O.double(), tolerance)
        into_NO = torch.empty_like(onto_NO)
        ways.write_product(into_NO, input_NI, matrix)
        assert_near(into_NO, expected, tolerance)
        added_NO = onto_NO.clone()
        ways.add_product(added_NO, input_NI, matrix)
        assert_near(added_NO, onto_NO.double() + expected, tolerance)


@every_way
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_a_feedforward_has_torchs_gelu_between_its_products(way: str, dtype: torch.dtype, rows: int) -> None:
    ways, exact = WAYS[way](dtype), torch.promote_types(dtype, torch.float32)
    normed_ND, onto_ND = 2 * numbers(rows, 192, dtype=dtype), numbers(rows, 192, dtype=exact)
    inner_OI, outer_OI = numbers(384, 192), numbers(192, 384)
    inner_bias, outer_bias = numbers(384, dtype=dtype), numbers(192, dtype=exact)
    hidden_N = F.gelu(F.linear(normed_ND.double(), inner_OI.to(dtype).double(), inner_bias.double()))
    expected = onto_ND.double() + F.linear(hidden_N, outer_OI.to(dtype).double(), outer_bias.double())
    ways.add_feedforward(onto_ND, normed_ND, (ways.matrix(inner_OI), inner_bias), (ways.matrix(outer_OI), outer_bias))
    assert_near(onto_ND, expected, TOLERANCE[dtype])


@every_way
def test_no_gradients_are_kept_for_a_matrix(way: str, dtype: torch.dtype) -> None:
    assert not WAYS[way](dtype).matrix(numbers(192, 24).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("threads", "width", "parts"), [(1, 256, 1), (2, 256, 2), (3, 256, 2), (8, 256, 4), (8, 4032, 7), (3, 4003, 1)]
)
def test_as_many_threads_share_a_row_as_get_whole_panels(
    monkeypatch: pytest.MonkeyPatch, threads: int, width: int, parts: int
) -> None:
    """Of 16 numbers, and 64 a thread at least."""
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert SplitProducts(torch.float32).matrix(numbers(width, 24)).shape == (parts, 24, width // parts)


@pytest.mark.skipif(not products.packing_pays(), reason="needs a processor on which rows are split")
@pytest.mark.parametrize(("width_in", "width_out"), [(256, 768), (256, 256), (1024, 256), (256, 4032), (192, 576)])
def test_a_product_does_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, width_in: int, width_out: int
) -> None:
    input_1I, weight_OI = numbers(1, width_in), numbers(width_out, width_in)
    found = []
    for threads in (1, 2, 3, 4, 8):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        split = SplitProducts(torch.float32)
        found.append(split.product(input_1I, split.matrix(weight_OI)))
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize(
    ("dtype", "rows", "elsewhere", "on_amd"),
    [
        (torch.float32, 0, Products, Products),
        (torch.float32, 1, FewProducts, SplitProducts),
        (torch.float32, 8, FewProducts, PackedProducts),
        (torch.float32, 9, Products, PackedProducts),
        (torch.bfloat16, 1, Products, PackedProducts),
        (torch.bfloat16, 9, Products, PackedProducts),
        (torch.float64, 1, Products, Products),
    ],
)
def test_the_way_depends_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, elsewhere: type, on_amd: type
) -> None:
    """AMD's count if oneDNN has fast products for them: others were not measured."""
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    for amd, works in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr("gptvae_cli.machine.is_amd", lambda amd=amd: amd)
        monkeypatch.setattr("gptvae_cli.products.packing_works", lambda works=works: works)
        assert type(best_products(torch.device("cpu"), dtype, rows)) is (on_amd if amd and works else elsewhere)
        assert type(best_products(torch.device("cuda"), dtype, rows)) is Products


def test_packing_needs_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not products.packing_works()
