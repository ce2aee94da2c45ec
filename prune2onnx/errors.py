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
