"""The flags of a job: `load_config(argv)` reads them, `Config` holds them. Importing this imports no jax."""

from emergency_ckpt.config.checks import advice, inactive_flags
from emergency_ckpt.config.load import load_config
from emergency_ckpt.config.schema import FLAGS, Config

__all__ = ["FLAGS", "Config", "advice", "inactive_flags", "load_config"]
