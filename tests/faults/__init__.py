"""Real commands, killed at random times and started again: `python -m tests.faults`, or `make faults`."""
