"""Several processes under torchrun: one dictionary, one exact BatchTopK, the same run as one process's."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import batchtopk as bt
import cli
from conftest import Planted
from test_cli import FILES, ROOT, invoke, options

STEPS = 20
CFG = bt.Config(d_model=48, n_latents=120, k=4, batch_size=256, tokens=256 * STEPS, lr=3e-3, device="cpu",
                dead_tokens=1000)

def torchrun(*arguments):
    """torchrun with two processes, as a process; both its outputs are read as one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

ACTIVATIONS = "batchtopk", "topk", "jumprelu"  # the first begins as the second

def train_here(activation, folder, group=bt.Processes()):
    """What this process's steps give: its statistics, all latents, which entries are kept at the end."""
    cfg, planted = dataclasses.replace(CFG, activation=activation), Planted()
    trainer, stats = bt.Trainer(cfg, group.keep_share_(bt.make_sae(cfg))), []
    for i in range(STEPS):
        if i == STEPS // 2:  # some latents fall silent, so that the auxiliary loss has work
            share = group.share(cfg)
            dead = torch.arange(cfg.n_latents)[share] % 7 == 0
            trainer.sae.b_enc.data[dead] = -5.0
            trainer.sae.tokens_since_fired[dead] = 2000
        stats.append(list(trainer.step(planted.batch(256, i))))
    x, first = planted.batch(64, 99).repeat(4, 1), group.share(cfg).start or 0  # four times: ties
    kept, centred = [], x - trainer.sae.b_dec.data
    for hint in (0.0, 1e9):
        latent, row, value = bt.find_entries(trainer.sae, centred, hint, cfg.n_kept(256) + 1)
        kept.append(torch.stack([row, latent + first]))
    metrics = bt.evaluate(trainer.sae, [planted.batch(512, 98)])
    theta = bt.calibrate(trainer.sae, [planted.batch(512, 97)])
    trainer.sae.save(folder / activation)
    group.total(0)  # all wait until it is saved
    whole = bt.SAE.load(folder / activation)
    assert len(whole.b_enc) == 120 and whole.processes.size == 1
    alone, together = (bt.evaluate(sae, [planted.batch(512, 96)])["theta"] for sae in (whole, trainer.sae))
    assert alone["l0"] == together["l0"] and alone["fvu"] == pytest.approx(together["fvu"], rel=1e-5)
    assert len(alone["feature_density"]) == 120 and alone["frac_alive"] == together["frac_alive"]
    again = 1 if activation == "jumprelu" else theta  # a factor, of thresholds that are calibrated already
    assert bt.calibrate(whole, [planted.batch(512, 97)]) == pytest.approx(again, rel=1e-4)
    state = group.all_latents(trainer.sae.state_dict())
    return dict(stats=torch.tensor(stats), state=dict(state), kept=kept, metrics=metrics, theta=theta)

