"""Reports: what a run leaves, on one page."""
