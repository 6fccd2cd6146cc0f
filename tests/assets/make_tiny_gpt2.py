"""Train the embedded language model, tests/assets/tiny-gpt2, on the source of Python's standard library.

    python tests/assets/make_tiny_gpt2.py                                # 6 M tokens, half an hour on four cores
    python tests/assets/make_tiny_gpt2.py --further --tokens 5_000_000   # 5 M more, which made the model as committed
    python tests/assets/make_tiny_gpt2.py --evaluate                     # the held-out loss of the model as committed
    python tests/assets/make_tiny_gpt2.py --second FOLDER                # another model, to see that nothing is tuned to one

A GPT-2 of 4 blocks x 256, context 128, byte-level BPE of 4096 tokens: small enough for a repository, trained for real,
so that its residual stream has something to find. Files are split into training and held-out ones by a hash of their
path (batchtopk.documents), so the split is the same on every machine and for every Python version.

The second model differs in width, depth, tokeniser and text: 3 blocks x 192, BPE of 1024 tokens, 1 M tokens of the C++
headers that torch comes with, which are left beside it as FOLDER.jsonl.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from batchtopk import Config, documents  # noqa: E402

FOLDER, CONTEXT, VOCAB, BATCH, TOKENS = HERE / "tiny-gpt2", 128, 4096, 32, 6_000_000
WIDTH, BLOCKS, DATASET = 256, 4, "stdlib"


def texts(split: str) -> list[str]:
    return list(documents(Config(d_model=WIDTH, n_latents=WIDTH, dataset=DATASET), split))


def write_headers(path: Path) -> None:
    """The C++ headers of the installed torch, in the order of a hash of their paths, as a data set of one text a line."""
    root = Path(torch.__file__).parent / "include"
    headers = sorted(root.rglob("*.h"), key=lambda header: hashlib.sha256(header.relative_to(root).as_posix().encode()).digest())
    path.write_text("".join(json.dumps({"text": h.read_text(encoding="utf-8", errors="replace")}) + "\n" for h in headers), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the training files alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts("train"), trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end)


def token_stream(tokenizer, split: str) -> torch.Tensor:
    """All documents of a split as one row of token ids, each preceded by the end-of-text token."""
    rows = tokenizer(texts(split), add_special_tokens=False)["input_ids"]
    return torch.tensor([i for row in rows for i in [tokenizer.eos_token_id, *row]])


@torch.no_grad()
def held_out_loss(model, stream: torch.Tensor) -> float:
    """Mean cross-entropy in nats per predicted token over all full contexts of `stream`."""
    blocks = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(b, labels=b).loss.item() * len(b) for b in blocks.split(64)]
    return sum(losses) / len(blocks)


@torch.no_grad()
def muon_step_(parameters, momenta, lr: float, momentum: float = 0.95) -> None:
    """Muon (Jordan et al. 2024): Nesterov momentum, its update orthogonalised by five Newton-Schulz iterations.

    torch.optim.Muon iterates in bfloat16, which takes ten seconds a step on a CPU without such instructions.
    """
    for p, m in zip(parameters, momenta):
        m.lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(m, momentum)
        x = update.T if update.shape[0] > update.shape[1] else update
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        x = x.T if update.shape[0] > update.shape[1] else x
        p.add_(x, alpha=-lr * max(1, p.shape[1] / p.shape[0]) ** 0.5)  # Conv1D stores [in, out]


def train(tokens: int, further: bool) -> None:
    torch.manual_seed(1 if further else 0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER) if further else make_tokenizer()
    stream, held_out = token_stream(tokenizer, "train"), token_stream(tokenizer, "held-out")
    print(f"{len(stream):,} training tokens, {len(held_out):,} held-out tokens", flush=True)
    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=BLOCKS, n_head=4,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32) if further else GPT2LMHeadModel(config)
    matrices = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    others = [p for n, p in model.named_parameters() if not (".h." in n and p.ndim == 2)]
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    steps, order, losses, start = tokens // (BATCH * CONTEXT), [], [], time.time()
    for step in range(steps):
        if len(order) < BATCH:  # a new pass, cut into contexts at a new offset
            offset = torch.randint(CONTEXT, ()).item()
            data = stream[offset : offset + (len(stream) - offset) // CONTEXT * CONTEXT].view(-1, CONTEXT)
            order = torch.randperm(len(data)).tolist()
        batch = data[[order.pop() for _ in range(BATCH)]]
        rate = min((step + 1) / 50, 1.0, 2 * (1 - step / steps))  # warm-up, constant, linear decay over the last half
        loss = model(batch, labels=batch).loss
        loss.backward()
        muon_step_(matrices, momenta, lr=0.02 * rate)
        adam.param_groups[0]["lr"] = 3e-3 * rate
        adam.step()
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            mean, seconds = sum(losses[-50:]) / 50, time.time() - start
            print(f"step {step + 1} of {steps}, {seconds:.0f} s, training loss {mean:.3f}", flush=True)
    model.eval()
    print(f"held-out loss {held_out_loss(model, held_out):.4f} nats per token", flush=True)
    model.half().save_pretrained(FOLDER)  # float16 halves the file; loaded back as float32
    tokenizer.save_pretrained(FOLDER)
    settings = json.loads((FOLDER / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--further", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--second", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.second:
        FOLDER, DATASET, VOCAB, WIDTH, BLOCKS = args.second, f"{args.second}.jsonl", 1024, 192, 3
        args.tokens = min(args.tokens, 1_000_000)
        write_headers(Path(DATASET))
    if not args.evaluate:
        train(args.tokens, args.further)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    held_out = token_stream(tokenizer, "held-out")
    share = torch.bincount(held_out, minlength=VOCAB).double() / len(held_out)
    loss, entropy = held_out_loss(model, held_out), float(-torch.xlogy(share, share).sum())
    print(f"{FOLDER.name}: held-out loss {loss:.3f} nats per token (perplexity {math.exp(loss):.1f}); "
          f"unigram entropy of the same tokens {entropy:.2f}")
