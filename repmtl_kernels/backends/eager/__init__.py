"""The stages in plain PyTorch, for any device."""
