"""The model card of a version: README.md of its bundle, which goes wherever the model goes.

It says what a stranger has to know before using the model (Mitchell et al. 2019, "Model Cards for Model Reporting",
arXiv:1810.03993). Hubs read its form: YAML between two lines of dashes, then Markdown. It is written before the gate
judges the version, so it holds what is known by then; the registry has the verdict. A card is a function of its
arguments. The decision card (decision.py) is about the choice between two versions instead.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from flows.cards.decision import escape, format_interval, list_scores, pick_sources, render_table
from flows.cards.verdict import describe_share
from gptcore.corpus.reading import Reading, count_documents
from gptcore.credentials import strip_secrets
from gptcore.evaluation.memorization import Memorization
from gptcore.evaluation.run_report import Scores
from gptcore.evaluation.samples import Sample
from gptcore.training.run_directory import Result

_LOADING = "## How to load it"
_MAX_SAMPLES = 3
_MAX_CHARS = 600
"""Most characters of a sample on the card; the training's MLflow run has all samples in full."""
_MAX_SOURCES = 20
_MAX_SUFFIXES = 20
_COLUMNS = {
    "read": "files read",
    "documents": "documents",
    "empty": "empty",
    "duplicate": "duplicates",
    "bad": "damaged files",
    "foreign": "other tables",
    "replaced": "replaced characters",
}
"""The counts of a reading that are columns of a table, and their headings."""
_SIDES = ("train", "val", "holdout")


@dataclass(frozen=True)
class TrainedModelFacts:
    """What is known about a model that was trained here, besides its lineage."""

    result: Result
    scores: Scores
    samples: Sequence[Sample]
    reading: Reading = field(default_factory=Reading)
    """What became of the files of its sources; empty if an earlier release read them."""


@dataclass(frozen=True)
class Champion:
    """The champion that the gate compares the version with."""

    version: str
    bits_per_byte: str | None
    """The champion's own score, on the text that was held out from it."""


def render_card(
    model_name: str,
    cfg: Mapping[str, Any],
    lineage: Mapping[str, Any],
    facts: TrainedModelFacts | None = None,
    champion: Champion | None = None,
) -> str:
    """Render the card as Markdown. `cfg` is the configuration of the model's architecture.

    `facts` is None if the model was made elsewhere, or was registered before there were model cards.
    """
    parts = [
        _render_front_matter("gptflow", lineage),
        f"# {escape(model_name)}",
        _render_summary(model_name, cfg, lineage),
        _render_loading(model_name),
        "## What it learned from",
        _render_training_data(lineage, facts.reading if facts else Reading()),
        "## How it was trained",
        _render_training(cfg, lineage, facts),
        "## How good it is",
        _render_evaluation(model_name, lineage, facts, champion),
        *(["## What it writes", _render_samples(facts.samples)] if facts and facts.samples else []),
        "## Limits",
        _render_limits(cfg, facts),
        "## Licence",
        "The licence of the text that it learned from: the owners of that text decide what may be done with the model. "
        "gptflow, the software that made the model, is under the MIT licence and claims nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def adapt_for_transformers(card: str, architecture: str) -> str:
    """Adapt the card to an exported model: only the library, and the section on how to load the model, change.

    `architecture` is the name of the model's class in `transformers`, such as GPT-2.
    """
    _, _, after = card.partition("\n---\n")
    before, _, rest = after.partition(f"\n{_LOADING}\n")
    _, separator, rest = rest.partition("\n## ")
    loading = (
        f"{_LOADING}\n\nThis directory holds the model as a {architecture} of Hugging Face's `transformers`, exported "
        "by `gptflow export`. `DIR` is its path:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")\n'
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))\n```\n"
    )
    return f"{_render_front_matter('transformers', {}, architecture)}\n{before}\n{loading}{separator}{rest}"


def _render_front_matter(library: str, lineage: Mapping[str, Any], architecture: str = "") -> str:
    tags = ["gpt", *([architecture.replace("-", "").lower()] if architecture else []), "gptflow"]
    recipe = _look_up(lineage, "config", "model", "recipe")
    about = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": [*tags, *([f"recipe:{recipe}"] if recipe else [])],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---"


def _render_summary(model_name: str, cfg: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    size = f" of {lineage['parameters']:,} parameters" if "parameters" in lineage else ""
    origin = f"made by the pipeline {_render_code(lineage['pipeline'])}" if "pipeline" in lineage else "from elsewhere"
    if source := lineage.get("imported_from"):
        origin = f"imported from {_render_code(strip_secrets(str(source)))}"
    return (
        f"A GPT{size} that continues text, {origin}: a version of the registered model {_render_code(model_name)}. It "
        f"reads at most {cfg['context_length']:,} tokens at once and knows {cfg['vocab_size']:,} different tokens "
        f"(tokenizer {_render_code(lineage.get('tokenizer', 'unknown'))}). This card was written before the decision "
        f"whether the version becomes champion, the version in use. `gptflow models {model_name}` lists every version "
        f"with its verdict, and `gptflow show models:/{model_name}/VERSION` says why."
    )


def _render_loading(model_name: str) -> str:
    uri = f"models:/{model_name}@champion"
    return (
        f"{_LOADING}\n\nThis loads the champion from its registry, which `GPTFLOW_HOME` or `MLFLOW_TRACKING_URI` "
        f"names. Write `models:/{model_name}/VERSION` for another version:\n\n"
        f'```python\nimport flows, mlflow\n\nchampion = flows.load("{uri}")  # .model, .tokenizer, .cfg\n'
        f'served = mlflow.pyfunc.load_model("{uri}")\n'
        'served.predict(["Once upon a time"], params={"max_new_tokens": 50, "temperature": 0.8})\n```\n\n'
        f'```sh\ngptflow generate {uri} --prompt "Once upon a time"\n```\n\n'
        "The directory of this file is a whole model, which needs neither a registry nor a network. Only its "
        'safetensors and JSON files are read:\n\n```python\nimport gptcore\n\nmodel = gptcore.load("DIR").model\n```'
    )


