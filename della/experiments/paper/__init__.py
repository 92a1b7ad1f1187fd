"""The paper's experiment, repeated: in miniature, on a small real model, at full size."""
