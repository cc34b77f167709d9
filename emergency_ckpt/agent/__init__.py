"""The owner of the bytes at rest: it moves sealed steps on, independently of the train loop. No jax here."""
