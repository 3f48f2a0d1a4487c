"""The error that ends an experiment with one sentence, and short forms of other errors."""


class UserError(Exception):
    """An error that the user can correct. The message names the argument, the given value and the allowed values."""


def first_line(error: Exception, length: int = 200) -> str:
    """The first line of an error's message, cut to ``length`` characters; the type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]
