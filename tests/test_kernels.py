"""The kernels for GPUs, interpreted on a CPU: each against its operators and a float64 oracle, and the step.

    pip install --no-deps triton==3.9.0 && TRITON_INTERPRET=1 pytest tests/test_kernels.py

Triton reads the variable when it is imported, so this is a process of its own. Without it all are skipped.
"""

import collections
import contextlib
import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import batchtopk as bt
import test_method
from conftest import Planted, same_tensors
from test_method import ACTIVATIONS, CASES, RULES, config, randn, random_sae

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1"),
              pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")]  # of NumPy, for NaN

@contextlib.contextmanager
def operators():
    """PyTorch's operators instead of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bt, "kernels_run", lambda device: False)
        yield

def entries(n_latents, n_rows, share, seed=0):
    """Latent and row of a random share of all entries, in order, and normal numbers for them."""
    chosen = torch.rand(n_latents, n_rows, generator=torch.Generator().manual_seed(seed)) < share
    latent, row = chosen.nonzero().T.contiguous()
    return latent, row, randn(len(latent), seed=seed + 1)

@pytest.fixture(autouse=True)
def used():
    """Else this file would compare the operators with themselves."""
    assert bt.has_kernels(torch.ones(1))

# Operation 1

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_latents, n_rows", [(1, 1), (1, 70), (13, 1), (7, 1029), (5, 2051)])
@pytest.mark.parametrize("threshold", [0.3, -math.inf, math.inf, "each latent's own"])
def test_collect_is_nonzero(n_latents, n_rows, dtype, threshold):
    z = randn(n_latents, n_rows).to(dtype)
    z.view(-1)[:: max(3, z.numel() // 5)] = math.nan
    z.view(-1)[1::97], z.view(-1)[2::97] = math.inf, -math.inf
    least = randn(n_latents, seed=1) if isinstance(threshold, str) else torch.full((n_latents,), threshold)
    expected = (~(z.double() <= least[:, None])).nonzero().T
    assert torch.equal(torch.stack([*bt.collect(z, least)]), expected)
    with operators():
        flat = bt.flat_above(z, least)
    assert torch.equal(flat, expected[0] * n_rows + expected[1])
    assert torch.equal(bt.flat_above(z, least), flat)

def test_collect_continues_where_it_stopped_and_stops_where_there_is_no_room():
    z, found = randn(9, 33), torch.zeros(1, dtype=torch.int64)
    expected = (z > 0.5).nonzero().T
    for capacity in (10**3, len(expected[0]), 17, 1):
        place, found = torch.full((2, capacity + 5), -7), torch.zeros(1, dtype=torch.int64)
        for first in range(0, 9, 4):
            part = z[first : first + 4]
            found = bt.collect(part, torch.full((9,), 0.5)[: len(part)], place[:, :capacity], found, first)
        kept = min(capacity, len(expected[0]))
        assert found.item() == len(expected[0]), "all are counted, also those without a place"
        assert torch.equal(place[:, :kept], expected[:, :kept]) and (place[:, kept:] == -7).all()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latents", [60, 30])
def test_each_rows_largest_are_found_whatever_the_sizes_of_rows(latents, dtype, monkeypatch):
    """In rows whose thresholds differ by a factor of a hundred, from any hint of that size."""
    monkeypatch.setitem(bt.CHUNK_ENTRIES, "cpu", 16 * latents)
    sae = random_sae(config(n_latents=60))
    sae.b_enc.data.mul_(0.01)
    centred = (randn(16, 12, seed=3) * torch.logspace(-1, 1, 16)[:, None]).contiguous()
    for n in (4, 8):
        with operators():
            exact = bt.find_entries(sae, centred, 0.0, n, per_row=True)
        dense = bt.row_topk((centred @ sae.W_enc.T + sae.b_enc).detach(), n).T
        assert torch.equal(torch.stack(exact[:2]), dense.nonzero().T) and len(exact[0]) == 16 * n
        torch.testing.assert_close(exact[2], dense[dense > 0], atol=1e-5, rtol=1e-5)
        for hint in (4.0, 16.0):
            (latent, row, value), right, *_ = bt.try_largest(sae, centred, hint, n, dtype, per_row=True)
            assert right == 1 and torch.equal(latent, exact[0]) and torch.equal(row, exact[1])
            torch.testing.assert_close(value, exact[2], atol=1e-5, rtol=1e-5)
        for hint in (1e4, 1e-4):  # too high for the small rows, so low that the last level holds too many
            assert not bt.try_largest(sae, centred, hint, n, dtype, per_row=True).right

def test_a_rows_level_is_its_nth_largest_rounded_down():
    z, b = 4 * randn(50, 300).bfloat16(), 0.1 * randn(50, seed=1)
    counts, lowest = torch.zeros(bt.LEVELS, 300, dtype=torch.int32), torch.tensor([2.0**-8])
    for n in (1, 5, 12):
        counts.zero_()
        for part in (slice(0, 20), slice(20, 50)):  # the second adds to what the first found
            level = bt.raise_row_level_(counts, z[part], b[part], torch.zeros(300), lowest, n)
            exact = (z[: part.stop].float() + b[: part.stop, None]).topk(n, dim=0).values[-1]
            exact = exact.clamp_min(lowest)
            assert ((level <= exact) & (level >= 0.84 * exact)).all()
    level = bt.raise_row_level_(counts.zero_(), z, b, torch.zeros(300), lowest, 51)
    assert (level == 0.999 * lowest).all(), "of too few the lowest"

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_try_largest_is_the_exact_search_or_says_that_it_failed(dtype, monkeypatch):
    monkeypatch.setitem(bt.CHUNK_ENTRIES, "cpu", 64)  # several chunks
    failed = 0
    for seed, n_rows, n in ((0, 16, 24), (1, 13, 5), (2, 1, 3)):
        sae = random_sae(config(n_latents=23), seed)
        centred = (randn(n_rows, 12, seed=seed + 100) - sae.b_dec).detach()
        with operators():
            exact = bt.find_entries(sae, centred, 0.0, n)
        for factor in (0.2, 0.9, 0.9999, 1.0, 1.5, 1e6):
            hint = factor * float(exact[2].min())
            (latent, row, value), right, *_ = bt.try_largest(sae, centred, hint, n, dtype)
            if right:
                assert factor < 1 and torch.equal(latent, exact[0]) and torch.equal(row, exact[1])
                torch.testing.assert_close(value, exact[2], atol=1e-5, rtol=1e-5)
            else:
                assert factor >= 1 or factor == 0.2, "just below the threshold it must succeed"
                failed += factor == 0.2
    assert failed, "one of the cases should have found more than it can hold"

@pytest.mark.parametrize("size", [1000, 3000])
def test_try_largest_misses_no_entry_however_large_a_part_of_x_the_encoder_ignores(size, monkeypatch):
    """As in test_method: the part that all x share is taken out of the product in bfloat16."""
    sae, x, sure, threshold = test_method.ignored_direction(size, False, 32, 64, 512)
    monkeypatch.setitem(bt.CHUNK_ENTRIES, "cpu", 32 * 256)
    (latent, row, _), right, *_ = bt.try_largest(sae, x, 0.95 * threshold, 32 * 32, torch.bfloat16)
    found = torch.zeros_like(sure)
    found[latent, row] = True
    assert right and found[sure].all(), f"{int((sure & ~found).sum())} of {int(sure.sum())}"

def test_of_equal_entries_as_many_are_kept_as_fit():
    sae, x = random_sae(config(n_latents=8)), randn(1, 12, seed=3).expand(5, 12).contiguous()
    with torch.no_grad():
        sae.W_enc.copy_(x[:1].expand(8, 12))
    (latent, row, value), right, *_ = bt.try_largest(sae, x, 0.01, 11, torch.float32)
    assert len({*zip(latent.tolist(), row.tolist())}) == 11 and value.min() > 0.01 and right == 1

# Operations 2 and 3

@pytest.mark.parametrize("d_model", [1, 12, 129, 2304])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_dots_are_those_of_the_operator_and_of_float64(d_model, share):
    a, b, (i, j, _) = randn(7, d_model), randn(5, d_model, seed=1), entries(7, 5, share)
    exact = (a.double()[i] * b.double()[j]).sum(1)
    with operators():
        operator = bt.dots(a, b, i, j)
    found = bt.dots(a, b, i, j)
    for other in (exact.float(), operator):
        torch.testing.assert_close(found, other, atol=1e-5 * d_model**0.5, rtol=1e-5)
    few = bt.launch_dots(a.bfloat16(), b, i, j, torch.tensor([len(i) // 2]))
    half = (a.bfloat16().double()[i] * b.double()[j]).sum(1).float()
    torch.testing.assert_close(few[: len(i) // 2], half[: len(i) // 2], atol=1e-5 * d_model**0.5, rtol=1e-5)
    assert (few[len(i) // 2 :] == -math.inf).all(), "what was not found is never among the largest"

@pytest.mark.parametrize("d_model", [1, 12, 1100, 2304])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_sums_are_those_of_the_operator_and_of_float64(d_model, share):
    """With empty groups, and one that has everything."""
    group, which, weight = entries(6, 11, share)
    group = group.where(group != 3, 4)
    rows, starts = randn(11, d_model, seed=2), bt.group_starts(group, 7)
    exact = torch.zeros(7, d_model, dtype=torch.float64)
    exact.index_add_(0, group, weight.double()[:, None] * rows.double()[which])
    found = bt.sum_rows(rows, which, weight, starts)
    torch.testing.assert_close(found, exact.float(), atol=1e-5, rtol=1e-5)
    with operators():
        torch.testing.assert_close(found, bt.sum_rows(rows, which, weight, starts), atol=1e-5, rtol=1e-5)

# Operation 4 and the whole step

def count_calls(monkeypatch, name):
    """A list that grows with each call of a function of the module."""
    function, calls = getattr(bt, name), []
    monkeypatch.setattr(bt, name, lambda *arguments: (calls.append(1), function(*arguments))[1])
    return calls

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_papers(case, rule, monkeypatch):
    """As in test_method, from a hint just below the threshold, if there is one."""
    sae = random_sae(config())
    x = CASES[case](sae, randn(16, 12, seed=1))
    least = bt.find_entries(sae, (x - sae.b_dec).detach(), 0.0, 3 * len(x))[2].min()

    class Started(bt.Trainer):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.last_threshold = float(least) / bt.HINT * 0.999
    for name, value in (("Trainer", Started), ("RUN", 4)):
        monkeypatch.setattr(bt, name, value)
    attempted, searched = (count_calls(monkeypatch, name) for name in ("try_largest", "largest_above"))
    test_method.test_loss_and_gradients_are_the_papers("sparse", case, 17, rule, monkeypatch)
    if rule == "batchtopk":
        assert attempted and bool(searched) == (case == "fewer positives than N"), "one attempt is enough"

@pytest.mark.parametrize("changes", [
    dict(encoder_dtype="bfloat16"), dict(beta1=0.0, k=0.3), dict(n_latents=1, k=1), dict(batch_size=1, k=8),
    dict(d_model=33, n_latents=37, batch_size=19), dict(normalize="token"), dict(aux_k=0)], ids=str)
def test_a_step_of_kernels_is_one_of_operators(changes, monkeypatch):
    """Moments, counts and counters after each of four steps; with dead latents, of which one fires always."""
    monkeypatch.setattr(bt, "RUN", 4)
    cfg = config(**dict(d_model=24, batch_size=24, n_latents=30, tokens=10**5, aux_k=4) | changes)
    theirs, planted = bt.Trainer(cfg), Planted(cfg.d_model, 96)
    theirs.sae.load_state_dict(random_sae(cfg).state_dict())  # else gradients that are 0 but for rounding
    theirs.sae.b_enc.data[0] = 3.0
    attempted, aux = count_calls(monkeypatch, "try_largest"), 0
    for i in range(4):
        if i == 2:
            theirs.sae.tokens_since_fired[: 1 + cfg.n_latents // 4] = 10**6
        ours, x = copy.deepcopy(theirs), planted.batch(cfg.batch_size, i)
        with operators():
            a = theirs.step(x)
        b, aux = ours.step(x), max(aux, a.aux)
        assert b == pytest.approx(a, rel=1e-4, nan_ok=True)
        expected, found = bt.trainer_state(theirs), bt.trainer_state(ours)
        for name in expected:
            if name.partition(".")[2] == "count" or name in ("tokens_since_fired", "n_fired"):
                assert torch.equal(found[name], expected[name]), name
            elif "." in name:
                size = float(expected[name].abs().max())
                torch.testing.assert_close(found[name], expected[name], atol=1e-6 + 1e-5 * size, rtol=1e-4)
        for name, p in theirs.sae.named_parameters():  # Adam's first step is its gradient's sign
            off = (p - getattr(ours.sae, name)).abs() > 1e-5
            assert off.float().mean() < 0.01, f"{name} in step {i}: {int(off.sum())} entries differ"
    assert len(attempted) == 3 and bool(aux) == bool(cfg.aux_k)

@pytest.mark.parametrize("d_model", [12, 2304])
def test_a_frequent_latent_is_summed_in_runs(d_model, monkeypatch):
    """The parts of a group before, in and after its whole runs, wherever it starts."""
    monkeypatch.setattr(bt, "RUN", 8)
    launched, launch = collections.Counter(), bt.launch
    monkeypatch.setattr(bt, "launch", lambda kernel, *arguments, **options: (
        launched.update([kernel]), launch(kernel, *arguments, **options))[1])
    for seed, sizes in enumerate([(3, 40, 0, 2), (0, 8, 8, 1), (5, 2, 30, 30), (7, 9, 0, 0), (1, 1, 1, 4)]):
        cfg = config(n_latents=4, beta1=0.0, d_model=d_model)
        latent = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
        row, value = torch.arange(len(latent)) % 40, randn(len(latent), seed=seed)
        d_value = randn(len(latent))
        g, centred, states = randn(40, d_model, seed=1), randn(40, d_model, seed=2), []
        nothing = bt.AuxGradient(latent[:0], g[:0], g[:0, 0], g[:0])
        for context in (operators, contextlib.nullcontext):
            trainer = bt.Trainer(cfg)
            trainer.x_std, trainer.variance = 1.0, 1.0
            starts = bt.group_starts(latent, 4)
            kept = bt.StepEntries(bt.Entries(latent, row, value))
            new = bt.Gradients(kept, centred, g, d_value, randn(4, seed=3), None, nothing, starts, None, None)
            with context():
                bt.update_latents_(trainer, new, torch.tensor(1e-3))
            states.append(bt.trainer_state(trainer))
        for name, t in states[0].items():
            torch.testing.assert_close(states[1][name], t, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert launched[bt.runs_kernel] >= 4

def test_what_is_not_finite_is_an_error_before_anything_changes():
    trainer, x = bt.Trainer(config(dead_tokens=32)), randn(16, 12)
    for i in range(3):
        trainer.step(randn(16, 12, seed=i))
    for name, bad in [("x", math.nan), ("x", math.inf), ("W_enc", math.nan), ("b_enc", math.inf),
                      ("W_dec", math.nan)]:
        broken, wrong = copy.deepcopy(trainer), x.clone()
        (wrong if name == "x" else getattr(broken.sae, name).data).view(-1)[5] = bad
        before = copy.deepcopy(bt.trainer_state(broken))
        if name == "W_dec":
            broken.sae.b_enc.data[0] = 9.0  # it fires
            before = copy.deepcopy(bt.trainer_state(broken))
        with pytest.raises(bt.InputError, match="not finite"):
            broken.step(wrong)
        assert same_tensors(before, bt.trainer_state(broken)), name

def test_the_same_steps_give_the_same_bits():
    states = []
    for _ in range(2):
        trainer = bt.Trainer(config(dead_tokens=32, encoder_dtype="bfloat16"))
        for i in range(4):
            trainer.step(randn(16, 12, seed=i))
        states.append(bt.trainer_state(trainer))
    assert same_tensors(*states)

def test_torchs_default_dtype_changes_nothing():
    """Its kernels were given tensors of another dtype than they read."""
    states, batches = [], [randn(16, 12, seed=i) for i in range(4)]
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            trainer = bt.Trainer(config(dead_tokens=32))
            states.append(bt.trainer_state(trainer) | {"stats": torch.tensor([*map(trainer.step, batches)])})
        finally:
            torch.set_default_dtype(torch.float32)
    assert states[0].keys() == states[1].keys()
    for name, t in states[0].items():
        torch.testing.assert_close(states[1][name], t, check_dtype=name != "stats", equal_nan=True)

def test_a_batch_may_lie_in_memory_as_it_likes():
    trainer, x = bt.Trainer(config()), randn(16, 12, seed=3)
    for i in range(2):
        trainer.step(randn(16, 12, seed=i))
    turned, sae = x.T.contiguous().T, trainer.sae
    for found, other in zip(*(sae.encode_sparse(t) for t in (x, turned))):
        torch.testing.assert_close(found, other)
    assert copy.deepcopy(trainer).step(turned) == pytest.approx(trainer.step(x), rel=1e-4)
    assert not turned.is_contiguous()

def test_rows_too_wide_for_one_program_take_the_operators(monkeypatch):
    monkeypatch.setattr(bt, "WIDEST", 8)
    monkeypatch.setattr(bt, "launch_update_latents_", lambda *_: pytest.fail("12 are wider than 8"))
    trainer = bt.Trainer(config())
    for i in range(2):
        assert trainer.step(randn(16, 12, seed=i)).l0 == 3

@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encoding_calibration_and_evaluation_are_those_of_operators(activation):
    sae, x = random_sae(config(activation=activation)), randn(40, 12, seed=1)
    sae.theta.fill_(1.5)

    def results():
        twin = copy.deepcopy(sae)
        (row, latent), value = twin.encode_sparse(x)
        theta, metrics = bt.calibrate(twin, [x]), bt.evaluate(twin, [x])
        return row, latent, value, theta, metrics["batch"]["fvu"], metrics["theta"]["l0_histogram"]
    with operators():
        expected = results()
    for found, other in zip(results(), expected):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(other), atol=1e-5, rtol=1e-5)

# What a step asks of the host

class Host(TorchDispatchMode):
    """Counts what a step launches (kernels, and operators that are no views) and how often it waits."""
    WAITS = "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"

    def __init__(self, on_host=torch.empty(0)):  # a tensor that lies on the host: to read it is no wait
        super().__init__()
        self.on_host = on_host.untyped_storage().data_ptr()

    def __enter__(self):
        self.launched, self.waited, self.patch = collections.Counter(), [], pytest.MonkeyPatch()
        launch, inside = bt.launch, []

        def counted_launch(kernel, *arguments, **options):  # the interpreter itself uses operators
            self.launched[kernel.fn.__name__] += 1
            inside.append(kernel)
            with torch.utils._python_dispatch._disable_current_modes():
                result = launch(kernel, *arguments, **options)
            inside.pop()
            return result

        def waiting(name, method):
            def wait(t, *arguments):
                on_host = t.untyped_storage().data_ptr() == self.on_host
                self.waited.extend([] if inside or on_host else [name])
                return method(t, *arguments)
            return wait
        self.patch.setattr(bt, "launch", counted_launch)
        for name in self.WAITS:
            self.patch.setattr(torch.Tensor, name, waiting(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.launched.update([] if is_view else [str(func)])
        if func is torch.ops.aten.index.Tensor:
            self.waited += ["mask" for t in args[1] if t is not None and t.dtype == torch.bool]
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize("n_dead, aux_k, most, changes", [
    (0, 512, 82, {}), (5, 512, 105, {}), (5, 3, 111, {}), (0, 512, 135, dict(topk_start=1.0)),
    (0, 512, 135, dict(activation="topk"))], ids=str)
def test_a_step_launches_few_kernels_and_waits_once(n_dead, aux_k, most, changes, monkeypatch):
    """And what a GPU records as two CUDA graphs is nearly all, and does not wait."""
    trainer = bt.Trainer(config(n_latents=24, batch_size=48, dead_tokens=10**6, aux_k=aux_k,
                                encoder_dtype="bfloat16", **changes))
    trainer.sae.b_enc.data[:n_dead] = -100.0
    for i in range(3):
        trainer.sae.tokens_since_fired[:n_dead] = 10**7 if i == 1 else 10**7 + 48 * i
        trainer.step(randn(48, 12, seed=i))
    if n_dead:  # the step before this one must have been left alone
        trainer.step(randn(48, 12, seed=8))
    x, recorded = randn(48, 12, seed=9), []
    with Host() as host:
        def as_recorded(name):
            function = getattr(bt, name)

            def call(*arguments):  # numbers that change from step to step are tensors there
                arguments = [torch.tensor(a) if isinstance(a, float) else a for a in arguments]
                before, waited = host.launched.total(), len(host.waited)
                result = function(*arguments)
                recorded.append(host.launched.total() - before)
                assert len(host.waited) == waited, "a CUDA graph cannot wait"
                return result
            monkeypatch.setattr(bt, name, call)
        as_recorded("step_gradients")
        as_recorded("apply_")
        stats = trainer.step(x)
    assert stats.dead == n_dead and bool(stats.aux) == bool(n_dead)
    assert host.waited == ["tolist"] and len(recorded) == 2
    assert sum(recorded) <= most, host.launched.most_common()
    assert host.launched.total() - sum(recorded) <= 8, host.launched.most_common()
    kernels = {"count_kernel", "collect_kernel", "dots_kernel", "sums_kernel", "update_kernel"}
    assert kernels <= {*host.launched}

def test_jumprelus_step_waits_for_the_sizes_of_what_is_found_alone(monkeypatch):
    """Bug here once: its penalty lay on the GPU, and each step fetched it; four parts, each with four waits."""
    monkeypatch.setattr(bt, "JUMP_START", 48 / 4096)
    monkeypatch.setattr(bt, "JUMP_AFTER", 0.0)
    trainer = bt.Trainer(config(n_latents=24, batch_size=48, activation="jumprelu", encoder_dtype="bfloat16"))
    for i in range(2):
        trainer.step(randn(48, 12, seed=i))
    penalty, x = trainer.sae.penalty, randn(48, 12, seed=9)
    with Host(on_host=penalty) as host:
        trainer.step(x)
    assert penalty[0] > 0 and torch.equal(trainer.sae.penalty, penalty), "it learns its thresholds"
    # how many exceed the thresholds in bfloat16, which of them do in float32, which are active; the numbers
    assert host.waited == ["__int__", "nonzero", "nonzero", "tolist"]
    assert host.launched.total() <= 140, host.launched.most_common()
    for sae in (copy.deepcopy(trainer.sae).to("meta"), copy.deepcopy(trainer.sae).bfloat16()):
        assert torch.equal(sae.penalty, penalty) and sae.penalty.dtype == torch.float64, "it stays on the host"

# Kernels and recordings prove themselves

@pytest.mark.parametrize("name", ["levels", "collect", "dots", "sums", "runs", "update", "vector"])
def test_kernels_that_give_wrong_results_are_not_used(name, monkeypatch):
    launch = bt.launch

    def faulty(kernel, grid, out, *arguments, **options):
        launch(kernel, grid, out, *arguments, **options)
        return out.zero_() if kernel.fn.__name__ == f"{name}_kernel" else out
    monkeypatch.setattr(bt, "launch", faulty)
    monkeypatch.setattr(bt, "kernels_work", {})
    with pytest.warns(UserWarning, match="Triton does not work on cpu .*something else in .*: steps take") as said:
        assert not bt.has_kernels(torch.ones(1)) and not bt.has_kernels(torch.ones(1))
    assert sum("Triton" in str(warning.message) for warning in said) == 1, "said once"

@pytest.mark.parametrize("a, b", [("mean_enc", "square_enc"), ("factor_enc", "factor_dec"), ("g", "c"),
                                  ("aux_enc", "aux_dec"), ("value", "d_value"), ("mean_b", "square_b")])
def test_two_arguments_of_the_update_that_are_swapped_are_noticed(a, b, monkeypatch):
    """It has 37. They are given by name, but a kernel that names them wrongly would train wrongly."""
    launch = bt.launch

    def swapped(kernel, grid, out, *arguments, **options):
        if kernel.fn.__name__ == "update_kernel":
            options |= {a: options[b], b: options[a]}
        return launch(kernel, grid, out, *arguments, **options)
    monkeypatch.setattr(bt, "launch", swapped)
    monkeypatch.setattr(bt, "kernels_work", {})
    with pytest.warns(UserWarning, match="Triton does not work on cpu .*something else in "):
        assert not bt.has_kernels(torch.ones(1))

class Graph(TorchDispatchMode):
    """A CUDA graph for a CPU: what is launched while it is open, launched again into the same tensors."""
    fault = None  # what goes wrong: see the test

    def __init__(self):
        super().__init__()
        self.launches = []

    def pool(self):
        return None

    def add(self, launch, arguments, options):
        result = launch(*arguments, **options)
        self.launches.append((launch, arguments, options, result))
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.topk.default and self.fault == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.add(func, args, kwargs or {})

    def replay(self):
        for launch, arguments, options, result in self.launches:
            if self.fault == "forgets" and launch is torch.ops.aten.mv.default:
                continue
            again = launch(*arguments, **options)
            for old, new in zip(*(r if isinstance(r, (tuple, list)) else [r] for r in (result, again))):
                if new.data_ptr() != old.data_ptr():  # neither in place nor a view
                    old.copy_(new)

@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on a CPU."""
    launch, opened = bt.launch, []

    def launched(*arguments, **options):
        with torch.utils._python_dispatch._disable_current_modes():
            return opened[-1].add(launch, arguments, options) if opened else launch(*arguments, **options)

    @contextlib.contextmanager
    def record(graph, pool, **options):
        opened.append(graph)
        try:
            with graph:
                yield
        finally:
            opened.pop()

    class Recorded(bt.RecordedStep):
        def __init__(self, trainer, x, *rest):
            before = copy.deepcopy(bt.trainer_state(trainer))
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty_like", torch.zeros_like)
                try:
                    super().__init__(trainer, x, *rest)
                finally:  # a GPU runs nothing while it records
                    for name, t in bt.trainer_state(trainer).items():
                        t.copy_(before[name])
    for owner, name, fake in [
            (bt, "launch", launched), (bt, "RecordedStep", Recorded), (bt, "unrecorded", set()),
            (bt, "recording_stream", lambda device: None), (torch.Tensor, "is_cuda", True),
            (torch.cuda, "CUDAGraph", Graph), (torch.cuda, "graph", record),
            (torch.cuda, "current_stream", lambda device: None),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch._C, "_cuda_clearCublasWorkspaces", lambda: None)]:
        monkeypatch.setattr(owner, name, fake, raising=name[0] != "_")

