"""Faults by seed against real processes: `python -m benchmarks.faults`."""
