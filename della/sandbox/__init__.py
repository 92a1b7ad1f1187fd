"""Walls for generated code, and what runs inside them."""
