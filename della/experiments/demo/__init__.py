"""The demo trio: a tiny Llama, three experts of it, and the three tasks they are scored on.

``python -m della.experiments.demo.run`` merges the experts with four methods and scores every model, on a
CPU, in NumPy.  The models are made by training/train_trio.py of the repository.
"""

from __future__ import annotations

from pathlib import Path

TRIO = Path(__file__).parent / "trio"
EXPERTS = ("lm", "math", "code")
