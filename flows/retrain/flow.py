"""The retraining flow: ingest -> compare -> tokenize -> train -> evaluate -> sample -> plot -> register -> gate.

Every step finds what an earlier run completed, so a run after a failure resumes where the failed one stopped. The
MLflow run and the registered version are found by the run key. If an earlier run left a training unfinished, the next
run finishes that training first, on its own text. The run ends as Completed, and the first word of the state's message
is the verdict: promoted, rejected, skipped (there is no reason to train, see policy.py) or paused (the training is
longer than its session). If the text looks like an accident (hold.py), the run ends as Failed, and the word is held. A
run that is stopped saves its training and ends as Cancelled. tasks.py has the steps themselves.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect._internal.control_listener import get_intent
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.cards.decision import list_details, list_scores
from flows.cards.model_card import TrainedModelFacts
from flows.cards.verdict import Verdict
from flows.config.pipelines import Pipeline, TaskRunnerName
from flows.notifications.events import send_former_state_name
from flows.notifications.notify import NotifyConfig, notify_failure, notify_promotion
from flows.notifications.verdicts import write_message
from flows.registry import ancestry, register, versions
from flows.registry.lineage import lineage, settings_key
from flows.retrain import (
    attempts,
    decision_card,
    hold,
    last_success,
    mirror,
    parameters,
    run_names,
    task_runners,
    tasks,
)
from flows.retrain.attempts import Attempt
from flows.retrain.decision_card import JudgedRetraining
from flows.retrain.parameters import Request
from flows.retrain.policy import Reason, measure_divergence
from flows.state import lock_holder, postgres_lock
from flows.state.root import StateRoot, state_root
from flows.tracking import errors, reconcile, runs
from flows.tracking.metrics import MetricsLog
from gptcore import manifest
from gptcore.config import (
    CorpusConfig,
    EvaluateConfig,
    GateConfig,
    ModelConfig,
    RetrainConfig,
    SampleConfig,
    TrainConfig,
)
from gptcore.corpus.snapshot import Snapshot
from gptcore.devices import choose_device
from gptcore.errors import CorpusError, TrainingDiverged
from gptcore.evaluation.evidence import explain_shortage
from gptcore.evaluation.run_report import Scores, read_samples, read_scores
from gptcore.processes import MapShards
from gptcore.tokens.directory import Tokens
from gptcore.training.resolve import resolve
from gptcore.training.run_directory import Paused, Result, RunDirectory


@dataclass(frozen=True)
class Outcome:
    """How a retraining ended."""

    pipeline: str
    verdict: str
    """promoted, rejected, skipped, paused, or held."""
    reason: str
    """The reason, in a sentence."""
    uri: str
    """The version that the run is about. Empty if there is none."""
    rows: tuple[tuple[str, str], ...] = ()
    """The result table."""
    changes: tuple[tuple[str, str], ...] = ()
    """What changed in the text since the previous training, with numbers."""
    plots: str = ""
    run_directory: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each step."""


