"""Run directories copied by hand from one place to another: whole steps, verified, visible only when whole."""
