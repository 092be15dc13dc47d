"""Weights & Biases as a projection of run folders; the folders hold the truth and know nothing of it.

Only a helper process (``helper``) imports wandb for writing. It reads a run folder, while the cell works or afterwards, and logs
what it finds (``projection``). The parent (``guard``) hands over a path, waits a bounded time at the end, and ends the process, so
that nothing that raises, hangs or crashes in the helper can reach a cell. ``sync`` projects finished cells, and ``recorded`` reads
runs back into the frame that tables are made of.
"""
