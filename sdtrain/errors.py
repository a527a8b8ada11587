"""Mistakes a user can mend. Entry points print them as one sentence and exit with code 2; anything else is a fault."""


class UserError(ValueError):
    """What happened, where, and what to do, in that order, as a sentence."""

    of_all = False
    """All ranks have been told the same: one of them says it."""


class ConfigError(UserError):
    """A configuration that cannot work."""


class DataError(UserError):
    """Shards, images or labels that cannot be used."""


class ShardChanged(DataError):
    """A shard that was replaced, changed or deleted while it was being read from."""


class WeightsError(UserError):
    """A weights file that is missing, damaged or of another network."""


class RunError(UserError):
    """A run folder that cannot be used or resumed."""


class MachineError(RuntimeError):
    """A process that died, hangs or cannot be reached: no mistake of the user's, and worth another attempt."""


class Interrupted(Exception):
    """Long work was left on all ranks because of a request to stop; the run that goes on does it again."""


EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130
