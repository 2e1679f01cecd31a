"""Models with a head on a causal LM: scalar rewards and general preferences."""
