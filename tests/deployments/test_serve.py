"""Schedules and deployments: which are refused, registered or changed, and what their runs train."""

import json
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from flows.config.pipelines import Pipeline, PipelinesFile
from flows.config.schedule import ScheduleConfig
from flows.deployments.form import build_form
from flows.deployments.serve import _build_schedule
from flows.deployments.sync import PAUSED, _keep_pause
from flows.operations.flows import promote
from flows.retrain.flow import retrain
from flows.retrain.parameters import build_flow_parameters, merge_parameters
from gptcore.errors import ConfigError
from tests.servers import Prefect, Serving
from tests.tiny import write_pipelines

OPERATIONS = ("promote", "rollback", "prune")
NIGHT = "pipelines:\n  night:\n    schedule:\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("      cron: 99 2 * * *\n", [":4: pipelines.night.schedule.cron", "99 2 * * *", "minute (0-59)"]),
        ("      cron: '* * * *'\n", ["is not a cron expression"]),
        ("      cron: '@daily'\n", ["is not a cron expression"]),
        ("      cron: R 2 * * *\n", ["is not a cron expression"]),
        ("      cron: 0 2 * * *\n      interval: 60\n", ["one of cron and interval", "0 2 * * *", "60"]),
        ("      paused: true\n", ["one of cron and interval", "neither"]),
        ("      interval: 0\n", ["greater than or equal to 1"]),
        ("      cron: 0 2 * * *\n      timezone: Mars/Phobos\n", ["Mars/Phobos", "Europe/Berlin"]),
        ("      crom: 0 2 * * *\n", ["did you mean cron?"]),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_line_and_the_fix(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "pipelines.yaml").write_text(NIGHT + text)
    with pytest.raises(ConfigError) as refused:
        PipelinesFile(tmp_path / "pipelines.yaml").pipeline("night")
    for part in (*parts, f"{tmp_path}/pipelines.yaml:", "pipelines.night.schedule"):
        assert part in str(refused.value)


