"""What is lost, believed or refused when a run is killed, a disk is full, or a file was changed."""

import dataclasses
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch

import batchtopk as bt
import cli
from conftest import SMALL, same_tensors

@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    texts = (f"def f{i}(x): return x * {i * i}" for i in range(3000))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return bt.RunConfig.preset("tiny", d_model=256, layer=2, **{
        **SMALL, "dataset": str(path), "tokens": 1300, "eval_tokens": 200, "checkpoint_tokens": 500,
        "context": 32, "n_latents": 64, "buffer_tokens": 600, "dead_tokens": 500})

@pytest.fixture(scope="module")
def finished(lm, cfg, tmp_path_factory):
    """A run that nothing interrupted, with two SAEs."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    cli.train_runs(two(cfg), lm, folder)
    return folder

def two(cfg):
    return {"a": cfg, "b": dataclasses.replace(cfg, activation="topk", seed=1)}

def assert_same(folder, other):
    for name in ("config.json", "metrics.jsonl", "sae.safetensors"):
        for run in ("a", "b"):
            assert (folder / run / name).read_bytes() == (other / run / name).read_bytes(), name
    left, expected = (sorted(p.name for p in runs.rglob("*")) for runs in (folder, other))
    assert left == expected, "no leftovers"

class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""

def kill_at(n, before, monkeypatch):
    """Die in the n-th write of a file from now on, before or after it takes effect; returns their names."""
    names, replace = [], os.replace

    def dying(source, target):
        names.append(Path(target).name.split("-")[0])  # "state" is followed by the tokens
        if len(names) == n and before:
            raise Killed
        replace(source, target)
        if len(names) == n:
            raise Killed
    monkeypatch.setattr(bt.os, "replace", dying)
    return names

def test_a_run_killed_at_any_write_is_resumed_to_the_same_end(lm, cfg, finished, tmp_path, monkeypatch):
    """Bugs here once: killed before its first saved state or after its last step, a run was stuck or lost."""
    files = "config.json", "metrics.jsonl", "state", "sae.safetensors", "evaluation.json"
    folder, kills, left, begun = tmp_path / "run", 0, {*itertools.product(files, (0, 1))}, False
    while left:  # from the last saved state to the end there are eight writes
        with monkeypatch.context() as patch, pytest.raises(Killed):
            names = kill_at(1 + kills // 2 % 8, kills % 2, patch)
            cli.train_runs(two(cfg), lm, folder, resume=begun)
        left.discard((names[-1], kills % 2))
        kills, begun = kills + 1, any(folder.glob("*/config.json"))
        assert kills < 60
    cli.train_runs(two(cfg), lm, folder, resume=True)
    assert_same(folder, finished)

def test_a_full_disk_costs_a_saved_state_but_not_the_run(lm, cfg, finished, tmp_path, monkeypatch):
    """And a file without which the run makes no sense ends it in an error that names it."""
    save, n = bt.save_tensors, [0]

    def full_at_times(path, *rest):
        n[0] += 1
        if n[0] in (1, 3):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        assert n[0] < 4 or cli.saved_states(tmp_path / "run") == [(1, 1024)], "the state before stays"
        save(path, *rest)
    monkeypatch.setattr(bt, "save_tensors", full_at_times)
    with pytest.warns(UserWarning, match="No space.*state-512-.*older than token 512"):
        cli.train_runs(two(cfg), lm, tmp_path / "run")
    assert_same(tmp_path / "run", finished)
    monkeypatch.undo()
    monkeypatch.setattr(bt.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full.*config.json"):
        cli.train_runs(two(cfg), lm, tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.*"))

HOLD = """
import pathlib, sys, batchtopk
print({"transformers", "datasets", "typer", "rich", "safetensors"} & set(sys.modules))
import cli
with cli.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""

