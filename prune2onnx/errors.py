"""The errors a user may meet, each with the exit status of the command line.

Every message names the thing, what arrived, what was expected and what to do; the command line
prints it on one line without a traceback. Any other exception that reaches the user is a bug.
"""


class Prune2OnnxError(Exception):
    """A failure the user can act on (exit status 1).

    Its text may quote a file of unknown origin: line breaks and control characters are escaped.
    """

    exit_status = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class RecipeError(Prune2OnnxError):
    """A recipe, option or argument that does not fit (exit status 2)."""

    exit_status = 2


class BudgetError(Prune2OnnxError):
    """A size, density or accuracy that was asked for was missed (exit status 3)."""

    exit_status = 3


class MismatchError(Prune2OnnxError):
    """onnxruntime's output differs from the reference (exit status 4)."""

    exit_status = 4


class OutOfMemoryError(Prune2OnnxError):
    """There is less memory than what was asked for takes (exit status 1)."""


class RenamedWarning(FutureWarning):
    """A setting was given by an old name that the next version will not accept."""


class DataWarning(UserWarning):
    """Data that can be used, but are probably not what was meant."""


class PruningWarning(UserWarning):
    """A network of which pruning leaves more alone than was probably meant."""


class LowMemoryWarning(UserWarning):
    """There may be less memory than what was asked for takes."""


def printable(text: str) -> str:
    r"""A text with line breaks and terminal control characters escaped.

    >>> printable("fc.weight\n\x1b[2J")
    'fc.weight\\n\\x1b[2J'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_LONGEST = 400  # most characters of a first line


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, cut; the error's type where none is."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)[:_LONGEST]


def one_line(error: BaseException) -> str:
    """All of an error's text on one line; the error's type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
