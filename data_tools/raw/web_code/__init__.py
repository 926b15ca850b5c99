"""Code and what it looks like: scripts and notebooks with their figures, HTML with screenshots."""
