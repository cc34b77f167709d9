"""Measurements of this package beside Orbax's emergency manager, on the same state, mesh and processes.

`python -m benchmarks --help`. Nothing here judges a figure: a run prints what it measured, with its spread.
"""
