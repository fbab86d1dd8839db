"""What can go wrong in a run, each with the exit status that the scripts end with."""


class GraftingError(Exception):
    """A failure whose message is one sentence for the user: what was found, what was expected, what to do."""

    exit_status = 1


class MismatchError(GraftingError, ValueError):
    """Two networks that cannot be blended; the message names the first entry that differs, and both sides."""


class CheckpointError(GraftingError, ValueError):
    """A file that is not the checkpoint it should be: truncated, damaged, foreign, malicious or of another run."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be good, but cannot be read just now: for its disk, its permissions or want of memory."""


class DataError(GraftingError):
    """Images that cannot be had as asked: a folder laid out in another way, a file that is no image."""


class WriteError(GraftingError, OSError):
    """A file that could not be written: the disk is full, read-only or gone."""


class RefusedError(GraftingError):
    """A start that would collide with a run that the save directory already holds."""


class NeighbourTimeout(GraftingError):
    """The neighbour gave no sign of life for as long as the user said to wait."""

    exit_status = 3
