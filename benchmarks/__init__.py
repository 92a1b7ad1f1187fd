"""Measuring della beside mergekit: `checkpoints` makes the data, `compare` runs both and reports."""
