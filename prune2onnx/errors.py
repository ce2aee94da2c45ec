"""The errors a user may meet, each with the exit status of the command line.

Every message names the thing, what arrived, what was expected and what to do; the command line
prints it on one line without a traceback. Anything else that escapes is a defect of ours.
"""


class Prune2OnnxError(Exception):
    """A failure the user can act on (exit status 1).

    Its text may quote a stranger's file: what would break the line or steer a terminal is escaped.
    """

    exit_status = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class RecipeError(Prune2OnnxError):
    """A recipe, option or argument that does not fit (exit status 2)."""

    exit_status = 2


class BudgetError(Prune2OnnxError):
    """A size, density or drop that was asked for was missed (exit status 3)."""

    exit_status = 3


class MismatchError(Prune2OnnxError):
    """onnxruntime's answer differs from the reference (exit status 4)."""

    exit_status = 4


def printable(text: str) -> str:
    r"""A text with what would break the line or steer a terminal escaped.

    >>> printable("fc.weight\n\x1b[2J")
    'fc.weight\\n\\x1b[2J'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; "" where none does."""
    return next((line for line in str(error).splitlines() if line.strip()), "")


def one_line(error: BaseException) -> str:
    """All of an error's text on one line."""
    return " ".join(str(error).split())
