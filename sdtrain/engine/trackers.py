"""Where the curves of a run are drawn besides metrics.jsonl: TensorBoard and Weights & Biases.

    runs/NAME/
      tensorboard/     event files; a start cuts from the curves what lies behind its position
      wandb/           runs as Weights & Biases writes them; `wandb sync` sends those that were written offline
        told.json      the id of the run there, and what it has been told

The x axis is images seen. Only the main rank has trackers. What one of them cannot write is an OSError.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdtrain.config.compare import to_tree
from sdtrain.config.keys import Config
from sdtrain.errors import ConfigError, RunError
from sdtrain.files import read_json, sweep, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger("sdtrain")

Values = Mapping[str, float]
Told = tuple[str, int, Values]  # name of what is told at a position at most once, images seen, values
FINISH_SEC = 20.0  # for what the server has not got yet; the rest stays in the run folder
FLUSH_SEC = 0.1  # a row that is told so shortly before a kill is lost there, and stays in metrics.jsonl
BINS = 20
MOST_NUMBER = 1 << 53  # beyond it a whole number is no float


class Tracker(Protocol):
    """`folder` is what it writes."""

    folder: Path

    def catch_up(self, rows: Iterable[Told]) -> None:
        """Take the rows of earlier starts that it has not been told."""

    def scalars(self, name: str, seen_img: int, values: Values) -> None: ...

    def image(self, name: str, seen_img: int, picture: NDArray[np.uint8]) -> None:
        """A uint8 [H, W, 3] picture."""

    def histogram(self, name: str, seen_img: int, values: Tensor) -> None: ...

    def close(self) -> None: ...


def open_tracker(kind: str, run_folder: Path, resumed_img: int, config: Config) -> Tracker:
    """Raises OSError, and `RunError` where Weights & Biases cannot go on."""
    return TensorBoard(run_folder, resumed_img) if kind == "tensorboard" else WandB(run_folder, config)


def check_trackers(config: Config) -> None:
    """Raises `ConfigError` for a tracker that is not installed."""
    if "wandb" in config.trackers:
        wandb_package()


def told(row: Mapping[str, Any]) -> Told:
    """What trackers are told of a row: its name, its position, its numbers under the names that curves have."""
    kind, split = row["kind"], row.get("split", "")
    prefix = {"train": "", "perf": "perf/"}.get(kind, f"{kind}/{split}/")
    numbers = {key: value for key, value in row.items() if key != "seen_img" and is_number(value)}
    curves = {f"{prefix}{key}".replace("//", "/"): value for key, value in numbers.items()}
    curves = {name: value for name, value in curves.items() if name.isprintable()}  # a file may hold anything
    return f"{kind}/{split}", int(float(row["seen_img"])), curves


def is_number(value: object) -> bool:
    return isinstance(value, float) or isinstance(value, int) and abs(value) < MOST_NUMBER


class TensorBoard:
    """Event files."""

    def __init__(self, run_folder: Path, resumed_img: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run_folder / "tensorboard"
        self._is_new = not any(self.folder.glob("events.*"))
        hush_board()
        self._writer = SummaryWriter(str(self.folder), purge_step=resumed_img + 1)

    def catch_up(self, rows: Iterable[Told]) -> None:
        if self._is_new:  # else they are there, up to the position of this start
            for row in rows:
                self.scalars(*row)

    def scalars(self, name: str, seen_img: int, values: Values) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, seen_img)

    def image(self, name: str, seen_img: int, picture: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, picture, seen_img, dataformats="HWC")

    def histogram(self, name: str, seen_img: int, values: Tensor) -> None:
        self._writer.add_histogram(name, values, seen_img, bins=BINS)

    def close(self) -> None:
        self._writer.close()


def hush_board() -> None:
    """TensorBoard writes in a thread, which prints its own traceback before it hands the error to us."""
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            usual(args)

    threading.excepthook = hook


@dataclass(frozen=True)
class Mark:
    """How far Weights & Biases has been told, over all starts of a run."""

    id: str
    calls: int = 0
    seen_img: int = -1
    names: tuple[str, ...] = ()  # what it was told of `seen_img`

    def covers(self, name: str, seen_img: int) -> bool:
        return seen_img < self.seen_img or seen_img == self.seen_img and name in self.names

    def moved(self, name: str, seen_img: int) -> Mark:
        names = (*self.names, name) if seen_img == self.seen_img else (name,)
        return replace(self, calls=self.calls + 1, seen_img=seen_img, names=names)


class WandB:
    """One run of Weights & Biases, whatever number of starts.

    It forgets nothing, so what a start repeats after a kill, which is the same to the bit, is not told again.
    Offline, unless WANDB_MODE says otherwise or WANDB_API_KEY is set; its other variables hold too.
    """

    def __init__(self, run_folder: Path, config: Config) -> None:
        self.folder = run_folder / "wandb"
        self.folder.mkdir(exist_ok=True)
        sweep(self.folder)
        self._package = wandb_package()
        self._mark = read_mark(self.folder / "told.json")
        self._note(self._mark)
        with self._as_writing():
            self._run = self._start(run_folder, config)

    def _start(self, run_folder: Path, config: Config) -> Any:
        settings = {"silent": True, "console": "off", "symlink": False, "finish_timeout": FINISH_SEC}
        settings |= {"x_transaction_log_flush_interval": FLUSH_SEC}
        try:
            run = self._package.init(
                project=os.environ.get("WANDB_PROJECT", "sdtrain"),
                name=os.environ.get("WANDB_NAME", config.name),
                id=self._mark.id,
                resume="allow",
                mode=(mode := wandb_mode()),
                dir=str(run_folder),
                config=to_tree(config),
                settings=self._package.Settings(**settings),
            )
        except (self._package.errors.Error, ValueError) as error:
            offline = "set WANDB_MODE=offline, or take wandb out of tracker"
            raise RunError(f"Weights & Biases does not start ({' '.join(str(error).split())}): {offline}") from error
        run.define_metric("seen_img", hidden=True)
        run.define_metric("*", step_metric="seen_img")
        sent_by = f"is written here; to send it: wandb sync {self.folder}/offline-run-*"
        where = f"is at {run.url}" if mode == "online" else sent_by
        log.info("Weights & Biases: run %s %s", self._mark.id, "is told nothing" if mode == "disabled" else where)
        return run

    def catch_up(self, rows: Iterable[Told]) -> None:
        for name, seen_img, values in rows:
            self._mark = self._tell(name, seen_img, values)
        self._note(self._mark)

    def scalars(self, name: str, seen_img: int, values: Values) -> None:
        self._note(self._tell(name, seen_img, values))

    def image(self, name: str, seen_img: int, picture: NDArray[np.uint8]) -> None:
        self._note(self._tell(name, seen_img, {name: self._package.Image(picture)}))

    def histogram(self, name: str, seen_img: int, values: Tensor) -> None:
        self._note(self._tell(name, seen_img, {name: self._package.Histogram(values.tolist(), num_bins=BINS)}))

    def close(self) -> None:
        with self._as_writing():
            self._run.finish()

    def _tell(self, name: str, seen_img: int, values: Mapping[str, Any]) -> Mark:
        if self._mark.covers(name, seen_img) or self._run.disabled:
            return self._mark
        with self._as_writing():
            self._run.log({**values, "seen_img": seen_img}, step=self._mark.calls, commit=True)
        return self._mark.moved(name, seen_img)

    def _note(self, mark: Mark) -> None:
        """Written after each call: a disk that is full shows here, where the package only notes it in its own log."""
        write_json(self.folder / "told.json", asdict(mark))
        self._mark = mark

    @contextmanager
    def _as_writing(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            with suppress(ConnectionError):  # else the end of this process would tell the one that is gone to end
                self._package.teardown()
            raise OSError("the process of Weights & Biases has ended") from error
        except self._package.errors.Error as error:
            raise OSError(f"Weights & Biases: {error}") from error


def wandb_mode() -> str:
    """online, offline or disabled: compute nodes seldom have a network, so online is for those who ask for it."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def wandb_package() -> Any:
    """The package. Raises `ConfigError` where it is not installed."""
    try:
        import wandb

        _ = wandb.init  # a folder of runs is a package too, an empty one
    except (ImportError, AttributeError) as error:
        install = "pip install 'sdtrain[wandb]', or write tracker: tensorboard"
        raise ConfigError(f"tracker wandb needs the package of Weights & Biases ({error}): {install}") from error
    return wandb


def read_mark(path: Path) -> Mark:
    """A new one where none is written. Raises `RunError` for a damaged file."""
    if not os.path.lexists(path):
        return Mark(id=secrets.token_hex(4))
    try:
        found = read_json(path)
        mark = Mark(**{**found, "names": tuple(map(str, found["names"]))})
        numbers = [mark.calls, mark.seen_img]
        if not (re.fullmatch("[0-9a-f]{8}", mark.id) and all(type(n) is int and -1 <= n < 1 << 53 for n in numbers)):
            raise ValueError("it is not what a run writes")
    except (OSError, ValueError, TypeError, LookupError) as error:
        again = "put it back, or remove it, and Weights & Biases begins another run with the whole curve"
        raise RunError(f"{path} is damaged ({error}): {again}") from error
    return mark
