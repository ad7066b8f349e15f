"""Who gets in: invitations, certificates, revocation. Each refusal reaches whoever caused it."""

from __future__ import annotations

import asyncio
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator import admin, registry
from coordinator.audit import verified
from coordinator.authority import Authority
from coordinator.config import ConfigError, Home, read_config
from coordinator.server import CoordinatorServer, ServerCertificates, ServerError
from coordinator.store import Store, StoreError
from protos.v1 import coordination_pb2 as pb
from protos.v1 import enrolment_pb2 as join_pb
from protos.v1.coordination_pb2_grpc import CoordinationStub
from protos.v1.enrolment_pb2_grpc import EnrolmentStub
from study.invitation import Invitation, InvitationError
from tests.coordinator.agent import (
    Credentials,
    certificate_request,
    join,
    join_request,
    new_key,
)
from tests.coordinator.federation import Federation


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    return error.value.code(), str(error.value.details())


def fresh_request() -> join_pb.JoinRequest:
    return join_request(new_key()[0], Ed25519PrivateKey.generate())


async def test_an_invitation_lets_one_key_in_once_and_the_same_request_any_number_of_times(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        token, request = admin.invite(federation.home, "st-marys"), fresh_request()
        first = await join(token, request)
        assert first == await join(token, request)
        assert first.state == join_pb.JoinReply.PENDING
        (waiting,) = admin.pending(federation.home)
        assert waiting.fingerprint == first.fingerprint
        code, text = await refused(join(token, fresh_request()))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "used already, with another key" in text
        admin.approve(federation.home, "st-marys")
        second = await join(token, request)
        assert second.state == join_pb.JoinReply.APPROVED
        assert second == await join(token, request)


async def test_an_invitation_that_was_replaced_forged_or_has_expired_is_refused(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        home, place = federation.home, Home(federation.home)
        replaced = admin.invite(home, "st-marys")
        admin.invite(home, "st-marys")
        code, text = await refused(join(replaced, fresh_request()))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "replaced by a later one" in text

        stranger = Authority.create(tmp_path / "stranger")
        forged = stranger.invitation("st-marys", "0" * 32, federation.address, 1)
        ours = Authority.load(place.authority)
        trusting = Invitation(**{**vars(forged), "authority_pem": ours.pem})
        for token in (forged.encode(), trusting.encode()):
            code, _ = await refused(join(token, fresh_request()))
            assert code == grpc.StatusCode.UNAVAILABLE

        long_ago = datetime.now(UTC) - timedelta(hours=2)
        expired = ours.invitation("st-marys", "1" * 32, federation.address, 1, now=long_ago)
        code, _ = await refused(join(expired.encode(), fresh_request()))
        assert code == grpc.StatusCode.UNAVAILABLE

        with pytest.raises(InvitationError):
            Invitation.decode("concilium-ü" + replaced[11:])
        with pytest.raises(InvitationError, match="copy the whole line"):
            Invitation.decode(replaced[:-7])


async def test_the_store_knows_when_an_invitation_ends_whatever_its_certificate_says(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        ours = Authority.load(Home(federation.home).authority)
        made = ours.invitation("st-marys", "2" * 32, federation.address, 1)
        store = Store(f"sqlite:///{federation.home / 'store.sqlite'}")
        store.run(registry.invite, "st-marys", "2" * 32, time.time() - 1)
        store.close()
        code, text = await refused(join(made.encode(), fresh_request()))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert "has expired: ask the study centre for a new one" in text


async def test_each_certificate_opens_its_own_calls_only(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join("site-1")
        made = Invitation.decode(admin.invite(federation.home, "site-2"))
        invited = Credentials(made.private_key_pem, made.certificate_pem, made.authority_pem)
        async with invited.channel(made.address) as channel:
            code, text = await refused(CoordinationStub(channel).NextTask(pb.NextTaskRequest()))
            assert (code, "joining only" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)
        silo = federation.silos["site-1"]
        async with silo.credentials.channel(federation.address) as channel:
            code, text = await refused(EnrolmentStub(channel).Join(fresh_request()))
            assert (code, "joined already" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)
        anonymous = grpc.aio.secure_channel(
            federation.address, grpc.ssl_channel_credentials(made.authority_pem)
        )
        async with anonymous as channel:
            code, _ = await refused(CoordinationStub(channel).NextTask(pb.NextTaskRequest()))
            assert code == grpc.StatusCode.UNAVAILABLE


async def test_a_request_that_proves_nothing_is_refused(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        token = admin.invite(federation.home, "st-marys")
        for field, value, words in (
            ("identity_proof", bytes(64), "does not prove identity_key"),
            ("identity_proof", bytes(63), "has 63 bytes, not 64"),
            ("identity_key", b"", "identity_key is missing"),
            ("certificate_request", b"nonsense", "no PKCS#10 request"),
            ("certificate_request", bytes(9000), "at most 8192"),
            ("agent_version", "", "agent_version is missing"),
        ):
            request = fresh_request()
            setattr(request, field, value)
            code, text = await refused(join(token, request))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert words in text
        assert admin.pending(federation.home) == []


async def test_a_renewed_certificate_works_at_once_and_a_revoked_silo_is_refused_in_open_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.service._LOOK_AGAIN", 60.0)
    async with Federation(tmp_path) as federation:
        await federation.join("site-1", "site-2")
        silo = federation.silos["site-1"]
        key, pem = new_key()
        async with silo.credentials.channel(federation.address) as channel:
            request = join_pb.RenewRequest(certificate_request=certificate_request(key))
            renewed = await EnrolmentStub(channel).Renew(request)
            assert renewed == await EnrolmentStub(channel).Renew(request)
        fresh = Credentials(pem, renewed.certificate, silo.credentials.authority)
        async with fresh.channel(federation.address) as channel:
            stub = CoordinationStub(channel)
            poll = asyncio.ensure_future(stub.NextTask(pb.NextTaskRequest(wait_seconds=60)))
            await asyncio.sleep(0.3)
            admin.revoke(federation.home, "site-1")
            began = time.monotonic()
            code, text = await refused(poll)
            assert code == grpc.StatusCode.PERMISSION_DENIED
            assert "revoked" in text
            assert time.monotonic() - began < 20, "it did not wait to look again by itself"
            code, _ = await refused(stub.NextTask(pb.NextTaskRequest()))
            assert code == grpc.StatusCode.PERMISSION_DENIED
        other = federation.silos["site-2"]
        async with other.credentials.channel(federation.address) as channel:
            task = await CoordinationStub(channel).NextTask(pb.NextTaskRequest())
            assert task.WhichOneof("task") == "idle"


async def test_who_asks_for_certificates_without_end_has_a_few_good_ones_and_the_one_it_shows(
    tmp_path: Path,
) -> None:
    """A silo to which no answer comes through goes on with its first certificate."""
    async with Federation(tmp_path) as federation:
        await federation.join("site-1")
        first, given = federation.silos["site-1"].credentials, []
        async with first.channel(federation.address) as channel:
            stub = EnrolmentStub(channel)
            for _ in range(9):
                key, pem = new_key()
                request = join_pb.RenewRequest(certificate_request=certificate_request(key))
                reply = await stub.Renew(request)
                given.append(Credentials(pem, reply.certificate, first.authority))
            request = join_pb.RenewRequest(certificate_request=certificate_request(key))
            code, text = await refused(stub.Renew(request))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "10 certificates within an hour: the one that it has stays good" in text
        for made, good in ((first, True), (given[0], False), (given[2], False), (given[3], True)):
            async with made.channel(federation.address) as channel:
                poll = CoordinationStub(channel).NextTask(pb.NextTaskRequest())
                if good:
                    assert (await poll).WhichOneof("task") == "idle"
                else:
                    code, text = await refused(poll)
                    assert (code, "replaced" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)
        store = Store(f"sqlite:///{federation.home / 'store.sqlite'}")
        assert len(store.run(registry.admitted)) == 7
        store.close()


async def test_the_server_s_certificate_is_replaced_without_a_restart_and_only_when_it_is_another(
    tmp_path: Path,
) -> None:
    async with Federation(tmp_path) as federation:
        host, _, port = federation.address.rpartition(":")
        place = Home(federation.home).authority

        async def shown() -> str:
            return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))

        before = await shown()
        assert before == await shown()
        (place / "server.pem").unlink()  # as if two thirds of its life were over
        after = await shown()
        assert after != before
        assert after == await shown()
        given = ServerCertificates(Authority.load(place), host)
        assert given() is not None
        assert given() is None
        (place / "server.pem").unlink()
        assert given() is not None
        assert given() is None


async def test_probes_get_the_standard_health_answer(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        await federation.join("site-1")
        credentials = federation.silos["site-1"].credentials
        async with credentials.channel(federation.address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert await check(b"") == b"\x08\x01"


async def test_a_port_that_is_taken_is_told_with_the_fix(tmp_path: Path) -> None:
    async with Federation(tmp_path / "one") as federation:
        other = tmp_path / "two"
        admin.init(other, federation.address, listen=federation.address)
        server = CoordinatorServer(other)
        with pytest.raises(ServerError, match="cannot listen on .* set `listen`"):
            await server.start()
        await server.stop()


def test_a_wrong_setting_is_told_with_key_value_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    for text, words in (
        ('addres = "a:1"', "address is missing"),
        ('address = "nowhere"', "nowhere"),
        ('address = "a:70000"', "between 1 and 65535"),
        ('address = "a:1"\nabsent_afer = 3', "did you mean absent_after"),
        ('address = "a:1"\nlargest_vector = 1', "use at least 1024"),
        ("address = ", "cannot be read as TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_config(path)
    with pytest.raises(ConfigError, match="concilium coordinator init"):
        read_config(tmp_path / "missing.toml")


def test_keys_are_private_an_authority_is_never_replaced_and_the_log_shows_changes(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    admin.init(home, "localhost:8443")
    assert (home / "authority" / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(admin.AdminError, match="keep it"):
        admin.init(home, "localhost:8443")
    admin.invite(home, "st-marys")
    with pytest.raises(admin.AdminError, match="lower-case letters"):
        admin.invite(home, "St Mary's")
    with pytest.raises(registry.RegistryError, match="has not used its invitation"):
        admin.approve(home, "st-marys")
    with pytest.raises(registry.RegistryError, match="no site 'nobody'"):
        admin.revoke(home, "nobody")
    store = Store(f"sqlite:///{home / 'store.sqlite'}")
    assert store.run(verified).entries == 2
    store.run(lambda c: c.exec_driver_sql("UPDATE events SET detail = '{}' WHERE place = 1"))
    with pytest.raises(StoreError, match="changed at or before entry 1"):
        store.run(verified)
    store.close()
