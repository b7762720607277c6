"""Products with matrices that do not change, in the way that is fastest for a type, a number of rows and a processor.

`best_products` chooses, by row `layout` of `tests/benchmarks/speed/`; tests hold all ways equal.

Shapes: N rows, D model width, I and O widths that a matrix takes and gives, P parts of W numbers each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvae_cli import machine

_ROOT_HALF = 0.5**0.5
_FEW_ROWS = 8
_PANEL = 16
"""Numbers that MKL computes at once on AMD's processors: parts of as many, or a multiple, have the very sums of the
whole."""
_LEAST_PART = 4 * _PANEL
"""Numbers of a row that a thread computes at least."""

Linear = tuple[Tensor, Tensor]
"""A matrix as `Products.matrix` lays it out, and a bias [O]."""


def best_products(device: torch.device, dtype: torch.dtype, rows: int) -> Products:
    """The fastest way to multiply.

    Args:
        device: where.
        dtype: of matrices and inputs.
        rows: how many each product will have, where there will be many such products; else 0.
    """
    if device.type != "cpu" or rows == 0:
        return Products(dtype)
    if packing_pays():
        # oneDNN then takes a third to nine tenths of the time of MKL, with which torch multiplies float32; but MKL
        # takes less for a single row, if that is shared among threads.
        if rows == 1 and dtype == torch.float32:
            return SplitProducts(dtype)
        if dtype in (torch.float32, torch.bfloat16):
            return PackedProducts(dtype, rows)
    if rows <= _FEW_ROWS:
        return FewProducts(dtype) if dtype == torch.float32 else Products(dtype, by_vector=rows == 1)
    return Products(dtype, transpose=True)


def packing_pays() -> bool:
    """Whether this is one of AMD's processors with the instructions that oneDNN's fast products need. Others were not
    measured, or, as Intel's, multiply fast without."""
    with_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return bool(machine.is_amd() and with_mkl and packing_works())


