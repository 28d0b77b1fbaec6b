"""The stages with the compiled operators of ``csrc``."""
