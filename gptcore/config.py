"""The schema of the configuration: of pipelines.yaml, the command line and the form in the Prefect UI.

Each section is a frozen pydantic model that refuses unknown keys. The string under a field is its documentation, which
`gptflow run --help` and the form show with the default. An empty field is `null` in pipelines.yaml. This module does
not import torch, so a wrong value is reported within a moment. Sections that only the flows read are in flows/config
and flows/notifications.
"""

import codecs
import re
from collections.abc import Mapping
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from gptcore.components import RECIPES
from gptcore.credentials import check_address
from gptcore.sections import Added, Section

SizeName = Literal["nano", "mini", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

_SHAPE = ("context_length", "emb_dim", "n_heads", "n_layers")
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(_SHAPE, shape))
    for name, shape in {
        "nano": (64, 128, 4, 4),
        "mini": (128, 128, 4, 4),
        "small": (256, 384, 6, 6),
        # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2, with 64-wide heads.
        "gpt2": (1024, 768, 12, 12),
        "gpt2-medium": (1024, 1024, 16, 24),
        "gpt2-large": (1024, 1280, 20, 36),
        "gpt2-xl": (1024, 1600, 25, 48),
    }.items()
}
"""Context length, width, heads and layers of each named model size."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**48)]
DEVICE_NAME = r"^(auto|cpu|mps|cuda(:[0-9]+)?)$"
"""Pattern of a device's name. devices.py says what `auto` means."""
Device = Annotated[str, Field(pattern=DEVICE_NAME)]
Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", True, False]
Threads = Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]
Source = Annotated[str, Field(min_length=1), AfterValidator(check_address)]
Format = Literal["text", "json", "jsonl", "csv", "tsv", "parquet", "html", "notebook"]
"""How the text of a file is found in its bytes."""
_SUFFIX = re.compile(r"(\.[a-z0-9_\-]+){1,2}(?<!\.gz)(?<!\.zst)")


