"""The error that ends an experiment with one plain sentence."""


class UserError(Exception):
    """Something the user can put right: the message says which argument, what was given, and what is allowed."""
