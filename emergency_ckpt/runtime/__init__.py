"""What the manager sets in motion: starting up, the save pipeline, the restore session, extras.

These modules connect rooms that must not know each other (jaxio, local, persistent, agent); the decisions are
made in `core`.
"""
