"""What can be configured: the one schema behind pipelines.yaml, the command line and the form in the Prefect UI.

Each section is a frozen pydantic model that refuses unknown keys. The string under a field is its documentation: it
becomes the help of `gptflow run --help` and the text beside the field in the form. Nothing here imports torch, so that
a wrong value is answered at once.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gptcore.recipes import RECIPES
from gptcore.sections import Section

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
"""The named model sizes."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**48)]


class CorpusConfig(Section):
    """Which text is learned from, how it becomes tokens, and how it is split."""

    sources: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = ("python-docs",)
    """Where text comes from: a file, a directory, a glob, an http(s) URL (append #sha256=HEX to have it checked),
    anything fsspec opens (s3://, gs://, hf://), or python-docs, the reference that ships inside Python. Formats by
    suffix: .txt .md .jsonl .csv .parquet, each also .gz or .zst; tables need a column named text. Links inside a
    directory must not lead out of it, nor a server's redirections into a narrower network: name such places here."""
    tokenizer: Annotated[str, Field(pattern=r"^(bytes|bpe:[0-9]{3,6}|[A-Za-z][A-Za-z0-9_.\-]*)$")] = "gpt2"
    """gpt2 or another tiktoken name; bpe:N, a vocabulary of N entries trained on the train split; or bytes."""
    split: Literal["hash", "contiguous"] = "hash"
    """hash: every block of text belongs to train, val or holdout by its content alone, so the corpus may grow and
    yesterday's holdout stays unseen. contiguous: the first part is train, then val, then holdout."""
    block_bytes: Annotated[int, Field(ge=256, le=1_048_576)] = 2048
    """About how many bytes of a long document stay together on one side of the split."""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the text that chooses the best checkpoint."""
    holdout_fraction: Fraction = 0.05
    """Share of the text that no training or selection sees: it gives the reported scores. With 0, scores come from
    val and are marked as also used for selection."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do about bytes that are not UTF-8: refuse the file and say where, or replace them by U+FFFD."""

    @model_validator(mode="after")
    def _fractions_leave_something_to_train(self) -> Self:
        if self.val_fraction + self.holdout_fraction >= 1:
            raise ValueError(
                f"val_fraction {self.val_fraction} and holdout_fraction {self.holdout_fraction} add up to 1 or more: "
                "nothing is left to train on; lower one of them"
            )
        if (kind := self.tokenizer).startswith("bpe:") and not 257 <= int(kind[4:]) <= 200_000:
            raise ValueError(f"tokenizer {kind!r}: N of bpe:N must lie between 257 and 200000")
        return self


