"""Hundreds of pipelines in one pipelines.yaml: what it costs to read, register, schedule and look at them.

    python -m bench.many --pipelines 500
    python -m bench.many --pipelines 500 --database postgresql://postgres@127.0.0.1:5432

It starts a real Prefect and a real MLflow server, on SQLite or each on its own database of a PostgreSQL server. Every
pipeline has a nightly cron schedule and two triggers, and some are due every minute. Their runs find the lock of the
pipeline taken, which costs a whole flow run but no training. Another part lets concurrent writers create runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml

COMMAND = [sys.executable, "-P", "-c", "from flows.cli import main; main()"]
QUIET = {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
PREFECT, MLFLOW = 4801, 5801
DUE_EACH_MINUTE = 4
_BACKLOG_SECONDS = 60
"""In the first minute the runner works on runs that became due before it started."""
_PAGES = ("deployments", "runs", "dashboard")


def main() -> None:
    """Run the measurements; print a line of JSON after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=int, default=500)
    parser.add_argument("--database", help="postgresql://USER@HOST:PORT of a server on which databases may be made")
    parser.add_argument("--minutes", type=float, default=4.2, help="how long the schedules are watched")
    parser.add_argument("--writers", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--only", nargs="*", default=["file", "register", "pages", "commands", "lag", "writers"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        bench = Bench(Path(directory), asked.pipelines, asked.database)
        say(pipelines=asked.pipelines, database="PostgreSQL" if asked.database else "SQLite")
        if "file" in asked.only:
            say(file=bench.file())
        servers = stack.enter_context(bench.servers())
        if "register" in asked.only:
            say(register=bench.register())
        if "pages" in asked.only:
            say(pages=bench.pages())
        if "commands" in asked.only:
            say(commands=bench.commands())
        if "lag" in asked.only:
            say(lag=bench.lag(asked.minutes, servers))
        if "writers" in asked.only:  # last: a server on SQLite may not recover from them
            for count in asked.writers:
                say(writers=bench.writers(count))
        say(memory={name: _mb(process) for name, process in servers.items()}, bytes=bench.bytes())


def say(**found: Any) -> None:
    """Print one line of JSON at once."""
    print(json.dumps(found), flush=True)


class Bench:
    """A project with its servers."""

    def __init__(self, directory: Path, count: int, database: str | None) -> None:
        self.directory, self.database = directory, database
        self.path = directory / "pipelines.yaml"
        self.home = directory / "mlruns"
        self.names = [f"p{index:04d}" for index in range(count)]
        self.write(0)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))},
            **QUIET,
            "PYTHONTZPATH": "",
            "PREFECT_HOME": str(directory / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{PREFECT}/api",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{MLFLOW}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "GPTFLOW_HOME": str(self.home),
        }

    def write(self, due_each_minute: int) -> None:
        """Write pipelines.yaml: `due_each_minute` pipelines are due every minute, the others at night."""
        pipelines = {}
        for index, name in enumerate(self.names):
            cron = "* * * * *" if index < due_each_minute else f"{index % 60} {index // 60 % 6} * * *"
            pipelines[name] = {
                "corpus": {"sources": ["text/"], "tokenizer": "bytes"},
                "model": {"n_layers": 2, "n_heads": 2, "emb_dim": 32, "context_length": 32},
                "schedule": {"cron": cron},
                "triggers": [{"on": "corpus_changed"}, {"on": "promoted", "model": f"gpt-{self.names[index - 1]}"}],
                "notify": [{"webhook": "https://example.org/hook", "on": ["stale"]}],
            }
        (self.directory / "text").mkdir(exist_ok=True)
        (self.directory / "text" / "one.txt").write_text("A text.\n" * 100)
        self.path.write_text(yaml.safe_dump({"watch_seconds": 3600, "pipelines": pipelines}))

    def file(self) -> dict[str, float]:
        """Return the seconds to read the file and to check every pipeline in it."""
        from flows.config.pipelines import PipelinesFile

        began = time.perf_counter()
        read = PipelinesFile(self.path)
        parsed = time.perf_counter()
        for name in read.names():
            read.pipeline(name)
        return {"bytes": self.path.stat().st_size, "read": parsed - began, "check": time.perf_counter() - parsed}

    @contextmanager
    def servers(self) -> Iterator[dict[str, psutil.Process]]:
        """Start Prefect and MLflow, and wait until they are healthy."""
        prefect, mlflow = f"sqlite+aiosqlite:///{self.directory}/prefect.db", f"sqlite:///{self.directory}/mlflow.db"
        if self.database:
            for name in ("prefect", "mlflow"):
                self.sql(f"drop database if exists bench_{name}", f"create database bench_{name}")
            prefect = f"{self.database.replace('postgresql', 'postgresql+asyncpg')}/bench_prefect"
            mlflow = f"{self.database}/bench_mlflow"
        where = ["--host", "127.0.0.1", "--port"]
        commands = {
            "prefect": ["-m", "prefect", "server", "start", *where, str(PREFECT)],
            "mlflow": ["-m", "mlflow", "server", *where, str(MLFLOW), "--workers", "1", "--backend-store-uri", mlflow],
        }
        environment = {**self.environment, "PREFECT_API_DATABASE_CONNECTION_URL": prefect}
        with ExitStack() as stack:
            running = {}
            for name, command in commands.items():
                log = stack.enter_context((self.directory / f"{name}.log").open("w"))
                process = subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=log, stderr=log, cwd=self.directory
                )
                stack.callback(_end, process)
                running[name] = psutil.Process(process.pid)
            _until(lambda: _answers(f"http://127.0.0.1:{PREFECT}/api/health"))
            _until(lambda: _answers(f"http://127.0.0.1:{MLFLOW}/health"))
            yield running

    def sql(self, *statements: str) -> list[Any]:
        """Execute the statements; return the rows of the last one."""
        import psycopg2

        connection = psycopg2.connect(f"{self.database}/postgres")
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def register(self) -> dict[str, Any]:
        """Return the seconds of `gptflow deploy` for a new file, the same file, and one changed pipeline."""
        from prefect.workers.process import ProcessWorker

        template = ProcessWorker.get_default_base_job_template()
        self.ask("work_pools/", {"name": "bench", "type": "process", "base_job_template": template})
        took: dict[str, Any] = {}
        for name in ("first", "again", "one changed"):
            if name == "one changed":
                self.path.write_text(self.path.read_text().replace("emb_dim: 32", "emb_dim: 64", 1))
            began = time.perf_counter()
            self.gptflow("deploy", "--work-pool", "bench")
            took[name] = time.perf_counter() - began
        took["refused, locked"] = self.locked()
        return took

    def lag(self, minutes: float, servers: dict[str, psutil.Process]) -> dict[str, Any]:
        """Return the seconds from due to running of pipelines that are due every minute under `gptflow serve`."""
        from flows.state import locks

        self.write(DUE_EACH_MINUTE)
        with ExitStack() as stack:
            for name in self.names[:DUE_EACH_MINUTE]:
                stack.enter_context(locks.hold(self.home / "locks" / f"{name}.lock"))
            log = stack.enter_context((self.directory / "serve.log").open("w+"))
            began = time.perf_counter()
            process = subprocess.Popen(
                [*COMMAND, "serve", "--limit", "8"], env=self.environment, cwd=self.directory, stdout=log, stderr=log
            )
            stack.callback(_end, process)
            _until(lambda: "\nserving " in (self.directory / "serve.log").read_text(), 1200)
            ready, ready_at = time.perf_counter() - began, time.time()
            servers["runner"] = psutil.Process(process.pid)
            before = {name: sum(one.cpu_times()[:2]) for name, one in servers.items()}
            time.sleep(60 * minutes)
            share = {
                name: 100 * (sum(one.cpu_times()[:2]) - before[name]) / (60 * minutes) for name, one in servers.items()
            }
            servers.pop("runner")
            memory = _mb(psutil.Process(process.pid))
        runs = self.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 200, **_HAVE_BEGUN})
        times = [(_seconds(run["expected_start_time"]), _seconds(run["start_time"])) for run in runs]
        lags = [start - due for due, start in times if due > ready_at + _BACKLOG_SECONDS]
        assert lags, "no run has started: see serve.log"
        return {
            "all are taken from the pool after": ready,
            "runs": len(lags),
            "seconds, median": median(lags),
            "seconds, longest": max(lags),
            "of one core, %": share,
            "runner's MB": memory,
        }

    def pages(self) -> dict[str, float]:
        """Return the seconds until a browser has loaded a page of Prefect's UI completely, on a second visit."""
        from playwright.sync_api import sync_playwright

        took = {}
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            for name in (*_PAGES, *_PAGES):
                began = time.perf_counter()
                page.goto(f"http://127.0.0.1:{PREFECT}/{name}", wait_until="networkidle", timeout=120_000)
                took[name] = time.perf_counter() - began - 0.5  # the network has to be idle for so long
            browser.close()
        return took

    def writers(self, count: int, seconds: float = 8.0) -> dict[str, Any]:
        """Let `count` clients create flow runs at once; return how many, how slowly, and how many were refused."""
        flow = self.flow  # before the writes overload the server and it stops answering
        until = time.perf_counter() + seconds

        def write(_: int) -> list[tuple[float, bool]]:
            took = []
            while time.perf_counter() < until:
                began = time.perf_counter()
                try:
                    run = self.ask("flow_runs/", {"flow_id": flow, "state": {"type": "PENDING"}})["id"]
                    self.ask(f"flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}})
                    self.ask(f"flow_runs/{run}/set_state", {"state": {"type": "COMPLETED"}})
                    took.append((time.perf_counter() - began, True))
                except (urllib.error.HTTPError, TimeoutError) as error:
                    assert isinstance(error, TimeoutError) or error.code == 503, error
                    took.append((time.perf_counter() - began, False))
            return took

        with ThreadPoolExecutor(count) as pool:
            every = sorted(one for some in pool.map(write, range(count)) for one in some)
        return {
            "writers": count,
            "runs per second": sum(well for _, well in every) / seconds,
            "refused with 503 or not answered, %": 100 * sum(not well for _, well in every) / len(every),
            "seconds, median": every[len(every) // 2][0],
            "seconds, 99 %": every[len(every) * 99 // 100][0],
        }

    @cached_property
    def flow(self) -> str:
        """Return the id of a flow whose runs are only recorded."""
        return str(self.ask("flows/", {"name": "bench"})["id"])

    def commands(self) -> dict[str, float]:
        """Return the seconds of commands that read all pipelines."""
        took = {}
        for name in ("models", "doctor"):
            began = time.perf_counter()
            self.gptflow(name, "--json", may_fail=True)
            took[name] = time.perf_counter() - began
        return took

    def bytes(self) -> dict[str, int]:
        """Return the sizes of both databases."""
        if self.database:
            asked = "select pg_database_size('bench_prefect'), pg_database_size('bench_mlflow')"
            ((prefect, mlflow),) = self.sql(asked)
            return {"prefect": prefect, "mlflow": mlflow}
        sizes = {name: self.directory.glob(f"{name}.db*") for name in ("prefect", "mlflow")}
        return {name: sum(path.stat().st_size for path in paths) for name, paths in sizes.items()}

    def locked(self) -> int:
        """Return how often Prefect's log reports a locked database."""
        return (self.directory / "prefect.log").read_text().count("database is locked")

    def gptflow(self, *arguments: str, may_fail: bool = False) -> None:
        done = subprocess.run(
            [*COMMAND, *arguments], env=self.environment, cwd=self.directory, capture_output=True, text=True
        )
        assert may_fail or done.returncode == 0, done.stdout[-500:] + done.stderr

    def ask(self, path: str, body: object) -> Any:
        data = json.dumps(body).encode()
        url = f"http://127.0.0.1:{PREFECT}/api/{path}"
        request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


_HAVE_BEGUN = {"flow_runs": {"start_time": {"is_null_": False}}, "flows": {"name": {"any_": ["retrain"]}}}


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def _mb(process: psutil.Process) -> float:
    """Return the resident memory of the process and its descendants."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 1e6


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def _until(is_true: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.2)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    main()
