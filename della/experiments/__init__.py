"""The experiments: the demo's trio and the paper's, at three scales.  Nothing below imports them."""
