"""What a merge computes: the semantics (reference.py), the table of methods, and the fast kernels."""
