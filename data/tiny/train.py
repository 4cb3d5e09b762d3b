"""Trains the embedded model and, on shuffled words, its controls; scores them; writes the checkpoint.

    python data/tiny/train.py --out FOLDER                          one GPU, a few minutes
    python data/tiny/train.py --out FOLDER --device cpu --smoke     a few steps, to see that all of it runs

Three runs of the same shape and start: `model` on the text; `control` on the words of each shard dealt out
anew over its documents, so that nothing but the frequencies of words is left; `bag` on documents whose own
words are shuffled, which keeps what occurs together (names, facts) and loses the order. FOLDER gets model/,
training.json and train.log. Every setting below can be overridden on the command line: --learning-rate 1e-3.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the corpus is made by processes, one per core

import corpus
import numpy as np
import probe
import score
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how."""

    # --- the model: Llama with grouped-query attention
    hidden: int = 384
    layers: int = 6
    heads: int = 6  # of 64 channels each
    kv_heads: int = 2
    intermediate: int = 1024
    context: int = 512
    rope_theta: float = 10_000.0
    # --- the text
    shards: int = corpus.SHARDS  # of one million characters each
    control_shards: int = 100  # of them, for each control
    # --- the optimiser: AdamW, linear warm-up, cosine to a tenth
    tokens: float = 760e6  # at most this many training tokens ...
    minutes: float = 3.8  # ... and at most this long; the schedule follows whichever is nearer its end
    control_minutes: float = 0.5  # for the control on words shuffled over all documents; 0: none
    bag_minutes: float = 0.5  # for the one on words shuffled within each document; 0: none
    batch: int = 128  # sequences of `context` tokens
    learning_rate: float = 1.5e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    # --- scoring
    score_batch: int = 256
    score_items: int = 1_000_000  # at most this many per task
    score_rows: int = 1_000_000  # rows of held-out text
    score_articles: int = 100
    probe_items: int = probe.ITEMS  # of every form, in training and in test combinations
    probe_steps: int = 1000


SMOKE = {"shards": 2, "control_shards": 1, "tokens": 16_384, "batch": 4, "warmup_steps": 2, "probe_items": 4,
         "probe_steps": 2, "score_batch": 8, "score_items": 8,
         "score_rows": 8, "score_articles": 2}


# ------------------------------------------------------------------------------------------- text
def shuffle_all(texts: list[str], rng: random.Random) -> list[str]:
    """All words of all texts dealt out anew; every text keeps its number of words."""
    words = [word for text in texts for word in text.split()]
    rng.shuffle(words)
    rest = iter(words)
    return [" ".join(islice(rest, len(text.split()))) for text in texts]


def shuffle_each(texts: list[str], rng: random.Random) -> list[str]:
    """The words of each text in random order."""
    return [" ".join(rng.sample(words, len(words))) for words in map(str.split, texts)]


SHUFFLES = {"control": shuffle_all, "bag": shuffle_each}


def _encode_shard(job: tuple[int, str]) -> np.ndarray:
    """Token ids of one shard for the run of that name."""
    number, name = job
    texts = corpus.shard(number)
    if name in SHUFFLES:
        texts = SHUFFLES[name](texts, random.Random(f"{name}-{number}"))
    return pack(AutoTokenizer.from_pretrained(HERE / "model"), texts)


def pack(tokenizer, texts: list[str]) -> np.ndarray:
    """One row of token ids: <s> document </s> <s> document </s> ..."""
    encoded = tokenizer(texts)["input_ids"]  # each begins with <s>
    return np.concatenate([np.array(ids + [tokenizer.eos_token_id], dtype=np.uint16) for ids in encoded])


def training_rows(settings: Settings, names: list[str], workers: int) -> dict[str, torch.Tensor]:
    """Run name -> int16 tensor (rows, context) of token ids. Call it before the device is in use: it
    forks."""
    jobs = [(number, name) for name in names
            for number in range(min(settings.shards, settings.control_shards if name in SHUFFLES else 10**9))]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        encoded = list(pool.imap(_encode_shard, jobs, chunksize=2))
    texts = {}
    for name in names:
        row = np.concatenate([ids for ids, job in zip(encoded, jobs) if job[1] == name])
        usable = len(row) // settings.context * settings.context
        texts[name] = torch.from_numpy(row[:usable].astype(np.int16).reshape(-1, settings.context))
    return texts


