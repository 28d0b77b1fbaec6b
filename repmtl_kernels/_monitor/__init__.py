"""Observation of a training run: how the tasks' saliencies relate, call by call."""
