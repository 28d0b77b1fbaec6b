"""The parts of the training criterion."""