def heldout_rows(tokenizer, settings: Settings) -> torch.Tensor:
    """Held-out text as (rows, context) token ids."""
    texts = (HERE / "text" / "heldout.txt").read_text().split(corpus.SEPARATOR)
    row = torch.from_numpy(pack(tokenizer, texts).astype(np.int64))
    return row[:len(row) // settings.context * settings.context].view(-1, settings.context)[:settings.score_rows]


# ------------------------------------------------------------------------------------------- model
def new_model(settings: Settings, tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.intermediate, max_position_embeddings=settings.context,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta}, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def optimiser(model, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays the weight matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": settings.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=settings.learning_rate, betas=(0.9, settings.beta2),
                             fused=model.device.type == "cuda")


def train(model, step_model, rows: torch.Tensor, settings: Settings, minutes: float, log, report) -> dict:
    """Trains `model` in place through `step_model` (the same weights, perhaps compiled). `report(done, last)`
    gives what a progress line says beyond the loss; `log` takes the line."""
    device = model.device
    rows = rows.to(device)
    steps = max(1, int(settings.tokens / (settings.batch * settings.context)))
    optimizer = optimiser(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    order, position, progress, done, start = torch.empty(0, dtype=torch.long), 0, 0.0, 0, None
    losses = []
    while progress < 1.0:
        if position + settings.batch > len(order):
            order, position = torch.randperm(len(rows), generator=generator), 0
        ids = rows[order[position:position + settings.batch].to(device)].long()
        position += settings.batch
        rate = settings.learning_rate * min(1.0, (done + 1) / settings.warmup_steps)
        rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = step_model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        if done % 10 == 0 or start is None:
            losses.append(loss.item())  # waits for the device
            if start is None:  # the first step compiles; it is not counted
                start, first_step = time.perf_counter(), done
        elapsed = time.perf_counter() - start
        progress = max(done / steps, elapsed / (60 * minutes))
        if done % 500 == 0 or progress >= 1.0:
            speed = (done - first_step) * settings.batch * settings.context / max(elapsed, 1e-9)
            log(f"step {done:5d}  {progress:6.1%}  loss {losses[-1]:.4f}  {speed:,.0f} tokens/s  "
                f"{report(done, progress >= 1.0)}")
    return {"steps": done, "tokens": done * settings.batch * settings.context, "last_loss": losses[-1],
            "seconds": time.perf_counter() - start, "epochs": done * settings.batch / len(rows)}


def save_checkpoint(model, folder: Path) -> None:
    """bf16 safetensors in shards of at most 12 MB, and the configuration. The tokenizer is not written: it
    stands in model/ beside this file, and the shards belong there too."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.config.dtype = torch.bfloat16
    copy.save_pretrained(folder, max_shard_size="12MB")
    for path in folder.iterdir():
        path.chmod(0o644)


# ------------------------------------------------------------------------------------------- whole run
def run(settings: Settings, out: Path, device: torch.device, compiled: bool, workers: int, log) -> None:
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    plans = {"model": settings.minutes, "control": settings.control_minutes, "bag": settings.bag_minutes}
    plans = {name: minutes for name, minutes in plans.items() if minutes}
    texts = training_rows(settings, list(plans), workers)
    log(f"{', '.join(f'{name} {rows.numel():,}' for name, rows in texts.items())} tokens of text after "
        f"{time.perf_counter() - begin:.0f} s")
    heldout = heldout_rows(tokenizer, settings)
    questions = probe.probes(settings.probe_items)
    model = new_model(settings, tokenizer)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(device)
    torch.set_float32_matmul_precision("high")
    step_model = torch.compile(model) if compiled else model
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    sample = heldout[:settings.score_batch]
    results, curve = {}, {}

    def report(done: int, last: bool) -> str:
        line = f"held-out perplexity {score.perplexity(model, sample, settings.score_batch):.3f}"
        if "model" in plans and not results and (last or done % settings.probe_steps == 0):  # not of controls
            curve[done] = probe.run(model, tokenizer, questions, settings.score_batch)
            line += "\n  train/test: " + probe.report(curve[done])
        return line

    for name, minutes in plans.items():
        model.load_state_dict(initial)
        training = train(model, step_model, texts[name], settings, minutes, log, report)
        torch.set_float32_matmul_precision("highest")
        scored = model
        if name == "model":
            save_checkpoint(model, out / "model")
            scored = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).to(device)
        scores = score.score_tasks(scored, tokenizer, HERE / "tasks", settings.score_batch, settings.score_items,
                                   alone=name == "model")
        average = sum(task["acc"] for task in scores.values()) / len(scores)
        results[name] = training | {"corpus_tokens": texts[name].numel(), "tasks": scores, "average": average,
                                    "items_sha256": score.items_digest(HERE / "tasks")}
        if name == "model":
            results[name] |= {
                "heldout_perplexity": score.perplexity(scored, heldout, settings.score_batch),
                "summaries_rouge_l": score.score_summaries(
                    scored, tokenizer, HERE / "text" / "summaries.jsonl", settings.score_articles),
                "probes": curve}
        torch.set_float32_matmul_precision("high")
        for task, values in scores.items():
            log(f"  {task:14s} " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
        log(f"  {name}: average {average:.3f}  {time.perf_counter() - begin:.0f} s")
        write_record(out / "training.json", settings, device, results, begin)


def write_record(path: Path, settings: Settings, device: torch.device, results: dict, begin: float) -> None:
    """What was trained, where, and what it scored; the model card is made from this file."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    record = {"settings": asdict(settings), "gpu": gpu, "python": platform.python_version(),
              "torch": torch.__version__, "transformers": transformers.__version__,
              "wall_seconds": time.perf_counter() - begin, **results}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and training.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a little text")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    for field in fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, help=f"default {field.default}")
    arguments = parser.parse_args()
    settings = replace(Settings(), **(SMOKE if arguments.smoke else {}))
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "train.log").open("w") as file:
        def log(line: str) -> None:
            for target in (sys.stdout, file):
                print(line, file=target, flush=True)

        run(settings, arguments.out, torch.device(arguments.device), arguments.device == "cuda"
            and not arguments.no_compile, arguments.workers, log)


if __name__ == "__main__":
    main()
