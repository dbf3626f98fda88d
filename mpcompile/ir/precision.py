"""Precision: the number format of the matrix products and convolutions of a file."""

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTIZED: frozenset[Precision] = frozenset({"int8", "fp8"})  # written as QuantizeLinear/DequantizeLinear pairs
