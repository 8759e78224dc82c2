"""Calibrate, quantize, serve and report on LLM checkpoints. See docs/architecture.md."""

__version__ = "0.1.0"
