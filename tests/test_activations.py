"""Activations of Hugging Face models, runs on them, and their evaluation."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import batchtopk as bt
import cli
from conftest import LOADED, SMALL, Largest

@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A small Gemma 2 with random weights, in a local folder, with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    cfg = Gemma2Config(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=16,
                       bos_token_id=0, eos_token_id=0, pad_token_id=0)
    Gemma2ForCausalLM(cfg).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bt.TINY_GPT2).save_pretrained(folder)
    return str(folder)

def altered(folder, change=lambda tensors: tensors, **config):
    """The embedded model with other tensors or another configuration, in a folder."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(bt.TINY_GPT2, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | config))
    return str(folder)

def small(**changes):
    return bt.RunConfig(**{**SMALL, "d_model": 256, "layer": 2, **changes})

def ids_of(n=4, length=32):
    return torch.randint(1, 4096, (n, length), generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_sites_are_the_residual_stream_and_what_is_added_to_it(family, gemma):
    name, ids = "tiny-gpt2" if family == "gpt2" else gemma, ids_of()
    sites = bt.RunConfig.__dataclass_fields__["site"].metadata["choices"]
    at = {site: bt.LanguageModel(name, 1, site, device="cpu") for site in sites}
    a = {site: lm.activations(ids) for site, lm in at.items()}
    hidden = at["resid_pre"].model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(a["resid_pre"], hidden[1]) and torch.equal(a["resid_post"], hidden[2])
    total = a["resid_pre"] + a["attn_out"] + a["mlp_out"]
    torch.testing.assert_close(total, a["resid_post"], atol=1e-4, rtol=1e-4)
    assert at["mlp_out"].d_model == a["mlp_out"].shape[-1]

def test_blocks_after_the_hook_never_run(lm):
    ran, blocks = [], lm.model.transformer.h
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    lm.activations(ids_of())
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]

@pytest.mark.parametrize("site, module", [
    ("resid_pre", ""), ("resid_post", ""), ("attn_out", ""), ("", "transformer.h.1.mlp.c_proj")])
def test_splicing_in_the_identity_leaves_the_logits_as_they_were(site, module, gemma):
    for name in ["tiny-gpt2"] if module else ["tiny-gpt2", gemma]:
        lm, ids = bt.LanguageModel(name, 1, site or "resid_pre", module, device="cpu"), ids_of()
        clean, changed = lm.logits(ids), lm.logits(ids, edit=torch.zeros_like)
        assert torch.equal(clean, lm.logits(ids, edit=lambda h: h))
        assert [torch.equal(clean[:, t], changed[:, t]) for t in (0, 1)] == [True, False], "0 is left"
        assert not lm.model._forward_hooks and torch.equal(clean, lm.logits(ids)), "hooks must be gone"

@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_stream_before_the_first_block_is_the_embeddings_as_it_receives_them(family, gemma):
    """Bug here once: there was one for GPT-2 alone. Gemma multiplies its embeddings by √D first."""
    first, ids = bt.LanguageModel("tiny-gpt2" if family == "gpt2" else gemma, 0, device="cpu"), ids_of()
    assert torch.equal(first.activations(ids), first.model(ids, output_hidden_states=True).hidden_states[0])
    plain = first.model.get_input_embeddings().weight[ids]
    assert not torch.equal(first.activations(ids), plain)

def test_the_first_position_and_special_tokens_are_left_out_by_default(lm):
    ids = torch.tensor([[5, 6, 0, 7], [0, 8, 9, 0]])
    assert lm.is_kept(ids).tolist() == [[False, True, False, True], [False, True, True, False]]
    x, read = lm.kept_activations(ids)
    assert torch.equal(read, lm.is_kept(ids)) and torch.equal(x, lm.activations(ids)[read])
    assert bt.LanguageModel("tiny-gpt2", device="cpu", skip_special=False).is_kept(ids).all()

def test_tokens_that_only_the_tokenizer_flags_as_special_are_left_out(tmp_path):
    """Bug here once: they were read. Llama 3 lists its header and end-of-turn tokens in no other place."""
    model = altered(tmp_path / "model")
    text = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    word = next(word for word, i in text["model"]["vocab"].items() if i == 4095)
    text["added_tokens"] += [{**text["added_tokens"][0], "id": 4095, "content": word}]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(text))
    lm = bt.LanguageModel(model, device="cpu")
    assert lm.tokenizer.all_special_ids == [0] and lm.special.tolist() == [0, 4095]
    assert lm.is_kept(torch.tensor([[5, 4095, 6]])).tolist() == [[False, False, True]]

def test_a_tokenizer_may_be_longer_than_the_embedding_until_such_a_token_occurs_in_the_text(tmp_path):
    """Bug here once: Gemma 3 1B was refused, whose tokenizer ends with an image token without a row."""
    from transformers import AutoTokenizer
    model = altered(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>", "<more>"])
    tokenizer.save_pretrained(model)
    lm = bt.LanguageModel(model, 1, "mlp_out", device="cpu")
    assert len(lm.tokenizer) == 4098 and lm.activations(ids_of()).shape == (4, 32, 256)
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}, a <more>" for i in range(2000)))
    ids = bt.held_out_contexts(small(dataset=str(tmp_path / "a.txt"), eval_tokens=100), lm.tokenizer)[0]
    for read in (lm.kept_activations, lm.logits):
        with pytest.raises(bt.InputError, match="token 4097 .'<more>'. .* embedding has 4096 rows"):
            read(ids)

def test_a_local_model_never_touches_the_network(monkeypatch, gemma):
    def refuse(*arguments, **_):
        raise AssertionError(f"network used: {arguments}")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("tiny-gpt2", gemma):
        bt.LanguageModel(name, 1, device="cpu")

@pytest.mark.parametrize("dtype, device, multiplies, expected", [
    ("auto", "cpu", True, "float32"), ("auto", "cuda", True, "bfloat16"), ("auto", "cuda", False, "float32"),
    ("bfloat16", "cpu", False, "bfloat16"), ("float32", "cuda", True, "float32")])
def test_auto_is_bfloat16_on_gpus_that_multiply_it(dtype, device, multiplies, expected, monkeypatch):
    def load(name, dtype, **_):
        raise bt.Unavailable(f"asked for {dtype}")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    capability = (8, 0) if multiplies else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies}, raising=False)
    monkeypatch.setattr(bt, "resolve_device", torch.device)
    with pytest.raises(bt.Unavailable, match=f"asked for torch.{expected}"):
        bt.LanguageModel("tiny-gpt2", dtype=dtype, device=device)

def test_a_quantised_model_keeps_its_own_precision(tmp_path, lm, monkeypatch):
    """Bug here once: float32 was forced on what is not quantised, which ended in a traceback about types."""
    given, model, load = [], copy.deepcopy(lm.model), "transformers.AutoModelForCausalLM.from_pretrained"
    monkeypatch.setattr(load, lambda *_, dtype, **__: given.append(dtype) or (model, LOADED))
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for name, config in (("plain", {}), ("quantised", quantised)):
        bt.LanguageModel(altered(tmp_path / name, **config), device="cpu", dtype="bfloat16")
    assert given == [torch.bfloat16, "auto"]

