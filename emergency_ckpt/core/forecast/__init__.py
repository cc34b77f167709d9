"""What to expect of a job before it runs: sizes, periods, losses, costs, and a simulation of failures."""
