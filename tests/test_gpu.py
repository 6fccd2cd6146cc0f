"""What only a GPU can show of recorded steps, beside the tests on CUDA in the other files. .ci/gpu runs them."""

import gc
import time
import warnings

import pytest
import torch

import batchtopk as bt
from conftest import Planted, same_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def config(**changes):
    return bt.Config(**dict(d_model=64, n_latents=512, k=8, batch_size=256, tokens=10**6, device="cuda",
                            topk_start=0.003) | changes)  # 12 steps of TopK

def steps(trainer, n):
    """Statistics of n steps. The batches' sizes make several kinds of steps."""
    planted = Planted(trainer.cfg.d_model, 256)
    return [trainer.step(planted.batch(200 if i % 4 == 3 else 256, i % 3).cuda()) for i in range(n)]

def expected(cfg, n, monkeypatch):
    """The same without recordings: statistics and state."""
    with monkeypatch.context() as patch:
        patch.setattr(bt, "find_recording", lambda *arguments: None)
        trainer = bt.Trainer(cfg)
        return steps(trainer, n), bt.trainer_state(trainer)

def recorded(trainer):
    return sum(step is not None for step in bt.recordings_of(trainer).values())

@pytest.fixture(autouse=True)
def no_warnings(monkeypatch):
    """Kernels and recordings that do not prove themselves warn, and here that is an error."""
    monkeypatch.setattr(bt, "unrecorded", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not work on")
        yield

def test_kernels_and_recordings_prove_themselves_within_a_second(monkeypatch):
    """Of the size at which the README's numbers were measured; Triton's compilation is done before."""
    shape = dict(d_model=768, n_latents=24576, batch_size=4096, k=32)
    x = [Planted(768, 4096, 40).batch(4096, i).cuda() for i in range(2)]
    spent = {}

    def timed(name):
        function = getattr(bt, name)

        def call(*arguments, **options):
            torch.cuda.synchronize()
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                torch.cuda.synchronize()
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        monkeypatch.setattr(bt, name, call)
    bt.has_kernels(x[0])  # compiles
    monkeypatch.setattr(bt, "kernels_work", {})
    timed("try_kernels")
    timed("record")
    trainer = bt.Trainer(config(**shape, topk_start=0.02))  # 5 steps of TopK
    for i in range(12):
        trainer.step(x[i % 2])
    assert recorded(trainer) >= 2 and len(spent) == 2 and sum(spent.values()) < 1, spent

def test_two_trainers_in_turn_of_which_one_is_deleted(monkeypatch):
    """Their recordings share neither memory nor what cuBLAS holds."""
    first, second, planted = bt.Trainer(config()), bt.Trainer(config(seed=1)), Planted(64, 256)
    for i in range(16):
        for trainer in (first, second):
            trainer.step(planted.batch(256, i % 3).cuda())
    assert recorded(first) == recorded(second) == 2
    del first, trainer
    gc.collect()
    torch.cuda.empty_cache()
    filling = torch.full((1 << 26,), float("nan"), device="cuda")  # where the other's memory was
    stats = [second.step(planted.batch(256, i % 3).cuda()) for i in range(16)]
    del filling
    with monkeypatch.context() as patch:
        patch.setattr(bt, "find_recording", lambda *arguments: None)
        alone = bt.Trainer(config(seed=1))
        others = [alone.step(planted.batch(256, i % 3).cuda()) for _ in range(2) for i in range(16)]
    assert stats == others[16:] and same_tensors(bt.trainer_state(second), bt.trainer_state(alone))

def test_rows_wider_than_one_program(monkeypatch):
    """They take the operators, and are not recorded."""
    found = {}
    for widest in (4096, 32):
        monkeypatch.setattr(bt, "WIDEST", widest)
        trainer = bt.Trainer(config())
        found[widest] = [stats.mse for stats in steps(trainer, 16)]
        assert bool(recorded(trainer)) == (widest == 4096)
    assert found[32][:4] == pytest.approx(found[4096][:4], rel=1e-3)
    assert found[32] == pytest.approx(found[4096], rel=0.1), "later rounding chooses other entries"

def test_kinds_beyond_the_most_are_not_recorded(monkeypatch):
    monkeypatch.setattr(bt, "MOST_KINDS", 1)
    trainer = bt.Trainer(config())
    stats = steps(trainer, 20)
    others, state = expected(config(), 20, monkeypatch)
    assert recorded(trainer) == 1
    assert stats == others and same_tensors(bt.trainer_state(trainer), state)

@pytest.mark.parametrize("where", ["in the first graph", "in the second graph", "in the trial"])
def test_a_recording_without_memory_is_told_once_and_training_goes_on(where, monkeypatch):
    name = {"in the first graph": "step_gradients", "in the second graph": "apply_",
            "in the trial": "check_same"}[where]
    function = getattr(bt, name)

    def crowded(*arguments):
        if where == "in the trial" or torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 45, dtype=torch.uint8, device="cuda")  # more than any GPU has
        return function(*arguments)
    trainer = bt.Trainer(config())
    bt.has_kernels(trainer.sae.W_enc)  # whose trial is not meant
    monkeypatch.setattr(bt, name, crowded)
    with pytest.warns(UserWarning, match="CUDA graphs do not work on .*memory.*: steps take longer") as said:
        stats = steps(trainer, 16)
    monkeypatch.setattr(bt, name, function)
    assert len(said) == 1 and not recorded(trainer)
    others, state = expected(config(), 16, monkeypatch)
    assert stats == others and same_tensors(bt.trainer_state(trainer), state)

@pytest.mark.parametrize("changes", [dict(topk_start=0), dict(topk_start=1.0), dict(activation="topk"),
                                     dict(activation="jumprelu", tokens=20 * 4096, topk_start=0)], ids=str)
def test_a_step_of_any_kind_waits_for_its_numbers(changes):
    """At the first shape of tests/bench.py. CUDA itself counts: an operation that waits raises an error."""
    trainer = bt.Trainer(config(d_model=768, n_latents=24576, batch_size=4096, k=32, **changes))
    x = Planted(768, 4096, 40).batch(4096, 0).cuda()
    for _ in range(10):
        trainer.step(x)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            trainer.step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in waits if "synchroniz" in str(w.message)]
    assert len(waits) == (4 if changes.get("activation") == "jumprelu" else 1), [str(w.message) for w in waits]
