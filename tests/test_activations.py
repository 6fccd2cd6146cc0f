"""Activations of Hugging Face models: hooks, packing, shuffling, data sets."""

import dataclasses
import json
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import batchtopk as bt
from conftest import SMALL


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A small Gemma 2 with random weights, in a local folder, with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    cfg = Gemma2Config(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=16, sliding_window=16, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    Gemma2ForCausalLM(cfg).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bt.TINY_GPT2).save_pretrained(folder)
    return str(folder)


def small(**changes):
    return bt.Config(**{**SMALL, "d_model": 256, **changes})


def ids_of(lm, n=4, length=32):
    return torch.randint(1, 4096, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_sites_are_the_residual_stream_and_what_is_added_to_it(family, gemma):
    name = "tiny-gpt2" if family == "gpt2" else gemma
    at = {site: bt.LanguageModel(name, 1, site, device="cpu") for site in ("resid_pre", "resid_post", "mlp_out", "attn_out")}
    ids = ids_of(at["resid_pre"])
    a = {site: lm.activations(ids) for site, lm in at.items()}
    hidden = at["resid_pre"].model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(a["resid_pre"], hidden[1]) and torch.equal(a["resid_post"], hidden[2])
    torch.testing.assert_close(a["resid_pre"] + a["attn_out"] + a["mlp_out"], a["resid_post"], atol=1e-4, rtol=1e-4)
    assert at["mlp_out"].d_model == a["mlp_out"].shape[-1]


def test_blocks_after_the_hook_never_run(lm):
    ran = []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.model.transformer.h)]
    lm.activations(ids_of(lm))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


@pytest.mark.parametrize("site, module", [("resid_pre", ""), ("resid_post", ""), ("attn_out", ""), ("", "transformer.h.1.mlp.c_proj")])
def test_splicing_in_the_identity_leaves_the_logits_as_they_were(site, module, gemma):
    for name in ["tiny-gpt2"] if module else ["tiny-gpt2", gemma]:
        lm = bt.LanguageModel(name, 1, site or "resid_pre", module, device="cpu")
        ids = ids_of(lm)
        assert torch.equal(lm.logits(ids), lm.logits(ids, edit=lambda h: h))
        changed = lm.logits(ids, edit=torch.zeros_like)
        assert not torch.equal(lm.logits(ids)[:, 1:], changed[:, 1:]) and torch.equal(lm.logits(ids)[:, 0], changed[:, 0]), "position 0 is left"
        assert not lm.model._forward_hooks and torch.equal(lm.logits(ids), lm.logits(ids, edit=lambda h: h)), "hooks must be gone"


def test_the_first_position_and_special_tokens_are_left_out_by_default(lm):
    ids = torch.tensor([[5, 6, 0, 7], [0, 8, 9, 0]])
    assert lm.is_kept(ids).tolist() == [[False, True, False, True], [False, True, True, False]]
    everything = bt.LanguageModel("tiny-gpt2", device="cpu", skip_special=False)
    assert everything.is_kept(ids).all()


@pytest.mark.parametrize("arguments, said", [
    (dict(layer=4), "layer is 4; .* 0 to 3"), (dict(module="transformer.h.2.mpl"), "no module 'transformer.h.2.mpl'.*ln_1, attn, ln_2, mlp")])
def test_a_site_that_is_not_there_is_named_with_those_that_are(arguments, said):
    with pytest.raises(bt.InputError, match=said):
        bt.LanguageModel("tiny-gpt2", **arguments, device="cpu")


