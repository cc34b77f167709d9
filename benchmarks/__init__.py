"""Measurements of this package beside Orbax's emergency manager, on the same state, mesh and processes.

`python -m benchmarks --help`. A run prints what it measured, with its spread, and which targets that reaches;
no test depends on a figure.
"""
