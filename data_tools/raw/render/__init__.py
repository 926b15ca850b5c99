"""Documents become page images with their text, without a browser."""
