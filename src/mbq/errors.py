"""The one exception that the command line turns into a sentence instead of a traceback, and the warning it shows."""


class MBQError(Exception):
    """A mistake the user can mend. The message is one sentence: it names the thing and says what to do."""


class MBQWarning(UserWarning):
    """Something works, and less well than it could here; the message says why."""
