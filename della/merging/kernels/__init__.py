"""The fast kernels behind reference.py, compiled by Numba."""