class TextHeld(CorpusError):
    """The text looks like an accident, and a person has to accept it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


# Prefect would check each section by itself, but a deployed run's sections are complete only after they are merged with
# those of its deployment. parameters.py merges and checks them.
@flow(
    name="retrain",
    flow_run_name=run_names.name_run,
    persist_result=False,
    validate_parameters=False,
    on_failure=[notify_failure, send_former_state_name],
    on_crashed=[notify_failure],
    on_completion=[notify_promotion, send_former_state_name],
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
    evaluate: EvaluateConfig = EvaluateConfig(),  # noqa: B008 -- frozen. Older deployments do not give it.
    force: bool = False,
    accept_text: bool = False,
    sources_overridden: bool = False,
    overlap: lock_holder.Overlap = "skip",
    task_runner: TaskRunnerName = "processes",
    notify: tuple[NotifyConfig, ...] = (),
) -> State[Outcome]:
    """Train a GPT on the current corpus, and make it champion if it is the best so far.

    Args:
        pipeline: Name of the pipeline, as in pipelines.yaml.
        model_name: Registered model that the new version belongs to.
        corpus: Which text the model learns from, how it becomes tokens, and how it is split.
        model: The model's architecture.
        train: How the model learns.
        sample: Which texts the trained model writes for people to read.
        gate: When the new version replaces the champion.
        retrain: What is a reason to train, and what happens to an unfinished training.
        evaluate: How much held-out text the trained model is scored on.
        force: Train again even if nothing has changed.
        accept_text: The text is right, even if much of it is gone, or something unlike it has taken its place.
        sources_overridden: Other sources than the pipeline's own: register a version, but do not replace a champion.
        overlap: While another run of the pipeline is active: skip, or wait for its end.
        task_runner: Processes the shards of a large corpus: processes, dask, ray, or a cluster's address.
        notify: Receivers of a message if the run fails or there is a new champion. The flow's hooks read it.
    """
    values: Any = {"corpus": corpus, "model": model, "train": train, "evaluate": evaluate}
    values |= {"sample": sample, "gate": gate, "retrain": retrain}
    given = Pipeline(name=pipeline, model_name=model_name, overlap=overlap, task_runner=task_runner, **values)
    return _retrain(parameters.read_request() or Request(given), force, accept_text, sources_overridden)


def _retrain(request: Request, force: bool, accept_text: bool, sources_overridden: bool) -> State[Outcome]:
    """Retrain the pipeline while holding its lock, or skip the run if another run holds it."""
    requested, root = request.pipeline, state_root().prepare()
    has_other_sources = sources_overridden or request.has_other_sources
    retraining = _Retraining(requested, root, force, accept_text, has_other_sources)
    try:
        with (
            errors.translate_errors(root),
            root.hold(root.lock_path(requested.name), str(flow_run.id), requested.overlap) as died,
        ):
            if died is not None and died.flow_run != str(flow_run.id) and (line := reconcile.end_dead_run(died)):
                get_run_logger().warning(line)
            outcome = retraining.run()
            last_success.record(root, requested.name, outcome.verdict, str(flow_run.id))
    except lock_holder.LockHeld as held:
        outcome = Outcome(requested.name, "skipped", str(held), uri="")
    except TextHeld as error:
        run_names.add_verdict(requested.name, "held")
        return Failed(message=write_message("held", str(error)), data=error)
    except (TerminationSignal, KeyboardInterrupt):
        if get_intent() is not None:  # a person cancelled the run, or a supervisor starts it again: Prefect ends it
            raise
        run_names.add_verdict(requested.name, "stopped")
        return Cancelled(message=retraining.describe_stop())
    version = outcome.uri.rpartition("/")[2] if outcome.verdict in ("promoted", "rejected") else ""
    run_names.add_verdict(requested.name, outcome.verdict, version)
    return Completed(message=write_message(outcome.verdict, outcome.reason), data=outcome)


class _Step:
    """A step of the flow, while it runs."""

    def __init__(self) -> None:
        self.description = ""

    def describe(self, description: str) -> None:
        """Set the text that the log reports as the step's result."""
        self.description = description


