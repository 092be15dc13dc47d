"""Where a cell lives on disk, and who works on it."""
