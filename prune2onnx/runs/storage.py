"""The database of a sweep or a search, and the locks of its workers: who may add runs, errors.

What stands in the database is the business of `runs.study` and `runs.tuning`.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from prune2onnx.errors import Prune2OnnxError, RecipeError, one_line

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study

STUDY = "sweep.db"

_TAKE = {
    "postgresql": "SELECT pg_try_advisory_xact_lock(7095119461)",
    "mysql": "SELECT GET_LOCK('prune2onnx', 0)",
    "mariadb": "SELECT GET_LOCK('prune2onnx', 0)",
}
"""Database -> the query that takes the lock of all workers, if it is free.

The server releases it at the end of the transaction or of the connection, so also when the worker
is killed. The number is ours, and means nothing.
"""

BEAT = 30
"""Seconds between heartbeats."""

GRACE = 120
"""Seconds without a heartbeat after which a run has lost its worker."""

_WAIT = 600.0  # seconds; adding a list takes a few
_POLL = 0.1


def default_storage(directory: Path) -> str:
    """URL of the database in a sweep's folder."""
    path = str(directory / STUDY).replace("{", "{{").replace("}", "}}")  # optuna fills in a version
    return f"sqlite:///{path}"


def public_url(url: str) -> str:
    """A URL without its password.

    Raises:
        RecipeError: it is no URL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError) as error:
        raise RecipeError(
            f"storage is {url.partition('@')[2] or url!r}, expected a URL that optuna takes, such "
            "as sqlite:///sweep.db or postgresql://user@host/database"
        ) from error


def unusable(url: str, error: BaseException) -> Prune2OnnxError:
    """The one error for everything that goes wrong with a database."""
    from sqlalchemy.engine import make_url

    while error.__cause__ is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    if isinstance(error, ImportError):
        advice = "install that driver, or name another one in the URL, as in mysql+pymysql://"
        if make_url(url).drivername in ("postgresql", "postgresql+psycopg"):
            advice = "install the driver with pip install 'prune2onnx[postgresql]'"
    else:
        advice = "check the URL, and that the server runs"
    return Prune2OnnxError(
        f"{public_url(url)}: the sweep's storage cannot be used: {one_line(error)[:300]}; {advice}"
    )


@contextlib.contextmanager
def errors_of(url: str, *types: type[Exception]) -> Iterator[None]:
    """Turns the errors of a database, and those of other types, into one clear error."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    caught: tuple[type[Exception], ...] = (StorageInternalError, SQLAlchemyError, *types)
    try:
        yield
    except Prune2OnnxError:
        raise
    except caught as error:
        raise unusable(url, error) from error


def opened(url: str) -> RDBStorage:
    """The database, in which each run has a heartbeat; `errors_of` is around it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options: dict[str, Any] = {}
    if url.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(url, options, heartbeat_interval=BEAT, grace_period=GRACE)


def close(storage: RDBStorage, url: str) -> None:
    """Closes the connections to a database."""
    with errors_of(url):
        storage.remove_session()
        storage.engine.dispose()


def fail_stale(study: Study) -> None:
    """Marks the runs of a study as failed that have lost their worker, as heartbeats say."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


@contextlib.contextmanager
def beating(storage: RDBStorage, beat: Callable[[], None]) -> Iterator[None]:
    """Calls `beat`, which sends a run's heartbeat, again and again, and once at the end."""
    over = threading.Event()

    def once() -> None:
        with contextlib.suppress(Exception):  # the next heartbeat may succeed
            beat()

    def beats() -> None:
        while not over.wait(BEAT):
            once()
        once()
        storage.remove_session()

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def lock_of(directory: Path, name: str) -> FileLock:
    """A lock in a sweep's folder; it is released when the process that holds it ends."""
    folder = directory / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Prune2OnnxError(
            f"{folder}: cannot be made: {error.strerror or error}; choose another folder with -o"
        ) from error
    return FileLock(folder / name)


def claim_lock(url: str, directory: Path) -> FileLock:
    """A lock for claiming runs.

    SQLite cannot lock rows, so the lock lies beside the database, for all its workers. Servers lock
    rows themselves: there the lock is the folder's.
    """
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    database = parsed.database
    if parsed.get_backend_name() == "sqlite" and database and database != ":memory:":
        path = Path(database.replace("{{", "{").replace("}}", "}"))
        if path.parent.is_dir():
            return FileLock(path.with_name(f"{path.name}.lock"))
    return lock_of(directory, "study")


@contextlib.contextmanager
def one_at_a_time(url: str) -> Iterator[None]:
    """Lets one worker of a server's database go on, wherever the others run.

    For making tables and adding runs: servers lock the rows that are there, not those that are yet
    to come. Where the database is a file this does nothing; `claim_lock` does it all.

    Raises:
        Prune2OnnxError: another worker holds the lock for too long.
    """
    import sqlalchemy

    parsed = sqlalchemy.make_url(url.format(SCHEMA_VERSION=12))  # filled in as optuna does it
    take = _TAKE.get(parsed.get_backend_name())
    if take is None:
        yield
        return
    # a connection of its own, closed at the end
    engine = sqlalchemy.create_engine(parsed, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        until = time.monotonic() + _WAIT
        while not connection.scalar(sqlalchemy.text(take)):
            if time.monotonic() > until:
                raise Prune2OnnxError(
                    f"{public_url(url)}: another worker has been adding the runs for more than "
                    f"{_WAIT:.0f} seconds; if it hangs, end it"
                )
            time.sleep(_POLL)
        yield
