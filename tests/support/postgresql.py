"""A PostgreSQL server of our own in a temporary folder, reached by a socket, not by the network."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

PLACES = (*os.environ.get("PATH", "").split(os.pathsep), *Path("/usr/lib/postgresql").glob("*/bin"))
"""Debian keeps the programs of a server out of PATH."""


def missing() -> str:
    """Why no server can be started; empty where one can."""
    if shutil.which("initdb", path=_path()) is None or shutil.which("pg_ctl", path=_path()) is None:
        return "PostgreSQL is not installed: no initdb and pg_ctl in PATH or /usr/lib/postgresql"
    if os.name != "posix":
        return "the server of this test listens on a Unix socket"
    if os.getuid() == 0 and (shutil.which("setpriv") is None or not _other_user()):
        return "PostgreSQL does not run as root, and setpriv or a user for it is missing"
    return ""


def _path() -> str:
    return os.pathsep.join(map(str, PLACES))


def _other_user() -> str:
    """A user without rights; a server refuses to run as root."""
    import pwd

    names = {user.pw_name for user in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), "")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts a server, and stops it at the end; gives the URL of a database, to be filled in."""
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 bytes
    prefix: list[str] = []
    if os.getuid() == 0:
        user = _other_user()
        shutil.chown(folder, user)
        prefix = ["setpriv", f"--reuid={user}", "--clear-groups"]
    run = [*prefix, "env", f"PATH={_path()}"]
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    data, log = folder / "data", folder / "log"
    try:
        subprocess.run(
            [
                *run,
                "initdb",
                "-D",
                data,
                "-U",
                "tester",
                "-A",
                "trust",
                "-N",
                "-E",
                "UTF8",
                "--no-locale",
            ],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        control = [*run, "pg_ctl", "-D", data, "-l", log, "-w"]
        subprocess.run([*control, "-o", options, "start"], check=True, cwd=folder, timeout=60)
        try:
            yield f"postgresql://tester@/{{}}?host={quote(str(folder))}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
