"""Sampling videos from a model."""