def some_steps(steps=6, **changes):
    """Statistics, state and trainer after steps in which a latent dies."""
    trainer = bt.Trainer(config(n_latents=24, tokens=100, **changes))
    trainer.sae.load_state_dict(random_sae(trainer.cfg).state_dict())
    return [trainer.step(randn(16, 12, seed=i)) for i in range(steps)], bt.trainer_state(trainer), trainer

@pytest.mark.parametrize("changes", [{}, dict(activation="topk"), dict(topk_start=0.45)], ids=str)
def test_recorded_steps_give_the_bits_of_those_that_are_not(changes, graphs, monkeypatch):
    """Of BatchTopK, TopK, and BatchTopK after it; and a first replay changes nothing beside the step itself."""
    stats, state, trainer = some_steps(**changes)
    kinds = bt.recordings_of(trainer)
    assert sum(step is not None for step in kinds.values()) == len(kinds) > ("topk_start" in changes)
    monkeypatch.setattr(bt, "find_recording", lambda *arguments: None)
    others = some_steps(**changes)
    assert stats == others[0] and same_tensors(state, others[1])

@pytest.mark.parametrize("fault, said", [("forgets", "something else in b_dec.*b_dec.mean"),
                                         ("no memory", "out of memory")])
def test_a_recording_that_fails_or_goes_wrong_is_not_used(fault, said, graphs, monkeypatch):
    """It is told once, training goes on as without it, and no other trainer records."""
    monkeypatch.setattr(Graph, "fault", fault)
    with pytest.warns(UserWarning, match=f"CUDA graphs do not work on cpu .*{said}.*: steps take longer") as told:
        stats, state, first = some_steps(5)
        *_, second = some_steps(3)
    assert len(told) == 1 and "recordings" not in first.cache.keys() | second.cache.keys()
    monkeypatch.setattr(bt, "find_recording", lambda *arguments: None)
    others = some_steps(5)
    assert stats == others[0] and same_tensors(state, others[1])

