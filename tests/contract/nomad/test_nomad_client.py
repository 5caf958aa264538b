"""Each call on the wire: what is asked, what becomes of the answer, what becomes of a refusal."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from rotator.adapters.nomad_access import NomadAccess, access_of
from rotator.adapters.nomad_client import NomadClient
from rotator.adapters.nomad_stream import follow
from rotator.adapters.nomad_words import diff_lines, placement_words
from rotator.config_nomad import NomadConfig
from rotator.ports import LaunchConflict, LauncherAway, LaunchError, LaunchRefused
from tests.contract.nomad.rig import eventually
from tests.nomad_double import NomadDouble, var_text
from tests.nomad_double.sample import HCL, sample_job

VARIABLES = var_text({"job_id": "vllm-a", "port": "8001"})


@pytest.fixture
async def nomad(tmp_path: Path) -> AsyncIterator[NomadDouble]:
    async with NomadDouble(tmp_path) as made:
        made.teach(HCL, VARIABLES, sample_job())
        yield made


@pytest.fixture
async def client(nomad: NomadDouble) -> AsyncIterator[NomadClient]:
    async with NomadClient(NomadAccess(address=nomad.address), deadline_s=3) as made:
        yield made


async def test_a_job_is_parsed_with_its_variables(client: NomadClient) -> None:
    job = await client.parse(HCL, VARIABLES)
    assert (job["ID"], job["Type"]) == ("vllm-a", "service")


async def test_an_unset_variable_is_refused_in_nomads_words(client: NomadClient) -> None:
    with pytest.raises(
        LaunchRefused, match=r'Nomad would not parse a job: Failed to parse job.*Unset variable "port"'
    ) as e:
        await client.parse(HCL, var_text({"job_id": "vllm-a"}))
    assert e.value.status == 400


async def test_an_empty_job_is_refused(client: NomadClient) -> None:
    with pytest.raises(LaunchRefused, match="Job spec is empty"):
        await client.parse("", "")


async def test_a_plan_of_a_new_job_enforces_that_there_is_none(client: NomadClient) -> None:
    planned = await client.plan(sample_job())
    assert (planned.job_modify_index, planned.changed, planned.failed) == (0, True, {})


async def test_a_plan_tells_what_would_change_and_what_it_enforces(client: NomadClient) -> None:
    done = await client.register(sample_job(), modify_index=0)
    same = await client.plan(sample_job())
    assert (same.job_modify_index, same.changed) == (done.modify_index, False)
    other = await client.plan(sample_job(Meta={"note": "b"}))
    assert other.changed
    assert diff_lines(other.diff) == ("Meta[note]: (none) -> b",)


async def test_a_job_without_a_place_is_planned_with_the_reason(nomad: NomadDouble, client: NomadClient) -> None:
    nomad.cluster.no_place = {"NodesEvaluated": 1, "DimensionExhausted": {"memory": 1}}
    planned = await client.plan(sample_job())
    assert placement_words(planned.failed) == "group 'engine': 1 nodes are too full: memory"


async def test_what_somebody_else_changed_is_not_overwritten(nomad: NomadDouble, client: NomadClient) -> None:
    planned = await client.plan(sample_job())
    await client.register(sample_job(), modify_index=planned.job_modify_index)
    with pytest.raises(LaunchConflict, match=r"could not register job 'vllm-a': somebody changed it.*already exists"):
        await client.register(sample_job(note="mine"), modify_index=planned.job_modify_index)
    assert nomad.cluster.jobs["vllm-a"]["Meta"] is None


async def test_a_job_that_was_purged_meanwhile_is_not_registered(client: NomadClient) -> None:
    with pytest.raises(LaunchConflict, match="job does not exist"):
        await client.register(sample_job(), modify_index=31)


async def test_a_submission_keeps_the_source_for_operators(nomad: NomadDouble, client: NomadClient) -> None:
    done = await client.register(sample_job(), modify_index=0, source=HCL, variables=VARIABLES)
    evaluation = await client.evaluation(done.eval_id)
    assert evaluation is not None
    assert evaluation["Status"] == "complete"


async def test_a_duration_as_text_is_refused_in_nomads_words(client: NomadClient) -> None:
    job = sample_job()
    job["TaskGroups"][0]["Tasks"][0]["KillTimeout"] = "5s"
    with pytest.raises(LaunchRefused, match="cannot unmarshal string into Go struct field"):
        await client.plan(job)


async def test_what_is_not_there_is_none(client: NomadClient) -> None:
    assert await client.job("nobody") is None
    assert await client.evaluation("00000000") is None
    assert await client.deployment("nobody") is None
    assert await client.allocations("nobody") == ()
    assert await client.node("00000000") is None
    assert await client.stop_job("nobody") == ""


async def test_a_job_id_with_a_slash_stays_one_segment(nomad: NomadDouble, client: NomadClient) -> None:
    await client.register(sample_job("team/vllm a"), modify_index=0)
    job = await client.job("team/vllm a")
    assert job is not None
    assert job["ID"] == "team/vllm a"


async def test_logs_are_read_from_their_end(nomad: NomadDouble, client: NomadClient) -> None:
    await client.register(sample_job(), modify_index=0)
    await eventually(lambda: nomad.cluster.live("vllm-a")[0]["ClientStatus"] == "running")
    nomad.log("vllm-a", "first\nsecond\n")
    alloc = (await client.allocations("vllm-a"))[0]["ID"]
    assert await client.logs(alloc, "vllm", tail_bytes=7) == "second\n"
    assert await client.logs("00000000", "vllm") == ""
    with pytest.raises(LaunchRefused, match='unknown task name "nobody"'):
        await client.logs(alloc, "nobody")


async def test_a_signal_to_a_task_that_is_not_there_is_refused(nomad: NomadDouble, client: NomadClient) -> None:
    await client.register(sample_job(), modify_index=0)
    with pytest.raises(LaunchRefused, match="not found"):
        await client.signal(nomad.cluster.live("vllm-a")[0]["ID"], "SIGKILL", "nobody")


async def test_who_leads_and_which_nodes_there_are(client: NomadClient) -> None:
    assert await client.leader() == "127.0.0.1:4647"
    assert [n["Name"] for n in await client.nodes()] == ["gpu1"]


# -- Nomad away ------------------------------------------------------------------------------------------------------


async def test_a_lost_leader_is_told_apart(nomad: NomadDouble, client: NomadClient) -> None:
    nomad.leaderless = True
    with pytest.raises(LauncherAway, match="Nomad has no leader now") as e:
        await client.job("vllm-a")
    assert e.value.kind == "leader"


async def test_a_dead_agent_is_told_apart(nomad: NomadDouble, client: NomadClient) -> None:
    await nomad.stop()
    with pytest.raises(
        LauncherAway, match=r"cannot be reached: nobody listens there: could not read job 'vllm-a'"
    ) as e:
        await client.job("vllm-a")
    assert e.value.kind == "unreachable"


async def test_an_agent_that_hangs_costs_its_deadline_and_no_more(tmp_path: Path) -> None:
    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with NomadClient(NomadAccess(address=f"http://127.0.0.1:{port}"), deadline_s=0.3) as client:
        with pytest.raises(LauncherAway, match=r"did not answer|cannot be reached"):
            await client.job("vllm-a")
    server.close()


@pytest.mark.parametrize("head", ["200 OK", "501 Unsupported\r\nContent-Type: text/html;charset=utf-8"])
async def test_something_else_at_the_address_is_named(head: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {head}\r\nContent-Length: 5\r\n\r\nhello".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with NomadClient(NomadAccess(address=f"http://127.0.0.1:{port}"), deadline_s=2) as client:
        with pytest.raises(LauncherAway, match=r"answers, but not as Nomad does: correct nomad.address"):
            await client.job("vllm-a")
    server.close()


async def test_an_agent_without_tls_is_told_apart_from_a_wrong_certificate() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with NomadClient(NomadAccess(address=f"https://127.0.0.1:{port}"), deadline_s=3) as client:
        with pytest.raises(LauncherAway, match="cannot be reached: it does not speak TLS: give its address with http:"):
            await client.leader()
    server.close()


# -- who we are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "said"), [("", "Permission denied"), ("wrong-token", "ACL token not found")])
async def test_a_refused_token_is_told_and_never_shown(
    tmp_path: Path, given: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with NomadDouble(tmp_path, token="right-token") as nomad:
        access = NomadAccess(address=nomad.address, token=given)
        async with NomadClient(access, deadline_s=3) as client:
            with pytest.raises(LauncherAway, match=rf"refuses our token \({said}\).*docs/nomad.md") as e:
                await client.job("vllm-a")
        assert e.value.kind == "token"
        assert "wrong-token" not in f"{access!r} {e.value} {caplog.text}"


async def test_a_token_file_is_read_again_for_every_call(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    async with NomadDouble(tmp_path, token="new") as nomad:
        access = access_of(
            NomadConfig.model_validate({"address": nomad.address, "token_file": file}), {"NOMAD_TOKEN": "x"}
        )
        async with NomadClient(access, deadline_s=3) as client:
            with pytest.raises(LauncherAway):
                await client.leader()
            file.write_text("new\n")
            assert await client.leader()
            file.unlink()
            with pytest.raises(LauncherAway, match=r"token file .* cannot be read"):
                await client.leader()


async def test_the_environment_does_not_overrule_what_it_was_told(
    nomad: NomadDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOMAD_ADDR", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NOMAD_NAMESPACE", "other")
    access = access_of(NomadConfig.model_validate({"address": nomad.address + "/"}), {})
    async with NomadClient(access, deadline_s=3) as client:
        assert await client.leader()


@pytest.mark.parametrize(
    ("config", "environ", "problem"),
    [
        ({}, {"NOMAD_ADDR": "gpu1:4646"}, "'gpu1:4646' is no address"),
        ({"ca_file": "/nowhere/ca.pem"}, {}, "nomad.ca_file: there is no file /nowhere/ca.pem"),
        ({}, {"NOMAD_CACERT": "/nowhere/ca.pem"}, "nomad.ca_file: there is no file"),
    ],
)
def test_an_access_that_cannot_be_is_refused_with_what_to_correct(config: dict, environ: dict, problem: str) -> None:
    with pytest.raises(LaunchError, match=problem):
        access_of(NomadConfig.model_validate(config), environ)


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def secure(tmp_path: Path, authority: trustme.CA) -> AsyncIterator[NomadDouble]:
    """Asks for client certificates, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    async with NomadDouble(tmp_path, tls=context, heartbeat_s=0.1) as made:
        yield made


