"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a config, an argument, a file or the data: one line that says what is wrong, where, and what would
    be right.

    The command line prints it and exits with 2, without a traceback. command: a command to give next, whole, with which
    the line ends.
    """

    def __init__(self, text: str, command: str = ""):
        super().__init__(f"{text}{command}")
        self.command = command


def raised(error: BaseException) -> str:
    """What somebody else's code raised, in a line: its type and the first 300 characters of what it says.

    >>> raised(ValueError("one\\n two"))
    'ValueError: one two'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def printable(text: str) -> str:
    """The text with what a terminal would obey written out.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