# What the interpreter does not notice

KINDS = {"*bf16": "z", "*i32": "counts", "i32": "l_first B capacity n D share",
         "*i64": "latent row ends n_before i j n_found which starts aux_place",
         "fp32": "factor factor_enc factor_dec factor_b epsilon epsilon_enc epsilon_dec epsilon_b "
                 "log_beta1 log_beta2"}
# All others: *fp32

def compile_kernels():
    """Compile every kernel to machine code of an H100; prints their names. Needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: kind for kind, names in KINDS.items() for name in names.split()}
    variants = [(kernel, dict(BLOCK=block, ROWS=rows)) for rows in (False, True)
                for kernel, block in ((bt.count_kernel, 2048), (bt.collect_kernel, 1024))]
    variants += [(bt.levels_kernel, dict(L=64, BLOCK=256, N=bt.LEVELS)),
                (bt.dots_kernel, dict(E=8, BLOCK=128, ALL=False)),
                (bt.dots_kernel, dict(E=8, BLOCK=128, ALL=True, n_found=None)),
                (bt.sums_kernel, dict(E=1, BLOCK=1024)), (bt.sums_kernel, dict(E=128, BLOCK=1, D=1)),
                (bt.vector_kernel, {})]
    for block in (256, 4096):
        variants.append((bt.runs_kernel, dict(RUN=64, E=2, BLOCK=block)))
        variants += [(bt.update_kernel, dict(RUN=64, E=2, BLOCK=block, AUX=aux)) for aux in (False, True)]
    for kernel, constants in variants:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places)
        compiled = bt.triton.compile(source, GPUTarget("cuda", 90, 32)).asm
        assert compiled["cubin"]
        print(kernel.__name__)

def test_every_kernel_compiles_for_a_gpu():
    """Bug met: a name that was a number in a loop and a block after it, which the interpreter allows."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", "import test_kernels; test_kernels.compile_kernels()"],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    launched = {word.rstrip(",") for word in Path(bt.__file__).read_text().replace("(", " ").split()
                if word.endswith("_kernel,")}
    assert launched == {*done.stdout.split()}, "every kernel that is launched"
