"""Plain-Python knowledge of how a model is divided; no torch here."""
