"""Pure tensor functions: the mathematics of quantization without models, configuration, files or logging."""
