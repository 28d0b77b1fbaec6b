"""A stand-in for a checkout of LibMTL: as much of its interface as a weighting meets."""

from .trainer import Trainer as Trainer
