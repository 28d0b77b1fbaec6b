"""The losses: checks of their arguments, values and gradients."""