def packing_works() -> bool:
    """Whether `PackedProducts` can be used, in bfloat16, too."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Products:
    """Products by torch's own operations.

    Args:
        dtype: of matrices and inputs.
        transpose: whether matrices are transposed in memory, which speeds products of many rows up on a CPU and takes
            as long as writing ten tokens.
        by_vector: whether a single row is multiplied as a vector, which takes bfloat16 three quarters of the time on a
            CPU.
    """

    def __init__(self, dtype: torch.dtype, *, transpose: bool = False, by_vector: bool = False) -> None:
        self.dtype = dtype
        self._transpose, self._by_vector = transpose, by_vector

    def matrix(self, weight_OI: Tensor) -> Tensor:
        """The weight of an `nn.Linear`, laid out for the other methods; it may share memory with the weight."""
        weight_IO = weight_OI.detach().to(self.dtype).T
        return weight_IO.contiguous() if self._transpose else weight_IO

    def product(self, input_NI: Tensor, matrix: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """As `F.linear` [N O]."""
        if self._by_vector and len(input_NI) == 1:
            weight_OI, input_I = matrix.T, input_NI[0]
            return (torch.mv(weight_OI, input_I) if bias_O is None else torch.addmv(bias_O, weight_OI, input_I))[None]
        return torch.mm(input_NI, matrix) if bias_O is None else torch.addmm(bias_O, input_NI, matrix)

    def write_product(self, out_NO: Tensor, input_NI: Tensor, matrix: Tensor) -> None:
        """`product`, into a tensor that may be of another type."""
        if out_NO.dtype == self.dtype:
            torch.mm(input_NI, matrix, out=out_NO)
        else:
            out_NO.copy_(self.product(input_NI, matrix))

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Tensor) -> None:
        """`product`, onto a tensor that may be of another type."""
        if x_NO.dtype == self.dtype:
            x_NO.addmm_(input_NI, matrix)
        else:
            x_NO.add_(self.product(input_NI, matrix))

    def add_feedforward(self, x_ND: Tensor, normed_ND: Tensor, inner: Linear, outer: Linear) -> None:
        """Two products with GELU between them, onto a tensor of the type of the outer bias."""
        matrix, bias_D = outer
        self.add_product(x_ND.add_(bias_D), self._gelu_product(normed_ND, *inner), matrix)

    def _gelu_product(self, input_NI: Tensor, matrix: Tensor, bias_O: Tensor) -> Tensor:
        return F.gelu(self.product(input_NI, matrix, bias_O))


class FewProducts(Products):
    """Of few rows of float32 on a CPU, where starting an operation takes as long as its arithmetic.

    GELU is u + u erf(u) of u = x / sqrt(2), over sqrt(2), and both roots are factors of products that are there anyway;
    torch's takes longer to start than this to compute.
    """

    def add_feedforward(self, x_ND: Tensor, normed_ND: Tensor, inner: Linear, outer: Linear) -> None:
        (inner_matrix, inner_bias_O), (outer_matrix, outer_bias_D) = inner, outer
        u_NO = torch.addmm(inner_bias_O, normed_ND, inner_matrix, beta=_ROOT_HALF, alpha=_ROOT_HALF)
        x_ND.add_(outer_bias_D).addmm_(torch.addcmul(u_NO, u_NO, torch.erf(u_NO)), outer_matrix, alpha=_ROOT_HALF)


class SplitProducts(Products):
    """Of one row of float32, of which every thread computes a part: one batched product with the parts of a matrix
    [P I W], which MKL shares out; an ordinary product of one row it computes on a single thread.

    Parts are as even and as many as threads can be used and whole panels allow, so that sums do not depend on their
    number. Those that make a row wider are transposed in memory, others are not. More rows than one take more time.
    """

    def matrix(self, weight_OI: Tensor) -> Tensor:
        width_out, width_in = weight_OI.shape
        most = min(torch.get_num_threads(), width_out // _LEAST_PART)
        parts = next((parts for parts in range(most, 1, -1) if width_out % (_PANEL * parts) == 0), 1)
        parts_PIW = weight_OI.detach().to(self.dtype).view(parts, -1, width_in).transpose(1, 2)
        return parts_PIW.contiguous() if width_out > width_in else parts_PIW

    def product(self, input_NI: Tensor, matrix: Tensor, bias_O: Tensor | None = None) -> Tensor:
        product_PNW = torch.bmm(input_NI.expand(len(matrix), -1, -1), matrix)
        product_NO = product_PNW.transpose(0, 1).reshape(len(input_NI), -1)
        return product_NO if bias_O is None else product_NO + bias_O

    def write_product(self, out_NO: Tensor, input_NI: Tensor, matrix: Tensor) -> None:
        if len(out_NO) == 1 and out_NO.dtype == self.dtype:
            parts = len(matrix)
            torch.bmm(input_NI.expand(parts, -1, -1), matrix, out=out_NO.view(parts, 1, -1))
        else:
            out_NO.copy_(self.product(input_NI, matrix))

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Tensor) -> None:
        if len(x_NO) == 1 and x_NO.dtype == self.dtype:
            parts = len(matrix)
            x_NO.view(parts, 1, -1).baddbmm_(input_NI.expand(parts, -1, -1), matrix)
        else:
            x_NO.add_(self.product(input_NI, matrix))

    def add_feedforward(self, x_ND: Tensor, normed_ND: Tensor, inner: Linear, outer: Linear) -> None:
        """Of a single row with GELU as in `FewProducts`."""
        if len(x_ND) > 1:
            super().add_feedforward(x_ND, normed_ND, inner, outer)
            return
        (inner_matrix, inner_bias_O), (outer_matrix, outer_bias_D) = inner, outer
        bias_P1W, normed_P1D = inner_bias_O.view(len(inner_matrix), 1, -1), normed_ND.expand(len(inner_matrix), -1, -1)
        u_1O = torch.baddbmm(bias_P1W, normed_P1D, inner_matrix, beta=_ROOT_HALF, alpha=_ROOT_HALF).view(1, -1)
        hidden_1O = torch.addcmul(u_1O, u_1O, torch.erf(u_1O)).mul_(_ROOT_HALF)
        self.add_product(x_ND.add_(outer_bias_D), hidden_1O, outer_matrix)


class PackedProducts(Products):
    """By oneDNN, with copies of the matrices in the order in which it reads them.

    `torch.compile` makes the same operations of an `nn.Linear` on a CPU; torch has no names for them that do not start
    with an underscore.

    Args:
        dtype: float32 or bfloat16.
        rows: see `best_products`.
    """

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        super().__init__(dtype)
        self._rows = rows

    def matrix(self, weight_OI: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().to(self.dtype), self._rows)
        return packed

    def product(self, input_NI: Tensor, matrix: Tensor, bias_O: Tensor | None = None) -> Tensor:
        product_NO: Tensor = torch.ops.mkldnn._linear_pointwise(input_NI, matrix, bias_O, "none", [], "")
        return product_NO

    def write_product(self, out_NO: Tensor, input_NI: Tensor, matrix: Tensor) -> None:
        out_NO.copy_(self.product(input_NI, matrix))

    def add_product(self, x_NO: Tensor, input_NI: Tensor, matrix: Tensor) -> None:
        x_NO.add_(self.product(input_NI, matrix))

    def _gelu_product(self, input_NI: Tensor, matrix: Tensor, bias_O: Tensor) -> Tensor:
        product_NO: Tensor = torch.ops.mkldnn._linear_pointwise(input_NI, matrix, bias_O, "gelu", [], "none")
        return product_NO
