"""The model card of a version: README.md of its bundle, which goes wherever the model goes.

It says what a stranger has to know before using the model (Mitchell et al. 2019, "Model Cards for Model Reporting",
arXiv:1810.03993), in the form that hubs read: YAML between two lines of dashes, then markdown. It is written before the
gate judges, so it holds what is known by then; the verdict stands in the registry. A card is a function of what it is
given. The decision card, report.py's, is about the choice between two versions instead.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from flows.releases.report import score_rows, table, text
from gptcore.judging.dossier import Scores
from gptcore.judging.samples import Sample
from gptcore.learning.rundir import Result

_LOADING = "## How to load it"
_MOST_SAMPLES = 3
_MOST_CHARS = 600
"""Of a sample on the card; all of them lie whole with the training's MLflow run."""
_MOST_SOURCES = 20
_SIDES = ("train", "val", "holdout")


@dataclass(frozen=True)
class Evidence:
    """What is known of a model that was trained here, beside its lineage."""

    result: Result
    scores: Scores
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Champion:
    """Whom the version meets at the gate."""

    version: str
    bits_per_byte: str | None
    """Its own score, on the text that was held out from it."""


def page(
    model_name: str,
    cfg: Mapping[str, Any],
    lineage: Mapping[str, Any],
    evidence: Evidence | None = None,
    champion: Champion | None = None,
) -> str:
    """The card. `cfg` is what the model is built from.

    Without `evidence` it was made elsewhere, or registered when there were no cards.
    """
    parts = [
        _front_matter("gptflow", lineage),
        f"# {text(model_name)}",
        _summary(model_name, cfg, lineage),
        _loading(model_name),
        "## What it learned from",
        _training_data(lineage),
        "## How it was trained",
        _training(cfg, lineage, evidence),
        "## How good it is",
        _evaluation(model_name, lineage, evidence, champion),
        *(["## What it writes", _samples(evidence.samples)] if evidence and evidence.samples else []),
        "## Limits",
        _limits(cfg, evidence),
        "## Licence",
        "That of the text it learned from: whoever owns the text decides what may be done with the model. The software "
        "that made it, gptflow, is under the MIT licence and claims nothing.",
    ]
    return "\n\n".join(parts) + "\n"


def for_transformers(card: str) -> str:
    """The card of an exported model: the same, but for how it is loaded and by what."""
    _, _, after = card.partition("\n---\n")
    before, _, rest = after.partition(f"\n{_LOADING}\n")
    _, found, rest = rest.partition("\n## ")
    loading = (
        f"{_LOADING}\n\nThis directory holds the model as a GPT-2 of Hugging Face's `transformers`, exported by "
        "`gptflow export`. `DIR` is where it lies:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")\n'
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))\n```\n"
    )
    return f"{_front_matter('transformers', {})}\n{before}\n{loading}{found}{rest}"


def _front_matter(library: str, lineage: Mapping[str, Any]) -> str:
    tags = ["gpt", *(["gpt2"] if library == "transformers" else []), "gptflow"]
    recipe = _of(lineage, "config", "model", "recipe")
    about = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": [*tags, *([f"recipe:{recipe}"] if recipe else [])],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---"


def _summary(model_name: str, cfg: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    size = f" of {lineage['parameters']:,} parameters" if "parameters" in lineage else ""
    origin = f"made by the pipeline {_code(lineage['pipeline'])}" if "pipeline" in lineage else "from elsewhere"
    if source := lineage.get("imported_from"):
        origin = f"imported from {_code(_public(str(source)))}"
    return (
        f"A GPT{size} that continues text, {origin}: a version of the registered model {_code(model_name)}. It reads "
        f"{cfg['context_length']:,} tokens at once, of {cfg['vocab_size']:,} that it knows "
        f"(tokenizer {_code(lineage.get('tokenizer', 'unknown'))}). Whether it became the champion is decided after "
        f"this was written: `gptflow models {model_name}` lists every version with its verdict, and `gptflow show "
        f"models:/{model_name}/VERSION` says why."
    )