class ModelConfig(Section):
    """The model's architecture. `size` gives a shape, and the other fields override it one by one."""

    size: SizeName = "mini"
    """A named size: nano (context 64, width 128, 4 layers), mini (128, 128, 4), small (256, 384, 6), or GPT-2's
    four published sizes (context 1024)."""
    context_length: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Tokens the model sees at once. Left empty: the size's."""
    emb_dim: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Width of the embeddings and of every block. Must be divisible by n_heads. Left empty: the size's."""
    n_heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Attention heads per block. Left empty: the size's."""
    n_layers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Transformer blocks. Left empty: the size's."""
    drop_rate: Fraction = 0.0
    """Dropout probability. The seed's configuration uses 0.1; on a CPU dropout in attention costs speed."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias."""
    recipe: Literal["gpt2", "modern"] = "gpt2"
    """Which parts the model is made of, where the fields below are left empty. gpt2: learned positions, layer norms,
    GELU and biases. modern: rotary positions, RMS norms, normed embeddings, queries and keys, squared ReLU, no biases,
    and blocks that begin as the identity; it learns faster, most of all with train.optimizer: muon."""
    positions: Literal["learned", "rotary"] | None = None
    """How a token's place is told: by a vector learned for each, or by turning queries and keys, whose heads must then
    have an even width. Empty: the recipe's."""
    norm: Literal["layer", "rms"] | None = None
    """Layer norms with gains and shifts, or RMS norms without any. Empty: the recipe's."""
    activation: Literal["gelu", "relu2"] | None = None
    """GELU or the squared ReLU between the feed-forward layers. Empty: the recipe's."""
    qk_norm: bool | None = None
    """Whether the queries and keys of each head are normed. Empty: the recipe's."""
    emb_norm: bool | None = None
    """Whether embeddings are normed. Empty: the recipe's."""
    bias: bool | None = None
    """Whether the blocks' other linear layers have biases. Empty: the recipe's."""
    tied: bool | None = None
    """Whether the output head is the token embedding, as in GPT-2's published weights: one matrix less to store and to
    learn. Empty: the recipe's."""
    init: Literal["pytorch", "gpt2", "zero"] | None = None
    """First weights: PyTorch's own, GPT-2's, or blocks that begin as the identity. Empty: the recipe's."""

    def shape(self) -> dict[str, int]:
        """context_length, emb_dim, n_heads and n_layers with the size's values filled in."""
        return {key: getattr(self, key) or SIZES[self.size][key] for key in _SHAPE}

    def for_vocabulary(self, vocab_size: int) -> dict[str, Any]:
        """What GPTModel is built from: the seed's dict of seven keys, and whatever parts are not the seed's."""
        seven = {"vocab_size": vocab_size, **self.shape(), "drop_rate": self.drop_rate, "qkv_bias": self.qkv_bias}
        seeds = RECIPES["gpt2"]
        return {**seven, **{key: value for key, value in self.parts().items() if value != seeds[key]}}

    def parts(self) -> dict[str, Any]:
        """The parts, with the recipe's filled in."""
        recipe = RECIPES[self.recipe]
        return {part: recipe[part] if (given := getattr(self, part)) is None else given for part in recipe}

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        width, heads = self.shape()["emb_dim"], self.shape()["n_heads"]
        if width % heads:
            raise ValueError(
                f"emb_dim {width} is not divisible by n_heads {heads}; the nearest widths that are: "
                f"{max(width // heads, 1) * heads} and {(width // heads + 1) * heads}"
            )
        if self.parts()["positions"] == "rotary" and width // heads % 2:
            raise ValueError(
                f"emb_dim {width} and n_heads {heads} make heads {width // heads} wide; rotary positions need an even "
                "width: choose another n_heads, or positions: learned"
            )
        return self


