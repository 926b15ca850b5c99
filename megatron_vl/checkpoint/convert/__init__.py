"""Weights in and out: other layouts' tensors to and from our checkpoints, one tensor at a time."""
