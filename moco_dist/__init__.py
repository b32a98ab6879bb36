"""Momentum Contrast pretraining and linear probing: one run, any machine."""

__version__ = "0.1.0"