class CorpusConfig(Section):
    """The text to learn from, how it becomes tokens, and how it is split into train, val and holdout."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = ("python-docs",)
    """Where text comes from: a file, a directory, a glob, an http(s) URL (append #sha256=HEX to check the download),
    anything that fsspec opens (s3://, gs://, hf://), or python-docs, the reference that ships inside Python. The suffix
    names the format: plain text and source code, .html .ipynb .json .jsonl .ndjson .csv .tsv .parquet, each also .gz or
    .zst; a file without a suffix is plain text. Directories are not searched for .json and .log. Write a password or
    key in an address as ${NAME}, an environment variable of the run. Links that lead out of a directory, and
    redirections from the internet into a private network, are refused: list their targets here instead."""
    exclude: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Added(before=())] = ()
    """Patterns of files that are not read below the directories and globs of sources, as in .gitignore, such as drafts/
    or *.log. Hidden files, node_modules, virtual environments, state roots, and the files that a .gitignore below a
    source names are never read."""
    text: Annotated[str, Field(min_length=1), Added(before="text")] = "text"
    """Which part of a table's row is its text: a column, a path to a nested value such as message.body, or a template
    over several columns, such as "{title}\\n\\n{body}"."""
    tokenizer: Annotated[str, Field(pattern=r"^(bytes|bpe:[0-9]{3,6}|[A-Za-z][A-Za-z0-9_.\-]*)$")] = "gpt2"
    """How text becomes tokens. gpt2 or another name in tiktoken: that published vocabulary. bpe:N: a vocabulary of N
    entries, from 257 to 200000, that is trained on the train split; it suits text unlike English and small models.
    bytes: one token per byte."""
    split: Literal["hash", "contiguous"] = "hash"
    """hash: the content of each block of text decides whether it belongs to train, val or holdout. So the corpus may
    grow, and text held out in an earlier run stays unseen. contiguous: the beginning of the text is train, then comes
    val, then holdout."""
    block_bytes: Annotated[int, Field(ge=64, le=1_048_576)] | None = None
    """Average size, in bytes, of the blocks into which a long document is cut. Every block is in train, val or
    holdout as a whole. Empty: chosen from the size of the pipeline's first snapshot (2048 for much text, less for less
    text), recorded there, and kept."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the text, between 0 and 1, on which the best checkpoint is chosen. Empty: chosen and kept as block_bytes
    is, 0.05 for much text, more for less text."""
    holdout_fraction: Fraction | None = None
    """Share of the text that neither training nor the choice of the checkpoint sees, and that the reported scores are
    measured on. With 0, the scores are measured on val and marked as such. Empty: chosen and kept as block_bytes is,
    0.05 for much text, more for less text."""
    duplicates: Annotated[Literal["drop", "keep"], Added(before="drop")] = "drop"
    """What to do with copies of a text, also if line ends, indents, case or quoting marks differ. drop: train on each
    text once. keep: copies stay in train, so that the model learns a repeated text more often. Copies never stay in val
    or holdout."""
    formats: Annotated[dict[str, Format], Added(before={})] = Field(default={})
    """How files are read whose suffix says nothing, or something else: .log: text. Directories are then searched for
    these suffixes too. A suffix is in lower case, without .gz or .zst."""
    encoding: Annotated[str, Added(before="")] = ""
    """The encoding of text files, by Python's name, such as cp1252 or shift_jis. Empty: UTF-8, or UTF-16 or UTF-32 if
    the file begins with a byte order mark, which is not part of the text. Web pages may name their own encoding.
    Everything is stored as UTF-8."""
    errors: Literal["strict", "replace", "skip"] = "strict"
    """What to do with files that cannot be used. strict: stop, and name all of them with their problems. skip: leave
    each of them out as a whole, also if one row of a table is wrong, and name them in the report of the run. replace:
    as strict, but bytes that are not valid in the encoding become U+FFFD."""

    @model_validator(mode="after")
    def _check_fractions_and_tokenizer(self) -> Self:
        if (
            self.val_fraction is not None
            and self.holdout_fraction is not None
            and self.val_fraction + self.holdout_fraction >= 1
        ):
            raise ValueError(
                f"val_fraction {self.val_fraction} and holdout_fraction {self.holdout_fraction} add up to 1 or more: "
                "nothing is left to train on; lower one of them"
            )
        if self.tokenizer.startswith("bpe:") and not 257 <= int(self.tokenizer[4:]) <= 200_000:
            raise ValueError(f"tokenizer {self.tokenizer!r}: N of bpe:N must be between 257 and 200000")
        return self

    @field_validator("sources", "exclude", mode="before")
    @classmethod
    def _accept_single_entry(cls, given: Any) -> Any:
        """Accept `sources: notes/` for a list of one entry."""
        return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given

    @field_validator("formats")
    @classmethod
    def _check_suffixes(cls, formats: dict[str, Format]) -> dict[str, Format]:
        """Refuse a key that no file's suffix can be."""
        if wrong := [suffix for suffix in formats if not _SUFFIX.fullmatch(suffix)]:
            raise ValueError(
                f"{wrong[0]!r} is not a suffix. Write it in lower case and with its dot, such as .log, without .gz"
            )
        return formats

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str) -> str:
        """Refuse an encoding that Python does not know."""
        try:
            if codecs.lookup(encoding or "utf-8").name in ("idna", "punycode"):
                raise LookupError
            "".encode(encoding or "utf-8")
        except (LookupError, ValueError):
            raise ValueError(
                f"{encoding!r} is not an encoding. Name one as Python does, such as cp1252, shift_jis or utf-16-le"
            ) from None
        return encoding

    @field_validator("text", mode="before")
    @classmethod
    def _refuse_mapping(cls, given: Any) -> Any:
        """Refuse a template without quotation marks, which YAML reads as a mapping."""
        if isinstance(given, Mapping):
            raise ValueError("write a template in quotation marks, as in text: '{title}'")
        return given

    @field_validator("text")
    @classmethod
    def _check_template(cls, text: str) -> str:
        """Refuse a template that cannot be filled in."""
        is_template = "{" in text or "}" in text
        try:
            fields = list(Formatter().parse(text)) if is_template else []
        except ValueError as error:
            raise ValueError(
                f"{text!r} is not a template: {error}. Write {{{{ or }}}} for a brace in the text"
            ) from None
        if any(name == "" or spec or conversion for _, name, spec, conversion in fields):
            raise ValueError(
                f"{text!r} must hold a column or path between each pair of braces, as in '{{title}} {{body}}'"
            )
        if is_template and not any(name for _, name, _, _ in fields):
            raise ValueError(f"{text!r} names no column, so every row would have the same text")
        return text


