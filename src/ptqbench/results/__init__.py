"""From run folders to what people read."""
