"""What can go wrong while networks are grafted: each error's message is one sentence for the user."""


class GraftingError(Exception):
    """A failure that says what was found, what was expected and what to do, in words of arguments and methods."""


class MismatchError(GraftingError, ValueError):
    """Two networks that cannot be blended; the message names the first entry that differs, and both sides."""


class CheckpointError(GraftingError, ValueError):
    """A file that is not the checkpoint it should be: truncated, damaged, foreign, malicious or of another run."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be good, but cannot be read just now: for its disk, its permissions or want of memory."""


class WriteError(GraftingError, OSError):
    """A file that could not be written: the disk is full, read-only or gone."""


class RefusedError(GraftingError):
    """A start that would collide with a run that the directory already holds; it has changed nothing there."""


class AlreadyRunError(RefusedError):
    """The network has run in this directory before, and was not asked to resume."""


class AliveError(RefusedError):
    """Another living process is this very network, or has become it while this one stood still."""


class SettingsError(RefusedError):
    """The settings differ from those that the run was started with."""


class NeighbourTimeout(GraftingError, TimeoutError):
    """The neighbour made no progress for as long as the caller said to wait."""
