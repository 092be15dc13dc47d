"""Hydra plugin: multiruns (``-m``) of ptqbench go to SLURM or to a pool of processes."""
