"""Workers of a sweep that start at the same moment, where there is no database and no list yet."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import postgresql
import pytest
import sqlalchemy
from places import ROOT

BUDGETS = {"sizes": [500, 2000], "seeds": [0, 1]}
NAMES = sorted(f"size-{size}-seed{seed}" for size in BUDGETS["sizes"] for seed in BUDGETS["seeds"])


class Worker:
    """A process that does one sweep after another, with pretended runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdin and process.stdout
        self.asked, self.answers = process.stdin, process.stdout
        assert self.answer() == "ready"

    def ask(self, folder: Path, url: str | None, log: Path, **more: object) -> None:
        asked = {"folder": str(folder), "url": url, "log": str(log), "dies_after": None}
        self.asked.write(json.dumps({**asked, "budgets": BUDGETS, **more}) + "\n")
        self.asked.flush()

    def answer(self) -> str:
        return json.loads(self.answers.readline())


@contextmanager
def started(count: int) -> Iterator[list[Worker]]:
    command = [sys.executable, ROOT / "tests" / "support" / "sweep_worker.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(count)]
    try:
        yield [Worker(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    with started(3) as made:
        yield made


@pytest.fixture(scope="module")
def new_database() -> Iterator[Callable[[str], str]]:
    """Makes an empty database on a server, and gives its URL."""
    if reason := postgresql.missing():
        pytest.skip(reason)
    psycopg = pytest.importorskip("psycopg", reason="pip install 'prune2onnx[postgresql]'")
    with postgresql.server() as url, psycopg.connect(url.format("postgres")) as connection:
        connection.autocommit = True

        def new(name: str) -> str:
            connection.execute(f"CREATE DATABASE {name}")
            return url.format(name)

        yield new


def at_once(workers: list[Worker], folders: list[Path], url: str | None, log: Path) -> list[str]:
    """What each worker returned: a Pareto front as JSON, or an error."""
    for worker, folder in zip(workers, folders, strict=True):
        worker.ask(folder, url, log)
    return [worker.answer() for worker in workers]


def states(url: str) -> list[str]:
    """The state of every run in a database."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(sqlalchemy.text("SELECT state FROM trials")))


def check(fronts: list[str], url: str, log: Path) -> None:
    """All have one front, every run is done once, and nothing else is in the list."""
    assert len(set(fronts)) == 1 and fronts[0].startswith("{"), fronts
    points = json.loads(fronts[0])["points"]
    assert sorted(point["name"] for point in points) == NAMES
    assert {point["state"] for point in points} == {"done"}
    assert sorted(log.read_text().split()) == NAMES
    assert states(url) == len(NAMES) * ["COMPLETE"]


@pytest.mark.parametrize("time", range(3))
def test_on_an_empty_server(workers, new_database, tmp_path, time):
    url, log = new_database(f"time{time}"), tmp_path / "log"
    folders = [tmp_path / str(number) for number in range(3)]
    check(at_once(workers, folders, url, log), url, log)


def test_a_list_that_a_killed_worker_left_incomplete_is_completed(workers, new_database, tmp_path):
    url, log = new_database("killed"), tmp_path / "log"
    with started(1) as (dying,):
        dying.ask(tmp_path / "dying", url, log, dies_after=2)
        assert dying.process.wait(timeout=60) == -signal.SIGKILL
    assert states(url) == 2 * ["WAITING"] and not log.exists()
    folders = [tmp_path / str(number) for number in range(3)]
    check(at_once(workers, folders, url, log), url, log)


def test_in_one_empty_folder(workers, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "sweep"
    check(at_once(workers, 3 * [folder], None, log), f"sqlite:///{folder}/sweep.db", log)


def test_in_folders_of_their_own_with_one_new_file(workers, tmp_path):
    url, log = f"sqlite:///{tmp_path}/shared.db", tmp_path / "log"
    folders = [tmp_path / str(number) for number in range(3)]
    check(at_once(workers, folders, url, log), url, log)


def test_of_different_sweeps_in_one_folder_one_goes_on(workers, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "sweep"
    one, other, _ = workers
    one.ask(folder, None, log)
    other.ask(folder, None, log, budgets={"sizes": [9000]})
    answers = [one.answer(), other.answer()]
    refused = [answer for answer in answers if not answer.startswith("{")]
    assert len(refused) == 1 and "holds a sweep with other settings" in refused[0]
