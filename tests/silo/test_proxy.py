"""Through a hospital's HTTP proxy: enrolment and the agent's calls, and what is said when it will
not let them pass. No message holds the proxy's password."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator import admin as centre_admin
from silo import admin
from silo.agent import run
from silo.config import SiloConfig, load_config
from silo.errors import ConfigError, EnrolmentError
from silo.home import SiloHome
from silo.reach import Unreachable, parse_proxy, proxy_of
from tests.silo.centre import AgentProcess, Centre, make_site
from tests.silo.proxy import ConnectProxy

PASSWORD = "hunter2-sesame"


@pytest.fixture
async def centre(tmp_path: Path) -> AsyncIterator[Centre]:
    made = Centre(tmp_path / "centre")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def proxy() -> AsyncIterator[ConnectProxy]:
    made = ConnectProxy(f"ward:{PASSWORD}")
    await made.start()
    yield made
    await made.stop()


def through(home: Path, url: str) -> None:
    config = home / "site.toml"
    config.write_text(config.read_text() + f'\n[coordinator]\nproxy = "{url}"\n')


async def enrol(centre: Centre, home: Path) -> None:
    token = centre_admin.invite(centre.home, "north")
    joining = asyncio.create_task(admin.join(home, token, lambda _: None))
    approving = asyncio.create_task(centre.approve("north"))
    done, _ = await asyncio.wait([joining, approving], return_when=asyncio.FIRST_COMPLETED)
    if joining in done:
        approving.cancel()
    await joining


async def test_a_site_joins_and_works_through_a_proxy_that_wants_a_password(
    centre: Centre, proxy: ConnectProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    home = make_site(tmp_path, "north")
    through(home, proxy.url(f"ward:{PASSWORD}"))
    await enrol(centre, home)
    agent = asyncio.create_task(run(home))
    async with asyncio.timeout(120):
        while (admin.status(home).get("last_contact")) is None:
            await asyncio.sleep(0.1)
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)
    assert set(proxy.connected) == {centre.address}
    assert len(proxy.connected) >= 2, "once to join, once to work"
    assert PASSWORD not in caplog.text
    assert PASSWORD not in (home / "status.json").read_text()


async def test_an_agent_listens_on_nothing_and_dials_one_port(
    centre: Centre, tmp_path: Path
) -> None:
    home = make_site(tmp_path, "north")
    await enrol(centre, home)
    agent = AgentProcess(home)
    try:
        async with asyncio.timeout(60):
            while admin.status(home).get("last_contact") is None:
                await asyncio.sleep(0.1)
        sockets = sockets_of(agent.process.pid)
    finally:
        agent.kill()
    assert {remote for state, remote in sockets if state == _ESTABLISHED} == {centre.address}
    assert not [state for state, _ in sockets if state == _LISTENING]


_ESTABLISHED, _LISTENING = "01", "0A"


def sockets_of(process: int) -> list[tuple[str, str]]:
    """(state, remote address) of every TCP socket of a process."""
    own = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                own.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in own:
                host, _, port = fields[2].rpartition(":")
                address = socket.inet_ntoa(bytes.fromhex(host[-8:])[::-1])
                found.append((fields[3], f"{address}:{int(port, 16)}"))
    return found


async def test_the_environment_s_proxy_is_taken_and_no_proxy_goes_around_it(
    centre: Centre, proxy: ConnectProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", proxy.url(f"ward:{PASSWORD}"))
    home = make_site(tmp_path, "north")
    await enrol(centre, home)
    assert proxy.connected
    before = len(proxy.connected)
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.0/8")
    assert proxy_of(centre.address, "") is None
    agent = asyncio.create_task(run(home))
    async with asyncio.timeout(120):
        while (admin.status(home).get("last_contact")) is None:
            await asyncio.sleep(0.1)
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)
    assert len(proxy.connected) == before


@pytest.mark.parametrize(
    ("user", "said"),
    [("", "wants a name"), ("ward:wrong-" + PASSWORD, "does not take the name and password given")],
)
async def test_a_proxy_that_wants_another_password_is_named_without_it(
    centre: Centre, proxy: ConnectProxy, tmp_path: Path, user: str, said: str
) -> None:
    home = make_site(tmp_path, "north")
    through(home, proxy.url(user))
    with pytest.raises(EnrolmentError) as error:
        await enrol(centre, home)
    assert f"127.0.0.1:{proxy.port} {said}" in str(error.value)
    assert PASSWORD not in str(error.value)
    assert PASSWORD not in repr(error.value.__cause__)
    assert proxy.connected == []


async def test_a_proxy_that_forbids_or_is_not_there_is_named(
    centre: Centre, tmp_path: Path
) -> None:
    strict = ConnectProxy(forbidding=True)
    await strict.start()
    home = make_site(tmp_path, "north")
    through(home, strict.url())
    with pytest.raises(EnrolmentError, match=f"says 403 when asked for {centre.address}"):
        await enrol(centre, home)
    await strict.stop()
    with pytest.raises(EnrolmentError, match="the proxy .* cannot be reached"):
        await enrol(centre, home)


def test_a_wrong_proxy_is_refused_without_its_password(tmp_path: Path) -> None:
    for url in (
        f"https://ward:{PASSWORD}@proxy:1",
        f"http://ward:{PASSWORD}@proxy:port",
        "http://",
    ):
        with pytest.raises(ValueError, match="is no proxy") as error:
            parse_proxy(url)
        assert PASSWORD not in str(error.value)
    home = make_site(tmp_path, "north")
    through(home, f"ftp://ward:{PASSWORD}@proxy:1")
    with pytest.raises(ConfigError, match="coordinator.proxy") as refused:
        load_config(SiloHome(home))
    assert PASSWORD not in str(refused.value)


def test_a_proxy_s_password_is_in_no_repr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_site(tmp_path, "north")
    through(home, f"http://ward:{PASSWORD}@proxy:1")
    config: SiloConfig = load_config(SiloHome(home))
    assert PASSWORD not in repr(config)
    assert PASSWORD not in repr(parse_proxy(f"http://ward:{PASSWORD}@proxy:1"))
    monkeypatch.setenv("grpc_proxy", f"socks://ward:{PASSWORD}@proxy:1")
    with pytest.raises(Unreachable) as error:
        proxy_of("example.org:1", "")
    assert PASSWORD not in str(error.value)
