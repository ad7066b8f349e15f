"""A PostgreSQL server of the tests' own, in a temporary folder, where it is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from uuid import uuid4

from sqlalchemy import create_engine, text

from concilium.demo.federation import free_port

WANTED = "needs PostgreSQL's server programs (Debian: apt-get install postgresql)"


def programs() -> Path | None:
    """The folder of initdb and pg_ctl, the newest version's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.append(Path(on_path))
    return found[-1].parent if found else None


class Server:
    """A cluster on loopback that trusts everybody who reaches it; gone when it is stopped."""

    def __init__(self, folder: Path) -> None:
        self._bin, self.port = folder, free_port()
        # The server refuses to run as root, and its user has to reach every folder above its own.
        self._user = "postgres" if os.getuid() == 0 else None
        self._root = Path(mkdtemp(prefix="concilium-postgres-", dir="/tmp"))
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self._root, account.pw_uid, account.pw_gid)
        self._data = self._root / "data"
        made = ["--username=test", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        self._call(["initdb", *made, f"--pgdata={self._data}"])
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off"
        options += " -c unix_socket_directories="
        log = self._root / "log"
        self._call(["pg_ctl", "-D", str(self._data), "-w", "-l", str(log), "-o", options, "start"])

    def halt(self, mode: str = "fast") -> None:
        self._call(["pg_ctl", "-D", str(self._data), "-w", "-m", mode, "stop"])

    def stop(self) -> None:
        self.halt("immediate")
        shutil.rmtree(self._root)

    def new_database(self, port: int | None = None) -> str:
        """The URL of an empty database."""
        name = f"t{uuid4().hex}"
        engine = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self._url(name, port)

    def _url(self, name: str, port: int | None = None) -> str:
        return f"postgresql+psycopg://test@127.0.0.1:{port or self.port}/{name}"

    def _call(self, command: Sequence[str]) -> None:
        # By a program, not by `user=` or `preexec_fn`: with these Python forks, and gRPC's handlers
        # of a fork may abort the child where a server runs in this process.
        user = self._user
        become = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        full = [str(self._bin / command[0]), *command[1:]]
        subprocess.run(
            ["setpriv", *become, *full] if user else full,
            check=True,
            cwd=self._root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )
