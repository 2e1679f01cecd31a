"""What `benchmarks/gpu.py` runs on a card: part a (right), part b (fast), and what it makes of the findings."""
