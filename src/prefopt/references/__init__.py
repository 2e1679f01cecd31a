"""Scores of frozen reference models: computed once, cached on disk, joined to pairs, weighted."""
