"""The error that a user can cause and mend."""


class UserError(Exception):
    """Names the field, file or sample, its value, and what would be right. Printed alone; exit status 1."""
