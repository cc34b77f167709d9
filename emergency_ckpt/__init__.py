"""Checkpoint manager for JAX training jobs: ramdisk tier, persistent tier, restore from survivors."""
