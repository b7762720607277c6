"""Products in every order of the matrices, against `F.linear` in float64; and which processor takes which."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from gptvae_cli.products import (
    FewProducts,
    PackedProducts,
    Products,
    SplitProducts,
    VectorProducts,
    best_products,
)

WAYS: dict[str, Callable[[torch.dtype, int], Products]] = {
    "plain": lambda dtype, rows: Products(dtype),
    "transposed": lambda dtype, rows: Products(dtype, transpose=True),
    "few": lambda dtype, rows: FewProducts(dtype),
    "vector": lambda dtype, rows: VectorProducts(dtype),
    "split": lambda dtype, rows: SplitProducts(dtype),
    "packed": PackedProducts,
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}

FLOAT32_ALONE = ("few", "split")
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="needs oneDNN, which packs",
)
every_way = pytest.mark.parametrize(
    ("way", "dtype"),
    [
        pytest.param(way, dtype, marks=needs_onednn if way == "packed" else ())
        for way in WAYS
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32 or way not in FLOAT32_ALONE
    ],
)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@every_way
@pytest.mark.parametrize("planned", [0, 1, 2, 9])
@pytest.mark.parametrize("rows", [1, 2, 9, 70])
def test_products_are_those_of_linear_layers(way: str, dtype: torch.dtype, planned: int, rows: int) -> None:
    """However many rows there are in the end, onto and into tensors of float32, too."""
    ways = WAYS[way](dtype, planned)
    for width_in, width_out in ((24, 160), (160, 24), (24, 103), (24, 203)):
        input_NI, weight_OI = numbers(rows, width_in, dtype=dtype), numbers(width_out, width_in)
        bias_O, onto_NO = numbers(width_out, dtype=dtype), numbers(rows, width_out)
        matrix = ways.matrix(weight_OI)
        exact_OI = weight_OI.to(dtype).double()
        expected = F.linear(input_NI.double(), exact_OI)
        tolerance = TOLERANCE[dtype]
        assert_near(ways.product(input_NI, matrix), expected, tolerance)
        assert_near(ways.product(input_NI, matrix, bias_O), expected + bias_O.double(), tolerance)
        into_NO = torch.empty(rows, width_out)
        ways.write_product(into_NO, input_NI, matrix)
        assert_near(into_NO, expected, tolerance)
        added_NO = onto_NO.clone()
        ways.add_product(added_NO, input_NI, matrix)
        assert_near(added_NO, onto_NO.double() + expected, tolerance)


@every_way
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_a_feedforward_has_torchs_gelu_between_its_products(way: str, dtype: torch.dtype, rows: int) -> None:
    ways = WAYS[way](dtype, rows)
    normed_ND, onto_ND = 2 * numbers(rows, 160, dtype=dtype), numbers(rows, 160)
    inner_OI, outer_OI = numbers(256, 160), numbers(160, 256)
    inner_bias, outer_bias = numbers(256, dtype=dtype), numbers(160)
    inner_N = F.linear(normed_ND.double(), inner_OI.to(dtype).double(), inner_bias.double())
    expected = onto_ND.double() + F.linear(F.gelu(inner_N), outer_OI.to(dtype).double(), outer_bias.double())
    ways.add_feedforward(onto_ND, normed_ND, (ways.matrix(inner_OI), inner_bias), (ways.matrix(outer_OI), outer_bias))
    assert_near(onto_ND, expected, TOLERANCE[dtype])


@every_way
def test_no_gradients_are_kept_for_a_matrix(way: str, dtype: torch.dtype) -> None:
    weight_OI = numbers(40, 24).requires_grad_()
    assert not WAYS[way](dtype, 4).matrix(weight_OI).tensor.requires_grad


@pytest.mark.parametrize(
    ("threads", "width", "parts"), [(1, 256, 1), (2, 256, 2), (3, 4003, 3), (8, 256, 4), (4, 63, 1)]
)
def test_every_thread_gets_a_part_of_a_row(
    monkeypatch: pytest.MonkeyPatch, threads: int, width: int, parts: int
) -> None:
    """Of at least 64 numbers; where parts cannot be even, the last one is filled up with zeros."""
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    split, input_1I, weight_OI = SplitProducts(torch.float32), numbers(1, 24), numbers(width, 24)
    matrix = split.matrix(weight_OI)
    assert matrix.tensor.shape == (parts, 24, -(-width // parts))
    expected = F.linear(input_1I.double(), weight_OI.double())
    assert_near(split.product(input_1I, matrix), expected, 2e-6)
    out_1O, sum_1O = torch.empty(1, width), torch.zeros(1, width)
    split.write_product(out_1O, input_1I, matrix)
    split.add_product(sum_1O, input_1I, matrix)
    assert_near(out_1O, expected, 2e-6)
    assert_near(sum_1O, expected, 2e-6)


@pytest.mark.parametrize(
    ("dtype", "rows", "elsewhere", "on_amd"),
    [
        (torch.float32, 0, Products, PackedProducts),
        (torch.float32, 1, FewProducts, SplitProducts),
        (torch.float32, 8, FewProducts, PackedProducts),
        (torch.float32, 9, Products, PackedProducts),
        (torch.bfloat16, 1, VectorProducts, PackedProducts),
        (torch.bfloat16, 2, Products, PackedProducts),
        (torch.float64, 1, Products, Products),
    ],
)
def test_the_way_depends_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, elsewhere: type, on_amd: type
) -> None:
    """AMD's count if they have registers of 512 bits: others were not measured."""
    for amd, capability in ((True, "AVX512"), (True, "AVX2"), (False, "AVX512")):
        monkeypatch.setattr("gptvae_cli.machine.is_amd", lambda amd=amd: amd)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        expected = on_amd if amd and capability == "AVX512" else elsewhere
        assert type(best_products(torch.device("cpu"), dtype, rows)) is expected
        assert type(best_products(torch.device("cuda"), dtype, rows)) is Products
