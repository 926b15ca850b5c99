"""The errors that a user can cause and mend."""


class UserError(Exception):
    """Names the field, file or sample, its value, and what would be right. Printed alone; exit status 1."""


class PassingError(UserError):
    """One that the same start may not meet again, later or on other nodes: a SLURM job tries."""
