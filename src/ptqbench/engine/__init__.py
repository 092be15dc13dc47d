"""Quantize a model, block by block."""
