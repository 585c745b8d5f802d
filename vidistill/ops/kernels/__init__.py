"""Triton kernels: each file needs Triton, and is imported in the functions that use it.

`memory` and `quant` do what torch has no operator for, and run on any GPU. `attention` and `fused` have rivals in torch
(flex attention, torch.compile) and run only with backend `triton`, until they are timed on a GPU.
"""
