"""The one exception that the command line turns into a sentence instead of a traceback."""


class MBQError(Exception):
    """A mistake the user can mend. The message is one sentence: it names the thing and says what to do."""