def test_two_processes_cannot_write_one_folder_and_the_module_imports_little(lm, cfg, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=Path(bt.__file__).parent,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert [holder.stdout.readline() for _ in range(2)] == [b"set()\n", b"held\n"]
    with pytest.raises(bt.Unavailable, match="another process"):
        cli.train_runs({"": cfg}, lm, tmp_path)
    holder.kill()
    holder.wait()
    with cli.locked(tmp_path):
        pass  # a lock dies with its process

@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_a_resumed_trainer_is_the_trainer(planted, tmp_path, activation):
    """Through a file, before the first step, between initialize_ and the first step, and in the middle."""
    cfg = bt.Config(d_model=48, n_latents=40, k=3, batch_size=16, dead_tokens=32, activation=activation,
                    tokens=320, device="cpu")  # JumpReLU begins at 96
    for begin in (lambda t: None, lambda t: t.initialize_(planted.batch(16, 0)),
                  lambda t: [t.step(planted.batch(16, i)) for i in range(11)]):
        straight, first, second = bt.Trainer(cfg), bt.Trainer(cfg), bt.Trainer(cfg)
        begin(straight), begin(first)
        cli.save_state(tmp_path, {"": first}, {"": 7.0}, (1, 2, 3, 4), {})
        seconds = {"": 0.0}
        assert cli.load_state_(tmp_path, {"": second}, seconds) == (first.tokens_seen, (1, 2, 3, 4), {})
        assert seconds == {"": 7.0}
        for i in range(11, 20):
            stats = second.step(planted.batch(16, i))
            assert stats == straight.step(planted.batch(16, i))
        assert same_tensors(bt.trainer_state(second), bt.trainer_state(straight))
    assert stats.dead
    del second.adam["b_enc"]
    cli.save_state(tmp_path, {"": second}, {}, (1, 2, 3, 4), {})
    for changes, said in (({}, "another version"), ({"n_latents": 41}, "does not belong to its config")):
        with pytest.raises(bt.InputError, match=said):
            cli.load_state_(tmp_path, {"": bt.Trainer(dataclasses.replace(cfg, **changes))}, {})

BEFORE_FOUND = """{'a': RunConfig(d_model=256, n_latents=4096, k=32, activation='batchtopk', topk_start=0.6,
normalize='scale', init='data', tokens=1000000, batch_size=512, lr=0.0, beta1=0.5, beta2=0.9, warmup=0.02,
decay=0.6, aux_k=512, aux_coef=0.03125, dead_tokens=20480, step='sparse', encoder_dtype='auto',
eval_tokens=65536, seed=0, device='auto', model='tiny-gpt2', layer=1, site='resid_pre', module='',
model_dtype='auto', dataset='stdlib', dataset_config='', text_column='text', context=128, prepend_bos=False,
skip_special=True, max_norm=4, norm_limit=1222.5, model_batch=32, buffer_tokens=131072, passes=1,
ce_contexts=128, checkpoint_minutes=10, checkpoint_tokens=0)}"""

def test_states_of_before_what_a_run_finds_stood_apart_go_on():
    """As commit 0748c89 wrote it: a state whose text is another is refused, and the run is lost."""
    cfg = bt.RunConfig.preset("tiny", d_model=256, prepend_bos=True, buffer_tokens=131_072, device="cpu")
    sae = types.SimpleNamespace(config=cfg, found=bt.Found(1222.5, False, 32))
    text = cli.state_text({"a": types.SimpleNamespace(cfg=cfg, sae=sae)})
    assert text == BEFORE_FOUND.replace("\n", " ")

def test_a_trainer_has_nothing_that_its_state_lacks():
    """Bug waiting to happen: what is added to a trainer and not to the list of what is saved is lost."""
    trainer = bt.Trainer(bt.Config(d_model=4, n_latents=8, k=1, device="cpu"))
    known = {*bt.TRAINER_NUMBERS, "n_fired", "sae", "adam"} | {"cfg", "device", "cache"}  # made again
    assert vars(trainer).keys() == known and set(bt.TRAINER_NUMBERS) < bt.trainer_state(trainer).keys()

# Files that were changed

def edited(value, random_):
    """A JSON value with one thing in it replaced by something of another type or size."""
    if isinstance(value, dict) and value and random_.random() < 0.9:
        key = random_.choice(list(value))
        change = random_.choice(["edit", "drop", "rename"])
        rest = {k: v for k, v in value.items() if k != key}
        new = {key + "x" * (change == "rename"): edited(value[key], random_)}
        return rest if change == "drop" else {**rest, **new}
    return random_.choice([None, True, -1, 0, 10**12, 1e308, float("nan"), "", "x" * 1000, [], {}, [[]] * 3,
                           "32"])

def mutants(path, n, seed):
    """Contents of a file, changed in one way each."""
    whole, random_ = path.read_bytes(), random.Random(seed)
    for i in range(n):
        kind = i % 4
        if kind == 0:  # a flipped bit
            data = bytearray(whole)
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        elif kind == 1:  # a part, or nothing
            data = whole[: random_.randrange(len(whole))]
        elif kind == 2:  # other bytes
            data = bytes(random_.randrange(256) for _ in range(random_.choice([0, 1, 8, 100])))
        elif path.suffix == ".safetensors":
            data = edited_tensors(path, random_)
        else:
            data = json.dumps(edited(json.loads(whole), random_)).encode()
        yield bytes(data)
    yield b"[" * 100_000  # too deep for a parser

def edited_tensors(path, random_):
    """The file with a tensor of another name, shape, type or value, or with other metadata."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    name = random_.choice(list(tensors))
    t = tensors.pop(name)
    change = random_.choice(["drop", "rename", "shape", "type", "value", "metadata"])
    if change == "metadata":
        tensors[name], metadata = t, random_.choice([None, {}, {"sha256": "0" * 64}])
    elif change != "drop":
        whole = not t.is_floating_point()
        new = {"shape": t.reshape(1, *t.shape), "type": t.float() if whole else t.half(),
               "value": torch.full_like(t, 7 if whole or t.isnan().all() else float("nan"))}
        tensors[name + "x" * (change == "rename")] = new.get(change, t)
    return safetensors.torch.save(tensors, metadata)

@pytest.mark.parametrize("name", ["config.json", "sae.safetensors"])
def test_a_changed_file_of_a_run_is_refused_in_a_line_that_names_it(finished, tmp_path, name):
    n, expected = int(os.environ.get("MUTANTS", 600)), bt.SAE.load(finished / "a").state_dict()
    config = bt.RunConfig.load(finished / "a")
    for file in ("config.json", "sae.safetensors"):
        (tmp_path / file).write_bytes((finished / "a" / file).read_bytes())
    refused = 0
    for data in mutants(finished / "a" / name, n, seed=1):
        (tmp_path / name).write_bytes(data)
        try:
            sae = bt.SAE.load(tmp_path)
            assert sae.config == config and same_tensors(sae.state_dict(), expected), data[:300]
        except (bt.InputError, bt.Unavailable) as error:
            refused += 1
            assert str(tmp_path) in str(error), error
    assert refused > 0.95 * n

def test_a_changed_state_is_refused_and_changed_metrics_are_written_again(lm, cfg, finished, tmp_path):
    assert cli.train_runs({"": cfg}, lm, tmp_path, on_step=lambda tokens, stats: tokens > 1200) is None
    [state], own = tmp_path.glob("state-*"), bt.RunConfig.load(tmp_path)
    sae = types.SimpleNamespace(config=own, found=bt.load_config(tmp_path)[1])
    text = cli.state_text({"": types.SimpleNamespace(cfg=own, sae=sae)})
    expected, n = bt.load_tensors(state, text), int(os.environ.get("MUTANTS", 600))
    whole, refused = state.read_bytes(), 0
    for data in list(mutants(state, n, seed=2)):
        state.write_bytes(data)
        try:
            assert same_tensors(bt.load_tensors(state, text), expected)
        except bt.InputError as error:
            refused += state.name in str(error)
    assert refused > 0.95 * n
    state.write_bytes(whole)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff[")
    cli.train_runs({"": cfg}, lm, tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "a" / "metrics.jsonl").read_bytes()

@pytest.mark.slow
def test_a_process_killed_ten_times_at_random_moments_ends_as_one_that_was_not(cfg, tmp_path):
    """SIGKILL, from the start of training on; then `--resume`, until a run comes to its end."""
    cli = Path(bt.__file__).parent / "cli.py"
    kinds = {f.name: f for f in dataclasses.fields(bt.RunConfig)}
    cfg = dataclasses.replace(cfg, tokens=400_000, checkpoint_tokens=20_000, context=128, buffer_tokens=4096)
    given = {name: value for name, value in dataclasses.asdict(cfg).items()
             if name != "d_model" and value not in (kinds[name].default, "")}
    options = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]

    def run(*arguments):
        return subprocess.Popen([sys.executable, str(cli), "train", *arguments], stderr=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True)
    whole, folder, random_, kills = tmp_path / "whole", tmp_path / "run", random.Random(0), 0
    process = run("--out", str(tmp_path), "--name", "whole", *options)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    process = run("--out", str(tmp_path), "--name", "run", *options)
    while kills < 10:
        process.stderr.readline()  # training has begun
        time.sleep(random_.random() * 1.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        process = run("--resume", str(folder))
    assert process.wait(timeout=300) == 0, process.stderr.read()
    for name in ("sae.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
