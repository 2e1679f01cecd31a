"""Preference optimization of language models: WPO, SPPO, GPO, adversarial and multi-reference methods."""

__version__ = "0.1.0"