class TrainConfig(Section):
    """How the model learns. Several budgets may be given; the first one reached ends the training."""

    max_steps: Count | None = 1000
    """Updates of the weights. Not applied where only another budget is given."""
    max_epochs: Count | None = None
    """Passes over the train split."""
    max_tokens: Count | None = None
    """Tokens trained on."""
    max_seconds: Annotated[Finite, Field(gt=0)] | None = None
    """Seconds spent in updates, over every attempt. A run with this budget is not repeatable bit for bit."""
    session_seconds: Annotated[Finite, Field(gt=0)] | None = None
    """Seconds after which a run saves and pauses, evaluations and saving included; the next one goes on. It makes one
    update at least. Sessions do not change the weights. Empty: a run trains to the end."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Windows per forward pass."""
    accumulation: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Forward passes per update: gradients of accumulation x batch_size windows are averaged."""
    stride: Annotated[int, Field(ge=1, le=1_048_576)] | None = None
    """Tokens between the starts of two windows. Left empty: the context length, so that windows do not overlap."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks and AdamW for the rest, at one learning rate."""
    learning_rate: Annotated[Finite, Field(gt=0, le=10)] = 1e-3
    """The highest learning rate of the schedule."""
    weight_decay: Annotated[Finite, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay. It acts on matrices, embeddings included, and not on biases and gains."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up: not at all, or to zero along a cosine or a line."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**48)] = 0
    """Updates over which the learning rate rises from near zero. With 0 it starts at its highest, except in a warm
    start, which then takes the first 5 percent of the updates."""
    grad_clip: Annotated[Finite, Field(ge=0)] = 1.0
    """Largest norm of the gradient; longer ones are scaled down to it. 0 switches clipping off."""
    eval_every: Count = 25
    """Updates between two evaluations. The first is after update 1, and there is one after the last."""
    eval_batches: Count | None = 20
    """Batches per evaluation, the same ones every time, from train and from val. Empty: the whole val split."""
    patience: Count | None = None
    """Stop after this many evaluations in a row without a new best validation loss. Empty: never."""
    checkpoint_seconds: Annotated[Finite, Field(gt=0)] | None = 300.0
    """Seconds between two checkpoints. Empty: none by time."""
    checkpoint_steps: Count | None = None
    """Updates between two checkpoints. Empty: none by steps."""
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest checkpoints are kept while training."""
    start_from: Annotated[str, Field(pattern=r"^(scratch|champion|models:/[^/@]+(@[^/@]+|/[0-9]+))$")] = "scratch"
    """Which weights training starts from: scratch (random ones), champion (the present champion's), or those of
    models:/NAME/VERSION or models:/NAME@ALIAS. A warm start takes over the weights alone, with their tokenizer, and
    the learning rate warms up again."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 123
    """Seed of the initial weights, the batch order and dropout."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass. Weights and optimiser stay fp32. auto: bf16 on cuda, else fp32."""
    compile: Literal["auto", True, False] = "auto"
    """Whether torch.compile fuses the blocks. auto: on cuda only; on a CPU it costs half a minute and gains nothing."""
    threads: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """CPU threads of the training on one machine; several processes there share them. auto: the cores this process may
    use."""
    processes: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = 1
    """Processes of this machine that train together, each on its share of every batch: batch_size must be divisible by
    them. auto: one per GPU where device is cuda, else one. The same model is learned with any number of them, up to
    rounding, so it may change while a training is unfinished."""
    shard: bool = False
    """Whether several processes share out weights, gradients and optimiser, for a model that is too large for one GPU,
    instead of each holding a copy."""

    @model_validator(mode="before")
    @classmethod
    def _another_budget_replaces_the_default_steps(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "max_steps" in given:
            return given
        has_other = any(given.get(key) is not None for key in ("max_epochs", "max_tokens", "max_seconds"))
        return {**given, "max_steps": None} if has_other else given

    @model_validator(mode="after")
    def _some_budget_is_given(self) -> Self:
        if self.max_steps is self.max_epochs is self.max_tokens is self.max_seconds is None:
            raise ValueError("no budget: give at least one of max_steps, max_epochs, max_tokens, max_seconds")
        return self

    @model_validator(mode="after")
    def _processes_share_the_batch_and_have_devices(self) -> Self:
        if self.processes in ("auto", 1):
            return self
        if (wrong := uneven(self.batch_size, int(self.processes), "processes")) is not None:
            raise ValueError(wrong)
        if self.device.startswith(("mps", "cuda:")):
            raise ValueError(
                f"processes {self.processes} and device {self.device}: one GPU is for one process; choose device: "
                "cuda, which gives each process one, or processes: 1"
            )
        return self


def uneven(batch_size: int, processes: int, name: str) -> str | None:
    """Why so many processes cannot share a batch; None where they can. `name` is what says how many they are."""
    if batch_size % processes == 0:
        return None
    below = next(n for n in range(min(processes, batch_size), 0, -1) if batch_size % n == 0)
    return (
        f"batch_size {batch_size} is not divisible by {name} {processes}, which are to share it; the nearest that "
        f"are: {name} {below}, or batch_size {-(-batch_size // processes) * processes}"
    )


EXECUTION_KEYS = frozenset(
    {"checkpoint_seconds", "checkpoint_steps", "keep_checkpoints", "session_seconds", "processes", "shard"}
)
"""Keys of `train` that say how a training is carried out, not what is learned: when it is saved and paused, and by how
many processes. They may change from one attempt to the next, and are no part of what names a training. (Other numbers
of processes round sums differently: equal to the last bit are only trainings by as many.)"""


class SampleConfig(Section):
    """Which texts the trained model writes for people to read."""

    prompts: Annotated[tuple[str, ...], Field(max_length=64)] = ("The", "In", "When")
    """What the model continues. An empty prompt starts a new document."""
    temperatures: Annotated[tuple[Annotated[Finite, Field(ge=0, le=100)], ...], Field(min_length=1, max_length=16)] = (
        0.0,
        0.8,
    )
    """Each prompt is continued once at each temperature; 0 takes the likeliest token every time."""
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Tokens written per sample."""
    top_k: Count | None = 50
    """Draw among this many likeliest tokens only. Empty: all."""
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that together reach this probability."""


class GateConfig(Section):
    """When a new version replaces the champion: both are scored on the same held-out blocks, clean for both."""

    margin: Annotated[Finite, Field(ge=0, le=8)] = 0.005
    """Bits per byte by which the challenger has to be better. 0: by anything at all."""
    confidence: Annotated[Finite, Field(ge=0.5, le=0.999)] = 0.95
    """How sure of that one has to be: the one-sided confidence of a paired bootstrap over the blocks."""


class RetrainConfig(Section):
    """When a run has a reason to train, and how long the traces of a training are kept.

    Each run compares the text with what the newest finished training learned from, whatever became of that one. Other
    settings are always a reason.
    """

    when: Literal["change", "share", "drift", "always"] = "change"
    """What is a reason to train: any change of the text; a share of new text above min_new_share; a champion that
    is worse on the new text than on its own holdout, by more than drift_margin; or always one."""
    min_new_share: Fraction = 0.05
    """For when: share. The part of the text that has to be new."""
    drift_margin: Annotated[Finite, Field(ge=0, le=8)] = 0.1
    """For when: drift. Bits per byte by which the champion has to be worse on the new text."""
    unfinished: Literal["finish", "restart"] = "finish"
    """What to do about a training that was paused or interrupted while the text has changed since: finish it, on the
    text that it began with, or leave it and start anew."""
    keep: Annotated[int, Field(ge=1, le=10_000)] = 10
    """How many of the model's newest versions keep their files. `gptflow prune` frees those of older versions, except
    for the champion's, of what a rollback may reach, and of what kept versions were made from."""


class Start(Section):
    """The weights of a registered version, from which a training starts."""

    uri: Annotated[str, Field(pattern=r"^models:/[^/@]+/[0-9]+$")]
    """Names the version, for people: models:/NAME/VERSION."""
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of RUN_DIR/start.safetensors."""


class RunConfig(Section):
    """What RUN_DIR/config.json says: all that `python -m gptcore.train RUN_DIR` has to know."""

    training_version: int
    """Raised when the arithmetic of training changes; a trainer of another version refuses the directory."""
    tokens: str
    """The token directory, absolute or relative to RUN_DIR, or a URL from which it is streamed, as in s3://BUCKET/NAME.
    Whoever prepares the directory may have it anywhere, as on a disk that several machines share; only the files of
    `tokens_sha256` are trained on."""
    tokens_sha256: str
    """Identity of the token directory, compared before training."""
    model: ModelConfig
    """The architecture."""
    vocab_size: Annotated[int, Field(ge=2)]
    """Entries of the tokenizer's vocabulary."""
    train: TrainConfig
    """Device, precision, compile, threads and processes are resolved: no auto."""
    start: Start | None = None
    """What train.start_from was resolved to. Empty: training starts from scratch."""
    run_key: str
    """Names the training: equal keys train equal weights."""

    @model_validator(mode="after")
    def _nothing_is_left_to_choose(self) -> Self:
        if open_keys := [
            key
            for key in ("device", "precision", "compile", "threads", "processes")
            if getattr(self.train, key) == "auto"
        ]:
            raise ValueError(
                f"train.{open_keys[0]} is auto: a run directory names what was chosen, so that resuming keeps it"
            )
        return self

    def cfg(self) -> dict[str, Any]:
        """The seed's dict of seven keys."""
        return self.model.for_vocabulary(self.vocab_size)
