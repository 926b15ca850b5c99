"""Schemas of the configuration and the checks that no single field can make."""
