"""Train the embedded model `tiny` and its tokenizer from nothing: ``python scripts/train_tiny.py --out DIR``.

Recipe. The text is `corpus.packaged` (seeded, endless), tokenized by a byte-level BPE that is
trained on its first stories. Stories are concatenated, each followed by a newline; half of the training windows begin
with BOS and a story, half are cut anywhere. Windows hold 256 tokens; while the rate decays, every fourth step has
half as many windows of 512. AdamW in float32 without weight decay, a higher learning rate for the gains of the norms
(which lets outlier channels grow), and a schedule of warm-up, constant rate and linear decay to zero (``--decay`` of
the steps), so that a run can be lengthened before its decay begins without changing what was learned before.
``--compile`` (needs a C++ compiler) makes steps faster and changes results in the last digits only.

The first ``--simple-chunks`` chunks of text leave out what can only be learned by heart (habits and rhymes): finding
things in the context is learned first, and the tables afterwards.

Every step draws its windows from a generator seeded by (seed, step): a run that is interrupted and started again with
the same command goes on from its last checkpoint (``DIR/state.pt``) as if nothing had happened. The folder ends up
with ``config.json``, ``model.safetensors``, the tokenizer and ``training.json`` (settings, tokens seen, wall time,
figures).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import packaged as corpus

BOS = "<s>"
CHUNK_STORIES = 8000
TOKENIZER_STORIES = 20000


def arguments() -> argparse.Namespace:
    """Parse the command line; the defaults are the recipe of the packaged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and of the checkpoint")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--window-batch", type=int, default=8, help="windows of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--gain-multiplier", type=float, default=5.0, help="learning rate of norm gains, relative")
    parser.add_argument("--beta2", type=float, default=0.98)
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--decay", type=float, default=0.2, help="fraction of the steps in which the rate decays")
    parser.add_argument("--simple-chunks", type=int, default=10, help="chunks of 400,000 tokens before habits appear")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return parser.parse_args()


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the first training stories; it puts BOS before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([corpus.text_of("training", TOKENIZER_STORIES, habits=False)[0]], trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, model_max_length=512)


def build(args: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


class Stream:
    """Windows of training text; chunk ``i`` of the text holds the stories of seed ``1000 + i``."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, simple_chunks: int) -> None:
        """Remember the tokenizer; text is made when asked for."""
        self.tokenizer, self.seed, self.simple_chunks, self.chunk = tokenizer, seed, simple_chunks, -1
        self.tokens = self.starts = torch.empty(0, dtype=torch.long)

    def _load(self, chunk: int) -> None:
        text, _ = corpus.text_of("training", CHUNK_STORIES, 1000 + chunk, habits=chunk >= self.simple_chunks)
        lines = text.splitlines(keepends=True)
        encoded = [e.ids[1:] for e in self.tokenizer.backend_tokenizer.encode_batch(lines)]
        self.tokens = torch.tensor([token for ids in encoded for token in ids])
        lengths = torch.tensor([len(ids) for ids in encoded])
        self.starts = torch.cumsum(lengths, 0) - lengths
        self.chunk = chunk

    def windows(self, step: int, tokens_before: int, n_windows: int, length: int) -> torch.Tensor:
        """Return windows (n_windows, length) for a step, after ``tokens_before`` tokens of training."""
        chunk = tokens_before // (CHUNK_STORIES * 50)
        if chunk != self.chunk:
            self._load(chunk)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        last = len(self.tokens) - length
        starts = self.starts[self.starts <= last]
        aligned = starts[torch.randint(len(starts), (n_windows // 2,), generator=generator)]
        anywhere = torch.randint(last, (n_windows - n_windows // 2,), generator=generator)
        rows = [torch.cat([torch.zeros(1, dtype=torch.long), self.tokens[s : s + length - 1]]) for s in aligned]
        return torch.stack(rows + [self.tokens[s : s + length] for s in anywhere])


def rate(args: argparse.Namespace, step: int) -> float:
    """Return the learning rate of a step relative to its peak."""
    left = (args.steps - step) / max(1.0, args.decay * args.steps)
    return min(1.0, (step + 1) / args.warmup, left)


def optimizer_of(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return AdamW without weight decay; gains of norms learn faster."""
    gains = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": others, "peak": args.learning_rate},
        {"params": gains, "peak": args.learning_rate * args.gain_multiplier},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.beta2), weight_decay=0.0)


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int = 256, limit: int | None = None
) -> float:
    """Return the perplexity of the evaluation text, cut into windows of ``length`` tokens."""
    text = corpus.packaged_text("evaluation")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    windows = tokens[: len(tokens) // length * length].view(-1, length)[:limit]
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, limit: int | None = None) -> dict[str, float]:
    """Return multiple-choice accuracy by kind of story and over all (``all``), by summed log-likelihood."""
    hits: dict[str, list[bool]] = {}
    for question in corpus.questions()[:limit]:
        start = len(tokenizer(question["context"])["input_ids"])
        scores = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer(question["context"] + choice)["input_ids"]])
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        hit = scores.index(max(scores)) == question["answer"]
        hits.setdefault("all", []).append(hit)
        hits.setdefault(question["id"].split("-")[0], []).append(hit)
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def save(args: argparse.Namespace, model: LlamaForCausalLM, optimizer: Any, step: int, spent: float, seen: int) -> None:
    """Write the checkpoint so that an interruption leaves the old or the new one."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": step, "wall_s": spent, "n_tokens": seen}
    torch.save(state, args.out / "state.tmp")
    (args.out / "state.tmp").replace(args.out / "state.pt")
    model.save_pretrained(args.out)


def train(args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[int, float]:
    """Train, resuming where a checkpoint is found; returns the tokens seen and the wall time in seconds."""
    optimizer, stream = optimizer_of(model, args), Stream(tokenizer, args.seed, args.simple_chunks)
    first, seen, before = 0, 0, 0.0
    if (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seen, before = state["step"], state["n_tokens"], state["wall_s"]
    stepper = torch.compile(model, dynamic=False) if args.compile else model
    began, average = time.time(), None
    for step in range(first, args.steps):
        long = step % 4 == 3 and step >= (1.0 - args.decay) * args.steps
        shape = (args.window_batch // 2, 512) if long else (args.window_batch, 256)
        windows = stream.windows(step, seen, *shape)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(args, step)
        loss = (model if long else stepper)(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += windows.numel()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            spent = before + time.time() - began
            print(f"step {step + 1} loss {average:.4f} tokens {seen} {seen / spent:.0f}/s {spent:.0f} s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args, model, optimizer, step + 1, before + time.time() - began, seen)
            figure = perplexity(model, tokenizer, limit=32)
            print(f"step {step + 1} perplexity {figure:.4f} (part of the evaluation text)", flush=True)
    return seen, before + time.time() - began


def main() -> None:
    """Train the tokenizer and the model, measure them and write the folder."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.vocabulary)
    tokenizer.save_pretrained(args.out)
    model = build(args, len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, vocabulary {len(tokenizer)}", flush=True)
    seen, spent = train(args, model, tokenizer)
    model.eval()
    text, nats = corpus.text_of("evaluation", corpus.EVALUATION_STORIES)
    figures = {
        "n_tokens_evaluation": (n := len(tokenizer(text)["input_ids"])),
        "perplexity_floor": math.exp(nats / n),
        "perplexity": {str(length): perplexity(model, tokenizer, length) for length in (128, 256, 512)},
        "acc": accuracy(model, tokenizer),
    }
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"settings": settings, "n_tokens": seen, "wall_s": round(spent), "torch": torch.__version__} | figures
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
