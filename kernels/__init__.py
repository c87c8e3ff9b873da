"""Triton kernels, one file for each system; installed as ``pyeff.kernels``.

Nothing here is imported before a kernel runs: Triton is optional, and importing it costs time.
"""
