"""The owner of the bytes at rest: it serves sealed slots to other hosts, and moves sealed steps on.

Independent of the train loop. No jax here.
"""