class ModelConfig(Section):
    """The model's architecture. `size` gives a shape and `recipe` the components; other fields override them."""

    size: SizeName = "mini"
    """A named size: nano (context 64, width 128, 4 layers), mini (128, 128, 4), small (256, 384, 6), or one of GPT-2's
    four published sizes (context 1024). Larger models learn more from much text and take longer."""
    context_length: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Tokens that the model sees at once. Empty: the size's."""
    emb_dim: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Width of the embeddings and of every block. Must be divisible by n_heads. Empty: the size's."""
    n_heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Attention heads per block. Empty: the size's."""
    n_layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of transformer blocks. Empty: the size's."""
    drop_rate: Fraction = 0.0
    """Dropout probability. The book uses 0.1, which helps if a small text is read many times. On a CPU, dropout in
    attention makes training slower."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias."""
    recipe: Literal["gpt2", "modern"] = "gpt2"
    """The components of the model, as far as the fields below are empty. gpt2: learned positions, layer norms, GELU and
    biases. modern: rotary positions, RMS norms, normed embeddings, queries and keys, squared ReLU, no biases, and
    blocks that begin as the identity. modern learns faster, most of all with train.optimizer: muon. Default of a
    pipeline: modern, or gpt2 if train.start_from is set."""
    positions: Literal["learned", "rotary"] | None = None
    """How the model knows a token's position. learned: a learned vector per position. rotary: queries and keys are
    rotated by an angle that depends on the position; heads must have an even width. Empty: the recipe's."""
    norm: Literal["layer", "rms"] | None = None
    """layer: layer norms with learned gains and shifts. rms: RMS norms with nothing learned. Empty: the recipe's."""
    activation: Literal["gelu", "relu2"] | None = None
    """Activation between the feed-forward layers: GELU, or the square of ReLU (relu2). Empty: the recipe's."""
    qk_norm: bool | None = None
    """Whether the queries and keys of each head are normed. Empty: the recipe's."""
    emb_norm: bool | None = None
    """Whether the embeddings are normed. Empty: the recipe's."""
    bias: bool | None = None
    """Whether the linear layers of the blocks have biases, apart from queries, keys and values. Empty: the recipe's."""
    tied: bool | None = None
    """Whether the output head and the token embedding are one matrix, as in GPT-2's published weights. That is one
    matrix less to store and to learn. Empty: the recipe's."""
    init: Literal["pytorch", "gpt2", "zero"] | None = None
    """Initial weights: PyTorch's (pytorch), GPT-2's (gpt2), or blocks that begin as the identity (zero). Empty: the
    recipe's."""

    def shape(self) -> dict[str, int]:
        """Return context_length, emb_dim, n_heads and n_layers, with the size's value for each empty field."""
        return {key: getattr(self, key) or SIZES[self.size][key] for key in _SHAPE}

    def build_cfg(self, vocab_size: int) -> dict[str, Any]:
        """Return the book's dict, from which GPTModel is built.

        It has the seven keys of the book (vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias)
        and every component that differs from the book's. Example for size nano and norm rms:

            {"vocab_size": 257, "context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0,
             "qkv_bias": False, "norm": "rms"}
        """
        cfg = {"vocab_size": vocab_size, **self.shape(), "drop_rate": self.drop_rate, "qkv_bias": self.qkv_bias}
        book = RECIPES["gpt2"]
        return {**cfg, **{key: value for key, value in self.components().items() if value != book[key]}}

    def components(self) -> dict[str, Any]:
        """Return the option of each component, with the recipe's option for each empty field."""
        given = {key: getattr(self, key) for key in RECIPES[self.recipe]}
        return {key: default if given[key] is None else given[key] for key, default in RECIPES[self.recipe].items()}

    @model_validator(mode="after")
    def _check_width_of_heads(self) -> Self:
        width, heads = self.shape()["emb_dim"], self.shape()["n_heads"]
        if width % heads:
            raise ValueError(
                f"emb_dim {width} is not divisible by n_heads {heads}; the nearest widths that are divisible: "
                f"{max(width // heads, 1) * heads} and {(width // heads + 1) * heads}"
            )
        if self.components()["positions"] == "rotary" and width // heads % 2:
            raise ValueError(
                f"emb_dim {width} and n_heads {heads} make heads {width // heads} wide; rotary positions need an even "
                "width. Choose another n_heads, or positions: learned"
            )
        return self


