"""What a user can mend."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something in a user's files or settings is wrong.

    The message is one line: which file or key, what was found, what is allowed, and the way out. Scripts print it
    without a traceback and exit with status 2.
    """


def exit_status(command: Callable[[], None]) -> int:
    """Runs a command; what a user can mend is told in one line on standard error, with status 2."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
