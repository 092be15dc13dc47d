"""Faults on purpose: kills, full disks, races, a cluster that misbehaves, and requests that make no sense.

Not part of the tests: it takes as long as it is given. ``make torture MINUTES=60`` runs every part, prints what was tried and what
was found, and writes the same as JSON. ``docs/reliability.md`` says what is promised.

A part is a module with ``SHARE`` (of the time), ``LIMIT`` (trials at most, or None), ``prepare(world)`` and
``trial(world, number) -> Outcome``. A trial draws everything from the seed and its number, so that it can be repeated alone.
"""
