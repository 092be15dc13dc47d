"""What a cell is: its schema, its identity, the names of members, and where the configuration lies."""
