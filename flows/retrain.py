"""The retraining flow: ingest -> tokenize -> train -> evaluate -> sample -> plot -> register -> gate.

Every step finds what an earlier attempt completed, so running the flow again after any failure goes on where it
stopped. The MLflow run and the registered version are found by the run key. A training that is registered already, with
a verdict, is not repeated: the run ends as Completed with the name Skipped.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import card, deployed, lock, registry, release, tasks, tracking
from flows.gate import SOURCES_OVERRIDDEN, Verdict
from flows.lineage import lineage, run_key
from flows.pipelines import Pipeline
from flows.report import detail_rows, score_rows
from flows.state import StateRoot, state_root
from gptcore import manifest
from gptcore.config import CorpusConfig, GateConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from gptcore.corpus import Snapshot
from gptcore.data import Tokens, check_sizes
from gptcore.dossier import Scores, read_samples, read_scores
from gptcore.errors import TrainingDiverged
from gptcore.rundir import Result, RunDirectory
from gptcore.train import TRAINING_VERSION, resolve

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a retraining ended."""

    pipeline: str
    verdict: str
    """promoted, rejected, or skipped."""
    reason: str
    """Why, in a sentence."""
    uri: str
    """The version that the run is about."""
    rows: tuple[tuple[str, str], ...] = ()
    """The result table."""
    plots: str = ""
    run_directory: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each step took."""


# Prefect would check each section alone; a deployed run's sections are checked when its deployment's stand under them.
@flow(name="retrain", flow_run_name="{pipeline}", persist_result=False, validate_parameters=False)
def retrain(
    pipeline: str,
    model_name: str,
    corpus: CorpusConfig,
    model: ModelConfig,
    train: TrainConfig,
    sample: SampleConfig,
    gate: GateConfig,
    force: bool = False,
    sources_overridden: bool = False,
    overlap: lock.Overlap = "skip",
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
        force: Train again even if nothing has changed.
        sources_overridden: corpus.sources are not the pipeline's own: register a version, but leave an existing
            champion alone.
        overlap: While another run of the pipeline is under way: skip, or wait for its end.
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
            overlap=overlap,
        ),
        False,
    )
    root = state_root().create()
    try:
        with lock.hold(root.lock(asked.name), str(flow_run.id), asked.overlap):
            resolved = asked.model_copy(update={"train": resolve(asked.train)})
            return _Retraining(resolved, root, force, sources_overridden or has_other_sources).run()
    except lock.Held as held:
        outcome = Outcome(asked.name, "skipped", str(held), uri=f"models:/{asked.model_name}@{registry.CHAMPION}")
        return Completed(name="Skipped", message=outcome.reason, data=outcome)


class _Retraining:
    """One run of the flow: what was asked for, and what has been made so far."""

    def __init__(self, pipeline: Pipeline, root: StateRoot, force: bool, sources_overridden: bool) -> None:
        self.pipeline, self.root, self.force = pipeline, root, force
        self.sources_overridden = sources_overridden
        self.seconds: dict[str, float] = {}

    def run(self) -> State[Outcome]:
        tracking.open_database(self.root)
        for parent in (self.root.corpora, self.root.tokens):
            manifest.sweep(parent)
        corpus = self.pipeline.corpus
        snapshot = self.step("ingest", _snapshot_line, tasks.ingest, corpus, self.root.corpora, Path.cwd())
        tokens = self.step("tokenize", _tokens_line, tasks.tokenize, snapshot.path, corpus.tokenizer, self.root.tokens)
        self.check_sizes(tokens)
        key = run_key(self.pipeline, tokens, TRAINING_VERSION)
        attempt, done = self.attempt(key)
        if done is not None:
            return self.skipped(str(done.version))
        run = self.prepared(key, attempt, tokens)
        tags = {"prefect_flow_run_id": str(flow_run.id), "corpus_sha256": snapshot.sha256}
        mlflow_run_id = tracking.open_run(self.root, self.pipeline, key, attempt, tags)
        try:
            outcome = self.trained(run, snapshot, tokens, mlflow_run_id, attempt)
        except BaseException as error:
            tracking.close_interrupted(self.root, mlflow_run_id, _mlflow_status(error), _failure_tags(error))
            raise
        name = "Promoted" if outcome.verdict == "promoted" else "Kept champion"
        return Completed(name=name, message=outcome.reason, data=outcome)

    def trained(
        self, run: RunDirectory, snapshot: Snapshot, tokens: Tokens, mlflow_run_id: str, attempt: int
    ) -> Outcome:
        """From the training on: everything that belongs to one run directory."""
        tracking.log_dataset(self.root, mlflow_run_id, self.pipeline, snapshot)
        result = self.step("train", _result_line, tasks.train, self.root, run, mlflow_run_id)
        evaluation = self.step("evaluate", _evaluation_line, tasks.evaluate, run, snapshot, tokens)
        samples = self.step("sample", _samples_line, tasks.sample, run, snapshot, tokens, self.pipeline.sample)
        plots = self.step("plot", str, tasks.plot, run, evaluation)
        scores = read_scores(evaluation)
        candidate = self.candidate(run, snapshot, tokens, scores, result, mlflow_run_id, attempt)
        version = self.step("register", self.version_line, tasks.register, self.root, run, tokens, candidate)
        verdict = self.gated(version, snapshot, scores)
        outcome = Outcome(
            pipeline=self.pipeline.name,
            verdict="promoted" if verdict.promoted else "rejected",
            reason=verdict.reason,
            uri=f"models:/{self.pipeline.model_name}/{version}",
            rows=(*score_rows(scores), *detail_rows(scores, result)),
            plots=str(plots),
            run_directory=str(run.path),
            seconds=self.seconds,
        )
        began = time.perf_counter()
        done = card.Retrained(
            pipeline=self.pipeline,
            run=run,
            snapshot=snapshot,
            result=result,
            scores=scores,
            version=version,
            verdict=verdict,
            mlflow_run_id=mlflow_run_id,
            flow_run_id=str(flow_run.id),
            samples=samples,
            plots=plots,
        )
        self.report(outcome, done, evaluation)
        self.seconds["report"] = round(time.perf_counter() - began, 2)
        return outcome

    def step(self, name: str, describe: Callable[[T], str], task: Callable[..., T], *arguments: Any) -> T:
        """Runs a task, and says in one line what came out and how long it took."""
        began = time.perf_counter()
        result = task(*arguments)
        self.seconds[name] = round(time.perf_counter() - began, 2)
        get_run_logger().info("%s: %s  (%.1f s)", name, describe(result), self.seconds[name], extra={"step": name})
        return result

    def gated(self, version: str, snapshot: Snapshot, scores: Scores) -> Verdict:
        name, cfg = self.pipeline.model_name, self.pipeline.gate
        arguments = (self.root, name, version, snapshot, scores, cfg, self.sources_overridden)
        return self.step("gate", _verdict_line, tasks.gate, *arguments)

    def check_sizes(self, tokens: Tokens) -> None:
        train, context = self.pipeline.train, self.pipeline.model.shape()["context_length"]
        check_sizes(tokens, context, train.stride or context, train.batch_size * train.accumulation)

    def attempt(self, key: str) -> tuple[int, Any]:
        """The attempt to work on; and the version that makes it needless, if there is one."""
        newest = registry.find(self.root, self.pipeline.model_name, key)
        if newest is None:
            return 1, None
        number, is_decided = int(newest.tags["attempt"]), "verdict" in newest.tags
        if newest.tags.get("gate_kind") == SOURCES_OVERRIDDEN and not self.sources_overridden:
            is_decided = False  # the pipeline's own sources have become this text: now it competes
        if not is_decided:
            return number, None
        return (number + 1, None) if self.force else (number, newest)

    def prepared(self, key: str, attempt: int, tokens: Tokens) -> RunDirectory:
        run = RunDirectory(self.root.run_directory(self.pipeline.name, key, attempt))
        run.prepare(run_config(self.pipeline, tokens, f"../../../tokens/{tokens.path.name}", key))
        return run

    def candidate(
        self,
        run: RunDirectory,
        snapshot: Snapshot,
        tokens: Tokens,
        scores: Scores,
        result: Result,
        mlflow_run_id: str,
        attempt: int,
    ) -> release.Candidate:
        champion = registry.champion_of(self.root, self.pipeline.model_name)
        origin = {
            **lineage(self.pipeline, snapshot, tokens, run, result, scores),
            "prefect_flow_run_id": str(flow_run.id),
            "parent_version": None if champion is None else str(champion.version),
        }
        name = self.pipeline.model_name
        return release.Candidate(name, run.config().run_key, attempt, mlflow_run_id, origin)

    def version_line(self, version: str) -> str:
        return f"models:/{self.pipeline.model_name}/{version}"

    def skipped(self, version: str) -> State[Outcome]:
        uri = self.version_line(version)
        reason = f"nothing changed since version {version} of {self.pipeline.model_name}; --force trains again"
        outcome = Outcome(self.pipeline.name, "skipped", reason, uri, seconds=self.seconds)
        return Completed(name="Skipped", message=reason, data=outcome)

    def report(self, outcome: Outcome, done: card.Retrained, evaluation: Path) -> None:
        """The evidence goes to the MLflow run, and a card with all of it to both."""
        directories = [evaluation, done.samples, done.plots, *card.publish(self.root, done)]
        tracking.log_results(self.root, done.mlflow_run_id, _final_metrics(done.scores), directories)
        tags = {"verdict": outcome.verdict, "reason": outcome.reason}
        tracking.close_run(self.root, done.mlflow_run_id, "FINISHED", tags)


def run_config(pipeline: Pipeline, tokens: Tokens, tokens_path: str, key: str) -> RunConfig:
    """What config.json of the run directory says. `pipeline.train` must be resolved (no auto)."""
    return RunConfig(
        training_version=TRAINING_VERSION,
        tokens=tokens_path,
        tokens_sha256=tokens.sha256,
        model=pipeline.model,
        vocab_size=tokens.n_vocab,
        train=pipeline.train,
        run_key=key,
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


def _snapshot_line(snapshot: Snapshot) -> str:
    sizes = ", ".join(f"{side} {size / 1000:,.0f} kB" for side, size in snapshot.bytes.items())
    return f"{snapshot.documents:,} documents: {sizes}"


def _tokens_line(tokens: Tokens) -> str:
    counts = ", ".join(f"{side} {count:,}" for side, count in tokens.counts.items())
    return f"{tokens.tokenizer}, {tokens.n_vocab:,} entries: {counts} tokens"


def _result_line(result: Result) -> str:
    return (
        f"{result.steps:,} steps, {result.tokens_seen:,} tokens, best val loss {result.best_val_loss:.3f} "
        f"at step {result.best_step:,}"
    )


def _evaluation_line(evaluation: Path) -> str:
    reported = read_scores(evaluation).reported
    return f"{reported.bits_per_byte:.4f} bits per byte on {reported.side}, perplexity {reported.perplexity:,.1f}"


def _samples_line(samples: Path) -> str:
    written = read_samples(samples)
    copied = max((sample.longest_copied for sample in written), default=0)
    return f"{len(written)} samples, longest verbatim copy {copied} characters"


def _verdict_line(verdict: Verdict) -> str:
    return f"{'promoted' if verdict.promoted else 'rejected'}: {verdict.reason}"