def files_of(authority: trustme.CA, folder: Path) -> dict[str, str]:
    pair = authority.issue_cert("rotator.test")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    pair.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    pair.private_key_pem.write_to_path(folder / "key.pem")
    return {name: str(folder / f"{name.removesuffix('_file')}.pem") for name in ("ca_file", "cert_file", "key_file")}


async def test_certificates_are_verified_both_ways(secure: NomadDouble, authority: trustme.CA, tmp_path: Path) -> None:
    config = NomadConfig.model_validate({"address": secure.address, **files_of(authority, tmp_path)})
    access = access_of(config, {})
    async with NomadClient(access, deadline_s=3) as client:
        assert await client.leader()
    lines = follow(access, ("vllm-a",), 0)
    assert (await anext(lines)).jobs == frozenset()
    await lines.aclose()


async def test_an_unknown_authority_is_refused_by_default(
    secure: NomadDouble, authority: trustme.CA, tmp_path: Path
) -> None:
    files = files_of(authority, tmp_path)
    access = NomadAccess(secure.address, cert_file=files["cert_file"], key_file=files["key_file"])
    async with NomadClient(access, deadline_s=3) as client:
        with pytest.raises(LauncherAway, match=r"not signed by an authority that we know: give nomad.ca_file"):
            await client.leader()
    with pytest.raises(LauncherAway, match="event stream broke"):
        await anext(follow(access, ("vllm-a",), 0))


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
async def test_only_the_spelled_out_opt_out_talks_to_anybody(
    secure: NomadDouble, authority: trustme.CA, tmp_path: Path
) -> None:
    files = files_of(authority, tmp_path)
    config = {"address": secure.address, "cert_file": files["cert_file"], "key_file": files["key_file"]}
    access = access_of(NomadConfig.model_validate({**config, "insecure_skip_verify": True}), {})
    async with NomadClient(access, deadline_s=3) as client:
        assert await client.leader()


# -- the double itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "violation"),
    [
        ("GET", "//v1/jobs", None, "no such path"),
        ("PATCH", "/v1/job/a?namespace=x", None, "method"),
        ("GET", "/v1/jobs?namespace=x&perfix=a", None, "query 'perfix'"),
        ("GET", "/v1/jobs", None, "no namespace"),
        ("POST", "/v1/jobs/parse?namespace=x", b'{"JobHCL": "", "Vars": ""}', "body key 'Vars'"),
        (
            "POST",
            "/v1/job/a/plan?namespace=x",
            b'{"Job": {"ID": "a", "Taskgroups": []}}',
            "Job has no key 'Taskgroups'",
        ),
    ],
)
async def test_the_double_notices_what_a_real_nomad_would_drop(
    tmp_path: Path, method: str, path: str, body: bytes | None, violation: str
) -> None:
    nomad = NomadDouble(tmp_path)
    await nomad.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(nomad.address.rsplit(":", 1)[1]))
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    writer.write(f"{method} {path} HTTP/1.1\r\n{length}\r\n".encode() + (body or b""))
    await reader.readline()
    writer.close()
    await nomad.stop()
    assert any(violation in found for found in nomad.violations), nomad.violations