@pytest.mark.parametrize("schedule", ["{cron: '*/5 2-4 * * mon', timezone: Europe/Berlin}", "{interval: 3600}"])
def test_a_schedule_is_read_without_importing_prefect(tmp_path: Path, schedule: str) -> None:
    (tmp_path / "pipelines.yaml").write_text(f"pipelines: {{night: {{schedule: {schedule}}}}}")
    program = "import sys; from pathlib import Path; from flows.config.pipelines import PipelinesFile\n"
    program += (
        "assert PipelinesFile(Path('pipelines.yaml')).pipeline('night').schedule; assert 'prefect' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)


def test_given_parameters_are_merged_over_those_of_the_deployment_field_by_field(tiny: Pipeline) -> None:
    registered = build_flow_parameters(tiny, set(Pipeline.model_fields))
    asked = merge_parameters(
        registered, {**registered, "train": {"max_steps": 5}, "corpus": {"val_fraction": 0.2}, "force": True}
    )
    assert asked == tiny.model_copy(
        update={
            "train": tiny.train.model_copy(update={"max_steps": 5}),
            "corpus": tiny.corpus.model_copy(update={"val_fraction": 0.2}),
        }
    )
    # 30 is not a multiple of the schema's 4 heads, but it is one of this pipeline's 2 heads.
    assert merge_parameters(registered, {**registered, "model": {"emb_dim": 30}}).model.shape()["n_heads"] == 2
    with pytest.raises(ConfigError, match="model: emb_dim 31 is not divisible by n_heads 2"):
        merge_parameters(registered, {**registered, "model": {"emb_dim": 31}})


def test_the_form_has_titles_for_people_and_begins_with_what_changes_often() -> None:
    form = build_form(retrain.parameters.model_dump(mode="json"))
    train, top = form["definitions"]["TrainConfig"]["properties"], form["properties"]
    assert sorted(top, key=lambda key: top[key]["position"])[:4] == ["force", "accept_text", "train", "corpus"]
    assert sorted(train, key=lambda key: train[key]["position"])[:3] == ["max_steps", "max_epochs", "learning_rate"]
    assert (top["train"]["title"], train["learning_rate"]["title"]) == ("Training", "Learning rate")
    titles = [
        one["title"] for section in (form, *form["definitions"].values()) for one in section["properties"].values()
    ]
    assert not [title for title in titles if "_" in title]


@pytest.fixture
def scheduled(project: Path) -> Path:
    # Another package of the same name in the working directory must not be imported.
    (project / "flows").mkdir()
    (project / "flows" / "__init__.py").write_text("raise RuntimeError('the wrong flows')")
    return project


@pytest.mark.slow
def test_the_server_has_the_deployments_of_the_file_and_every_change_is_listed(
    scheduled: Path, server: Prefect
) -> None:
    write_pipelines(
        scheduled, one={"schedule": {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}}, two={"tags": ["mine"]}
    )
    with Serving(scheduled, server) as lines:
        assert lines == ["added      one", "added      two", *(f"added      {name}" for name in OPERATIONS)]
        schedule = server.ask("deployments/name/retrain/one")["schedules"]
        assert [(one["schedule"]["cron"], one["schedule"]["timezone"], one["active"]) for one in schedule] == [
            ("0 2 * * *", "Europe/Berlin", True)
        ]
        assert {"gptflow", "mine"} < set(server.ask("deployments/name/retrain/two")["tags"])
    write_pipelines(scheduled, one={}, three={"schedule": {"interval": 7200, "paused": True}})
    with Serving(scheduled, server) as lines:
        assert lines == [
            "changed    one",
            "added      three",
            "unchanged  promote",
            "unchanged  rollback",
            "changed    prune",  # its form lists how much each pipeline's model keeps
            "removed    two",
        ]
        assert server.ask("deployments/name/retrain/one")["schedules"] == []
        (schedule,) = server.ask("deployments/name/retrain/three")["schedules"]
        assert (schedule["schedule"]["interval"], schedule["active"]) == (7200.0, False)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.ask("deployments/name/retrain/two")
    three = server.ask("deployments/name/retrain/three")
    server.ask(f"deployments/{three['id']}/schedules/{schedule['id']}", {"active": True}, "PATCH")
    with Serving(scheduled, server) as lines:
        kept = "schedule not paused on the server, paused in the file; --reset-schedules takes the file's word"
        unchanged = [f"unchanged  {name}" for name in OPERATIONS]
        assert lines == ["unchanged  one", f"unchanged  three ({kept})", *unchanged]
        (schedule,) = server.ask("deployments/name/retrain/three")["schedules"]
        assert schedule["active"]


@pytest.mark.parametrize(
    ("registered", "there", "file", "then"),
    [
        (True, False, True, False),
        (False, True, False, True),
        (True, True, False, False),
        (False, False, True, True),
        (True, False, False, False),
        (True, True, True, True),
    ],
)
def test_a_schedule_stays_on_or_off_as_a_person_left_it_until_the_files_own_word_changes(
    registered: bool, there: bool, file: bool, then: bool
) -> None:
    template = promote.to_deployment("night")
    schedules = [_build_schedule(ScheduleConfig(cron="0 2 * * *", paused=not file))]
    wanted = template.model_copy(update={"schedules": schedules})
    existing = {"version": "a" if registered else f"a{PAUSED}", "paused": False, "schedules": [{"active": there}]}
    note = _keep_pause(wanted, existing)
    assert (wanted.schedules[0].active, bool(note)) == (then, file != then)


@pytest.mark.slow
def test_a_run_refuses_wrong_parameters_and_changes_only_the_given_ones(scheduled: Path, server: Prefect) -> None:
    write_pipelines(scheduled, form={})
    with Serving(scheduled, server):
        run = server.start("form", train={"max_steps": 5})
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.start("form", train={"max_steps": -5})
        assert b"-5 is less than the minimum of 1" in refused.value.read()
        assert server.ended(run)["type"] == "COMPLETED"
        (directory,) = (scheduled / "mlruns" / "runs" / "form").glob("*/")
        trained = json.loads((directory / "config.json").read_text())
        assert (trained["train"]["max_steps"], trained["train"]["learning_rate"]) == (5, 0.01)
        assert (trained["train"]["batch_size"], trained["model"]["emb_dim"]) == (8, 32)
