"""Triton kernels: each file needs Triton, and is imported in the functions that use it."""
