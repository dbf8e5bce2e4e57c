"""Kernels of our own for inference on CPUs, in C that is compiled at first use.

`library` compiles and keeps them; `few_rows` is for linear layers and experts, `small` for norms, rotary positions and
the choice of experts, `mla` for attention. Each module says when its kernels may be used (`takes`, ...); without a
compiler, or for gradients, callers keep to torch's operations.
"""
