"""Products with matrices that do not change, in whatever way a processor multiplies them fastest.

That depends on the type, on the number of rows and, on a CPU, on whose it is; `best_products` chooses, by row `layout`
of `tests/benchmarks/speed/`. Tests hold all ways equal.

Shapes: N rows, D model width, I and O widths that a matrix takes and gives, P parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvae_cli import machine

_ROOT_HALF = 0.5**0.5
_FEW_ROWS = 8
_LEAST_PART = 64
"""Numbers of a row that a thread computes at least."""


def best_products(device: torch.device, dtype: torch.dtype, rows: int) -> Products:
    """The fastest way to multiply.

    Args:
        device: where.
        dtype: of matrices and inputs.
        rows: that will be multiplied, many times; 0 for any number, once.
    """
    if device.type != "cpu":
        return Products(dtype)
    # With these processors oneDNN takes a third to nine tenths of the time of MKL, which is what torch multiplies
    # float32 with, but MKL takes less for a single row that is shared among threads.
    if machine.is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        if rows == 1 and dtype == torch.float32:
            return SplitProducts(dtype)
        if dtype in (torch.float32, torch.bfloat16):
            return PackedProducts(dtype, rows)
    if rows == 1 and dtype == torch.bfloat16:
        return VectorProducts(dtype)
    if 0 < rows <= _FEW_ROWS and dtype == torch.float32:
        return FewProducts(dtype)
    return Products(dtype, transpose=rows > _FEW_ROWS)


class Matrix(NamedTuple):
    """The matrix of an `nn.Linear`, laid out for one of the ways to multiply, and how wide what it gives is."""

    tensor: Tensor
    width: int


Linear = tuple[Matrix, Tensor]
"""A matrix and its bias [O]."""


class Products:
    """Products by torch's own operations.

    Args:
        dtype: of matrices and inputs.
        transpose: whether matrices are transposed in memory, which speeds products of many rows up on a CPU and takes
            as long as writing ten tokens.
    """

    def __init__(self, dtype: torch.dtype, *, transpose: bool = False) -> None:
        self.dtype = dtype
        self._transpose = transpose

    def matrix(self, weight_OI: Tensor) -> Matrix:
        """What the other methods take for the weight of an `nn.Linear`; it may share its memory."""
        weight_IO = weight_OI.detach().to(self.dtype).T
        return Matrix(weight_IO.contiguous() if self._transpose else weight_IO, len(weight_OI))

    def product(self, input_NI: Tensor, matrix: Matrix, bias_O: Tensor | None = None) -> Tensor:
        """As `F.linear` [N O]."""
        tensor_IO = matrix.tensor
        return torch.mm(input_NI, tensor_IO) if bias_O is None else torch.addmm(bias_O, input_NI, tensor_IO)

    def write_product(self, out_NO: Tensor, input_NI: Tensor, matrix: Matrix) -> None:
        """`product`, into a tensor that may be of another type."""
        if out_NO.dtype == self.dtype:
            torch.mm(input_NI, matrix.tensor, out=out_NO)
        else:
            out_NO.copy_(self.product(input_NI, matrix))

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Matrix) -> None:
        """`product`, onto a tensor that may be of another type."""
        if x_NO.dtype == self.dtype:
            x_NO.addmm_(input_NI, matrix.tensor)
        else:
            x_NO.add_(self.product(input_NI, matrix))

    def add_feedforward(self, x_ND: Tensor, normed_ND: Tensor, inner: Linear, outer: Linear) -> None:
        """Two products with GELU between them, onto a tensor of the type of the outer bias."""
        matrix, bias_D = outer
        self.add_product(x_ND.add_(bias_D), F.gelu(self.product(normed_ND, *inner)), matrix)


class FewProducts(Products):
    """Of few rows of float32 on a CPU, where starting an operation takes as long as it does.

    GELU is u + u erf(u) of u = x / sqrt(2), over sqrt(2), and products that are there anyway divide by both roots;
    torch's takes longer to start than this to compute.
    """

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Matrix, *, scale: float = 1) -> None:
        x_NO.addmm_(input_NI, matrix.tensor, alpha=scale)

    def add_feedforward(self, x_ND: Tensor, normed_ND: Tensor, inner: Linear, outer: Linear) -> None:
        matrix, bias_D = outer
        u_N = self._scaled_product(normed_ND, *inner, _ROOT_HALF)
        self.add_product(x_ND.add_(bias_D), torch.addcmul(u_N, u_N, torch.erf(u_N)), matrix, scale=_ROOT_HALF)

    def _scaled_product(self, input_NI: Tensor, matrix: Matrix, bias_O: Tensor, scale: float) -> Tensor:
        return torch.addmm(bias_O, input_NI, matrix.tensor, beta=scale, alpha=scale)


class VectorProducts(Products):
    """Of one row of bfloat16 on a CPU: torch's product of matrices takes a third longer than that of a matrix and a
    vector."""

    def product(self, input_NI: Tensor, matrix: Matrix, bias_O: Tensor | None = None) -> Tensor:
        if len(input_NI) > 1:
            return super().product(input_NI, matrix, bias_O)
        weight_OI, input_I = matrix.tensor.T, input_NI[0]
        return (torch.mv(weight_OI, input_I) if bias_O is None else torch.addmv(bias_O, weight_OI, input_I))[None]


class SplitProducts(FewProducts):
    """Of one row of float32, of which every thread computes a part: products of the same row with the parts of a
    matrix [P I O/P], which MKL shares out. A single one it computes on a single thread.

    A part that makes the row wider is transposed in memory, another is not.
    """

    def matrix(self, weight_OI: Tensor) -> Matrix:
        width_out, width_in = weight_OI.shape
        parts = max(1, min(torch.get_num_threads(), width_out // _LEAST_PART))
        weight_OI = F.pad(weight_OI.detach().to(self.dtype), (0, 0, 0, -width_out % parts))
        parts_PIO = weight_OI.view(parts, -1, width_in).transpose(1, 2)
        return Matrix(parts_PIO.contiguous() if width_out > width_in else parts_PIO, width_out)

    def product(self, input_NI: Tensor, matrix: Matrix, bias_O: Tensor | None = None) -> Tensor:
        product_PNO = torch.bmm(input_NI.expand(len(matrix.tensor), -1, -1), matrix.tensor)
        product_NO = product_PNO.transpose(0, 1).reshape(len(input_NI), -1)[:, : matrix.width]
        return product_NO if bias_O is None else product_NO + bias_O

    def write_product(self, out_NO: Tensor, input_NI: Tensor, matrix: Matrix) -> None:
        if self._is_even(input_NI, matrix):
            parts = len(matrix.tensor)
            torch.bmm(input_NI.expand(parts, -1, -1), matrix.tensor, out=out_NO.view(parts, 1, -1))
        else:
            out_NO.copy_(self.product(input_NI, matrix))

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Matrix, *, scale: float = 1) -> None:
        if self._is_even(input_NI, matrix):
            parts = len(matrix.tensor)
            x_NO.view(parts, 1, -1).baddbmm_(input_NI.expand(parts, -1, -1), matrix.tensor, alpha=scale)
        else:
            x_NO.add_(self.product(input_NI, matrix), alpha=scale)

    def _scaled_product(self, input_NI: Tensor, matrix: Matrix, bias_O: Tensor, scale: float) -> Tensor:
        if not self._is_even(input_NI, matrix):
            return self.product(input_NI, matrix, bias_O) * scale
        parts = len(matrix.tensor)
        bias_P1O, input_PNI = bias_O.view(parts, 1, -1), input_NI.expand(parts, -1, -1)
        return torch.baddbmm(bias_P1O, input_PNI, matrix.tensor, beta=scale, alpha=scale).view(1, -1)

    def _is_even(self, input_NI: Tensor, matrix: Matrix) -> bool:
        """Whether what comes of a product lies in memory part by part: of a single row, and no part is filled up."""
        return len(input_NI) == 1 and matrix.width % len(matrix.tensor) == 0


class PackedProducts(Products):
    """By oneDNN, with matrices in the order in which it reads them.

    `torch.compile` makes the same operations of an `nn.Linear` on a CPU; torch has no names for them that do not start
    with an underscore.

    Args:
        dtype: see `Products`; float32 or bfloat16.
        rows: see `best_products`.
    """

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        super().__init__(dtype)
        self._rows = rows

    def matrix(self, weight_OI: Tensor) -> Matrix:
        weight_OI = weight_OI.detach().to(self.dtype)
        return Matrix(torch.ops.mkldnn._reorder_linear_weight(weight_OI, self._rows or None), len(weight_OI))

    def product(self, input_NI: Tensor, matrix: Matrix, bias_O: Tensor | None = None) -> Tensor:
        product_NO: Tensor = torch.ops.mkldnn._linear_pointwise(input_NI, matrix.tensor, bias_O, "none", [], "")
        return product_NO

    def write_product(self, out_NO: Tensor, input_NI: Tensor, matrix: Matrix) -> None:
        out_NO.copy_(self.product(input_NI, matrix))

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Matrix) -> None:
        x_NO.add_(self.product(input_NI, matrix))

    def add_feedforward(self, x_ND: Tensor, normed_ND: Tensor, inner: Linear, outer: Linear) -> None:
        (inner_matrix, inner_bias), (outer_matrix, outer_bias_D) = inner, outer
        inner_N = torch.ops.mkldnn._linear_pointwise(normed_ND, inner_matrix.tensor, inner_bias, "gelu", [], "none")
        self.add_product(x_ND.add_(outer_bias_D), inner_N, outer_matrix)
