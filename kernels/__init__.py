"""Triton kernels and their launchers, installed as `tritonsym.kernels`: tensors, ints and tiles only.

Nothing here imports the rest of the library, and nothing in the library imports triton before a kernel is launched.
"""
