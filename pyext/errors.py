"""Errors that are the user's to mend."""


class InputError(ValueError):
    """Bad input (a file, a setting, a row): one line with what was expected, what came, the fix.

    The command line prints it without a traceback and exits with 2.
    """
