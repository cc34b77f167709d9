"""Runs one JAX job on this machine: the processes of all slices, restarts, and failures on demand."""
