"""Data that any machine can build from what pip installs: see `recipe.py`."""
