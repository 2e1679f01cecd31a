"""Reports: training runs side by side, and loops by iteration, as one page each."""
