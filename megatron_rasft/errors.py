"""What can go wrong in the world. What a user typed wrongly is a ValueError instead."""


class RasftError(Exception):
    """Base of the errors this package raises for the state of the world; the message is meant to be read."""


class DataError(RasftError):
    """A data file is missing, empty or holds rows that cannot be used."""


class ModelFolderError(RasftError):
    """A Hugging Face folder is incomplete, unsupported or does not fit the run."""


class CheckpointError(RasftError):
    """A checkpoint belongs to another run or model, is incomplete, or could not be written."""


class RolloutError(RasftError):
    """A rollout engine could not deliver what the run cannot go on without."""
