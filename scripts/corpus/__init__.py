"""The generator of the embedded texts: a small world, the stories and the facts about it."""