def _loading(model_name: str) -> str:
    uri = f"models:/{model_name}@champion"
    return (
        f"{_LOADING}\n\nThe champion, or `models:/{model_name}/VERSION` for one version, where its registry is at hand "
        "(`GPTFLOW_HOME` or `MLFLOW_TRACKING_URI` says where):\n\n"
        f'```python\nimport flows, mlflow\n\nchampion = flows.load("{uri}")  # .model, .tokenizer, .cfg\n'
        f'served = mlflow.pyfunc.load_model("{uri}")\n'
        'served.predict(["Once upon a time"], params={"max_new_tokens": 50, "temperature": 0.8})\n```\n\n'
        f'```sh\ngptflow generate {uri} --prompt "Once upon a time"\n```\n\n'
        "The directory that this file lies in is a whole model; it needs neither a registry nor a network. Of it only "
        'safetensors and JSON are read:\n\n```python\nimport gptcore\n\nmodel = gptcore.load("DIR").model\n```'
    )


def _training_data(lineage: Mapping[str, Any]) -> str:
    if (corpus := lineage.get("corpus")) is None:
        rows = [(_code(name), _code(digest)) for name, digest in lineage.get("files", {}).items()]
        files = table(("read from", "sha256"), rows)
        return "Nothing is known of the text that it learned from." + (f"\n\n{files}" if files else "")
    sources = [_public(source) for source in _of(lineage, "config", "corpus", "sources") or ()]
    named = [f"- {text(source)}" for source in sources[:_MOST_SOURCES]]
    more = [f"- and {len(sources) - _MOST_SOURCES:,} more"] if len(sources) > _MOST_SOURCES else []
    sides = [(side, f"{corpus['blocks'][side]:,}", f"{corpus['bytes'][side]:,}") for side in _SIDES]
    split = ", ".join(f"{key} {value}" for key, value in lineage.get("split", {}).items())
    return "\n\n".join(
        [
            f"{corpus['documents']:,} documents from:",
            "\n".join([*named, *more]),
            table(("side", "blocks", "bytes"), sides),
            f"The model learned from `train`; `val` chose among its states; `holdout` did neither. Duplicates were "
            f"dropped ({text(split)}).",
            table(
                ("sha256 of", ""),
                [(name, _code(lineage.get(key, "unknown"))) for name, key in _DIGESTS.items()],
            ),
        ]
    )


_DIGESTS = {"text": "corpus_sha256", "tokens": "tokens_sha256", "tokenizer": "tokenizer_sha256"}


def _training(cfg: Mapping[str, Any], lineage: Mapping[str, Any], evidence: Evidence | None) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in cfg.items())
    rows = [("architecture", shape), ("started from", lineage.get("started_from") or "random weights")]
    if evidence is None:
        is_ours = "pipeline" in lineage  # registered when there were no cards
        rows[1:] = [("training", "in its lineage, lineage.json" if is_ours else "unknown: it was made elsewhere")]
    else:
        result, train = evidence.result, _of(lineage, "run_config", "train") or {}
        keys = ("optimizer", "learning_rate", "schedule", "weight_decay", "batch_size", "accumulation", "precision")
        rows += [
            ("optimisation", ", ".join(f"{key} {train[key]}" for key in keys if key in train)),
            ("updates", f"{result.steps:,} of {result.tokens_seen:,} tokens in all, ended by {result.stopped_by}"),
            ("weights", f"those after update {result.best_step:,}, val loss {result.best_val_loss:.4f} nats per token"),
            ("seed", str(lineage.get("seed"))),
            ("time", f"{result.seconds:,.1f} s in updates"),
            (
                "hardware",
                ", ".join(f"{key} {value}" for key, value in (lineage.get("hardware") or {}).items() if value),
            ),
        ]
    versions = [
        f"{name} {lineage['packages'][name]}" for name in ("gptflow", "torch") if _of(lineage, "packages", name)
    ]
    rows += [
        ("code", f"commit {lineage.get('code_commit')}, {', '.join(versions)}"),
        ("sha256 of the weights", str(lineage.get("weights_sha256"))),
    ]
    return table(("", ""), [(name, text(value)) for name, value in rows])


