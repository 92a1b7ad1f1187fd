"""Carrying out a Plan: reading, computing, writing; and verifying what was merged."""
