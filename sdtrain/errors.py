"""Mistakes a user can mend. Entry points print them as one sentence and exit with code 2; anything else is a fault."""


class UserError(ValueError):
    """What happened, where, and what to do, in that order, as a sentence."""

    of_all = False
    """All ranks have been told the same: one of them says it."""
    of_one = False
    """It may be this rank's alone, which never meets the others: it says so itself."""


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


class Together(Exception):
    """What all ranks raise at the same place: none of them has to be told."""


class Interrupted(Together):
    """Work was left on all ranks for this request to stop (`StopRequest.reason`); the run that goes on does it."""

    def __init__(self, reason: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason


class RankFailed(Together):
    """Something has failed on a rank: the same sentence, and the same exit code, on every rank."""

    def __init__(self, sentence: str, code: int, intact: bool = True) -> None:
        """`intact`: the state is that of the step before, on every rank."""
        super().__init__(sentence)
        self.sentence, self.code, self.intact = sentence, code, intact


EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
EXIT_INTERRUPTED = 130
