"""Errors that a user can mend: each message says what was found, what was expected and how to get there."""


class DsvtError(Exception):
    """Base of the errors raised on purpose; the command line prints them without a traceback."""


class ConfigError(DsvtError):
    """A configuration value, key or model description is unknown or impossible."""


class PointCloudError(DsvtError):
    """A point cloud lacks x, y or z, has inconsistent sizes or the wrong number of columns."""


class DataError(DsvtError):
    """A file or bag with clouds or labels is missing, empty or not what it claims to be."""


class ModelError(DsvtError):
    """A model folder or weights file is missing, corrupt or belongs to another model."""


class EngineError(DsvtError):
    """An inference engine or exported network cannot be built, loaded or run."""
