"""What makes an engine unusable. Imports nothing, so that the command line can know it."""


class EngineError(Exception):
    """The cluster cannot be used, or no longer: one sentence that says why."""