def _render_training_data(lineage: Mapping[str, Any], reading: Reading) -> str:
    if (corpus := lineage.get("corpus")) is None:
        rows = [(_render_code(name), _render_code(digest)) for name, digest in lineage.get("files", {}).items()]
        files = render_table(("read from", "sha256"), rows)
        return "Nothing is known about the text that it learned from." + (f"\n\n{files}" if files else "")
    sources = [strip_secrets(source) for source in _look_up(lineage, "config", "corpus", "sources") or ()]
    named = [f"- {escape(source)}" for source in sources[:_MAX_SOURCES]]
    more = [f"- and {len(sources) - _MAX_SOURCES:,} more"] if len(sources) > _MAX_SOURCES else []
    sides = [(side, f"{corpus['blocks'][side]:,}", f"{corpus['bytes'][side]:,}") for side in _SIDES]
    split = lineage.get("split", {})
    duplicates = "kept" if split.get("duplicates") == "keep" else "dropped"
    settings = ", ".join(f"{key} {value}" for key, value in split.items() if key != "duplicates")
    return "\n\n".join(
        [
            f"{count_documents(corpus['documents'])} from:",
            "\n".join([*named, *more]),
            *_render_reading(reading),
            render_table(("side", "blocks", "bytes"), sides),
            "The model learned from `train`. `val` chose the best state of the training. `holdout` did neither. "
            f"Duplicates were {duplicates} ({escape(settings)}).",
            render_table(
                ("sha256 of", ""),
                [(name, _render_code(lineage.get(key, "unknown"))) for name, key in _DIGESTS.items()],
            ),
        ]
    )


def _render_reading(reading: Reading) -> list[str]:
    """Render what became of the files of the sources, in numbers. The names of files stay in the run's log."""
    if not reading.counts:
        return []
    names = [name for name in _COLUMNS if reading.total(name)]
    counts = sorted(reading.counts.items(), key=lambda one: one[1]["documents"], reverse=True)
    rows = [
        (_render_code(suffix), *(f"{number[name]:,}" if number[name] else "" for name in names))
        for suffix, number in counts
        if any(number[name] for name in names)
    ]
    notes = [f"Not shown: {more:,} other suffixes."] if (more := len(rows) - _MAX_SUFFIXES) > 0 else []
    if skipped := [f"{_render_code(suffix)} {number['skipped']:,}" for suffix, number in counts if number["skipped"]]:
        notes.append(f"Files that were not read: {', '.join(skipped[:_MAX_SUFFIXES])}.")
    if reading.excluded:
        notes.append(f"Left out by rules: {escape(reading.describe_excluded())}.")
    if reading.secrets:
        notes.append(f"Lines that look like keys or passwords, and are in the text: {reading.describe_kinds()}.")
    table = render_table(("suffix", *(_COLUMNS[name] for name in names)), rows[:_MAX_SUFFIXES])
    return [table, " ".join(notes)] if notes else [table]


