"""Where notices come from: clouds, files, people. A source that fails is tried again, and never fatal.

No jax here: the agent of a host watches, and tells its trainers.
"""
