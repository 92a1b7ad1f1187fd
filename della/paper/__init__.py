"""The paper's experiment: in miniature, on a 135 M parameter model, and at full size."""
