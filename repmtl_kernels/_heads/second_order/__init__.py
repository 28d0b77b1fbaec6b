"""Convolution and batch norm with an efficient, exact double backward."""

from repmtl_kernels._heads.second_order.context import second_order
from repmtl_kernels._heads.second_order.convert import convert_second_order

__all__ = ["convert_second_order", "second_order"]
