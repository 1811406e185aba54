"""The retraining flow: ingest -> compare -> tokenize -> train -> evaluate -> sample -> plot -> register -> gate.

Every step finds what an earlier attempt completed, so running the flow again after any failure goes on where it
stopped. The MLflow run and the registered version are found by the run key. What an earlier run left unfinished is
finished first, on the text that it began with. Without a reason to train (reason.py) the run ends as Completed with the
name Skipped, and a training longer than its session with the name Paused.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import attempt, faults, lines, lock, runners, tasks, tracking
from flows.attempt import Attempt
from flows.metrics import MetricsLog
from flows.pipelines import Pipeline
from flows.reason import Reason, divergence
from flows.releases import ancestry, card, registry, release
from flows.releases.gate import Verdict
from flows.releases.lineage import lineage, settings_key
from flows.releases.model_card import Evidence
from flows.releases.report import detail_rows, score_rows
from flows.runners import TaskRunnerName
from flows.service import deployed, reconcile, successes
from flows.service.notify import NotifyConfig, tell_failure, tell_promotion
from flows.sharing import advisory, mirror
from flows.state import StateRoot, state_root
from gptcore import manifest, memory
from gptcore.config import CorpusConfig, GateConfig, ModelConfig, RetrainConfig, SampleConfig, TrainConfig
from gptcore.corpus import Snapshot
from gptcore.data import Tokens, check_sizes
from gptcore.errors import TrainingDiverged
from gptcore.judging.dossier import Scores, read_samples, read_scores
from gptcore.learning.rundir import Paused
from gptcore.text.workers import Map
from gptcore.train import resolve

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a retraining ended."""

    pipeline: str
    verdict: str
    """promoted, rejected, skipped, or paused."""
    reason: str
    """Why, in a sentence."""
    uri: str
    """The version that the run is about."""
    rows: tuple[tuple[str, str], ...] = ()
    """The result table."""
    changes: tuple[tuple[str, str], ...] = ()
    """What changed in the text since the training before, with numbers."""
    plots: str = ""
    run_directory: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each step took."""


# Prefect would check each section alone; a deployed run's sections are checked when its deployment's stand under them.
@flow(
    name="retrain",
    flow_run_name="{pipeline}",
    persist_result=False,
    validate_parameters=False,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
    on_completion=[tell_promotion],
)
def retrain(
    pipeline: str,
    model_name: str,
    corpus: CorpusConfig,
    model: ModelConfig,
    train: TrainConfig,
    sample: SampleConfig,
    gate: GateConfig,
    retrain: RetrainConfig,
    force: bool = False,
    sources_overridden: bool = False,
    overlap: lock.Overlap = "skip",
    task_runner: TaskRunnerName = "processes",
    notify: tuple[NotifyConfig, ...] = (),
) -> State[Outcome]:
    """Trains a GPT on the corpus as it is now, and makes it champion if it is the best so far.

    Args:
        pipeline: Name of the pipeline, as in pipelines.yaml.
        model_name: Registered model that the new version belongs to.
        corpus: Which text is learned from, how it becomes tokens, and how it is split.
        model: The model's architecture.
        train: How the model learns.
        sample: Which texts the trained model writes for people to read.
        gate: When the new version replaces the champion.
        retrain: What is a reason to train, and what becomes of an unfinished training.
        force: Train again even if nothing has changed.
        sources_overridden: corpus.sources are not the pipeline's own: register a version, but leave an existing
            champion alone.
        overlap: While another run of the pipeline is under way: skip, or wait for its end.
        task_runner: Who reads and encodes the shards of a large corpus: processes, dask, ray, or a cluster's address.
        notify: Who is told if the run fails or there is a new champion. The flow's hooks read it.
    """
    asked, has_other_sources = deployed.asked() or (
        Pipeline(
            name=pipeline,
            model_name=model_name,
            corpus=corpus,
            model=model,
            train=train,
            sample=sample,
            gate=gate,
            retrain=retrain,
            overlap=overlap,
            task_runner=task_runner,
        ),
        False,
    )
    root = state_root().create()
    try:
        with faults.in_our_words(root), root.hold(root.lock(asked.name), str(flow_run.id), asked.overlap) as died:
            if died is not None and died.flow_run != str(flow_run.id) and (line := reconcile.end_dead(died)):
                get_run_logger().warning(line)
            state = _Retraining(asked, root, force, sources_overridden or has_other_sources).run()
            successes.record(root, asked.name, state.name or "", str(flow_run.id))
            return state
    except lock.Held as held:
        outcome = Outcome(asked.name, "skipped", str(held), uri=f"models:/{asked.model_name}@{registry.CHAMPION}")
        return Completed(name="Skipped", message=outcome.reason, data=outcome)


class _Retraining:
    """One run of the flow: what was asked for, and what has been made so far."""

    def __init__(self, asked: Pipeline, root: StateRoot, force: bool, sources_overridden: bool) -> None:
        self.pipeline = asked.model_copy(update={"train": resolve(asked.train)})
        self.settings = settings_key(asked)  # what `auto` stands for on this machine is not what was asked for
        self.root, self.force, self.sources_overridden = root, force, sources_overridden
        self.changes: tuple[tuple[str, str], ...] = ()
        self.seconds: dict[str, float] = {}

    def run(self) -> State[Outcome]:
        tracking.open_database(self.root)
        tracking.close_left(self.root, self.pipeline.name)
        for parent in (self.root.corpora, self.root.tokens, self.root.mirror):
            manifest.sweep(parent)
        found = self.unfinished() or self.begun()
        return self.skipped(found) if isinstance(found, str) else self.worked_on(found)

    def unfinished(self) -> Attempt | None:
        if self.pipeline.retrain.unfinished == "restart":
            return None
        if (brought := mirror.bring(self.root, self.pipeline, self.sources_overridden)) is not None:
            get_run_logger().info("another machine began %s", brought, extra={"step": "unfinished"})
        found = attempt.unfinished(self.root, self.pipeline, self.sources_overridden)
        if found is not None:
            get_run_logger().info("goes on with %s", found.run.path.name, extra={"step": "unfinished"})
            reason = self.step("compare", lines.of_reason, tasks.compare, *self.compared(found.snapshot))
            self.note_changes(reason, found.tokens, found.snapshot)
        return found

    def begun(self) -> Attempt | str:
        """A training on the text as it is now, prepared; or, in a sentence, why there is none."""
        with runners.opened(self.pipeline.task_runner) as mapped:
            return self.begun_on(mapped)

    def begun_on(self, mapped: Map) -> Attempt | str:
        pipeline, root = self.pipeline, self.root
        where = (root.corpora, Path.cwd(), mapped)
        snapshot = self.step("ingest", lines.of_snapshot, tasks.ingest, pipeline.corpus, *where)
        reason = self.step("compare", lines.of_reason, tasks.compare, *self.compared(snapshot))
        if not (reason.must_train or self.force or self.sources_overridden):
            return f"{reason.text}; --force trains again"
        start = ancestry.start_of(root, pipeline)
        given = {"vocabulary": start.tokenizer()} if start else {}
        text = (snapshot.path, pipeline.corpus.tokenizer, root.tokens)
        tokens = self.step("tokenize", lines.of_tokens, tasks.tokenize, *text, mapped=mapped, **given)
        self.check_sizes(tokens)
        wanted = self.force or pipeline.retrain.when == "always"
        number = attempt.number_of(root, pipeline, tokens, start, wanted, self.sources_overridden)
        if number is None:
            return f"{pipeline.model_name} has a version already that learned exactly this; --force trains again"
        self.note_changes(reason, tokens, snapshot)
        return attempt.prepare(root, pipeline, snapshot, tokens, start, number, self.sources_overridden)

    def compared(self, snapshot: Snapshot) -> tuple[StateRoot, Pipeline, str, Snapshot]:
        return self.root, self.pipeline, self.settings, snapshot

    def note_changes(self, reason: Reason, tokens: Tokens, snapshot: Snapshot) -> None:
        self.changes = reason.changes
        if reason.since is not None:
            self.changes += divergence(self.root, self.pipeline, reason.since, tokens, snapshot)

    def worked_on(self, found: Attempt) -> State[Outcome]:
        tags = {"prefect_flow_run_id": str(flow_run.id), "corpus_sha256": found.snapshot.sha256}
        mlflow_run_id = tracking.open_run(self.root, self.pipeline, found.run_key, found.number, tags)
        try:
            outcome = self.trained(found, mlflow_run_id)
        except BaseException as error:
            tracking.close_interrupted(self.root, mlflow_run_id, _mlflow_status(error), _failure_tags(error))
            raise
        names = {"promoted": "Promoted", "rejected": "Kept champion", "paused": "Paused"}
        return Completed(name=names[outcome.verdict], message=outcome.reason, data=outcome)

    def trained(self, found: Attempt, mlflow_run_id: str) -> Outcome:
        """From the training on: everything that belongs to one run directory."""
        tracking.log_dataset(self.root, mlflow_run_id, self.pipeline, found.snapshot)
        with mirror.Following(self.root, found, self.sources_overridden) as mirrored:
            result = self.step("train", lines.of_training, tasks.train, self.root, found.run, mlflow_run_id)
            mirrored.settle()
        if isinstance(result, Paused):
            return self.paused(found, result, mlflow_run_id)
        text = (found.run, found.snapshot, found.tokens)
        evaluation = self.step("evaluate", lines.of_evaluation, tasks.evaluate, *text)
        samples = self.step("sample", lines.of_samples, tasks.sample, *text, self.pipeline.sample)
        plots = self.step("plot", lines.of_plots, tasks.plot, found.run, evaluation)
        scores = read_scores(evaluation)
        evidence = Evidence(result, scores, read_samples(samples))
        candidate = self.candidate(found, evidence, mlflow_run_id)
        registered = (self.root, found.run, found.tokens, candidate)
        version = self.step("register", self.version_line, tasks.register, *registered)
        verdict = self.gated(version, found, scores)
        done = card.Retrained(
            pipeline=self.pipeline,
            run=found.run,
            snapshot=found.snapshot,
            result=result,
            scores=scores,
            version=version,
            verdict=verdict,
            mlflow_run_id=mlflow_run_id,
            flow_run_id=str(flow_run.id),
            samples=samples,
            plots=plots,
        )
        outcome = self.reported(done, evaluation)
        mirror.forget(self.root, found)
        return outcome

    def step(self, name: str, describe: Callable[[T], str], task: Callable[..., T], *given: Any, **named: Any) -> T:
        """Runs a task, and says in one line what came out and how long it took."""
        began = time.perf_counter()
        advisory.ensure_not_lost()
        with lines.of_progress(get_run_logger()):
            result = task(*given, **named)
        self.seconds[name] = round(time.perf_counter() - began, 2)
        get_run_logger().info("%s: %s  (%.1f s)", name, describe(result), self.seconds[name], extra={"step": name})
        return result

    def gated(self, version: str, found: Attempt, scores: Scores) -> Verdict:
        name, cfg = self.pipeline.model_name, self.pipeline.gate
        arguments = (self.root, name, version, found.snapshot, scores, cfg, self.sources_overridden)
        return self.step("gate", lines.of_verdict, tasks.gate, *arguments)

    def check_sizes(self, tokens: Tokens) -> None:
        train, context = self.pipeline.train, self.pipeline.model.shape()["context_length"]
        check_sizes(tokens, context, train.stride or context, train.batch_size * train.accumulation)
        memory.check(self.pipeline.model, train, tokens.n_vocab)

    def candidate(self, found: Attempt, evidence: Evidence, mlflow_run_id: str) -> release.Candidate:
        made_from = (found.snapshot, found.tokens, found.run)
        origin = {
            **lineage(self.pipeline, *made_from, evidence.result, evidence.scores, found.ancestors),
            "settings_key": self.settings,
            "prefect_flow_run_id": str(flow_run.id),
        }
        return release.Candidate(self.pipeline.model_name, found.run_key, found.number, mlflow_run_id, origin, evidence)

    def version_line(self, version: str) -> str:
        return f"models:/{self.pipeline.model_name}/{version}"

    def skipped(self, reason: str) -> State[Outcome]:
        newest = registry.newest_finished(self.root, self.pipeline)
        uri = registry.uri_of(newest) if newest else f"models:/{self.pipeline.model_name}@{registry.CHAMPION}"
        outcome = Outcome(self.pipeline.name, "skipped", reason, uri, seconds=self.seconds)
        return Completed(name="Skipped", message=reason, data=outcome)

    def paused(self, found: Attempt, ended: Paused, mlflow_run_id: str) -> Outcome:
        reason = f"{ended.reason} are over at step {ended.step:,}; the next run goes on from there"
        # MLflow's word for a run that is not over and that nobody works on at the moment.
        tracking.close_run(self.root, mlflow_run_id, "SCHEDULED", {"paused_at": str(ended.step)})
        uri = f"models:/{self.pipeline.model_name}@{registry.CHAMPION}"
        return Outcome(
            self.pipeline.name, "paused", reason, uri, run_directory=str(found.run.path), seconds=self.seconds
        )

    def reported(self, done: card.Retrained, evaluation: Path) -> Outcome:
        """The evidence goes to the MLflow run, and a card with all of it to both."""
        began = time.perf_counter()
        outcome = self.outcome(done)
        made = card.publish(self.root, done, self.changes or None)
        directories = [evaluation, done.samples, done.plots, *made]
        tracking.log_results(self.root, done.mlflow_run_id, _final_metrics(done.scores), directories)
        MetricsLog(self.root, done.mlflow_run_id, done.run.metrics).send()  # what MLflow did not take before
        tags = {"verdict": outcome.verdict, "reason": outcome.reason}
        tracking.close_run(self.root, done.mlflow_run_id, "FINISHED", tags)
        self.seconds["report"] = round(time.perf_counter() - began, 2)
        return outcome

    def outcome(self, done: card.Retrained) -> Outcome:
        return Outcome(
            pipeline=self.pipeline.name,
            verdict="promoted" if done.verdict.promoted else "rejected",
            reason=done.verdict.reason,
            uri=self.version_line(done.version),
            rows=(*score_rows(done.scores), *detail_rows(done.scores, done.result)),
            changes=self.changes,
            plots=str(done.plots),
            run_directory=str(done.run.path),
            seconds=self.seconds,
        )


def _final_metrics(scores: Scores) -> dict[str, float]:
    reported = scores.reported
    own = {key: getattr(reported, key) for key in ("loss", "perplexity", "bits_per_byte", "top1", "top5")}
    simple = {f"baseline_{key}": value for key, value in asdict(scores.baselines).items() if key.endswith("per_byte")}
    return {**{f"{reported.side}_{key}": value for key, value in own.items()}, **simple}


def _mlflow_status(error: BaseException) -> str:
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _failure_tags(error: BaseException) -> dict[str, str]:
    tags = {"reason": f"{type(error).__name__}: {error}"[:4000]}
    if isinstance(error, TrainingDiverged):
        tags["diverged_at"] = str(error.step)
    return tags
