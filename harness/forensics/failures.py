"""Why a finished run cannot be taken up again. Torch-free, so that the command line can name them."""


class NothingToReplay(Exception):
    """A run that did not fail, or that kept nothing to replay its failure from."""


class SnapshotError(Exception):
    """A stored snapshot that is damaged or of another run."""


class RebuildError(Exception):
    """A run that cannot be made again here; says what differs."""
