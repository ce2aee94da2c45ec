"""The errors a user may meet, each with the exit status of the command line.

Every message names the thing, what arrived, what was expected and what to do; the command line
prints it on one line without a traceback. Anything else that escapes is a defect of ours.
"""


class Prune2OnnxError(Exception):
    """A failure the user can act on (exit status 1)."""

    exit_status = 1


class RecipeError(Prune2OnnxError):
    """A recipe, option or argument that does not fit (exit status 2)."""

    exit_status = 2


class MismatchError(Prune2OnnxError):
    """onnxruntime's answer differs from the reference (exit status 4)."""

    exit_status = 4


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; "" where none does."""
    return next((line for line in str(error).splitlines() if line.strip()), "")


def one_line(error: BaseException) -> str:
    """All of an error's text on one line."""
    return " ".join(str(error).split())
