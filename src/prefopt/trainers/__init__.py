"""Trainers: what they share in `base`, and a module for each method."""
