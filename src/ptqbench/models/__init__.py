"""Access to checkpoints and to decoder blocks, by composing the installed transformers classes."""