def test_a_model_that_cannot_run_here_ends_in_one_line(tmp_path, lm, monkeypatch):
    """As kernels for GPUs alone do, or layers of different types."""
    model, load = copy.deepcopy(lm.model), "transformers.AutoModelForCausalLM.from_pretrained"
    model.transformer.h[0].ln_1.half()
    monkeypatch.setattr(load, lambda *_, **__: (model, LOADED))
    with pytest.raises(bt.Unavailable, match="^model 'tiny-gpt2' cannot run on cpu; give another of them"):
        bt.LanguageModel("tiny-gpt2", device="cpu")

@pytest.fixture(scope="module")
def library():
    """The standard library's sources for training, and those held out."""
    return [list(bt.texts_of(small(dataset="stdlib"), split)) for split in ("train", "held-out")]

def test_the_embedded_model_is_a_language_model(lm, library):
    """Unigram entropy is 6.3 nats; a model trained on this source is far below it, on files it never saw."""
    texts = lm.tokenizer([text[2000:3200] for text in library[1]])["input_ids"]
    ids = torch.tensor([row[:128] for row in texts if len(row) >= 128][:32])
    loss = torch.nn.functional.cross_entropy(lm.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert len(ids) == 32 and loss < 2.8  # 2.67 over all held-out text
    assert sum(p.stat().st_size for p in bt.TINY_GPT2.iterdir()) < 10e6

# Text

def write_texts(folder, texts):
    """The texts as a.txt, a.jsonl and a.parquet; returns the .jsonl."""
    import datasets
    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "a.parquet")
    return str(folder / "a.jsonl")

def lines(n):
    return [f"line {i} of {i * i}" for i in range(n)]

@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_local_files_give_their_documents_and_hold_out_every_twentieth(tmp_path, suffix):
    texts = lines(45)
    write_texts(tmp_path, texts)
    cfg = small(dataset=str(tmp_path / f"a.{suffix}"))
    assert list(bt.texts_of(cfg, "held-out")) == [texts[19], texts[39]]
    assert sorted([*bt.texts_of(cfg, "train"), texts[19], texts[39]]) == sorted(texts)