_DIGESTS = {"text": "corpus_sha256", "tokens": "tokens_sha256", "tokenizer": "tokenizer_sha256"}


def _render_training(cfg: Mapping[str, Any], lineage: Mapping[str, Any], facts: TrainedModelFacts | None) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in cfg.items())
    rows = [("architecture", shape), ("started from", lineage.get("started_from") or "random weights")]
    if facts is None:
        is_ours = "pipeline" in lineage  # registered before there were model cards
        rows[1:] = [("training", "see its lineage, lineage.json" if is_ours else "unknown: it was made elsewhere")]
    else:
        result, train = facts.result, _look_up(lineage, "run_config", "train") or {}
        keys = ("optimizer", "learning_rate", "schedule", "weight_decay", "batch_size", "accumulation", "precision")
        rows += [
            ("optimisation", ", ".join(f"{key} {train[key]}" for key in keys if key in train)),
            ("steps", f"{result.steps:,} with {result.tokens_seen:,} tokens in all, ended by {result.stopped_by}"),
            ("weights", f"those after step {result.best_step:,}, val loss {result.best_val_loss:.4f} nats per token"),
            ("seed", str(lineage.get("seed"))),
            ("time", f"{result.seconds:,.1f} s in updates"),
            (
                "hardware",
                ", ".join(f"{key} {value}" for key, value in (lineage.get("hardware") or {}).items() if value),
            ),
        ]
        rows += [
            ("earlier updates with", ", ".join(f"{key} {value}" for key, value in earlier.items()))
            for earlier in (lineage.get("executions") or [])[:-1]
        ]
    versions = [
        f"{name} {lineage['packages'][name]}" for name in ("gptflow", "torch") if _look_up(lineage, "packages", name)
    ]
    rows += [
        ("code", f"commit {lineage.get('code_commit')}, {', '.join(versions)}"),
        ("sha256 of the weights", str(lineage.get("weights_sha256"))),
    ]
    return render_table(("", ""), [(name, escape(value)) for name, value in rows])


def _render_evaluation(
    model_name: str, lineage: Mapping[str, Any], facts: TrainedModelFacts | None, champion: Champion | None
) -> str:
    if facts is None and (score := lineage.get("holdout_bits_per_byte")) is not None:
        return f"{score:.4f} bits per byte, lower is better, on text that was held out from it."
    if facts is None:
        return "It was not scored when it was registered. The next retraining is compared with it on held-out text."
    scores = facts.scores
    (side, score), *simple = list_scores(scores)
    rows = [(f"this model, {side}", score)]
    if scores.holdout is not None:
        rows.append(("this model, val bits per byte (also used for selection)", f"{scores.val.bits_per_byte:.4f}"))
    if champion is not None:
        name = f"version {champion.version}, the champion then, on what was held out from it"
        rows.append((name, champion.bits_per_byte or "unknown"))
    rows += [(f"{name}, on the same text as this model", value) for name, value in simple]
    reported = scores.reported
    by_source, note = pick_sources(scores.sources, "held-out text")
    sources = [
        (escape(one.source), f"{one.blocks:,}", f"{one.bytes:,}", f"{one.bits_per_byte:.4f}") for one in by_source
    ]
    share = describe_share(reported.bytes, reported.available_bytes)
    interval = format_interval(reported)
    parts = [
        f"Bits per byte, lower is better, on {reported.bytes:,} bytes in {reported.blocks:,} blocks of "
        f"{reported.side}{f' ({share})' if share else ''}. Scores compare between models with different vocabularies."
        + (f" The model's score on such text is {interval}, with a confidence of 95%." if interval else ""),
        render_table(("", "bits per byte"), [(escape(name), escape(value)) for name, value in rows]),
        *(
            [render_table(("source", "blocks", "bytes", "bits per byte"), sources), note]
            if len(scores.sources) > 1
            else []
        ),
        f"In other units: {reported.loss:.4f} nats per token, perplexity {reported.perplexity:,.1f}. The next token is "
        f"the model's first guess in {reported.top1:.1%} of all cases, and among its first five in "
        f"{reported.top5:.1%}. The gate compares version and champion on the same text, block by block: see "
        f"`gptflow show models:/{model_name}/VERSION`.",
    ]
    return "\n\n".join(filter(None, parts))