class TrainConfig(Section):
    """How the model learns. With several budgets (max_...), training ends when the first one is used up."""

    max_steps: Count | None = 1000
    """Budget: updates of the weights. The default does not apply if another budget is given."""
    max_epochs: Count | None = None
    """Budget: passes over the train split."""
    max_tokens: Count | None = None
    """Budget: tokens trained on."""
    max_seconds: Annotated[Finite, Field(gt=0)] | None = None
    """Budget: seconds spent in updates, over all attempts. A training with this budget cannot be repeated bit for
    bit."""
    session_seconds: Annotated[Finite, Field(gt=0)] | None = None
    """Seconds after which a run saves a checkpoint and pauses; the next run resumes the training. The time includes
    evaluations and saving, and a run makes at least one update. Set it to train in a time window, such as at night. It
    does not change the weights. Empty: a run trains to the end."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Windows per forward pass; each window has context_length tokens. Lower it if memory runs out."""
    accumulation: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Forward passes per update: the gradients of accumulation x batch_size windows are averaged. Raise it to learn
    from larger batches than fit into memory."""
    stride: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Tokens between the starts of two windows. Empty: the context length, so that windows do not overlap."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all weights. muon: Muon for the matrices of the blocks and AdamW for the rest, with the same
    learning rate; it learns more from each update. Default of a pipeline: muon, or adamw if start_from is set."""
    learning_rate: Annotated[Finite, Field(gt=0, le=10)] = 1e-3
    """Highest learning rate of the schedule. Lower it if the loss diverges. Default of a pipeline: 0.02 for muon, 0.001
    for adamw."""
    weight_decay: Annotated[Finite, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay. Applies to matrices, including embeddings, and not to biases and gains."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up: not at all (constant), or to zero along a cosine or a line."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**48)] = 0
    """Updates over which the learning rate rises from near zero, fewer than the budget has. With 0, training begins at
    the highest rate, but a warm start (see start_from) warms up over the first 5 percent of the updates."""
    grad_clip: Annotated[Finite, Field(ge=0)] = 1.0
    """Largest norm of the gradient: a gradient with a larger norm is scaled down to it. 0 turns clipping off."""
    eval_every: Count = 25
    """Updates between two evaluations. The model is also evaluated after the first update and after the last."""
    eval_batches: Count | None = 20
    """Batches per evaluation from each of train and val, the same batches every time. Empty: the whole val split."""
    patience: Count | None = None
    """Evaluations in a row without a new best val loss after which training stops. Empty: it never stops early."""
    checkpoint_seconds: Annotated[Finite, Field(gt=0)] | None = 300.0
    """Seconds between two checkpoints. A killed training loses about this much work at most. Empty: no checkpoints by
    time."""
    checkpoint_steps: Count | None = None
    """Updates between two checkpoints. Empty: no checkpoints by updates."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of the newest checkpoints that are kept during training."""
    start_from: Annotated[str, Field(pattern=r"^(scratch|champion|models:/[^/@]+(@[^/@]+|/[0-9]+))$")] = "scratch"
    """Weights from which training starts: scratch (random weights), champion (the current champion's), or
    models:/NAME/VERSION or models:/NAME@ALIAS (those of a registered version). A warm start, which is any but scratch,
    takes only the weights and their tokenizer; the learning rate warms up again."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 123
    """Random seed of the initial weights, the order of the batches and dropout."""
    device: Device = "auto"
    """Device to train, score and sample on: cpu, cuda, cuda:N, mps, or auto (cuda if available, else mps, else cpu)."""
    precision: Precision = "auto"
    """Number format of the forward and backward pass. The weights and the optimizer stay in fp32. auto: bf16 on cuda
    and on AMD's CPUs with avx512_bf16, else fp32."""
    compile: Compile = "auto"
    """Whether torch.compile compiles the blocks. auto: on cuda only, because on a CPU it takes half a minute and makes
    no update faster."""
    threads: Threads = "auto"
    """CPU threads of the training on one machine, which its processes share. auto: as many as the cores that this
    process may use. The number may change while a training is unfinished."""
    processes: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = 1
    """Processes of this machine that train together, each on an equal share of every batch. batch_size must be
    divisible by their number. auto: one per GPU if device is cuda, else one. Any number of processes learns the same
    model, up to rounding, so the number may change while a training is unfinished."""
    shard: bool = False
    """Whether each of several processes holds a shard of weights, gradients and optimizer state instead of a copy. Set
    it for a model that is too large for one GPU."""

    @model_validator(mode="before")
    @classmethod
    def _drop_default_steps_for_another_budget(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "max_steps" in given:
            return given
        has_other = any(given.get(key) is not None for key in ("max_epochs", "max_tokens", "max_seconds"))
        return {**given, "max_steps": None} if has_other else given

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.max_steps is self.max_epochs is self.max_tokens is self.max_seconds is None:
            raise ValueError("no budget: give at least one of max_steps, max_epochs, max_tokens, max_seconds")
        return self

    @model_validator(mode="after")
    def _check_processes(self) -> Self:
        if self.processes in ("auto", 1):
            return self
        if (problem := explain_uneven(self.batch_size, int(self.processes), "processes")) is not None:
            raise ValueError(problem)
        if self.device.startswith(("mps", "cuda:")):
            raise ValueError(
                f"processes {self.processes} and device {self.device}: one GPU is for one process. Choose device: "
                "cuda, which gives each process a GPU, or processes: 1"
            )
        return self


def explain_uneven(batch_size: int, processes: int, name: str) -> str | None:
    """Return why `processes` cannot share a batch evenly, or None if they can.

    `name` is the setting that gives their number, for the message.
    """
    if batch_size % processes == 0:
        return None
    below = next(n for n in range(min(processes, batch_size), 0, -1) if batch_size % n == 0)
    return (
        f"batch_size {batch_size} is not divisible by {name} {processes}, and each process needs an equal share. "
        f"Set {name} {below}, or batch_size {-(-batch_size // processes) * processes}"
    )


def explain_long_warm_up(warmup_steps: int, updates: int | None) -> str | None:
    """Return why the warm-up does not fit into a budget of so many updates, or None if it does or is not limited."""
    if updates is None or warmup_steps < updates or warmup_steps == 0:
        return None
    return (
        f"warmup_steps {warmup_steps} are not fewer than the {updates} updates of the budget, so the learning rate "
        "would not reach its highest value. Lower warmup_steps, or raise the budget"
    )


EXECUTION_KEYS = frozenset(
    {"checkpoint_seconds", "checkpoint_steps", "keep_checkpoints", "session_seconds", "processes", "shard"}
)
"""Keys of `train` that say when a training saves and pauses and how many processes run it, but not what it learns.

They may change from one attempt to the next and are not part of the run key. Weights are equal to the last bit only
for equal numbers of processes, because another number rounds sums differently."""


class MachineSettings(Section):
    """The keys of `train` that depend on the machine and are part of the run key.

    A training that was started on one machine may be resumed on another one, which does not make it another training.
    """

    device: Device
    """As `train.device`."""
    precision: Precision
    """As `train.precision`."""
    compile: Compile
    """As `train.compile`."""
    threads: Threads
    """As `train.threads`."""

    @classmethod
    def of(cls, train: TrainConfig) -> Self:
        """Take these keys from `train`."""
        return cls(**{key: getattr(train, key) for key in cls.model_fields})

    def fill_in(self, requested: TrainConfig) -> TrainConfig:
        """Return `requested` with the threads of these settings, and with their values for each other key at `auto`.

        Example: with device cuda and threads 8 here, a request for device auto and threads 1 gets device cuda and
        threads 8, while a request for device cpu keeps it.
        """
        is_open = {key: key == "threads" or getattr(requested, key) == "auto" for key in type(self).model_fields}
        return requested.model_copy(update={key: getattr(self, key) for key in is_open if is_open[key]})


class SampleConfig(Section):
    """The texts that the trained model writes for people to read."""

    prompts: Annotated[tuple[str, ...], Field(max_length=64)] = ("The", "In", "When")
    """Texts that the model continues. An empty prompt begins a new document."""
    temperatures: Annotated[tuple[Annotated[Finite, Field(ge=0, le=100)], ...], Field(min_length=1, max_length=16)] = (
        0.0,
        0.8,
    )
    """Temperatures of sampling: each prompt is continued once at each. 0 always takes the most likely token; higher
    temperatures give more varied text."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Largest number of tokens per sample."""
    top_k: Count | None = 50
    """Draws each token from this many most likely tokens only. Empty: from all tokens."""
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    """Draws each token from the most likely tokens that together reach this probability. 1: from all tokens."""


class EvaluateConfig(Section):
    """How much held-out text a trained model is scored on."""

    max_bytes: Annotated[Count | None, Added(before=None)] = 1_000_000
    """Most bytes that are scored of val, of holdout, and by the gate of old and of new holdout blocks each. Of more
    text, the blocks with the lowest hashes are scored, at least 25. So the time does not grow with the corpus, and the
    sample stays nearly the same from night to night. Raise it if the decision card says that the interval is wider than
    gate.margin. Empty: all text is scored."""


class GateConfig(Section):
    """When a new version, the challenger, replaces the champion, which is the version in use.

    Both are scored on the same held-out blocks, and neither was trained on any of them.
    """

    margin: Annotated[Finite, Field(ge=0, le=8)] = 0.005
    """Bits per byte by which the challenger must be better. Raise it to change the champion less often. 0: any
    improvement is enough."""
    confidence: Annotated[Finite, Field(ge=0.5, le=0.999)] = 0.95
    """Confidence, between 0.5 and 0.999, with which the challenger must be better by more than the margin. It is the
    one-sided confidence of a paired bootstrap over the blocks."""
    forget: Annotated[Finite, Field(ge=0, le=8)] | None = None
    """Bits per byte by which the challenger may be worse on old text: held-out blocks that were in the champion's
    corpus already. If the challenger is worse by more, with the same confidence, it is not promoted, however good it is
    on new text. Raise this value if the text is meant to change. Default: the margin."""

    @property
    def forget_margin(self) -> float:
        """Return `forget`, or `margin` if `forget` is empty."""
        return self.margin if self.forget is None else self.forget


class RetrainConfig(Section):
    """When a run has a reason to train, and how many versions are kept.

    Each run compares the text with the text of the newest finished training, whether or not its model was promoted.
    Changed settings are always a reason to train.
    """

    when: Literal["change", "share", "drift", "always"] = "change"
    """The reason to train. change: the text changed. share: the share of new text is above min_new_share. drift: the
    champion is worse on the new text than on its own holdout by more than drift_margin. always: every run trains."""
    min_new_share: Fraction = 0.05
    """With when: share. The share of the text, between 0 and 1, that must be new."""
    drift_margin: Annotated[Finite, Field(ge=0, le=8)] = 0.1
    """With when: drift. Bits per byte by which the champion must be worse on the new text."""
    max_removed_share: Annotated[float, Field(ge=0.0, le=1.0), Added(before=1.0)] = 0.5
    """Share of the previous training's text, between 0 and 1, that may be gone. If more is gone, or if more of the text
    is new and unlike the text before, the run is held: it trains nothing until a person accepts the text. With 1, no
    run is held."""
    unfinished: Literal["finish", "restart"] = "finish"
    """What to do with a paused or interrupted training if the text has changed since. finish: complete it on the text
    that it began with. restart: leave it and train on the changed text."""
    keep: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Number of the model's newest versions that keep their files. `gptflow prune` deletes the files of older versions,
    except those of the champion, of versions that a rollback can reach, and of versions that kept versions were made
    from."""


class Start(Section):
    """The registered version with whose weights a training starts."""

    uri: Annotated[str, Field(pattern=r"^models:/[^/@]+/[0-9]+$")]
    """The version for people to read: models:/NAME/VERSION."""
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """sha256 of RUN_DIR/start.safetensors."""


class RunConfig(Section):
    """RUN_DIR/config.json: everything that `python -m gptcore.train RUN_DIR` needs to know."""

    training_version: int
    """Number that grows when the arithmetic of training changes. A trainer of another version refuses the directory."""
    tokens: str
    """The token directory: a path, absolute or relative to RUN_DIR, or a URL such as s3://BUCKET/NAME, from which the
    tokens are streamed. The directory may be anywhere, for example on a disk that several machines share. The trainer
    refuses files that do not match `tokens_sha256`."""
    tokens_sha256: str
    """Identity of the token directory, checked before training."""
    model: ModelConfig
    """The architecture."""
    vocab_size: Annotated[int, Field(ge=2)]
    """Number of entries in the tokenizer's vocabulary."""
    train: TrainConfig
    """Settings of the training, with the device, precision, compile, threads and processes of its newest start. Where
    one of the first four is `auto`, every start of the trainer chooses it for its machine, and records `chosen`. If the
    trainer is started by hand, its launcher decides the number of processes."""
    in_run_key: MachineSettings | None = None
    """device, precision, compile and threads as `run_key` and the checkpoints hold them. Empty: as in `train`."""
    chosen: MachineSettings | None = None
    """What the newest start of the trainer used, if one of these keys is `auto` in `train`. Later starts keep the
    precision. Empty: the trainer had nothing to choose, or has not started yet."""
    start: Start | None = None
    """The version that train.start_from names. Empty: training starts from scratch."""
    run_key: str
    """Identity of the training: trainings with equal keys learn equal weights on equal machines."""

    @property
    def machine_in_run_key(self) -> MachineSettings:
        """The device, precision, compile and threads that the run key was computed with."""
        return self.in_run_key or MachineSettings.of(self.train)

    @property
    def precision_so_far(self) -> Precision:
        """The precision of the training until now: auto if it has not started."""
        return (self.chosen or self.machine_in_run_key).precision

    def with_train(self, train: TrainConfig) -> Self:
        """Return the same training with other settings for its next start."""
        hashed = self.machine_in_run_key
        return self.model_copy(
            update={"train": train, "in_run_key": None if hashed == MachineSettings.of(train) else hashed}
        )

    def cfg(self) -> dict[str, Any]:
        """Return the book's dict, from which GPTModel is built (see ModelConfig.build_cfg)."""
        return self.model.build_cfg(self.vocab_size)
