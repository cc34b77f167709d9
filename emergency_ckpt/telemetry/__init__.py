"""What happened, as lines and as numbers: events, the log that writes them, and counters."""