def _evaluation(
    model_name: str, lineage: Mapping[str, Any], evidence: Evidence | None, champion: Champion | None
) -> str:
    if evidence is None and (score := lineage.get("holdout_bits_per_byte")) is not None:
        return f"{score:.4f} bits per byte, lower is better, on text that was held out from it."
    if evidence is None:
        return "It was not scored when it was registered; the next retraining is compared with it on held-out text."
    scores = evidence.scores
    (side, score), *simple = score_rows(scores)
    rows = [(f"this model, {side}", score)]
    if scores.holdout is not None:
        rows.append(("this model, val bits per byte (also used for selection)", f"{scores.val.bits_per_byte:.4f}"))
    if champion is not None:
        own = champion.bits_per_byte or "unknown"
        rows.append((f"version {champion.version}, the champion then, on what was held out from it", own))
    rows += [(f"{name}, on the same text as this model", value) for name, value in simple]
    reported = scores.reported
    return (
        f"Bits per byte, lower is better, on {reported.bytes:,} bytes in {reported.blocks:,} blocks of "
        f"{reported.side}; comparable between vocabularies.\n\n"
        f"{table(('', 'bits per byte'), [(text(name), text(value)) for name, value in rows])}\n\n"
        f"In other words {reported.loss:.4f} nats per token, perplexity {reported.perplexity:,.1f}; the next token is "
        f"the model's first guess in {reported.top1:.1%}, among its first five in {reported.top5:.1%} of all cases. "
        "The gate compares version and champion on the same text, block by block: see `gptflow show "
        f"models:/{model_name}/VERSION`."
    )


def _samples(samples: Sequence[Sample]) -> str:
    """One per prompt, the warmest: what is drawn shows more than what is likeliest."""
    by_prompt = {sample.prompt: sample for sample in sorted(samples, key=lambda sample: sample.temperature)}
    shown = list(dict.fromkeys(sample.prompt for sample in samples))[:_MOST_SAMPLES]
    return "\n\n".join(_sample(by_prompt[prompt]) for prompt in shown)


def _sample(sample: Sample) -> str:
    whole = sample.prompt + sample.text
    clipped = whole[:_MOST_CHARS] + (" …" if len(whole) > _MOST_CHARS else "")
    begins = f"After {text(repr(sample.prompt[:80]))}" if sample.prompt else "A new document"
    return (
        f"{begins}, temperature {sample.temperature:g}, seed {sample.seed}; {sample.longest_copied:,} characters in a "
        f"row stand in the training text:\n\n{fenced(clipped)}"
    )


def fenced(plain: str) -> str:
    """Text as a block of code that no text can end: its fence is longer than any run of back-ticks inside."""
    shown = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", re.sub(r"\r\n?", "\n", plain))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def _limits(cfg: Mapping[str, Any], evidence: Evidence | None) -> str:
    limits = [
        "It knows no other text than the one it learned from, with its language, its errors and its prejudices, and "
        "states falsehoods as fluently as facts.",
        f"It sees at most {cfg['context_length']:,} tokens; what stood before them it does not know.",
        "It may repeat its training text letter by letter, and with it whatever stood there that is private.",
        "It was neither taught to follow instructions nor to refuse any; nobody has examined what it writes.",
    ]
    if evidence is not None:
        longest = max((sample.longest_copied for sample in evidence.samples), default=0)
        reported, simple = evidence.scores.reported, evidence.scores.baselines
        if longest:
            limits[2] += f" The longest stretch in its samples has {longest:,} characters."
        if not reported.bits_per_byte < simple.xz_primed_bits_per_byte:
            limits.append(
                "A compressor that has seen the training text predicts unseen text better, so remembering strings "
                "takes one further than this model: do not expect much of it."
            )
        if reported.also_used_for_selection:
            limits.append("Its score is a little too good: the same text chose among the states of the training.")
    return "\n".join(f"- {limit}" for limit in limits)


def _public(source: str) -> str:
    """A source without what may be a secret: of a URL, user, password, query and fragment."""
    if "://" not in source:
        return source
    try:
        parts = urlsplit(source)
    except ValueError:
        return source.partition("://")[0] + "://…"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _code(value: object) -> str:
    """A name or a digest in code's letters, where it cannot break out of a table or of its quotes."""
    plain = re.sub(r"[\s|`]+", " ", str(value))
    return f"`{plain}`"


def _of(lineage: Mapping[str, Any], *keys: str) -> Any:
    """What stands under the keys, each inside the one before; None where one is missing."""
    found: Any = lineage
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
