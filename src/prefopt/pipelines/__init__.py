"""Resumable runs: loops of stages, and sweeps over settings."""
