"""Which cells a request means, and what they need."""