@pytest.mark.parametrize("name", ["a[12]", "a [v2]", "a::b", "a*", "a?", "file:a"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_file_is_read_literally_whatever_its_name(tmp_path, suffix, name, monkeypatch):
    """Bug here once: a[12].jsonl trained on the a1.jsonl beside it, and a::b.jsonl could not be read."""
    for stem, texts in (("a1", lines(30)), (name, [f"of {text}" for text in lines(45)])):
        write_texts(tmp_path, texts)
        (tmp_path / f"a.{suffix}").rename(tmp_path / f"{stem}.{suffix}")
    monkeypatch.chdir(tmp_path)
    for dataset in (f"{name}.{suffix}", str(tmp_path / f"{name}.{suffix}")):
        assert list(bt.texts_of(small(dataset=dataset), "held-out")) == texts[19::20]

def test_a_folder_whose_name_would_be_read_as_a_pattern_is_refused(tmp_path):
    """Bug here once: a[12] gave the text of the a1 beside it. Other folders and patterns of files are read."""
    for name in ("a1", "a[12]", "a::b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines(30)))
    for name in ("a[12]", "a::b"):
        with pytest.raises(bt.InputError, match="is a folder, but would be read as a pattern; give one of"):
            list(bt.texts_of(small(dataset=str(tmp_path / name)), "train"))
    for name in ("a1", "a[1]/*.jsonl"):
        assert list(bt.texts_of(small(dataset=str(tmp_path / name)), "held-out")) == lines(30)[19::20]

@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_json_is_read_and_halves_of_characters_are_replaced(tmp_path, indent):
    """Bug here once: one half of an emoji, as where a text was cut, and the file could not be read."""
    rows = [{"id": 1, "text": f"{i} \ud83d\u2028 é"} for i in range(3)]
    (tmp_path / "a.json").write_text("\n" + json.dumps(rows, indent=indent))
    assert list(bt.texts_of(small(dataset=str(tmp_path / "a.json")), "train")) == [
        f"{i} ?\u2028 é" for i in range(3)]

@pytest.mark.parametrize("suffix", ["txt", "TXT", "md"])
@pytest.mark.parametrize("between, n", [("\n\n", 45), ("\n \t\n\n", 45), ("\n", 45)])
def test_documents_of_a_text_file_are_divided_by_lines_of_white_space_or_are_its_lines(
        tmp_path, suffix, between, n):
    """Bug here once: with a blank in them, or without any, the file counted as one document."""
    (tmp_path / f"a.{suffix}").write_text(between.join(lines(n)) + "\n\n", encoding="utf-8-sig")
    cfg = small(dataset=str(tmp_path / f"a.{suffix}"))
    assert [list(bt.texts_of(cfg, s)) for s in ("held-out", "train")] == [
        lines(n)[19::20], [t for i, t in enumerate(lines(n)) if i % 20 != 19]]
    (tmp_path / f"a.{suffix}").write_text("one\ntwo\n\nthree\nfour")
    assert list(bt.texts_of(cfg, "train")) == ["one\ntwo", "three\nfour"]

@pytest.mark.parametrize("name, data, said", [
    ("a.txt", "é".encode("latin1"), "is not in UTF-8 .unexpected end of data at byte 0.; .* iconv -f latin1"),
    *((name, text.encode(code), "is not in UTF-8 but in UTF-16, or is no text; .* iconv -f utf-16 ")
      for name, text in (("a.md", "text\n" * 99), ("a.jsonl", '{"text": "x"}\n' * 30))
      for code in ("utf-16", "utf-16-le", "utf-16-be")),
    ("a.jsonl", '{"text": "é"}\n'.encode("latin1") * 99, "is not in UTF-8 .*; .* iconv -f latin1"),
    ("a.jsonl", b"1\n2\n", "row 0 of .* no text in column 'text'"),
    ("a.parquet", None, "too little text"),
    ("a.doc", b"x", r"ends in '.doc'; files can end in: .txt, .md, .jsonl"), ("a", b"x", "ends in ''"),
    ("a.txt", b"one\n\ntwo\n", "too little text: .* lines of white space"),
    ("a.jsonl", b'{"text": "x"}\n' * 30, "too little text: two contexts of .* \\(every 20th\\)")])
def test_files_that_cannot_be_used_say_why(tmp_path, lm, name, data, said):
    """Bugs here once: UTF-16 was to be converted from Latin-1, and without a mark at its start it was read;
    empty tables ended in StopIteration."""
    import pyarrow.parquet
    if data is None:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(bt.InputError, match=said):
        bt.held_out_contexts(small(dataset=str(tmp_path / name)), lm.tokenizer)

def test_the_standard_library_is_split_by_file_without_overlap(library):
    train, held_out = map(set, library)
    assert len(train) > 5 * len(held_out) > 50 and not {t for t in train & held_out if len(t) > 500}

def test_a_hub_data_set_with_a_loading_script_is_retried_at_its_parquet_revision(monkeypatch):
    import datasets
    calls = []

    def load_dataset(path, **options):
        calls.append({"path": path, **options})
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return iter([{"text": "hello"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(bt.texts_of(small(dataset="some/openwebtext"), "train")) == ["hello"]
    first = {"path": "some/openwebtext", "name": None, "split": "train", "streaming": True}
    assert calls == [first, {**first, "revision": "refs/convert/parquet"}]

@pytest.mark.parametrize("text, kind, said", [
    (None, bt.Unavailable, "dataset"), *((blank, bt.InputError, "too little text") for blank in ("", "\n\n")),
    ('{"text": "  "}\n' * 40, bt.InputError, "too little text"),
    ('{"body": "x"}\n' * 40, bt.InputError, "row 0 of .* no text in column 'text'; .*: body"),
    ('{"text": "x"}\n' * 40 + '{"text": "x\n', bt.Unavailable, "could not be read"),
    ("not json\n" * 40, bt.Unavailable, "could not be read")])
def test_texts_that_cannot_be_used_are_named(tmp_path, lm, text, kind, said):
    """Bug here once: a malformed line ended in a traceback of two hundred lines."""
    if text is not None:
        (tmp_path / "a.jsonl").write_text(text)
    cfg = small(dataset=str(tmp_path / "a.jsonl"))
    for read in (lambda *a: next(bt.training_contexts(*a)), bt.held_out_contexts):
        with pytest.raises(kind, match=said) as error:
            read(cfg, lm.tokenizer)
        assert "a.jsonl" in str(error.value) and "\n" not in str(error.value)

def test_a_model_folder_without_a_tokenizer_is_named(tmp_path):
    """Bug here once: transformers made an empty tokenizer, and training waited for tokens for ever."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(bt.TINY_GPT2 / file, tmp_path)
    with pytest.raises((bt.InputError, bt.Unavailable), match=str(tmp_path)):
        bt.LanguageModel(str(tmp_path), device="cpu")

C_FC = "transformer.h.1.mlp.c_fc.weight"

@pytest.mark.parametrize("change, config, n, first", [
    (lambda t: {"x." + name: weight for name, weight in t.items()}, {}, 53, "lm_head.weight"),
    (lambda t: {name: t[name] for name in t if name != C_FC}, {}, 1, C_FC),
    (lambda t: t | {C_FC: t[C_FC][:, 1:].contiguous()}, {}, 1, C_FC),
    (lambda t: t, {"tie_word_embeddings": False}, 1, "lm_head.weight"),
    (lambda t: t, {"n_layer": 5}, 12, "transformer.h.4.attn.c_attn.bias")])
def test_weights_that_are_missing_are_named_and_never_drawn_at_random(tmp_path, change, config, n, first):
    """Bug here once: such a model trained and was evaluated with random weights, without a word."""
    model = altered(tmp_path / "model", change, **config)
    said = f"^{n} weights of model '{model}' are missing or of another shape, first {first}; "
    with pytest.raises(bt.InputError, match=said):
        bt.LanguageModel(model, device="cpu")

def test_weights_that_are_not_used_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="^11 tensors .* unused, first transformer.h.3.attn.c_attn.weight"):
        bt.LanguageModel(altered(tmp_path / "model", n_layer=3), device="cpu")

def packed(texts, tokenizer, length):
    """Contexts of the texts in order: the begin token is before each text, and first in each context."""
    begin, ids = tokenizer.bos_token_id, []
    for text in texts:
        for token in [begin, *tokenizer(text)["input_ids"]]:
            if len(ids) % length == 0 and token != begin:
                ids.append(begin)
            ids.append(token)
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

def test_every_context_begins_with_the_begin_token_and_documents_follow_in_order(tmp_path, lm):
    """Bug here once: only documents did. Gemma malfunctions without it: 6.4 nats a token instead of 4.2."""
    texts = lines(4000)
    cfg = small(dataset=write_texts(tmp_path, texts), context=16, eval_tokens=900)
    calibration, evaluation = bt.held_out_contexts(cfg, lm.tokenizer)
    held_out = texts[19::20]  # all shorter than their share, so none is cut
    for found, own in ((calibration, held_out[::2]), (evaluation, held_out[1::2])):
        assert torch.equal(found, packed(own, lm.tokenizer, 16)[:60]), "of different documents"
    plain = dataclasses.replace(cfg, prepend_bos=False)  # as SAEs of older versions were trained
    ids, begin = bt.held_out_contexts(plain, lm.tokenizer)[0].flatten().tolist(), lm.tokenizer.bos_token_id
    joined = [i for text in held_out[::2] for i in [begin, *lm.tokenizer(text)["input_ids"]]]
    assert ids == joined[: len(ids)]

@pytest.mark.parametrize("bos, eos, expected", [
    (1, 2, [[1, 5, 6, 7], [1, 8, 9, 1], [1, 10, 11, 1]]),
    (None, 2, [[2, 5, 6, 7], [2, 8, 9, 2], [2, 10, 11, 2]]),
    (None, None, [[5, 6, 7, 8], [9, 10, 11, 12]])])
def test_contexts_begin_with_the_begin_token_else_the_end_token_else_with_text(bos, eos, expected):
    tokenizer = types.SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
    ids, n = bt.pack(small(context=4), tokenizer, iter([[5, 6, 7, 8, 9], [10, 11], [12]]), 3)
    assert ids.tolist() == expected and n == 3

def test_held_out_text_is_of_many_documents_other_ones_for_calibration_than_for_evaluation(tmp_path, lm):
    """Bug here once: of 16,384 tokens 99.6 % were one file, in both halves."""
    long, short = (" ".join([word] * n) for word, n in ((" 1", 9000), (" 2", 100)))
    texts = [f"{i} {long if i % 100 == 19 else short}" for i in range(8000)]
    cfg = small(dataset=write_texts(tmp_path, texts), context=32, eval_tokens=4000)
    [one] = lm.tokenizer(" 1", add_special_tokens=False)["input_ids"][-1:]
    for ids in bt.held_out_contexts(cfg, lm.tokenizer):
        assert len(ids) == 130  # ⌈4000 / 31⌉
        of_long = (ids == one).sum(1) > 8  # contexts from a long document
        runs = [sum(1 for _ in group) for long, group in itertools.groupby(of_long.tolist()) if long]
        assert len(runs) > 3 and max(runs) <= 5, "5 of 130 contexts are 4 %"
    texts = [short] * 19 + [" ".join(lines(3000))]
    few = small(dataset=write_texts(tmp_path, texts), context=32, eval_tokens=4000)
    a, b = bt.held_out_contexts(few, lm.tokenizer)  # a single held-out document is divided
    assert len(a) == len(b) == 130 and not {*map(tuple, a.tolist())} & {*map(tuple, b.tolist())}

def test_passages_take_equally_much_of_long_documents_if_their_share_is_not_enough():
    documents = [list(range(n)) for n in (3, 100, 8, 100)]
    for most, wanted, lengths in ((5, 10, [3, 5, 5, 5]), (5, 51, [3, 20, 8, 20]), (5, 400, [3, 100, 8, 100]),
                                  (9, 0, [3, 9, 8, 9])):
        found = list(bt.passages(documents, most, wanted))
        assert [len(part) for part in found] == lengths
        assert all(part == list(range(part[0], part[-1] + 1)) for part in found), "without gaps"
    assert len({part[0] for part in bt.passages([list(range(100))] * 50, 5, 9)}) > 20, "from random places"

def test_training_contexts_are_shuffled_far_beyond_the_buffer_each_once(tmp_path, lm):
    """Bug here once: text in the order of its documents, of which a few fill the buffer, trained worse."""
    texts = lines(600)
    cfg = small(dataset=write_texts(tmp_path, texts), context=16, model_batch=4, tokens=16 * 80)
    train = [t for i, t in enumerate(texts) if i % 20 != 19]
    chunk, n_documents = bt.pack(cfg, lm.tokenizer, bt.tokenise(lm.tokenizer, iter(train)), 80)
    ordered = packed(train[:n_documents], lm.tokenizer, 16)  # whole documents, at least 80 contexts
    assert torch.equal(chunk, ordered) and 80 <= len(ordered) < 90

    def chunk(seed):
        shuffled = bt.training_contexts(dataclasses.replace(cfg, seed=seed), lm.tokenizer)
        return torch.stack([next(shuffled)[0] for _ in ordered])
    places = [ordered.tolist().index(context) for context in chunk(0).tolist()]
    assert sorted(places) == list(range(len(ordered)))
    assert sum(abs(i - p) for i, p in enumerate(places)) > 1000
    assert not torch.equal(chunk(0), chunk(1)) and torch.equal(chunk(0), chunk(0))

def test_contexts_continue_from_their_position_and_repeat_without_end(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(bt, "TEXT_SHUFFLE", 40)
    cfg = small(dataset=write_texts(tmp_path, lines(300)), context=16, model_batch=4)
    found, positions = zip(*itertools.islice(bt.training_contexts(cfg, lm.tokenizer), 600))
    assert positions[-1].documents > 2 * 285, "should have gone round more than twice"
    for start in (0, 130, 197, 520):  # 40 contexts or so are shuffled together
        again = bt.training_contexts(cfg, lm.tokenizer, positions[start])
        assert all(torch.equal(context, next(again)[0]) for context in found[start + 1 : start + 60])

def test_a_run_that_reads_its_text_more_than_once_says_how_often(tmp_path, lm, recwarn, monkeypatch):
    """Bug here once: a file of 200 kB was read more than three times in silence; L0 was 33.6 for k = 32."""
    monkeypatch.setattr(bt, "TEXT_SHUFFLE", 40)
    cfg = small(dataset=write_texts(tmp_path, lines(300)), context=16)
    texts = bt.tokenise(lm.tokenizer, bt.texts_of(cfg, "train"))
    length = 16 * len(bt.pack(cfg, lm.tokenizer, texts, 10**6)[0])

    def warned(n_contexts, **changes):
        recwarn.clear()
        stream = bt.training_contexts(dataclasses.replace(cfg, **changes), lm.tokenizer)
        [*itertools.islice(stream, n_contexts)]
        stream.close()
        return [re.search(r"has about ([\d,]+) tokens and is read ([\d.]+) times", str(w.message))
                for w in recwarn]
    [said] = warned(600, tokens=2 * length)
    assert float(said[1].replace(",", "")) == pytest.approx(length * 15 / 16, rel=0.03)
    assert float(said[2]) == pytest.approx(2 * 16 / 15, rel=0.05)
    assert not warned(600, tokens=length // 2) and not warned(600, tokens=2 * length, passes=3)
    monkeypatch.setattr(bt, "TEXT_SHUFFLE", 8192)
    assert len(warned(1, tokens=2 * length)) == 1, "of a short text before the first context is used"

@pytest.mark.slow
def test_a_process_that_leaves_a_stream_open_ends_at_once_and_cleanly():
    """Bug here once: a thread was killed inside native code at exit, and the process aborted."""
    code = ("import batchtopk as bt; cfg = bt.RunConfig(d_model=1, n_latents=64);"
            "lm = bt.LanguageModel('tiny-gpt2', device='cpu');"
            "stream = bt.training_contexts(cfg, lm.tokenizer); next(stream); print('done')")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(bt.__file__).parent, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr

class CountingModel:
    """Stands in for a language model: an activation is the token's running number and its id."""
    kept_activations, is_read = bt.LanguageModel.kept_activations, bt.LanguageModel.is_read

    def __init__(self, tokenizer):
        self.tokenizer, self.d_model, self.device, self.n = tokenizer, 2, torch.device("cpu"), 0
        self.model, self.norm_limit = types.SimpleNamespace(dtype=torch.float32), 0
        self.processes = bt.Processes()

    def is_kept(self, ids):
        return torch.arange(ids.numel()).view_as(ids) % 3 > 0  # not all, and not a multiple of anything

    def activations(self, ids):
        assert 0 < len(ids) <= 8, "a model cannot read an empty block, nor more than model_batch contexts"
        start, self.n = self.n, self.n + ids.numel()
        return torch.stack([torch.arange(start, self.n).view_as(ids), ids], -1).float()

@pytest.mark.parametrize("passes", [1, 3])
def test_the_shuffle_buffer_mixes_activations_and_computes_none_that_no_step_uses(passes, tmp_path, lm):
    """Bug here once: a run of 50,000 tokens began by filling a buffer of 131,072."""
    model, fills = CountingModel(lm.tokenizer), {}
    cfg = small(dataset=write_texts(tmp_path, lines(600)), batch_size=64, buffer_tokens=512, context=16,
                tokens=6_000 * passes, passes=passes)
    for x, at in bt.activation_batches(cfg, model):
        fills.setdefault(model.n, []).append(x[:, 0])
    served = [torch.cat(batches) for batches in fills.values()]
    sizes = [len(rows) for rows in served]
    assert sum(sizes) == 6_000 * passes and not any(size % 64 for size in sizes[:-1]), "only the last is short"
    if passes == 1:
        assert sizes == [512] * 11 + [6_000 - 11 * 512]
    times = torch.cat(served).unique(return_counts=True)[1]
    assert times.max() == passes and (times == passes).sum() > 5_500, "each so often, but for a rest"
    assert model.n * 2 / 3 < 6_000 + len(fills) * 16, "less than a context a buffer is read for nothing"
    for batches in fills.values():
        pairs = itertools.combinations([set(batch.tolist()) for batch in batches], 2)
        assert max(len(one & other) for one, other in pairs) < 32, "each time in another order"
    for rows in served:
        assert rows.max() - rows.min() > 400 and (rows.diff() == 1).float().mean() < 0.1, "mixed"

@pytest.mark.parametrize("passes", [1, 2])
def test_activations_continue_exactly_from_every_position(passes, tmp_path, lm, monkeypatch):
    monkeypatch.setattr(bt, "TEXT_SHUFFLE", 40)
    text = Path(write_texts(tmp_path, lines(300))).with_suffix(".txt")  # is opened fast
    cfg = small(dataset=str(text), batch_size=64, buffer_tokens=200, context=16,
                model_batch=4, tokens=2_500, passes=passes)
    pairs = list(bt.activation_batches(cfg, CountingModel(lm.tokenizer)))
    assert pairs[-1][1].documents > 100 / passes
    assert {at.batches for _, at in pairs} == ({1, 2, 3, 4} if passes == 1 else {1, 2, 3, 4, 5, 6})
    assert sum(len(x) for x, _ in pairs) == 2_500 and len(pairs[-1][0]) == 2_500 % 64
    for i, (_, at) in enumerate(pairs):
        again = list(bt.activation_batches(cfg, CountingModel(lm.tokenizer), at))
        assert len(again) == len(pairs) - i - 1
        assert all(torch.equal(x[:, 1], y[:, 1]) for (x, _), (y, _) in zip(pairs[i + 1 : i + 4], again))

def test_the_example_of_a_resume_is_so(tmp_path, lm):
    """That of the docstring. What continues from a Position that an older version saved is the same run."""
    model = SinkModel(lm.tokenizer)
    model.special = torch.tensor([])
    cfg = small(dataset=write_texts(tmp_path, lines(600)), batch_size=64, buffer_tokens=200, context=128,
                tokens=1_000)
    said = re.findall(r"^ +Position\((.*)\)  ", bt.activation_batches.__doc__, re.M)
    assert len(said) == 6
    start, first, stopped, at, third, second_buffer = (bt.Position(*map(int, p.split(","))) for p in said)
    batches = list(bt.activation_batches(cfg, model, start))
    assert [p for _, p in batches[:4]] == [first, stopped, third, second_buffer]
    read, resumed = [], bt.activation_batches(cfg, model, at, lambda *n: read.append(n))
    x, after = next(resumed)
    assert torch.equal(x, batches[2][0]) and after == third and read == [(254, 200)]
    ended = bt.activation_batches(cfg, model, at, lambda n, wanted: read.append(n) or True)
    assert list(ended) == [], "on_read ends them, before a batch is served"

def test_the_buffer_is_a_share_of_the_text_unless_its_size_is_given():
    """Bug here once: in a run of 120,000 tokens all were read before step 1, and again after a stop."""
    cfg = bt.RunConfig(d_model=1, n_latents=64, tokens=120_000)
    assert cfg.buffer_size == 30_000 and dataclasses.replace(cfg, passes=3).buffer_size == 10_000
    assert dataclasses.replace(cfg, tokens=10**6).buffer_size == 131_072
    assert dataclasses.replace(cfg, tokens=1000, batch_size=512).buffer_size == 512, "at least a batch"
    assert dataclasses.replace(cfg, buffer_tokens=131_072).buffer_size == 131_072, "as runs of before say"
    for preset, size in (("gpt2-small", 1 << 20), ("gemma-2-2b", 1 << 19)):
        assert bt.RunConfig.preset(preset, d_model=1).buffer_size == size

# Tokens whose norm is many times the others'

class SinkModel(CountingModel):
    """Its activations have norms of about 1, but position 1 of every fourth context has 1000."""

    def __init__(self, tokenizer, d_model=8):
        super().__init__(tokenizer)
        self.d_model, self.left_out = d_model, None

    is_kept = bt.LanguageModel.is_kept
    skip_special, special = True, torch.tensor([0])

    def activations(self, ids):
        h = torch.randn(*ids.shape, self.d_model, generator=torch.Generator().manual_seed(int(ids.sum())))
        h[:, 1] *= torch.where(ids.sum(1) % 4 == 0, 1000.0, 1.0)[:, None]
        return h / self.d_model**0.5

def test_tokens_of_massive_norm_are_left_out_and_what_they_held_is_said(lm):
    model, ids = SinkModel(lm.tokenizer), ids_of(200, 16)
    x, read = model.kept_activations(ids)
    assert len(x) == 200 * 15
    limit, tokens, variance = bt.outliers(x, 10)
    norm, out = x.norm(dim=1), x.norm(dim=1) > 50
    assert limit == pytest.approx(10 * float(norm.median())) and 20 < out.sum() < 80
    centred = x - x.mean(0)
    assert tokens == float(out.double().mean()) and 0.99 < variance < 1
    assert variance == pytest.approx(float(centred[out].square().sum() / centred.square().sum()), rel=1e-5)
    model.norm_limit = limit
    x, fewer = model.kept_activations(ids)
    assert torch.equal(x, model.activations(ids)[fewer]) and x.norm(dim=1).max() <= limit
    assert (read & ~fewer).sum() == out.sum() and fewer.sum() == (~out).sum()

def test_a_few_tokens_that_hold_half_the_variance_are_warned_of():
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    bt.outliers(x, 10)
    x[:5] *= 3  # within the limit
    bt.outliers(x, 10)
    x[:5] *= 10
    with pytest.warns(UserWarning, match="^7\\d% of the variance is that of 1 % of the tokens"):
        bt.outliers(x, 100)

@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_counted_and_refused(lm, data, tmp_path, monkeypatch, value):
    """Bug here once: "norm_limit is nan; give a number", though nobody gave one."""
    activations, x, place = lm.activations, torch.randn(64, 8), torch.tensor([5])
    monkeypatch.setattr(lm, "activations", lambda ids: activations(ids).index_fill(1, place, value))
    said = "not finite on {} of {} tokens; try another --model-dtype"
    for limit in (0.0, 5.0):
        monkeypatch.setattr(lm, "norm_limit", limit)
        if value != torch.inf or not limit:  # else it is one of the tokens beyond the limit
            with pytest.raises(bt.InputError, match=said.format(4, "\\d+")):
                lm.kept_activations(ids_of())
    with pytest.raises(bt.InputError, match=said.format("\\d+", "\\d+")):
        cli.train_runs({"": configs(data)["batch"]}, lm, tmp_path / "run")
    x[:3, 1] = value
    cfg = bt.Config(d_model=8, n_latents=16, k=2, batch_size=64, device="cpu")
    with pytest.raises(bt.InputError, match="^x is not finite on 3 of 64 tokens$"):
        bt.Trainer(cfg).step(x)

def test_splicing_leaves_tokens_beyond_the_limit_as_they_are(lm):
    ids, model = ids_of(), bt.LanguageModel("tiny-gpt2", 2, device="cpu")
    norm = model.activations(ids).norm(dim=-1)
    model.norm_limit = float(norm[:, 1:].median())
    read = model.kept_activations(ids)[1]
    assert torch.equal(read, (norm <= model.norm_limit) & model.is_kept(ids)) and 30 < read.sum() < 100
    seen = []
    model.logits(ids, edit=lambda h: seen.append(h) or h)
    assert torch.equal(seen[0], model.activations(ids)[read])
    changed = model.logits(ids, edit=torch.zeros_like)
    where = model.logits(ids, edit=lambda h: torch.zeros_like(h), where=read)
    assert torch.equal(changed, where) and not torch.equal(changed, model.logits(ids))

# Runs

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set that is read faster than the standard library."""
    texts = [f"def f{i}(x): return x * {i * i} + {i}" for i in range(4000)]
    return write_texts(tmp_path_factory.mktemp("data"), texts)

def configs(data):
    cfg = small(dataset=data, tokens=3000, eval_tokens=300, context=32, buffer_tokens=1000, dead_tokens=512)
    return {"batch": cfg, "jump": dataclasses.replace(cfg, activation="jumprelu", batch_size=128, seed=1),
            "token": dataclasses.replace(cfg, activation="topk")}

@pytest.fixture(scope="module")
def finished(lm, data, tmp_path_factory):
    """A comparison that was never interrupted: folder, results, and the tokens seen after each batch."""
    folder, seen = tmp_path_factory.mktemp("runs") / "once", []
    results = cli.train_runs(configs(data), lm, folder, on_step=lambda tokens, stats: seen.append(tokens))
    return folder, results, seen

def assert_same_run(folder, other):
    """Bit for bit the same weights and the same metrics."""
    paths = [path.relative_to(folder) for path in folder.rglob("*.*") if path.suffix != ".json"]
    assert len(paths) in (2, 6)
    assert all((folder / path).read_bytes() == (other / path).read_bytes() for path in paths), paths

def stop_after(n, seen):
    def on_step(tokens, stats):
        seen.append(tokens)
        return len(seen) == n
    return on_step

def test_saes_trained_together_are_those_trained_alone(lm, data, finished, tmp_path):
    folder, together, seen = finished
    alone = cli.train_runs({"": configs(data)["token"]}, lm, tmp_path / "alone")
    assert_same_run(tmp_path / "alone", folder / "token")
    assert together[2]["theta"] == alone[0]["theta"] and alone[0]["run"] == str(tmp_path / "alone")
    assert [result["run"] for result in together] == [str(folder / name) for name in configs(data)]
    assert sum(n % 256 > 0 for n in seen) < 5 and seen == sorted(seen) and seen[-1] == 3000

def test_a_run_leaves_its_metrics_and_reports_them(lm, finished):
    folder, results, seen = finished
    for name, result in zip(("batch", "jump", "token"), results):
        records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["tokens"] for r in records] == seen and {*bt.StepStats._fields} <= set(records[0])
        held_out = [r["held_out"]["batch"]["fvu"] for r in records if "held_out" in r]
        assert len(held_out) == 10 and held_out[-1] < held_out[0] and "held_out" in records[-1]
        sae = bt.SAE.load(folder / name)
        again = {**cli.evaluate_runs({folder / name: sae}, lm)[0], "seconds": result["seconds"]}
        assert again == {key: result[key] for key in again} and result["tokens"] == 3000
        assert result["dead"] == float(sae.is_dead().float().mean()) and result["step_seconds"] > 0

def test_evaluate_with_a_language_model_finds_what_a_run_reports(lm, finished):
    sae, [result, *_] = bt.SAE.load(finished[0] / "batch"), finished[1]
    ids = bt.held_out_contexts(sae.config, lm.tokenizer)[1]
    few = ids[:: math.ceil(len(ids) / sae.config.ce_contexts)]
    found = bt.evaluate(sae, [bt.shuffled_activations(sae.config, lm, ids)], lm, few)
    for form in ("batch", "theta"):
        assert result[form].keys() == found[form].keys() - {"feature_density"}
        assert all(found[form][name] == pytest.approx(value, rel=1e-6) for name, value in result[form].items())
    assert result["theta"]["ce_sae"] != result["batch"]["ce_sae"]

@pytest.mark.parametrize("batch_size", [256, 1000])
def test_rare_latents_fired_on_few_of_the_last_tokens(batch_size, lm, data, tmp_path, monkeypatch):
    """Bug here once: in few steps, so that with a large batch all latents were rare."""
    for name, value in (("COUNTED", 1024), ("RARE", 100)):
        monkeypatch.setattr(cli, name, value)
    cfg, fired = dataclasses.replace(configs(data)["batch"], batch_size=batch_size), []

    def watched(trainer, x, step=bt.Trainer.step):
        if not fired:
            trainer.initialize_(x)
        selection = trainer.sae.training_selection(trainer.tokens_seen)
        fired.append((trainer.sae.encode(x, selection) > 0).sum(0))
        return step(trainer, x)
    monkeypatch.setattr(bt.Trainer, "step", watched)
    [result] = cli.train_runs({"": cfg}, lm, tmp_path / "run")
    last = math.ceil(1024 / batch_size) * batch_size  # in whole batches: 1024 or 2000
    n_skipped = (cfg.tokens - last) // batch_size
    rare = sum(fired[n_skipped:]) < (cfg.tokens - n_skipped * batch_size) / 100
    assert 0 < result["rare"] == float(rare.float().mean()) < 1

def test_seconds_are_read_when_a_gpu_has_done_its_work(lm, data, tmp_path, monkeypatch):
    """Bug here once: what an SAE's step had left to the GPU was billed to the next SAE."""
    waits, clock = [], itertools.count()
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    cli.clock(torch.device("cpu"))
    assert not waits
    cli.clock(torch.device("cuda:1"))
    assert waits == [torch.device("cuda:1")]
    monkeypatch.setattr(cli, "clock", lambda device: next(clock))
    results = cli.train_runs(configs(data), lm, tmp_path / "three")
    assert [r["step_seconds"] for r in results] == [next(clock) / 2 / 3] * 3, "once before and after each"

def test_cross_entropy_is_measured_on_a_bounded_number_of_contexts_from_all_held_out_text(lm, finished):
    """Bug here once: on the first quarter in the order of the documents, which is a few of them."""
    sae, seen, told = bt.SAE.load(finished[0] / "batch"), [], []
    sae.config = dataclasses.replace(sae.config, ce_contexts=7)
    ids = ids_of(40, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bt, "edited_losses", lambda lm, ids, *_: seen.append(ids) or torch.ones(5, 2))
        cli.evaluate_runs({"x": sae}, lm, (ids, torch.randn(99, 256)), lambda *done: told.append(done))
    assert torch.equal(torch.cat(seen), ids[::6]) and told[-1] == (7, 7)

def test_what_no_sae_changes_is_computed_once_for_all_of_a_comparison(lm, finished, monkeypatch):
    saes = [bt.SAE.load(finished[0] / name) for name in ("batch", "jump", "token")]
    calls, run, ids, mean = [0], lm.run, ids_of(6, 32), torch.ones(256)
    monkeypatch.setattr(lm, "run", lambda *given: calls.__setitem__(0, calls[0] + 1) or run(*given))
    together = bt.splice_losses(saes, lm, ids, mean)
    assert calls[0] == 1 + 3 + 4, "activations; clean, zero, mean; two forms of BatchTopK, one of the others"
    for sae, found in zip(saes, together):
        [alone] = bt.splice_losses([sae], lm, ids, mean)
        for form in ("batch", "theta"):
            assert found[form] == pytest.approx(alone[form], rel=1e-6)

def test_an_interrupted_comparison_continues_to_the_same_end(lm, data, finished, tmp_path, monkeypatch):
    """Stopped between two steps, and interrupted once more in the evaluation."""
    seen, folder = [], tmp_path / "twice"
    assert cli.train_runs(configs(data), lm, folder, on_step=stop_after(9, seen)) is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cli, "evaluate_runs", lambda *_: signal.raise_signal(signal.SIGINT))
        cli.train_runs(configs(data), lm, folder, resume=True, on_step=stop_after(0, seen))
    assert cli.saved_states(folder) == [(1, 3000)]
    results = cli.train_runs(configs(data), lm, folder, resume=True, on_step=stop_after(0, seen))
    assert seen == finished[2] and [r["theta"] for r in results] == [r["theta"] for r in finished[1]]
    assert_same_run(folder, finished[0])

def test_a_run_that_is_stopped_while_it_reads_is_saved_and_continues_to_the_same_end(lm, data, tmp_path):
    folder, read = tmp_path / "run", []

    def on_read(n, wanted):  # stops in the second buffer
        full = [wanted for n, wanted in read if n >= wanted == 1000]
        read.append((n, wanted))
        return bool(full)
    cfg = dataclasses.replace(configs(data)["token"], model_batch=4)
    assert cli.train_runs({"": cfg}, lm, folder, on_read=on_read) is None
    assert read[-1][0] < 1000 and cli.saved_states(folder) == [(1, 768)], "three batches are in a buffer"
    assert sum(n == wanted for n, wanted in read[:-1]) == 2, "held-out text, too, is told of"
    whole = cli.train_runs({"": cfg}, lm, tmp_path / "whole")
    again = cli.train_runs({"": cfg}, lm, folder, resume=True)
    assert again[0]["theta"] == whole[0]["theta"]
    assert_same_run(folder, tmp_path / "whole")

def test_an_interrupt_within_a_step_keeps_the_last_good_checkpoint(lm, data, finished, tmp_path, monkeypatch):
    """The first SAE has taken its step and the second has not: that state must not be saved."""
    folder, step = tmp_path / "run", bt.Trainer.step

    def stop(trainer, x):
        if trainer.cfg.activation == "jumprelu" and trainer.steps == 11:
            raise KeyboardInterrupt
        return step(trainer, x)
    assert cli.train_runs(configs(data), lm, folder, on_step=stop_after(4, [])) is None
    [state] = folder.glob("state-*")
    before = state.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bt.Trainer, "step", stop)
        cli.train_runs(configs(data), lm, folder, resume=True)
    assert state.read_bytes() == before
    cli.train_runs(configs(data), lm, folder, resume=True)
    assert_same_run(folder, finished[0])

def test_held_out_text_that_is_shorter_than_asked_for_is_said(lm, data, tmp_path, recwarn):
    """Bug here once: 65,536 tokens became 6,542 in silence."""
    cfg = dataclasses.replace(configs(data)["batch"], tokens=256, n_latents=16)
    for asked in (300, 65_536):
        cli.train_runs({"": dataclasses.replace(cfg, eval_tokens=asked)}, lm, tmp_path / str(asked))
        said = [re.fullmatch(r"held-out text gives [\d,]+ tokens for θ, ([\d,]+) to evaluate, not 65,536",
                             str(w.message)) for w in recwarn if "held-out" in str(w.message)]
        assert len(said) == (asked == 65_536)
    result = json.loads((tmp_path / "65536" / "evaluation.json").read_text())
    assert int(said[0][1].replace(",", "")) == result["eval_tokens"] < 10_000

def test_a_run_whose_data_set_fails_is_saved_and_continues_when_it_is_mended(lm, tmp_path, monkeypatch):
    """A bad line after many good ones."""
    path = tmp_path / "a.jsonl"
    good = Path(write_texts(tmp_path, lines(1200))).read_text()
    bad = good.splitlines(keepends=True)
    bad[900] = '{"text": "never clos\n'
    monkeypatch.setattr(bt, "TEXT_SHUFFLE", 16)
    monkeypatch.setattr(bt, "GROUP_CHARACTERS", (300, 300))
    cfg = dataclasses.replace(configs(str(path))["batch"], tokens=8_000, eval_tokens=60)
    cli.train_runs({"": cfg}, lm, tmp_path / "once")
    path.write_text("".join(bad))
    with pytest.raises(bt.Unavailable, match="a.jsonl.* could not be read"):
        cli.train_runs({"": cfg}, lm, tmp_path / "twice")
    [(_, tokens)] = cli.saved_states(tmp_path / "twice")
    assert 2_000 < tokens < 8_000
    path.write_text(good)
    cli.train_runs({"": cfg}, lm, tmp_path / "twice", resume=True)
    assert_same_run(tmp_path / "twice", tmp_path / "once")

def test_a_run_fixes_its_limit_of_norms_at_the_start_and_applies_it(lm, data, tmp_path, monkeypatch):
    """Position 1 of some contexts is made a hundred times larger: the tokens that real models have."""
    activations = lm.activations

    def with_sinks(ids):
        h = activations(ids).clone()
        h[:, 1] *= torch.where(ids.sum(1) % 3 == 0, 100.0, 1.0)[:, None]
        return h
    monkeypatch.setattr(lm, "activations", with_sinks)
    cfg, seen, step = configs(data)["batch"], [], bt.Trainer.step

    def watched(trainer, x):
        seen.append(float(x.norm(dim=1).max()))
        return step(trainer, x)
    calibrate, calibrated = bt.SAE.calibrate, []
    monkeypatch.setattr(bt.Trainer, "step", watched)
    monkeypatch.setattr(bt.SAE, "calibrate", lambda sae, batches: calibrated.append(batches[0]) or calibrate(
        sae, batches))
    results = {}
    for max_norm in (10, 0):
        own = dataclasses.replace(cfg, max_norm=max_norm)
        [results[max_norm]] = cli.train_runs({"": own}, lm, tmp_path / str(max_norm))
        found = bt.SAE.load(tmp_path / str(max_norm)).found
        assert (found.norm_limit > 0) == (max_norm > 0) and found.begin_token and found.pass_contexts
        assert (max(seen) > 1000) == (float(calibrated.pop().norm(dim=1).max()) > 1000) == (max_norm == 0)
        if max_norm:
            assert max(seen) <= found.norm_limit == lm.norm_limit and lm.left_out.variance > 0.5
            assert results[10]["left_out"] == pytest.approx(1 / 3 / 31, rel=0.5)
            assert results[10]["theta"]["frac_unread"] > 1 / 32 + 0.005 > results[10]["left_out"]
        seen.clear()
    assert results[0]["left_out"] == 0 and results[0]["theta"]["mse"] > 10 * results[10]["theta"]["mse"]
    sae = bt.SAE.load(tmp_path / "10")
    assert bt.LanguageModel.from_config(sae.config, sae.found).norm_limit == sae.found.norm_limit
    lm.norm_limit = 0  # the same activations from Python: the SAE itself leaves them out
    x = bt.shuffled_activations(cfg, lm, bt.held_out_contexts(cfg, lm.tokenizer)[1])
    metrics = bt.evaluate(sae, [x])
    assert metrics["left_out"] == pytest.approx(results[10]["left_out"])
    for name in ("fvu", "l0", "mse"):
        assert metrics["theta"][name] == pytest.approx(results[10]["theta"][name], rel=1e-5)
    sae.found = bt.Found()
    assert bt.evaluate(sae, [x])["theta"]["fvu"] > 1.5 * metrics["theta"]["fvu"], "where it did not count"

def test_a_tokenizer_that_is_not_the_models_is_warned_of(lm, data, tmp_path, recwarn):
    """Bug here once: with as many tokens in another order, a run ended well and told of it by ce_clean alone."""
    cfg = dataclasses.replace(configs(data)["batch"], tokens=256, eval_tokens=200)
    cli.train_runs({"": cfg}, lm, tmp_path / "run")
    assert not [w for w in recwarn if "chance" in str(w.message)]
    other = altered(tmp_path / "model")
    text = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    text["model"]["vocab"] = {word: -i % 4096 for word, i in text["model"]["vocab"].items()}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(text))
    with pytest.warns(UserWarning, match="predicts the text worse than chance"):
        cli.train_runs({"": cfg}, bt.LanguageModel(other, 2, device="cpu"), tmp_path / "other")

def test_what_cannot_share_activations_or_a_folder_is_refused(lm, data, finished, tmp_path):
    first = configs(data)
    for changes, said in ((dict(layer=1), "layer"), (dict(batch_size=100), "batch_size")):
        other = {"other": dataclasses.replace(first["batch"], **changes)}
        with pytest.raises(bt.InputError, match=f"other cannot be trained beside the others.*{said}"):
            cli.train_runs({**first, **other}, lm, tmp_path / "new")
    for name, resume, said in (("", 0, "exists"), ("batch", 1, "is finished")):
        with pytest.raises(bt.Unavailable, match=said):
            cli.train_runs(first, lm, finished[0] / name, resume=resume)
    assert not list(tmp_path.iterdir())

# Evaluation in the model, and devices

def test_splice_losses_are_those_of_one_context_at_a_time(lm, finished, monkeypatch):
    """Bug here once: logits of a whole batch, several times. Here the model claims a huge vocabulary."""
    sae, ids, mean = bt.SAE.load(finished[0] / "batch"), ids_of(8, 64), torch.ones(256)
    sae.config = dataclasses.replace(sae.config, batch_size=64 * 8)
    [together] = bt.splice_losses([sae], lm, ids, mean)
    claim = types.SimpleNamespace(weight=torch.empty(1 << 30, 0))
    monkeypatch.setattr(lm.model, "get_output_embeddings", lambda: claim)
    with Largest() as largest:
        [apart] = bt.splice_losses([sae], lm, ids, mean)
    assert largest.entries <= 4096 * 256, "the embedding's, while logits of the batch are twice as many"
    alone = [bt.splice_losses([sae], lm, ids[i : i + 1], mean)[0]["theta"] for i in range(8)]
    for name in set(alone[0]) - {"ce_recovered"}:  # which is a quotient of the others
        assert apart["theta"][name] == pytest.approx(sum(losses[name] for losses in alone) / 8, rel=1e-4)
    assert together["batch"] == pytest.approx(apart["batch"], rel=1e-5)

FAR = torch.device("meta")

class Far(torch.Tensor):
    """A tensor that says it lies on an accelerator (one named "meta"), while its values are in `near`."""

    @staticmethod
    def __new__(cls, near):
        strides = near.stride() if near.layout == torch.strided else None
        tensor = torch.Tensor._make_wrapper_subclass(cls, near.shape, strides, dtype=near.dtype, device=FAR)
        tensor.near = near
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return OneDevice.compute(func, args, kwargs or {})

    def tolist(self):
        return self.near.tolist()

    def new_tensor(self, data):
        return torch.tensor(data, dtype=self.dtype, device=FAR)

class OneDevice(TorchDispatchMode):
    """Refuses to compute on tensors of two devices, or with indices from another one, as an accelerator does.

    Tensors without dimensions may come from the CPU, and copies may go anywhere.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    @staticmethod
    def compute(func, args, kwargs):
        device, tensors = kwargs.get("device"), [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        far = {id(t.near): t for t in tensors if isinstance(t, Far)}
        near = [list(t.shape) for t in tensors if not isinstance(t, Far) and t.dim()]
        copies = func.overloadpacket.__name__ in ("_to_copy", "copy_")
        assert copies or not far or not near, f"{func} mixes devices: {near} lie on the CPU"
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args, kwargs = tree_map(lambda t: getattr(t, "near", t), (args, kwargs))
        result, wrap = func(*args, **kwargs), torch.device(device) == FAR if device is not None else far
        return tree_map(lambda t: far.get(id(t), Far(t)) if wrap and torch.is_tensor(t) else t, result)

@pytest.fixture
def accelerator(lm, monkeypatch):
    """A pretended accelerator, the device "far", whose tensors mix with none of the CPU's."""
    for name in ("CHUNK_ENTRIES", "UPDATE_ENTRIES"):
        monkeypatch.setitem(getattr(bt, name), FAR.type, 1 << 14)
    for name in ("tensor", "as_tensor"):  # torch makes these without asking OneDevice
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, device="cpu", **k: make(*a, **k).to(device))
    load = "transformers.AutoModelForCausalLM.from_pretrained"
    monkeypatch.setattr(load, lambda *_, **__: (copy.deepcopy(lm.model), LOADED))
    monkeypatch.setattr(bt, "resolve_device", lambda name: FAR if name == "far" else torch.device("cpu"))
    with OneDevice():
        yield "far"

def test_tensors_of_two_devices_are_told_apart(accelerator):
    x = torch.arange(6.0).to(FAR)
    assert (x[2:] * 2 + torch.tensor(1.0)).tolist() == [5.0, 7.0, 9.0, 11.0] and not isinstance(x.cpu(), Far)
    for mix in (lambda: x + torch.ones(6), lambda: x[torch.arange(3)], lambda: torch.ones(6)[x.long()],
                lambda: torch.cat([x, torch.ones(1)])):
        with pytest.raises(AssertionError, match="mixes devices"):
            mix()

@pytest.mark.parametrize("step, activation", [
    ("plain", "batchtopk"), ("sparse", "batchtopk"), ("sparse", "topk"), ("sparse", "jumprelu")])
def test_a_run_keeps_to_its_device(lm, data, tmp_path, accelerator, step, activation):
    """None of this was ever run on a GPU. What it computes there is what it computes on the CPU."""
    cfg = dataclasses.replace(configs(data)["batch"], tokens=400, batch_size=200, buffer_tokens=400,
                              dead_tokens=150, eval_tokens=100, step=step, activation=activation)
    near = cli.train_runs({"": cfg}, lm, tmp_path / "near")[0]
    far = bt.LanguageModel("tiny-gpt2", 2, device=accelerator)
    assert far.is_kept(torch.ones(2, 3, dtype=torch.int64)).device == FAR
    result = cli.train_runs({"": dataclasses.replace(cfg, device="far")}, far, tmp_path / "far")[0]
    assert result["theta"]["fvu"] == pytest.approx(near["theta"]["fvu"], rel=1e-3)
    assert result["theta"]["ce_sae"] == pytest.approx(near["theta"]["ce_sae"], rel=1e-3)
    sae, x = bt.SAE.load(tmp_path / "far", device=FAR), torch.randn(20, 256)
    expected = bt.SAE.load(tmp_path / "far").encode_sparse(x)
    for found, here in zip(sae.encode_sparse(x.to(FAR)), expected):
        torch.testing.assert_close(found.cpu(), here)
    assert sae.encode(x.to(FAR), "batch").device == sae(x.to(FAR)).device == FAR
    assert bt.calibrate(sae, [x]) > 0 and bt.export(sae, tmp_path / "encoder.pt")["largest_difference"] < 1e-4

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_is_the_run_on_a_cpu(data, tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        cfg = dataclasses.replace(configs(data)["batch"], device=device, model_dtype="float32")
        lm = bt.LanguageModel.from_config(cfg)
        results += cli.train_runs({"": cfg}, lm, tmp_path / device)
    assert results[1]["theta"]["fvu"] == pytest.approx(results[0]["theta"]["fvu"], rel=1e-2)