def test_a_local_model_never_touches_the_network(monkeypatch, gemma):
    def refuse(*arguments, **_):
        raise AssertionError(f"network used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("tiny-gpt2", gemma):
        bt.LanguageModel(name, 1, device="cpu")


def test_the_embedded_model_is_a_language_model(lm):
    """Unigram entropy is 6.3 nats; a model trained for real on this source is far below it, on files it never saw."""
    contexts = torch.cat([block[:2] for block in bt.Contexts(small(model_batch=32), lm.tokenizer, "held-out")])  # of all files
    losses = [torch.nn.functional.cross_entropy(lm.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for ids in contexts.split(32)]
    assert len(contexts) > 200 and sum(losses) / len(losses) < 2.8  # 2.67 over every held-out context: make_tiny_gpt2.py --evaluate
    assert sum(p.stat().st_size for p in bt.TINY_GPT2.iterdir()) < 10e6


# Text


def write_texts(folder, texts):
    import datasets

    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "a.parquet")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_local_files_give_their_documents_and_hold_out_every_twentieth(tmp_path, suffix):
    texts = [f"document number {i}" for i in range(45)]
    write_texts(tmp_path, texts)
    cfg = small(dataset=str(tmp_path / f"a.{suffix}"))
    assert list(bt.documents(cfg, "held-out")) == [texts[19], texts[39]]
    assert sorted([*bt.documents(cfg, "train"), texts[19], texts[39]]) == sorted(texts)


def test_the_standard_library_is_split_by_file_without_overlap():
    train, held_out = set(bt.stdlib_documents("train")), set(bt.stdlib_documents("held-out"))
    assert len(train) > 5 * len(held_out) > 50 and not {t for t in train & held_out if len(t) > 500}


def test_a_hub_data_set_with_a_loading_script_is_retried_at_its_parquet_revision(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return iter([{"text": "hello"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(bt.documents(small(dataset="some/openwebtext"), "train")) == ["hello"]
    assert calls[1] == (("some/openwebtext", None), {"split": "train", "streaming": True, "revision": "refs/convert/parquet"})
    assert calls[0][1] == {"split": "train", "streaming": True}


@pytest.mark.parametrize("write, said", [
    (lambda p: p.write_text(""), "is empty"), (lambda p: p.write_text('{"text": "  "}\n' * 40), "holds no"),
    (lambda p: p.write_text('{"body": "x"}\n' * 40), "columns of .* are: body"), (lambda p: None, "does not exist")])
def test_texts_that_cannot_be_used_are_named(tmp_path, lm, write, said):
    write(tmp_path / "a.jsonl")
    cfg = small(dataset=str(tmp_path / "a.jsonl"))
    with pytest.raises((bt.InputError, bt.Unavailable), match=said):
        next(iter(bt.ActivationStream(cfg, lm)))


def test_contexts_are_the_documents_in_order_separated_by_the_begin_token_without_padding(tmp_path, lm):
    texts = [f"def function_{i}(x): return x + {i}" for i in range(400)]
    write_texts(tmp_path, texts)
    cfg = small(dataset=str(tmp_path / "a.jsonl"), context=16, model_batch=4)
    blocks = list(bt.Contexts(cfg, lm.tokenizer, "train"))
    assert all(b.shape == (4, 16) for b in blocks[:-1]) and 0 < len(blocks[-1]) <= 4
    ids = torch.cat(blocks).flatten().tolist()
    expected = [i for n, t in enumerate(texts) if n % 20 != 19 for i in [lm.tokenizer.bos_token_id, *lm.tokenizer(t)["input_ids"]]]
    assert ids == expected[: len(ids)] and len(expected) - len(ids) < 16


def test_training_contexts_are_shuffled_far_beyond_the_buffer_each_once(tmp_path, lm):
    """Bug here once: text in the order of its documents, of which a few fill the buffer, cost a tenth of the error."""
    write_texts(tmp_path, [f"line {i} of {i * i}" for i in range(600)])
    cfg = small(dataset=str(tmp_path / "a.jsonl"), context=16, model_batch=4, text_shuffle=40)
    ordered = torch.cat(list(bt.Contexts(cfg, lm.tokenizer, "train")))[:80]

    def first_80(seed):
        shuffled = bt.Contexts(dataclasses.replace(cfg, seed=seed), lm.tokenizer, "train", endless=True)
        return torch.cat([block for _, block in zip(range(20), shuffled)])

    for part in (slice(0, 40), slice(40, 80)):
        places = [ordered[part].tolist().index(context) for context in first_80(0)[part].tolist()]
        assert sorted(places) == list(range(40)) and sum(abs(i - p) for i, p in enumerate(places)) > 300, places
    assert not torch.equal(first_80(0), first_80(1)) and torch.equal(first_80(0), first_80(0))


def test_contexts_continue_from_their_state_and_repeat_without_end(tmp_path, lm):
    write_texts(tmp_path, [f"line {i} of {i * i}" for i in range(300)])
    cfg = small(dataset=str(tmp_path / "a.jsonl"), context=16, model_batch=4)
    contexts = bt.Contexts(cfg, lm.tokenizer, "train", endless=True)
    blocks, states = [], []
    for block in contexts:
        blocks.append(block)
        states.append(contexts.state)
        if len(blocks) == 120:
            break
    assert states[-1]["documents"] > 2 * 285, "should have gone round more than twice"
    for start in (0, 33, 100):
        again = iter(bt.Contexts(cfg, lm.tokenizer, "train", endless=True, state=states[start]))
        assert all(torch.equal(next(again), block) for block in blocks[start + 1 : start + 15])


def test_an_error_in_the_tokenising_thread_reaches_the_caller_and_the_thread_ends_with_its_reader():
    import threading

    def items():
        yield 1
        raise ValueError("from the thread")

    with pytest.raises(ValueError, match="from the thread"):
        list(bt.prefetch(items(), 2))
    for item in bt.prefetch(iter(range(10**9)), 2):
        if item == 3:
            break
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(timeout=5)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_process_that_leaves_a_stream_open_ends_at_once_and_cleanly():
    """Bug here once: a daemon thread was killed inside native code at exit, and the process aborted after its last line."""
    code = ("import batchtopk as bt; cfg = bt.Config(d_model=1, n_latents=64, device='cpu'); lm = bt.LanguageModel('tiny-gpt2', device='cpu');"
            "stream = iter(bt.Contexts(cfg, lm.tokenizer, 'train', endless=True)); next(stream); print('done')")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(bt.__file__).parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


class CountingModel:
    """Stands in for a language model: the activation of a token is its running number, its position is always kept."""

    def __init__(self, tokenizer):
        self.tokenizer, self.d_model, self.device, self.n = tokenizer, 1, torch.device("cpu"), 0
        self.model = types.SimpleNamespace(dtype=torch.float32)

    def is_kept(self, ids):
        return torch.arange(ids.numel()).view_as(ids) % 3 > 0  # not all, and not a multiple of anything

    def activations(self, ids):
        start, self.n = self.n, self.n + ids.numel()
        return torch.arange(start, self.n, dtype=torch.float32).view(*ids.shape, 1)


def test_the_shuffle_buffer_serves_each_activation_once_and_mixes_them(lm):
    model = CountingModel(lm.tokenizer)
    stream = bt.ActivationStream(small(batch_size=64, buffer_tokens=512), model)
    served = torch.cat([x for _, x in zip(range(60), stream)]).flatten()
    assert len(served) == len(served.unique()) == 60 * 64 and (served % 1024 % 3 > 0).all()
    waiting = stream.buffer[stream.order[stream.cursor :]].flatten()
    everything = torch.cat([served, waiting, stream.spill.flatten()]).sort().values
    expected = torch.tensor([i for i in range(model.n) if i % 1024 % 3 > 0], dtype=torch.float32)  # blocks of 8 × 128
    assert torch.equal(everything, expected), "nothing is lost and nothing invented"
    assert served[:256].sort().values[-1] - served[:256].sort().values[0] > 256, "a half of the buffer comes from all of it"
    assert (served[:256].diff() == 1).float().mean() < 0.1


def test_a_stream_continues_exactly_from_its_state(lm):
    cfg = small(batch_size=128, buffer_tokens=1024)
    straight, first = bt.ActivationStream(cfg, lm), bt.ActivationStream(cfg, lm)
    expected = [x for _, x in zip(range(14), straight)]
    for _ in zip(range(6), first):
        pass
    second = bt.ActivationStream(cfg, lm)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    for want, got in zip(expected[6:], second):
        assert torch.equal(want, got)


def test_held_out_contexts_for_theta_and_evaluation_are_disjoint(lm):
    calibration, evaluation = bt.held_out_contexts(small(), lm.tokenizer)
    rows = {tuple(r.tolist()) for r in calibration}
    assert len(calibration) > 20 and len(evaluation) > 20 and not rows & {tuple(r.tolist()) for r in evaluation}


def small_configs(lm, **changes):
    common = {**SMALL, "d_model": lm.d_model, "layer": 2, "checkpoint_minutes": 0, **changes}
    return {"batch": bt.Config(**common), "jump": bt.Config(**{**common, "activation": "jumprelu", "batch_size": 128}),
            "token": bt.Config(**{**common, "activation": "topk", "seed": 1})}


def test_saes_trained_together_are_those_trained_alone(lm, tmp_path):
    together = bt.train_together(small_configs(lm), lm, tmp_path / "together")
    alone = bt.train_together({"token": small_configs(lm)["token"]}, lm, tmp_path / "alone")
    a, b = bt.SAE.load(tmp_path / "together" / "token"), bt.SAE.load(tmp_path / "alone" / "token")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert together[2]["theta"] == alone[0]["theta"] and [r["name"] for r in together] == ["batch", "jump", "token"]


def test_an_interrupted_comparison_continues_to_the_same_end(lm, tmp_path, monkeypatch):
    seen = []

    def stop(cfg, tokens, stats):
        seen.append(tokens)
        if len(seen) == 9:
            raise KeyboardInterrupt

    def stop_evaluating(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bt.train_together(small_configs(lm, checkpoint_minutes=10), lm, tmp_path / "twice", on_step=stop)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bt, "evaluate_run", stop_evaluating)
        bt.train_together(small_configs(lm, checkpoint_minutes=10), lm, tmp_path / "twice", on_step=lambda cfg, tokens, stats: seen.append(tokens))
    twice = bt.train_together(small_configs(lm, checkpoint_minutes=10), lm, tmp_path / "twice", on_step=lambda cfg, tokens, stats: seen.append(tokens))
    once = bt.train_together(small_configs(lm, checkpoint_minutes=10), lm, tmp_path / "once")
    assert seen == sorted(set(seen)) and not (tmp_path / "twice" / "state.safetensors").exists()
    assert [r["theta"] for r in twice] == [r["theta"] for r in once]


def test_saes_that_cannot_share_activations_are_refused(lm, tmp_path):
    configs = small_configs(lm)
    with pytest.raises(bt.InputError, match="other cannot be trained beside the others: layer differs"):
        bt.train_together({**configs, "other": bt.Config(**{**SMALL, "d_model": lm.d_model, "layer": 1, "checkpoint_minutes": 0})}, lm, tmp_path)
    with pytest.raises(bt.InputError, match="100, does not divide 256"):
        bt.train_together({**configs, "other": bt.Config(**{**SMALL, "d_model": lm.d_model, "layer": 2, "checkpoint_minutes": 0, "batch_size": 100})}, lm, tmp_path)
    assert not list(tmp_path.iterdir())
