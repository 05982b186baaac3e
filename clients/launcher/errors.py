"""Errors of the launcher."""


class LauncherError(Exception):
    """Something cannot be started or stopped; the message is one line that says what to do."""


class NotRunningError(LauncherError):
    """Nothing runs under this instance's name."""
