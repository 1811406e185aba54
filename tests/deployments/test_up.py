"""`gptflow up` with real servers: started, started twice, refused, stopped without leftovers, killed and reconciled."""

import json
import os
import re
import signal
import socket
import time
from typing import Any

import psutil
import pytest

from flows.state.servers import answers, read_servers
from tests.servers import Up, living, wait_for

pytestmark = pytest.mark.slow


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Return the addresses at which a process can be reached: TCP sockets that listen, and UDP sockets."""
    found = process.net_connections("inet")
    open_ones = (one for one in found if one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM)
    return {(one.laddr.ip, one.laddr.port) for one in open_ones}


def test_up_answers_runs_flows_reports_that_it_is_up_already_and_leaves_no_process(up: Up) -> None:
    up.start()
    assert answers(f"{up.servers().prefect_api}/health") and answers(f"{up.servers().mlflow}/health")
    for url in (up.servers().prefect, up.servers().mlflow):
        assert url in up.log.read_text()
    again = up.command(*up.arguments())
    assert again.returncode == 0 and f"up already (pid {up.process.pid})" in again.stdout
    assert up.servers().prefect in again.stdout and up.servers().mlflow in again.stdout
    run = up.train_for_long()
    here = up.command("run", "tiny")
    assert here.returncode == 0 and "another run holds the lock (pid" in here.stdout, here.stdout + here.stderr
    others = [one for one in up.prefect.runs() if one["parameters"].get("pipeline") == "tiny" and one["id"] != run]
    assert [up.prefect.verdict(one["id"]) for one in others] == ["skipped"]
    processes = up.processes()
    assert len(processes) > 5
    heard = {address for process in processes for address in listening(process)}
    assert {up.prefect_port, up.mlflow_port} <= {port for _, port in heard}
    assert {ip for ip, _ in heard} == {"127.0.0.1"}
    began = time.monotonic()
    up.process.terminate()
    up.process.wait(60)
    assert time.monotonic() - began < 30
    assert living(processes) == []
    assert "it saves first" in up.log.read_text() and read_servers(up.root.path) is None
    assert list(up.root.path.glob("runs/tiny/*/checkpoints/step-*"))
    assert up.mlflow_statuses() == ["KILLED"]
    up.start()
    stopped = up.prefect.state(run)
    assert (stopped["type"], stopped["name"]) == ("CANCELLED", "Cancelled")
    assert re.fullmatch(r"stopped, saved at step [\d,]+; the next run resumes", stopped["message"])


def test_dead_servers_are_restarted_the_next_start_ends_what_a_kill_left_and_doctor_reports_both(
    up: Up,
) -> None:
    def run_doctor() -> tuple[int, list[dict[str, Any]]]:
        done = up.command("doctor", "--json")
        return done.returncode, json.loads(done.stdout)

    up.start()
    before = up.servers().processes
    os.kill(before["mlflow"][0], signal.SIGKILL)
    os.kill(before["prefect"][0], signal.SIGKILL)
    wait_for(lambda: not set(before.values()) & set(up.servers().processes.values()), 240)
    wait_for(lambda: answers(f"{up.servers().prefect_api}/health") and answers(f"{up.servers().mlflow}/health"), 240)
    # The restarts are recorded a moment after the new servers answer.
    wait_for(lambda: run_doctor()[0] == 0, 240)
    _, found = run_doctor()
    servers = {check["message"].split(" at ")[0] for check in found if check["check"] == "servers"}
    # The runner ends, and is restarted too, if Prefect's server is away for as long as on a busy machine.
    assert servers - {"runner failed and was restarted once, last"} == {
        "MLflow answers",
        "Prefect answers",
        "mlflow failed and was restarted once, last",
        "prefect failed and was restarted once, last",
    }
    children = up.processes()[1:]
    up.process.kill()
    up.process.wait(30)
    assert living(children)
    up.start()
    assert "left over from" in up.log.read_text()
    assert living(children) == []

    run = up.train_for_long()
    for process in reversed(up.processes()):
        process.kill()
    up.process.wait(30)
    code, found = run_doctor()
    assert code == 1
    assert [check["message"] for check in found if not check["ok"]] == [
        "gptflow was up and was killed: nothing is scheduled or started any more"
    ]
    assert up.mlflow_statuses() == ["RUNNING"]
    up.start()
    assert up.prefect.state(run)["type"] == "CRASHED"
    assert up.mlflow_statuses() == ["KILLED"]
    for what in ("crashed    Prefect run", "killed     MLflow run"):
        assert what in up.log.read_text()


def test_a_port_in_use_is_named_with_its_flag(up: Up) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", up.mlflow_port))
        taken.listen()
        refused = up.command(*up.arguments())
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"port {up.mlflow_port}" in refused.stderr and "--mlflow-port" in refused.stderr
    same = up.command("up", "--prefect-port", "4400", "--mlflow-port", "4400")
    assert same.returncode == 2 and "are both 4400" in same.stderr
    elsewhere = up.command(*up.arguments(), PREFECT_API_URL="http://127.0.0.1:4400/api")
    assert "gptflow serve" in elsewhere.stderr
