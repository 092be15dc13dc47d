"""The four roles of a method: transform, target, solver and refine.

Modules here import torch only inside functions: their dataclasses are also the schema against which a request is
checked on a login node, where planning a sweep must take a second.
"""