def train_there(folder, environment):
    """A process as torchrun starts it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    group = bt.Processes.join("cpu")
    assert group == bt.Processes.join("cpu"), "again"
    found = {activation: train_here(activation, folder, group) for activation in ACTIVATIONS}
    found["ties"] = group.largest(torch.arange(4), torch.tensor([2.0, 1.0, 1.0, 1.0]), 4)[1]
    torch.save(found, folder / f"{group.rank}.pt")

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {activation: train_here(activation, folder) for activation in ACTIVATIONS}

@pytest.mark.parametrize("n", [2, 3])
def test_processes_together_do_what_one_does(n, alone, tmp_path):
    """Bug here once: a saved SAE, loaded whole in each of two processes, was evaluated as the sum of two."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["torch", "pytest", "typer.testing"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = dict(WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=port)
    workers = [context.Process(target=train_there, args=(tmp_path, environment | dict.fromkeys(
        ("RANK", "LOCAL_RANK"), str(i)))) for i in range(n)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        worker.kill()  # if it waits for another that has ended
    assert not any(worker.exitcode for worker in workers)
    ranks = [torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(n)]
    assert torch.cat([rank["ties"] for rank in ranks]).sort().values.tolist() == [1.0] * (4 - n) + [2.0] * n
    for activation, one in alone.items():
        found = [rank[activation] for rank in ranks]
        assert one["stats"][:, 2].max() > 0, "no auxiliary loss was tested"
        for other in found:
            torch.testing.assert_close(other["stats"], one["stats"], atol=1e-5, rtol=1e-4, equal_nan=True)
            assert torch.equal(other["stats"][:, 4:6], one["stats"][:, 4:6]), "l0 and dead"
            assert other["theta"] == pytest.approx(one["theta"], rel=1e-5)
            for name, value in one["metrics"]["batch"].items():
                torch.testing.assert_close(other["metrics"]["batch"][name], value, atol=1e-5, rtol=1e-5)
        for name, tensor in one["state"].items():
            torch.testing.assert_close(found[0]["state"][name], tensor, atol=1e-4, rtol=0, equal_nan=True)
        for i, kept in enumerate(one["kept"]):
            together = torch.cat([other["kept"][i] for other in found], dim=1)
            assert together.shape[1] == kept.shape[1] == 1025, "ties may not change how many are kept"
            here, there = ({tuple(entry) for entry in entries.T.tolist()} for entries in (kept, together))
            tied = {(row % 64, latent) for row, latent in here ^ there}
            assert len(tied) <= 1, "all but the tie at the threshold"

@pytest.mark.slow
def test_a_run_of_two_processes_survives_a_kill_and_ctrl_c_and_is_the_run_of_one(tmp_path):
    folder, arguments = tmp_path / "two", options(tokens=15_000, checkpoint_tokens=1024)
    resume = (ROOT / "cli.py", "train", "--resume", folder)
    # One of two is killed
    process = torchrun(ROOT / "cli.py", "train", "--out", tmp_path, "--name", "two", *arguments)
    wait_for(lambda: list(folder.glob("state-*-1-of-2.safetensors")), process)
    [victim] = [pid for pid in children(process.pid)
                if b"\0RANK=1\0" in bt.Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    started, said = time.time(), process.communicate()[0]
    assert process.returncode and time.time() - started < 60
    assert 'cli.py", line' not in said, "a traceback of ours"
    assert "saved by 2 processes" in invoke(*resume[1:]).stderr
    # Ctrl-C reaches all of them, and torchrun sends a second one
    before = tokens_saved(folder)
    process = torchrun(*resume)
    wait_for(lambda: tokens_saved(folder) > before, process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    again = f"saved; continue with: torchrun --nproc-per-node 2 cli.py train --resume {folder}\n"
    assert said.count(again) == 1, said
    assert len(list(folder.glob("state-*"))) == 2 and tokens_saved(folder) > before
    # To the end: an ordinary run
    process = torchrun(*resume, "--json")
    alone = invoke("train", "--out", tmp_path, "--name", "one", *arguments, "--json")
    said = process.communicate()[0]
    assert process.returncode == 0, said
    [result] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert {p.name for p in folder.iterdir()} == FILES
    assert result["theta"]["fvu"] == pytest.approx(json.loads(alone.stdout)["theta"]["fvu"], rel=1e-3)
    two, one = (bt.SAE.load(tmp_path / name) for name in ("two", "one"))
    assert two.W_enc.shape == one.W_enc.shape and two.theta == pytest.approx(float(one.theta), rel=1e-3)
    records = [[json.loads(line)["tokens"] for line in open(tmp_path / name / "metrics.jsonl")]
               for name in ("one", "two")]
    assert records[0] == records[1]
    assert bt.export(two, tmp_path / "encoder.pt")["flipped"] == 0

@pytest.mark.slow
def test_latents_that_cannot_be_shared_are_refused_in_one_line(tmp_path):
    process = torchrun(ROOT / "cli.py", "train", "--out", tmp_path, *options(n_latents=255))
    said = process.communicate()[0]
    assert process.returncode and said.count("error: ") == 1 and "255 only if it is a multiple of 2" in said

def tokens_saved(folder):
    return max([tokens for _, tokens in cli.saved_states(folder)], default=0)

def wait_for(condition, process):
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("nothing came of it in a minute")

def children(pid):
    stats = {path: path.read_text() for path in bt.Path("/proc").glob("[0-9]*/stat")}
    return [int(path.parent.name) for path, stat in stats.items()
            if stat.rpartition(")")[2].split()[1] == str(pid)]
