"""Scoring models: benchmarks, backends that generate, the sandbox for generated code, judges, intervals."""
