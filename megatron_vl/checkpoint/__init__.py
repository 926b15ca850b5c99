"""Checkpoints: everything a resume needs, written atomically."""
