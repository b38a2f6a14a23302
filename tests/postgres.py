"""A PostgreSQL server of the tests' own, on a Unix socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def binaries() -> Path | None:
    """The folder with `initdb` and `pg_ctl`, where there is one; Debian keeps them out of the path."""
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "pg_ctl").exists() and (place / "initdb").exists()), None)


class Server:
    """It runs as another user where the tests run as root, which the server refuses.

    Args:
        folder: Empty; short, since a socket's path must be.
    """

    def __init__(self, folder: Path) -> None:
        found = binaries()
        assert found is not None
        self._binaries, self.folder = found, folder
        self._user = None
        if os.getuid() == 0:
            self._user = next(user.pw_name for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody"))
            shutil.chown(folder, self._user)
        self.run("initdb", "-D", "data", "-A", "trust", "-U", "postgres", "--no-sync", "--no-locale", "-E", "UTF8")
        settings = [f"unix_socket_directories = '{folder}'", "listen_addresses = ''", "fsync = off"]
        (folder / "data" / "postgresql.auto.conf").write_text("\n".join([*settings, ""]))

    def run(self, name: str, *words: str) -> None:
        """Run one of the server's programs."""
        done = subprocess.run(
            [self._binaries / name, *words],
            cwd=self.folder,
            user=self._user,
            env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout

    def start(self) -> None:
        """Start it; returns when it answers."""
        self.run("pg_ctl", "-D", "data", "-l", "log", "-s", "-w", "start")

    def stop(self) -> None:
        """Stop it: connections are closed, and new ones refused."""
        self.run("pg_ctl", "-D", "data", "-s", "-m", "fast", "-w", "stop")

    @property
    def pids(self) -> list[int]:
        """Of the server and of those who serve its connections."""
        first = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    def url(self, database: str = "postgres") -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://postgres:a-secret@/{database}?host={self.folder}"

    def fresh(self) -> str:
        """For SQLAlchemy: a database that nobody has used."""
        name = f"d{time.monotonic_ns()}"
        self.run("createdb", "-h", str(self.folder), "-U", "postgres", name)
        return self.url(name)


@contextmanager
def server() -> Iterator[Server]:
    """A server that runs; the test is skipped where there is none."""
    if binaries() is None:
        pytest.skip("there is no PostgreSQL server here (Debian package postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    folder.chmod(0o755)
    one = Server(folder)
    try:
        one.start()
        yield one
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            one.stop()
        shutil.rmtree(folder, ignore_errors=True)
