"""Runs a model from its files: sources and checkpoints, model families, kernels, the engine, and its validation."""
