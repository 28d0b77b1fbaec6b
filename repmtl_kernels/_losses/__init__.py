"""From checked arguments to values and gradients."""
