"""Export to `transformers` and import from it: models keep their logits, and vocabularies keep their ids."""

import json
import os
import random
import shutil
import stat
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore.components import RECIPES
from gptcore.errors import ExchangeError
from gptcore.generation.generate import generate
from gptcore.huggingface import export, import_, tokenizer_json
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import END_OF_TEXT, assemble_tokenizer, get_tokenizer, train_bpe
from tests.tiny import TINY_CFG

pytestmark = pytest.mark.slow
SEED = {**TINY_CFG, "context_length": 12, "drop_rate": 0.1}
MODERN = {key: value for key, value in RECIPES["modern"].items() if value != RECIPES["gpt2"][key]}
BYTES = get_tokenizer("bytes")
IDS = torch.randint(0, 257, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    """The `transformers` package, imported here so that collecting the tests does not wait for the import."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return pytest.importorskip("transformers")


def random_model(**changes):
    """Return a model whose norms and biases differ from PyTorch's initial values."""
    torch.manual_seed(0)
    model = GPTModel({**SEED, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def random_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = {"vocab_size": 257, "n_positions": 12, "n_embd": 16, "n_head": 2, "n_layer": 2, **changes}
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@torch.no_grad()
def logits_of(checkpoint, ids=IDS):
    model = GPTModel(checkpoint.cfg)
    model.load_state_dict(checkpoint.weights)
    return model.eval()(ids)


@torch.no_grad()
def assert_same(logits, theirs, ids=IDS):
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-5)


EXPORTED = {
    "GPT2LMHeadModel": [{}, {"qkv_bias": True}, {"tied": True}, {"bias": False, "qkv_bias": True}],
    "Qwen3ForCausalLM": [
        MODERN,
        {**MODERN, "qkv_bias": True},
        {**MODERN, "tied": True},
        {**MODERN, "tied": True, "emb_norm": False},
    ],
}


@pytest.mark.parametrize(("name", "changes"), [(name, one) for name, every in EXPORTED.items() for one in every])
def test_an_exported_model_has_the_same_logits_and_can_be_imported_again(tmp_path, transformers, name, changes):
    model = random_model(**changes)
    export.export({**SEED, **changes}, model.state_dict(), BYTES, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == name and theirs.dtype == torch.float32
    assert theirs.config.tie_word_embeddings == ("tied" in changes and not changes.get("emb_norm"))
    with torch.no_grad():
        logits = model(IDS)
    assert_same(logits, theirs)
    assert theirs.generation_config.eos_token_id == BYTES.eot
    asked = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abc", return_tensors="pt")
    written = theirs.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=BYTES.eot)[0, 3:]
    ours = list(generate(model, BYTES.encode("abc"), 8, temperature=0, eos_id=BYTES.eot))
    assert written.tolist()[: len(ours)] == ours
    back = import_.read_checkpoint(str(tmp_path / "out"))
    assert torch.equal(logits_of(back), logits) and back.tokenizer.sha256 == BYTES.sha256
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} == set(back.files)


def test_a_qwen3_that_was_trained_further_without_its_gains_can_be_imported_again(tmp_path, transformers):
    export.export({**SEED, **MODERN}, random_model(**MODERN).state_dict(), BYTES, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for _ in range(3):
        theirs.zero_grad()
        theirs(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in (p for name, p in theirs.named_parameters() if "norm" not in name):
                parameter.sub_(0.01 * parameter.grad + 0.001 * parameter.grad.sign())
    theirs.eval().save_pretrained(tmp_path / "tuned")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "tuned")
    back = import_.read_checkpoint(str(tmp_path / "tuned"))
    assert_same(logits_of(back), theirs)
    assert back.tokenizer.sha256 == BYTES.sha256 and back.cfg["norm"] == "rms"


def test_the_files_have_the_modes_of_other_files_and_the_keys_that_other_programs_read(tmp_path):
    mask = os.umask(0o027)
    try:
        export.export(SEED, random_model().state_dict(), BYTES, tmp_path / "out", "a card")
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 6 and set(modes.values()) == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 12


HOSTILE = [
    *("", " ", "  two  ", "x \r\n\r\n y\r", "\n\n\n", "a\u0085b\u2028c\u00a0", "\x00\x00a\x00", "naïve ١٢٣٤٥ 日本語"),
    *("👩\u200d👩\u200d👧🏳️\u200d🌈", "e\u0301\u0301", "\ufeff\U0010ffff\ufffd", "it's IT'S 'ſ a'll've", "!!!\r\n/\n"),
    *("<|endoftext|>", "a<|endoftext|>\nb", "<|endoftext|>\n", "12345678", " " * 500 + "x", "\n" * 300, "a" * 900),
]
ODD = " \n\r\t'aszLl1٢é日!?.<|>/\x00\u0085\u00a0👩\u200d\u0301ſK"


def hostile_texts():
    draw = random.Random(1)
    return HOSTILE + ["".join(draw.choices(ODD, k=draw.randint(1, 40))) for _ in range(500)]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe:600"])
def test_an_exported_tokenizer_gives_the_same_ids_for_any_text_and_can_be_imported_again(tmp_path, transformers, name):
    texts = hostile_texts()
    tokenizer = get_tokenizer(name) if ":" not in name else train_bpe([*texts, *map(ascii, texts)], 600)
    cfg = {**SEED, "vocab_size": tokenizer.n_vocab, "emb_dim": 2}
    export.export(cfg, GPTModel(cfg).state_dict(), tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.decode(ids) == tokenizer.decode(ids), ascii(text)
        if text == END_OF_TEXT:
            continue
        assert theirs(text + theirs.eos_token)["input_ids"] == [*ids, tokenizer.eot], ascii(text)  # as fine-tuners do
        assert theirs(text)["input_ids"] == ids or text.endswith(END_OF_TEXT), ascii(text)
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot and len(theirs) == tokenizer.n_vocab
    assert theirs("a<|endoftext|>", split_special_tokens=False)["input_ids"][-1] == tokenizer.eot
    with pytest.raises((UnicodeEncodeError, TypeError)):
        theirs("a lone \ud800 surrogate")
    back = import_.read_checkpoint(str(tmp_path / "out")).tokenizer
    assert (back.name, back.sha256) == (name, tokenizer.sha256)
    theirs.save_pretrained(tmp_path / "saved")
    pattern = tokenizer.encoding._pat_str
    saved_by_them = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["pre_tokenizer"]
    for known in (saved_by_them, tokenizer_json._make_plain_pre_tokenizer(pattern)):  # as earlier releases wrote it
        assert tokenizer_json._find_pattern(tmp_path, known) == pattern


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json and merges.txt"])
def test_added_special_tokens_are_kept_and_other_added_tokens_refused(tmp_path, transformers, form):
    theirs, body = written_by_transformers(transformers, train_bpe(hostile_texts(), 300), tmp_path)
    theirs.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(tmp_path)
    if form != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(body["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, body["merges"])))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 300, "<|user|>": 301}))
    tokenizer = tokenizer_json.read(tmp_path, 302)
    assert tokenizer.encoding._special_tokens == {END_OF_TEXT: 299, "[PAD]": 300, "<|user|>": 301}
    cfg = {**SEED, "vocab_size": 302}
    export.export(cfg, GPTModel(cfg).state_dict(), tokenizer, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.convert_tokens_to_ids(["[PAD]", "<|user|>"]) == [300, 301] and len(again) == 302
    assert again("[PAD] <|user|>")["input_ids"] == tokenizer.encode("[PAD] <|user|>")
    if form != "tokenizer.json":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 300, "<|user|>": 301, "word": 302}))
        with pytest.raises(ExchangeError, match="adds 'word', which is not a special token"):
            tokenizer_json.read(tmp_path, 303)
        (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 300, "<|user|>": 301}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for key, token, message in (
        ("eos_token", "[PAD]", "eos_token is '.PAD.', and a text here ends with <.endoftext.>"),
        ("mask_token", "[MASK]", "mask_token is '.MASK.', which has no id"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, key: token}))
        with pytest.raises(ExchangeError, match=message):
            tokenizer_json.read(tmp_path, 302)


def test_a_model_that_hugging_face_cannot_express_is_refused_and_nothing_is_written(tmp_path):
    ranks = BYTES.encoding._mergeable_ranks
    odd = assemble_tokenizer("odd", ".", ranks, {"<|endoftext|>": 256})
    word = assemble_tokenizer("word", tokenizer_json.GPT2_PATTERN, ranks, {"<|endoftext|>": 256, "User": 257})
    model = random_model()
    for cfg, tokenizer, message in (
        ({**SEED, "positions": "rotary"}, BYTES, "model.norm 'layer'.*Qwen3.*with rotary positions.*always 'rms'"),
        ({**SEED, **MODERN, "qk_norm": False}, BYTES, "model.qk_norm False.*Qwen3.*always True"),
        ({**SEED, **MODERN, "activation": "gelu"}, BYTES, "model.activation 'gelu'.*Qwen3"),
        ({**SEED, **MODERN, "bias": True}, BYTES, "model.bias True.*Qwen3"),
        ({**SEED, **MODERN, "positions": "learned"}, BYTES, "model.norm 'rms'.*GPT-2"),
        ({**SEED, "emb_norm": True}, BYTES, "model.emb_norm True.*GPT-2"),
        ({**SEED, "norm": "rms"}, BYTES, "model.norm 'rms'"),
        ({**SEED, "activation": "relu2"}, BYTES, "model.activation 'relu2'"),
        ({**SEED, "qk_norm": True}, BYTES, "model.qk_norm True"),
        ({**SEED, "n_layers": 3}, BYTES, r"trf_blocks.2.att.W_key.weight is missing"),
        ({**SEED, "context_length": 8}, BYTES, r"pos_emb.weight has the shape \(12, 16\), and should have \(8, 16\)"),
        (SEED, odd, "the tokenizer odd cannot be expressed"),
        ({**SEED, "vocab_size": 258}, word, "'User' is a word"),
        (SEED, get_tokenizer("gpt2"), "the tokenizer has 50257 ids, the model 257"),
    ):
        with pytest.raises(ExchangeError, match=message):
            weights = model if cfg["vocab_size"] == 257 else GPTModel(cfg)
            export.export(cfg, weights.state_dict(), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ExchangeError, match="is not empty"):
            export.export(SEED, model.state_dict(), BYTES, place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def saved(theirs, directory, **how):
    theirs.save_pretrained(directory, **how)
    tokenizer_json.write(tokenizer_json.convert_to_json(BYTES), directory, 12)
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_gpt2_has_the_same_logits_from_a_directory_from_shards_or_from_a_single_file(tmp_path, tied):
    theirs = random_gpt2(tie_word_embeddings=tied)
    whole = saved(theirs, tmp_path / "whole")
    shards = saved(theirs, tmp_path / "shards", max_shard_size="10kB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    for path in (whole, shards, whole / "model.safetensors"):
        found = import_.read_checkpoint(str(path))
        assert_same(logits_of(found), theirs)
        assert found.cfg["n_heads"] == 2 and found.cfg.get("tied", False) == tied and found.tokenizer.name == "bytes"
    torch.save(theirs.state_dict(), whole / "pytorch_model.bin")
    (whole / "model.safetensors").unlink()
    assert_same(logits_of(import_.read_checkpoint(str(whole))), theirs)


def test_a_half_precision_gpt2_with_unprefixed_names_and_the_masks_of_old_releases_can_be_imported(tmp_path):
    theirs = random_gpt2().half()
    directory = saved(theirs, tmp_path / "old")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.transformer.state_dict().items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    save_file({**tensors, **masks}, directory / "model.safetensors")
    assert_same(logits_of(import_.read_checkpoint(str(directory))), theirs.float())


def written_by_transformers(transformers, tokenizer, directory):
    """Save the vocabulary with the GPT2Tokenizer of `transformers`. Return that tokenizer and the vocabulary."""
    body = tokenizer_json.convert_to_json(tokenizer)["model"]
    theirs = transformers.GPT2Tokenizer(vocab=body["vocab"], merges=[tuple(pair) for pair in body["merges"]])
    theirs.save_pretrained(directory)
    return theirs, body


def test_the_gpt2_vocabulary_saved_by_transformers_is_recognised_and_padding_is_dropped(tmp_path, transformers):
    theirs = random_gpt2(vocab_size=50304, n_embd=2)
    theirs.save_pretrained(tmp_path)
    written_by_transformers(transformers, get_tokenizer("gpt2"), tmp_path)
    found = import_.read_checkpoint(str(tmp_path))
    assert (found.tokenizer.name, found.dropped_ids, found.cfg["vocab_size"]) == ("gpt2", 47, 50257)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(found), theirs(IDS).logits[..., :50257], rtol=0, atol=1e-5)


def test_a_custom_vocabulary_in_gpt2s_two_old_files_gives_the_same_ids(tmp_path, transformers):
    texts = hostile_texts()
    ranks = dict(train_bpe([*texts, *map(ascii, texts)], 600).encoding._mergeable_ranks)
    assert get_tokenizer("gpt2").encoding._pat_str == tokenizer_json.GPT2_PATTERN
    ours = assemble_tokenizer("bpe:600", tokenizer_json.GPT2_PATTERN, ranks, {"<|endoftext|>": 599})
    theirs, body = written_by_transformers(transformers, ours, tmp_path)
    assert tokenizer_json.read(tmp_path, 600).sha256 == ours.sha256
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(body["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, body["merges"]), ""]))
    found = tokenizer_json.read(tmp_path, 600)
    assert (found.name, found.sha256) == ("bpe:600", ours.sha256)
    for text in texts:
        assert found.encode(text) == theirs(text, split_special_tokens=True)["input_ids"], ascii(text)


def test_the_books_state_dict_is_read_from_a_pth_file(tmp_path):
    cfg = {**SEED, "vocab_size": 50257, "emb_dim": 128, "n_layers": 1, "qkv_bias": True}
    torch.manual_seed(0)
    model = GPTModel(cfg).eval()
    body = {**model.state_dict(), "trf_blocks.0.att.mask": torch.ones(12, 12).triu(1)}
    torch.save(body, tmp_path / "model.pth")
    torch.save({"model_state_dict": body, "optimizer_state_dict": {"state": {}}}, tmp_path / "both.pth")
    for name in ("model.pth", "both.pth"):
        found = import_.read_checkpoint(str(tmp_path / name))
        assert found.cfg == {**cfg, "drop_rate": 0.0} and found.tokenizer.name == "gpt2"
        with torch.no_grad():
            assert torch.equal(logits_of(found), model(IDS))
    assert import_.read_checkpoint(str(tmp_path / "model.pth"), n_heads=4).cfg["n_heads"] == 4
    body["out_head.weight"] = body["tok_emb.weight"].clone()
    torch.save(body, tmp_path / "model.pth")
    found = import_.read_checkpoint(str(tmp_path / "model.pth"))
    assert found.cfg["tied"] and "out_head.weight" not in found.weights


def altered(key, value):
    def alter(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, key: value}))

    return alter


def rewritten(change):
    def alter(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return alter


def retold(key, value):
    def alter(directory):
        body = json.loads((directory / "tokenizer.json").read_text())
        inner = body["model"] if key in body["model"] else body
        inner[key] = value
        (directory / "tokenizer.json").write_text(json.dumps(body))

    return alter


def indexed(weight_map):
    def alter(directory):
        (directory / "model.safetensors").rename(directory / "one.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return alter


C_ATTN = "transformer.h.1.attn.c_attn.bias"
WRONG = {
    "another architecture": (altered("model_type", "llama"), "model_type is 'llama'.* 'gpt2' or 'qwen3'"),
    "another's config": (altered("model_type", "qwen3"), "model_type is 'qwen3', and the weights are .* GPT-2"),
    "another activation": (altered("activation_function", "relu"), "activation_function is 'relu'.*gelu_new"),
    "another epsilon": (altered("layer_norm_epsilon", 1e-6), "layer_norm_epsilon is 1e-06.* 1e-05"),
    "scaled by layer": (altered("scale_attn_by_inverse_layer_idx", True), "scale_attn_by_inverse_layer_idx is True"),
    "another inner width": (altered("n_inner", 32), "n_inner is 32"),
    "another vocabulary": (altered("vocab_size", 300), "vocab_size is 300, and the weights have 257"),
    "a billion layers": (altered("n_layer", 10**9), "n_layers is 1000000000, and the weights have 2"),
    "heads that do not divide": (altered("n_head", 3), "emb_dim 16.* n_heads 3"),
    "no such heads": (altered("n_head", "many"), "n_head is 'many'"),
    "a head of its own": (altered("tie_word_embeddings", False), "lm_head.weight is missing"),
    "a tensor missing": (rewritten(lambda t: t.pop(C_ATTN)), f"{C_ATTN} is missing"),
    "a tensor too much": (rewritten(lambda t: t.update(score=torch.ones(1))), "transformer.score is unexpected"),
    "a tensor of another shape": (rewritten(lambda t: t.update({C_ATTN: torch.ones(9)})), r"\(9,\).* \(48,\)"),
    "a number that is none": (rewritten(lambda t: t[C_ATTN].fill_(torch.nan)), f"{C_ATTN} holds numbers that are not"),
    "whole numbers": (rewritten(lambda t: t.update({C_ATTN: torch.ones(48, dtype=torch.int8)})), "torch.int8 numbers"),
    "two heads": (rewritten(lambda t: t.update({"lm_head.weight": torch.ones(257, 16)})), "lm_head.weight differs"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
    "cut weights": (lambda d: os.truncate(d / "model.safetensors", 900), "damaged, or not a safetensors"),
    "an index that leads elsewhere": (indexed({"x": "../one.safetensors"}), "weight_map must name files beside it"),
    "an index of too many": (indexed({"x": "one.safetensors", "y": "two.safetensors"}), "two.safetensors is missing"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda d: (d / "config.json").write_text("[" * 99999), "config.json is damaged"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "257 ids are not the 50257"),
    "a normalizer": (retold("normalizer", {"type": "NFC"}), "normalizer is .*NFC"),
    "other splitting": (retold("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer is .*Whitespace"),
    "another order of merges": (retold("merges", [["a", "b"]]), "merge 0 is not the one that its ids imply"),
    "no BPE": (retold("type", "WordLevel"), "not a byte-pair encoding"),
    "no end of text": (retold("added_tokens", []), "no special token <.endoftext.>"),
    "damaged tokens": (retold("added_tokens", [7]), "tokenizer.json is damaged"),
}


@pytest.fixture(scope="module")
def a_gpt2(tmp_path_factory):
    return saved(random_gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_or_damaged_checkpoint_is_refused_with_the_reason(tmp_path, a_gpt2, what):
    alter, message = WRONG[what]
    shutil.copytree(a_gpt2, tmp_path / "gpt2")
    alter(tmp_path / "gpt2")
    with pytest.raises(ExchangeError, match=message) as caught:
        import_.read_checkpoint(str(tmp_path / "gpt2"))
    assert str(tmp_path / "gpt2") in str(caught.value)


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def set_in(name, value):
    return rewritten(lambda t: t[f"model.layers.1.{name}.weight"].view(-1)[:1].fill_(value))


WRONG_QWEN3 = {
    "a trained gain": (set_in("input_layernorm", 1.5), "input_layernorm.weight holds 1.5, and .* always has 1.*norm"),
    "a trained gain of the queries": (set_in("self_attn.q_norm", 1.25), "q_norm.weight holds 1.25, .* always has 1.2"),
    "a real gate": (set_in("mlp.up_proj", 9), "mlp.up_proj.weight differs from model.layers.1.mlp.gate_proj.weight"),
    "the usual activation": (altered("hidden_act", "silu"), "hidden_act is 'silu', and a model here has 'relu'"),
    "another epsilon": (altered("rms_norm_eps", 1e-6), "rms_norm_eps is 1e-06"),
    "shared keys": (altered("num_key_value_heads", 1), "num_key_value_heads is 1, and a model here has 2"),
    "another base": (altered("rope_parameters", {"rope_theta": 1e6}), "rope_theta is 1000000.0"),
    "other rotations": (altered("rope_parameters", {"rope_type": "yarn"}), "rope_type is 'yarn'"),
    "another's config": (altered("model_type", "gpt2"), "model_type is 'gpt2', and the weights are .* Qwen3"),
    "a billion layers": (altered("num_hidden_layers", 10**9), "n_layers is 1000000000, and the weights have 2"),
    "a tensor missing": (rewritten(lambda t: t.pop("model.norm.weight")), "Qwen3.*model.norm.weight is missing"),
}


@pytest.mark.parametrize("what", WRONG_QWEN3)
def test_a_qwen3_that_a_model_here_cannot_express_is_refused_with_the_reason(tmp_path, what):
    alter, message = WRONG_QWEN3[what]
    export.export({**SEED, **MODERN}, random_model(**MODERN).state_dict(), BYTES, tmp_path / "qwen3")
    alter(tmp_path / "qwen3")
    with pytest.raises(ExchangeError, match=message):
        import_.read_checkpoint(str(tmp_path / "qwen3"))


def test_single_files_that_contain_code_or_are_not_a_gpt2_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"tok_emb.weight": Planted()}, "code.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"weight": torch.ones(2, 2)}, "other.pth")
    torch.save(random_model().state_dict(), "narrow.pth")
    (tmp_path / "text.bin").write_text("no tensors")
    for name, message in (
        ("code.pth", "could run code"),
        ("list.pth", "holds list, not a state dict"),
        ("other.pth", "is not a GPT-2: transformer.wte.weight is absent"),
        ("narrow.pth", "width 16 is not a multiple of GPT-2's 64.*--n-heads"),
        ("text.bin", "could run code"),
        ("nowhere.pth", "nowhere.pth does not exist"),
        ("no/such/directory", "no/such/directory does not exist"),
    ):
        with pytest.raises(ExchangeError, match=message):
            import_.read_checkpoint(name)
    assert not (tmp_path / "planted").exists()


def test_a_name_is_looked_up_on_the_hub_and_its_commit_is_recorded(tmp_path, a_gpt2, monkeypatch):
    import huggingface_hub

    asked = {}
    snapshot = tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(a_gpt2, snapshot)

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert import_.read_checkpoint("somebody/tiny-gpt2").source == "somebody/tiny-gpt2@c0ffee"
    assert list(asked) == ["somebody/tiny-gpt2"]
    assert not any(pattern.endswith((".bin", ".pth", ".py")) for pattern in asked["somebody/tiny-gpt2"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExchangeError, match="pip install huggingface_hub"):
        import_.read_checkpoint("somebody/tiny-gpt2")
