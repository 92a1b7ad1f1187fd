"""What may be dropped of each expert's delta: a kind of Drop a file, with its reference and kernels."""
