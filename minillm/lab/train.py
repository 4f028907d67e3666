"""How the bundled story model came to be: `python -m minillm.lab.train` makes it again.

A byte-level BPE tokenizer and a Qwen3 model of about 6M parameters, both learned from 755 fairy tales. The book fits
in 9.7 million characters, which a model of this size can learn by heart: most choices below are there to stop it.

Training has two phases under one learning-rate schedule. In the first, windows of 1024 tokens are cut from the stories
anywhere. The median story has 2,700, so a model trained only so would seldom see a beginning and an end together, and
would never stop talking. In the second, half of the windows are *told tales*: short stories whole, and long ones cut
down to their first and last paragraphs, so that each ends in time.
"""

import argparse
import json
import lzma
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END = "<|endoftext|>"
END_ID = 0
HELD_OUT_EVERY = 20  # stories 19, 39, 59, ... of the corpus are held out
PROMPT = "Once upon a time"
# How stories are best sampled; written to `generation_config.json`.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "eos_token_id": END_ID}
REPOSITORY = Path(__file__).resolve().parents[2]
# Words keep the space before them, a run of newlines is a piece of its own: paragraphs can be joined token by token.
PIECES = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
TALE_OPENING = re.compile(r"once|long ago|there (was|were)|lived", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from the corpus. Lengths are in tokens."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 768
    context: int = 1024
    dropout: float = 0.2  # after the embedding, each attention and each MLP
    batch_size: int = 32
    steps: int = 2000
    ending_share: float = 0.2  # of the steps: the second phase
    opening_rows: int = 2  # windows of a first-phase batch that start where a story starts
    told_rows: int = 16  # windows of a second-phase batch that are told tales
    shortest_tale: int = 200
    longest_tale: int = 800
    warmup: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 1.5  # ten times the usual: 28 passes over a small corpus
    evaluations: int = 24
    seed: int = 0

    @property
    def second_phase(self) -> int:
        """The step at which the second phase begins."""
        return round(self.steps * (1 - self.ending_share))


QUICK = Settings(
    vocab_size=512, hidden_size=64, num_layers=2, num_qo_heads=2, num_kv_heads=1, intermediate_size=128, context=256,
    batch_size=2, steps=10, opening_rows=1, told_rows=1, shortest_tale=128, longest_tale=255, warmup=2, evaluations=2,
)  # fmt: skip


# --- the text -------------------------------------------------------------------------------------------------------
def read_stories(corpus: Path) -> list[str]:
    """The stories of the corpus in order, without the white space around them."""
    text = lzma.decompress(corpus.read_bytes()).decode("utf-8")
    return [story.strip() for story in text.split(END + "\n") if story.strip()]


def split_stories(stories: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): every story whose index leaves 19 when divided by 20 is held out."""
    held_out = stories[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [story for i, story in enumerate(stories) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019); all 256 bytes are in it: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=[END], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def encode_paragraphs(tokenizer: Tokenizer, stories: list[str]) -> list[list[list[int]]]:
    """Each story as a list of paragraphs, each a list of token ids that includes the blank line after it."""
    split = [re.split(r"(?<=\n\n)(?=\S)", story) for story in stories]
    encodings = iter(tokenizer.encode_batch([paragraph for story in split for paragraph in story]))
    return [[next(encodings).ids for _ in story] for story in split]


# --- windows of tokens ----------------------------------------------------------------------------------------------
def story_windows(stories: list[np.ndarray], context: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless windows `[context + 1]` cut from the stories, which are put in a new order for every pass."""
    while True:
        order = rng.permutation(len(stories))
        stream = np.concatenate([np.append(stories[i], END_ID) for i in order])
        starts = np.arange(rng.integers(context), len(stream) - context, context)
        for start in rng.permutation(starts):
            yield stream[start : start + context + 1]


def opening_windows(stories: list[np.ndarray], context: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless windows `[context + 1]` that begin where a story begins: a prompt has no end token before it, either."""
    while True:
        window = np.empty(0, dtype=np.int64)
        while len(window) <= context:
            window = np.concatenate([window, stories[rng.integers(len(stories))], [END_ID]])
        yield window[: context + 1]


def shorten(paragraphs: list[list[int]], budget: int, share: float) -> list[int] | None:
    """A story told in at most `budget` tokens: whole, or its first paragraphs joined to its last.

    The first paragraphs get `share` of the budget and the last ones what is left. None where either does not fit.
    """
    if sum(map(len, paragraphs)) <= budget:
        return [token for paragraph in paragraphs for token in paragraph]
    lengths = np.array([len(paragraph) for paragraph in paragraphs])
    first = int(np.searchsorted(np.cumsum(lengths), budget * share, side="right"))
    last = int(np.searchsorted(np.cumsum(lengths[::-1]), budget - lengths[:first].sum(), side="right"))
    if first == 0 or last == 0:
        return None
    return [token for paragraph in paragraphs[:first] + paragraphs[-last:] for token in paragraph]


def told_windows(
    tales: list[list[list[int]]], context: int, lengths: tuple[int, int], rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Endless windows `[context + 1]` that begin where a tale begins and hold all of it, its end token included."""
    tales = [tale for tale in tales if shorten(tale, lengths[1], 0.5)]
    if not tales:
        raise ValueError(f"no tale can be told in {lengths[1]} tokens")
    while True:
        window: list[int] = []
        while len(window) <= context:
            paragraphs = tales[rng.integers(len(tales))]
            tale = shorten(paragraphs, int(rng.integers(*lengths, endpoint=True)), rng.uniform(0.4, 0.7))
            if tale is not None and len(tale) >= lengths[0] // 2:
                window += [*tale, END_ID]
        yield np.array(window[: context + 1])


def batches(settings: Settings, tokenizer: Tokenizer, stories: list[str]) -> Iterator[np.ndarray]:
    """The batches `[batch_size, context + 1]` of both phases, one for each step."""
    rng = np.random.default_rng(settings.seed)
    paragraphs = encode_paragraphs(tokenizer, stories)
    tales = [p for p, story in zip(paragraphs, stories, strict=True) if TALE_OPENING.search(story[:120])]
    flat = [np.concatenate(story) for story in paragraphs]
    anywhere = story_windows(flat, settings.context, rng)
    openings = opening_windows(flat, settings.context, rng)
    told = told_windows(tales, settings.context, (settings.shortest_tale, settings.longest_tale), rng)
    for step in range(settings.steps):
        second = step >= settings.second_phase
        special, rows = (told, settings.told_rows) if second else (openings, settings.opening_rows)
        yield np.array([next(special if row < rows else anywhere) for row in range(settings.batch_size)])


# --- the model ------------------------------------------------------------------------------------------------------
def build_model(settings: Settings) -> Qwen3ForCausalLM:
    """A Qwen3 model with fresh weights; hooks add the dropout of training."""
    config = Qwen3Config(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size, num_hidden_layers=settings.num_layers,
        intermediate_size=settings.intermediate_size, num_attention_heads=settings.num_qo_heads,
        num_key_value_heads=settings.num_kv_heads, head_dim=64, max_position_embeddings=settings.context,
        tie_word_embeddings=True, eos_token_id=END_ID, pad_token_id=END_ID,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)

    def drop(module: torch.nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, settings.dropout, module.training)

    layers = model.model.layers
    for module in [model.model.embed_tokens, *(x.self_attn.o_proj for x in layers), *(x.mlp.down_proj for x in layers)]:
        module.register_forward_hook(drop)
    return model


def build_optimizers(model: Qwen3ForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the weight matrices of the layers, AdamW for the embedding and the norms' scales."""
    rate, decay = settings.learning_rate, settings.weight_decay
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict] = [{"params": [model.model.embed_tokens.weight]}, {"params": scales, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=rate, weight_decay=decay, betas=(0.9, 0.95))]


def rate_at(step: int, settings: Settings) -> float:
    """The learning rate of a step (from 1 on) as a share of its peak: a linear warm-up, then a cosine down to zero."""
    if step <= settings.warmup:
        return step / settings.warmup
    progress = (step - 1 - settings.warmup) / (settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


# --- measuring ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, tokenizer: Tokenizer, stories: list[str], stride: int) -> dict[str, float]:
    """Nats per character and per token of whole stories, each token predicted once from what precedes it.

    Each story follows one end token and is closed by one, which is predicted and counted, too; characters are those
    of the story alone. The window of `max_position_embeddings` tokens moves by `stride`, and each token counts in the
    first window that reaches it: it sees at least `window - stride` tokens before it, where the story has them.
    """
    window = model.config.max_position_embeddings
    windows = []  # pairs of inputs and targets; -100 marks what does not count
    for encoding in tokenizer.encode_batch(stories):
        story = np.array([END_ID, *encoding.ids, END_ID])
        predicted = 0  # targets up to here have been counted
        for start in range(0, max(1, len(story) - 1 - window + stride), stride):
            end = min(start + window, len(story) - 1)
            x, y = np.full(window, END_ID), np.full(window, -100)
            x[: end - start] = story[start:end]
            y[predicted - start : end - start] = story[predicted + 1 : end + 1]
            windows.append((x, y))
            predicted = end
    model.eval()
    nats, tokens = 0.0, 0
    for i in range(0, len(windows), 32):
        ids, labels = torch.tensor(np.array(windows[i : i + 32]), device=model.device).unbind(1)
        logits = model(ids, use_cache=False).logits.float()
        nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += int((labels >= 0).sum())
    return {"nats_per_character": nats / sum(map(len, stories)), "nats_per_token": nats / tokens}


@torch.no_grad()
def tell(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompt: str, count: int, max_tokens: int, seed: int
) -> list[tuple[str, int, bool]]:
    """`count` stories sampled at the recommended temperature: (text with its prompt, tokens told, whether it ended)."""
    model.eval()
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids] * count, device=model.device)
    options = SAMPLING | {"max_new_tokens": max_tokens, "pad_token_id": END_ID}
    told = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    stories = []
    for row in told.tolist():
        new = row[ids.shape[1] :]
        ended = END_ID in new
        stories.append((tokenizer.decode(row), new.index(END_ID) + 1 if ended else len(new), ended))
    return stories


def environment(device: torch.device) -> dict[str, str]:
    """The machine and the versions behind a result."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    if device.type != "cuda":
        return {"device": "cpu", **versions}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {"device": torch.cuda.get_device_name(device), "driver": driver, **versions}


# --- training -------------------------------------------------------------------------------------------------------
def train(settings: Settings, stories: list[str], device: torch.device) -> tuple[Qwen3ForCausalLM, Tokenizer, dict]:
    """Train tokenizer and model; returns them with the history: the loss curve, and stories told along the way."""
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    training, held_out = split_stories(stories)
    tokenizer = train_tokenizer(training, settings.vocab_size)
    model = build_model(settings).to(device)
    optimizers = build_optimizers(model, settings)
    on_gpu = device.type == "cuda"
    forward = torch.compile(model) if on_gpu else model
    every = max(1, settings.steps // settings.evaluations)
    story_steps = {every, 3 * every, 6 * every, settings.second_phase, settings.steps}
    curve: list[dict] = []
    samples, nats = [], torch.zeros((), device=device)
    for step, batch in enumerate(batches(settings, tokenizer, training), start=1):
        model.train()
        tokens = torch.from_numpy(batch).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = forward(tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_at(step, settings)
            optimizer.step()
            optimizer.zero_grad()
        nats += loss.detach()
        if step % every == 0 or step == settings.steps:
            measured = held_out_loss(model, tokenizer, held_out, settings.context)
            mean = nats.item() / (step - (curve[-1]["step"] if curve else 0))
            point = {"step": step, "phase": 1 + (step > settings.second_phase), "training_nats_per_token": mean}
            curve.append(point | {f"held_out_{name}": value for name, value in measured.items()})
            nats.zero_()
            print(json.dumps(curve[-1]), flush=True)
        if step in story_steps:
            text, _, _ = tell(model, tokenizer, PROMPT, 1, settings.context // 4, seed=1)[0]
            samples.append({"step": step, "text": text})
    history = {"seconds": round(time.perf_counter() - began, 1), "parameters": model.num_parameters()}
    history["training_stories"] = len(training)
    history["training_tokens"] = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(training))
    return model, tokenizer, history | {"curve": curve, "samples": samples}


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face checkpoint: weights in bf16, tokenizer, and how best to sample."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(**SAMPLING, pad_token_id=END_ID)
    model.to(torch.bfloat16).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    )  # fmt: skip
    fast.save_pretrained(folder)


def judge(folder: Path, held_out: list[str], device: torch.device, count: int = 50) -> dict:
    """What the saved checkpoint, read back, is worth: held-out loss in two protocols, and how its stories end."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    window = model.config.max_position_embeddings
    told = tell(model, tokenizer, PROMPT, count, window - len(tokenizer.encode(PROMPT).ids), seed=0)
    lengths = [tokens for _, tokens, ended in told if ended]
    return {
        "held_out_stories": len(held_out),
        "held_out_characters": sum(map(len, held_out)),
        "sliding": {"stride": window // 2, **held_out_loss(model, tokenizer, held_out, window // 2)},
        "non_overlapping": {"stride": window, **held_out_loss(model, tokenizer, held_out, window)},
        "told": count,
        "told_and_ended": len(lengths),
        "median_tokens_of_ended": float(np.median(lengths)) if lengths else None,
        "shortest_ended": min(lengths, default=None),
        "examples": [text for text, _, _ in told[:4]],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m minillm.lab.train", description=__doc__.splitlines()[0])
    corpus, assets = "notebooks/data/fairy_tales.txt.xz", "minillm/assets/story-6m"
    results = "notebooks/results/training_story-6m.json"
    parser.add_argument("--corpus", type=Path, default=REPOSITORY / corpus, help=f"default: {corpus}")
    parser.add_argument("--output", type=Path, help=f"checkpoint folder; default: {assets}")
    parser.add_argument("--results", type=Path, help=f"the history as JSON; default: {results}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model on 40 stories, to see that all of it runs")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    if options.quick and not (options.output and options.results):
        parser.error("--quick needs --output and --results: it must not replace the bundled model")
    output = options.output or REPOSITORY / assets
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if options.device == "auto" else options.device)
    settings = replace(QUICK if options.quick else Settings(), seed=options.seed)
    stories = read_stories(options.corpus)
    stories = sorted(stories, key=len)[:40] if options.quick else stories
    model, tokenizer, history = train(settings, stories, device)
    save(model, tokenizer, output)
    record = {
        "command": shlex.join(["python", "-m", "minillm.lab.train", *given]),
        "date": date.today().isoformat(),
        "environment": environment(device),
        "settings": asdict(settings),
        "final": judge(output, split_stories(stories)[1], device, count=4 if options.quick else 50),
        **history,
    }
    path = options.results or REPOSITORY / results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["final"], indent=1))


if __name__ == "__main__":
    main()