def _render_samples(samples: Sequence[Sample]) -> str:
    """Render one sample per prompt, that of the highest temperature: random samples show more than likely ones."""
    by_prompt = {sample.prompt: sample for sample in sorted(samples, key=lambda sample: sample.temperature)}
    shown = list(dict.fromkeys(sample.prompt for sample in samples))[:_MAX_SAMPLES]
    return "\n\n".join(_render_sample(by_prompt[prompt]) for prompt in shown)


def _render_sample(sample: Sample) -> str:
    whole = sample.prompt + sample.text
    clipped = whole[:_MAX_CHARS] + (" …" if len(whole) > _MAX_CHARS else "")
    begins = f"After {escape(repr(sample.prompt[:80]))}" if sample.prompt else "A new document"
    return (
        f"{begins}, temperature {sample.temperature:g}, seed {sample.seed}. At most {sample.longest_copied:,} "
        f"characters in a row are copied from the training text:\n\n{_render_fence(clipped)}"
    )


def _render_fence(plain: str) -> str:
    """Render text as a block of code. No text can end it: the fence is longer than any run of back-ticks inside."""
    shown = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", re.sub(r"\r\n?", "\n", plain))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def _render_limits(cfg: Mapping[str, Any], facts: TrainedModelFacts | None) -> str:
    limits = [
        "It knows only the text that it learned from, with the language, errors and prejudices of that text. It states "
        "falsehoods as fluently as facts.",
        f"It sees at most {cfg['context_length']:,} tokens and does not know what came before them.",
        "It may repeat its training text letter by letter, private details included.",
        "It was not taught to follow instructions or to refuse them. Nobody has examined what it writes.",
    ]
    if facts is not None:
        longest = max((sample.longest_copied for sample in facts.samples), default=0)
        reported, simple = facts.scores.reported, facts.scores.baselines
        limits[2] += _describe_memorization(facts.scores.memorization)
        if longest:
            limits[2] += f" The longest copied run in its samples has {longest:,} characters."
        if not reported.bits_per_byte < simple.xz_primed_bits_per_byte:
            limits.append(
                "A compressor that has seen the training text predicts unseen text better. Merely remembering strings "
                "works better than this model, so do not expect much of it."
            )
        if reported.also_used_for_selection:
            limits.append("Its score is a little too good: the same text chose the best state of the training.")
    return "\n".join(f"- {limit}" for limit in limits)


def _describe_memorization(found: Memorization | None) -> str:
    """Say in a few sentences how much of its training text the model completes; empty if that was not measured."""
    if found is None:
        return ""
    kinds = (("once", found.once), ("more than once", found.repeated))
    measured = [
        f"in {completions.share:.1%} of {completions.sampled:,} passages that are there {often} (95% interval: "
        f"{completions.low:.1%} to {completions.high:.1%})"
        for often, completions in kinds
        if completions.sampled
    ]
    if not measured:
        return f" This was not measured: that text has no passage of {2 * found.prefix_tokens} tokens."
    tokens = found.prefix_tokens
    return (
        f" Given {tokens} tokens of its training text, it continues with exactly the next {tokens} tokens of that text "
        f"{', and '.join(measured)}."
    )


def _render_code(value: object) -> str:
    """Render a name or a digest as inline code that cannot break its table or its quotes."""
    plain = re.sub(r"[\s|`]+", " ", str(value))
    return f"`{plain}`"


def _look_up(lineage: Mapping[str, Any], *keys: str) -> Any:
    """Look up nested keys, each inside the one before. Returns None if a key is missing.

    For example, `_look_up(lineage, "config", "model", "recipe")`.
    """
    value: Any = lineage
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
