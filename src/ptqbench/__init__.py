"""ptqbench: compose, run and compare post-training quantization methods for large language models."""

__version__ = "0.1.0"