class _Retraining:
    """One run of the flow: its request, and the results so far."""

    def __init__(
        self, requested: Pipeline, root: StateRoot, force: bool, accept_text: bool, sources_overridden: bool
    ) -> None:
        self.pipeline = requested.model_copy(update={"train": resolve(requested.train)})
        self.requested_train = requested.train
        self.root, self.force, self.accept_text = root, force, accept_text
        self.sources_overridden = sources_overridden
        self.changes: tuple[tuple[str, str], ...] = ()
        self.seconds: dict[str, float] = {}
        self.training: RunDirectory | None = None
        """The run directory, once there is one."""

    def describe_stop(self) -> str:
        """Return a sentence for a run that was stopped: what is saved, and what the next run does."""
        if self.training is None:
            return "stopped before the training; the next run starts again"
        if self.training.read_result() is not None:
            return "stopped, the training is complete and saved; the next run resumes"
        return f"stopped, saved at step {self.training.saved_step():,}; the next run resumes"

    def run(self) -> Outcome:
        """Resume an unfinished training or prepare a new one, and work on it. Skip if there is no reason to train."""
        choose_device(self.requested_train.device)  # a GPU that is missing is an error before the text is read
        runs.connect_and_migrate(self.root)
        runs.close_leftovers(self.root, self.pipeline.name)
        for parent in (self.root.corpora, self.root.tokens, self.root.mirror):
            manifest.sweep(parent)
        self.pipeline = attempts.keep_recorded_split(self.root, self.pipeline)
        attempt = self.resume_unfinished() or self.start_new()
        return self.skip(attempt) if isinstance(attempt, str) else self.work_on(attempt)

    @property
    def settings(self) -> str:
        """The settings_key, with `auto` as it is, not with what it means on this machine."""
        return settings_key(self.as_requested)

    @property
    def as_requested(self) -> Pipeline:
        """The pipeline with `auto` as it is."""
        return self.pipeline.model_copy(update={"train": self.requested_train})

    @contextmanager
    def step(self, name: str) -> Iterator[_Step]:
        """Time a step and log its description in one line."""
        began = time.perf_counter()
        postgres_lock.ensure_not_lost()
        step = _Step()
        with tasks.relay_progress(get_run_logger()):
            yield step
        self.seconds[name] = round(time.perf_counter() - began, 2)
        get_run_logger().info("%s: %s  (%.1f s)", name, step.description, self.seconds[name], extra={"step": name})

    def resume_unfinished(self) -> Attempt | None:
        """Return the training that an earlier run, here or on another machine, did not finish."""
        if self.pipeline.retrain.unfinished == "restart":
            return None
        if (name := mirror.download_training(self.root, self.pipeline, self.sources_overridden)) is not None:
            get_run_logger().info("another machine started %s", name, extra={"step": "resume"})
        with tasks.relay_progress(get_run_logger()):
            attempt = attempts.find_unfinished(self.root, self.as_requested, self.sources_overridden)
        if attempt is not None:
            get_run_logger().info("unfinished training %s", attempt.run.path.name, extra={"step": "resume"})
            self.pipeline = attempts.keep_split(self.pipeline, attempt.snapshot.split)
            reason = self.compare(attempt.snapshot)
            self.collect_changes(reason, attempt.tokens, attempt.snapshot)
        elif why := attempts.explain_restart(self.root, self.as_requested, self.sources_overridden):
            get_run_logger().info(why, extra={"step": "resume"})
        return attempt

    def start_new(self) -> Attempt | str:
        """Prepare a training on the current text. Return a sentence instead if there is no reason to train."""
        with task_runners.open_task_runner(self.pipeline.task_runner) as map_shards:
            return self.prepare(map_shards)

    def prepare(self, map_shards: MapShards) -> Attempt | str:
        """Ingest and tokenize the text, with `map_shards` for its shards, and make the run directory.

        Return a sentence instead if there is no reason to train. Raises TextHeld.
        """
        root = self.root
        with self.step("ingest") as step:
            corpus = self.pipeline.corpus
            previous = versions.find_split_snapshot(root, self.pipeline)
            snapshot = tasks.ingest(
                cfg=corpus, corpora=root.corpora, base=root.project, map_shards=map_shards, previous=previous
            )
            step.describe(tasks.describe_snapshot(snapshot))
        self.pipeline = pipeline = attempts.keep_split(self.pipeline, snapshot.split)
        for line in snapshot.reading.describe():
            get_run_logger().info("ingest: %s", line, extra={"step": "ingest"})
        for warning in filter(None, (snapshot.reading.describe_secrets(), explain_shortage(snapshot))):
            get_run_logger().warning("ingest: %s", warning, extra={"step": "ingest"})
        reason = self.compare(snapshot)
        if reason.hold is not None and not self.sources_overridden:
            self.accept_or_hold(snapshot, reason)
        if not (reason.must_train or self.force or self.sources_overridden):
            return f"{reason.text}; --force trains again"
        start = ancestry.resolve_start(root, pipeline)
        with self.step("tokenize") as step:
            tokens = tasks.tokenize(
                snapshot=snapshot.path,
                name=pipeline.corpus.tokenizer,
                tokens_root=root.tokens,
                vocabulary=start.load_tokenizer() if start else None,
                map_shards=map_shards,
            )
            step.describe(tasks.describe_tokens(tokens))
        attempts.check_fits(pipeline, tokens)
        attempt = attempts.begin(
            root,
            pipeline,
            self.requested_train,
            snapshot,
            tokens,
            start,
            force=self.force or pipeline.retrain.when == "always",
            sources_overridden=self.sources_overridden,
        )
        if attempt is None:
            return f"{pipeline.model_name} has a version already that learned exactly this; --force trains again"
        self.collect_changes(reason, tokens, snapshot)
        return attempt

    def compare(self, snapshot: Snapshot) -> Reason:
        """Compare text and settings with those of the previous training."""
        with self.step("compare") as step:
            reason = tasks.compare(
                root=self.root,
                pipeline=self.pipeline,
                settings=self.settings,
                snapshot=snapshot,
                left_open=[key for key, value in self.requested_train if value == "auto"],
            )
            step.describe(tasks.describe_reason(reason))
        return reason

    def accept_or_hold(self, snapshot: Snapshot, reason: Reason) -> None:
        """Record that the run's user accepts a text that looks like an accident. Raises TextHeld if not."""
        if self.accept_text:
            hold.accept(self.root, self.pipeline, snapshot, since=str(reason.since))
            return
        command = f"gptflow run {self.pipeline.name} --accept-text"
        why = (
            f"{reason.hold}. Nothing was trained. If the text is right, accept it: `{command}`, or accept_text in the "
            f"form of a run{'; --force does not accept it' if self.force else ''}."
        )
        hold.record_held(self.root, self.pipeline.name, reason.hold or "")
        raise TextHeld(
            Outcome(
                pipeline=self.pipeline.name,
                verdict="held",
                reason=why,
                uri=self.version_uri(str(reason.since)),
                changes=reason.changes,
                seconds=self.seconds,
            )
        )

    def collect_changes(self, reason: Reason, tokens: Tokens, snapshot: Snapshot) -> None:
        """Keep what changed since the previous training, for the decision card and the outcome."""
        self.changes = reason.changes
        if reason.since is not None:
            self.changes += measure_divergence(self.root, self.pipeline, reason.since, tokens, snapshot)

    def work_on(self, attempt: Attempt) -> Outcome:
        """Train and judge an attempt inside its MLflow run, which gets the error's status if a step fails."""
        self.training = attempt.run
        self.pipeline = self.pipeline.model_copy(update={"train": attempt.train})
        if attempt.changes:
            get_run_logger().info("changed since its last start: %s", attempt.changes, extra={"step": "resume"})
        tags = {"prefect_flow_run_id": str(flow_run.id), "corpus_sha256": attempt.snapshot.sha256}
        mlflow_run_id = runs.open_run(self.root, self.pipeline, attempt.run_key, attempt.number, tags)
        try:
            return self.train(attempt, mlflow_run_id)
        except BaseException as error:
            runs.close_interrupted_run(self.root, mlflow_run_id, _mlflow_status(error), _failure_tags(error))
            raise

    def train(self, attempt: Attempt, mlflow_run_id: str) -> Outcome:
        """Train the model, and release it unless its session ended before the training."""
        runs.log_dataset(self.root, mlflow_run_id, self.pipeline, attempt.snapshot)
        with mirror.BackgroundUpload(self.root, attempt, self.sources_overridden) as upload:
            with self.step("train") as step:
                result = tasks.train(root=self.root, run=attempt.run, mlflow_run_id=mlflow_run_id)
                step.describe(tasks.describe_training(result))
            upload.finish()
        if isinstance(result, Paused):
            return self.pause(attempt, result, mlflow_run_id)
        return self.release(attempt, result, mlflow_run_id)

    def release(self, attempt: Attempt, result: Result, mlflow_run_id: str) -> Outcome:
        """Evaluate, register and judge a trained model, and publish all results."""
        run = attempt.run
        with self.step("evaluate") as step:
            evaluation = tasks.evaluate(
                run=run,
                snapshot=attempt.snapshot,
                tokens=attempt.tokens,
                max_bytes=self.pipeline.evaluate.max_bytes,
            )
            step.describe(tasks.describe_evaluation(evaluation))
        with self.step("sample") as step:
            samples = tasks.sample(run=run, snapshot=attempt.snapshot, tokens=attempt.tokens, cfg=self.pipeline.sample)
            step.describe(tasks.describe_samples(samples))
        with self.step("plot") as step:
            plots = tasks.plot(run=run, evaluation=evaluation)
            step.describe(tasks.describe_plots(plots))
        scores = read_scores(evaluation)
        facts = TrainedModelFacts(result, scores, read_samples(samples), attempt.snapshot.reading)
        candidate = self.build_candidate(attempt, facts, mlflow_run_id)
        with self.step("register") as step:
            version = tasks.register(root=self.root, run=run, tokens=attempt.tokens, candidate=candidate)
            step.describe(self.version_uri(version))
        done = JudgedRetraining(
            pipeline=self.pipeline,
            run=run,
            snapshot=attempt.snapshot,
            result=result,
            scores=scores,
            version=version,
            verdict=self.judge(version, attempt.snapshot, scores),
            mlflow_run_id=mlflow_run_id,
            flow_run_id=str(flow_run.id),
            samples=samples,
            plots=plots,
        )
        outcome = self.report(done, evaluation)
        mirror.remove_training(self.root, attempt)
        return outcome

    def judge(self, version: str, snapshot: Snapshot, scores: Scores) -> Verdict:
        """Let the gate decide about a registered version."""
        with self.step("gate") as step:
            verdict = tasks.gate(
                root=self.root,
                model_name=self.pipeline.model_name,
                version=version,
                snapshot=snapshot,
                scores=scores,
                cfg=self.pipeline.gate,
                sources_overridden=self.sources_overridden,
                max_bytes=self.pipeline.evaluate.max_bytes,
                device=self.pipeline.train.device,
            )
            step.describe(tasks.describe_verdict(verdict))
        return verdict

    def build_candidate(self, attempt: Attempt, facts: TrainedModelFacts, mlflow_run_id: str) -> register.Candidate:
        """Collect what the registration needs, with the version's lineage."""
        origin = {
            **lineage(
                pipeline=self.pipeline,
                snapshot=attempt.snapshot,
                tokens=attempt.tokens,
                run=attempt.run,
                result=facts.result,
                scores=facts.scores,
                ancestors=attempt.ancestors,
            ),
            "settings_key": self.settings,
            "prefect_flow_run_id": str(flow_run.id),
        }
        return register.Candidate(
            model_name=self.pipeline.model_name,
            run_key=attempt.run_key,
            attempt=attempt.number,
            mlflow_run_id=mlflow_run_id,
            lineage=origin,
            facts=facts,
        )

    def version_uri(self, version: str) -> str:
        """Return the URI of a version of the pipeline's registered model."""
        return f"models:/{self.pipeline.model_name}/{version}"

    def champion_uri(self) -> str:
        """Return the URI of the champion, empty if there is none."""
        champion = versions.find_champion(self.root, self.pipeline.model_name)
        return "" if champion is None else f"models:/{self.pipeline.model_name}@{versions.CHAMPION}"

    def skip(self, reason: str) -> Outcome:
        """Return the outcome of a run without a training."""
        newest = versions.find_newest_finished(self.root, self.pipeline)
        uri = versions.uri_of(newest) if newest else self.champion_uri()
        return Outcome(self.pipeline.name, "skipped", reason, uri, seconds=self.seconds)

    def pause(self, attempt: Attempt, ended: Paused, mlflow_run_id: str) -> Outcome:
        """End the run before the end of its training, which the next run resumes."""
        # SCHEDULED is MLflow's status for a run that has not ended and that no process works on.
        runs.close_run(self.root, mlflow_run_id, "SCHEDULED", {"paused_at": str(ended.step)})
        return Outcome(
            pipeline=self.pipeline.name,
            verdict="paused",
            reason=f"{ended.reason} are over at step {ended.step:,}; the next run resumes from there",
            uri=self.champion_uri(),
            run_directory=str(attempt.run.path),
            seconds=self.seconds,
        )

    def report(self, done: JudgedRetraining, evaluation: Path) -> Outcome:
        """Log the results to the MLflow run, publish the decision card, and close the MLflow run."""
        began = time.perf_counter()
        outcome = self.build_outcome(done)
        card_directories = decision_card.publish_card(self.root, done, self.changes or None)
        directories = [evaluation, done.samples, done.plots, *card_directories]
        runs.log_results(self.root, done.mlflow_run_id, _final_metrics(done.scores), directories)
        MetricsLog(self.root, done.mlflow_run_id, done.run.metrics).send()  # those that MLflow did not accept before
        tags = {"verdict": outcome.verdict, "reason": outcome.reason}
        runs.close_run(self.root, done.mlflow_run_id, "FINISHED", tags)
        self.seconds["report"] = round(time.perf_counter() - began, 2)
        return outcome

    def build_outcome(self, done: JudgedRetraining) -> Outcome:
        """Collect what the flow run returns about a judged version."""
        return Outcome(
            pipeline=self.pipeline.name,
            verdict="promoted" if done.verdict.promoted else "rejected",
            reason=done.verdict.reason,
            uri=self.version_uri(done.version),
            rows=(*list_scores(done.scores), *list_details(done.scores, done.result)),
            changes=self.changes,
            plots=str(done.plots),
            run_directory=str(done.run.path),
            seconds=self.seconds,
        )


def _final_metrics(scores: Scores) -> dict[str, float]:
    """Return the metrics of the reported side, of the baselines and of memorization, as in holdout_bits_per_byte."""
    reported = scores.reported
    own = {key: getattr(reported, key) for key in ("loss", "perplexity", "bits_per_byte", "top1", "top5")}
    simple = {f"baseline_{key}": value for key, value in asdict(scores.baselines).items() if key.endswith("per_byte")}
    return {**{f"{reported.side}_{key}": value for key, value in own.items()}, **simple, **scores.memorized_shares}


def _mlflow_status(error: BaseException) -> str:
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _failure_tags(error: BaseException) -> dict[str, str]:
    tags = {"reason": f"{type(error).__name__}: {error}"[:4000]}
    if isinstance(error, TrainingDiverged):
        tags["diverged_at"] = str(error.step)
    return tags
