"""What a user can mend."""


class UserError(ValueError):
    """Something in a user's files or settings is wrong.

    The message is one line: which file or key, what was found, what is allowed, and the way out. Scripts print it
    without a traceback and exit with status 2.
    """
