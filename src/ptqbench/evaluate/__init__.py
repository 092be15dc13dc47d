"""Measures of a quantized model: perplexity and zero-shot accuracy."""
