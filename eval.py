"""Evaluate runs and compare them.

    python eval.py out/stdlib/ntp out/stdlib/cocomix                          # one table
    python eval.py out/stdlib/ntp out/stdlib/cocomix --plot=curves.png        # and a picture of their logs
    python eval.py --compare out/stdlib/ntp out/stdlib/cocomix                # the course of training against the first run's, from the logs alone
    python eval.py out/stdlib/cocomix --steering --plot=steering.png          # what turning its concepts does, and what it costs
    python eval.py                                                            # the newest checkpoint under out/
    python eval.py out/stdlib/ntp --tasks=piqa,arc_easy --limit=100           # and tasks, on their first 100 documents
    python eval.py --model=gpt2 --eval_data=DIR                               # GPT-2 on all seven, from files DIR/NAME.jsonl[.gz]
    python eval.py out/stdlib/ntp --every                                     # all that train.py --keep_checkpoints kept

Loss is the mean over all of val.bin, every token a target once, in blocks of block_size; perplexity is its
exponential. The concept loss and the hit rate (the share of the label concepts that are among the concept_k
predicted ones) are measured against the concept model the run was trained with; beside it stands the hit rate of
naming the same concept_k concepts, the commonest labels of val, at every position.

The paper's seven tasks give the numbers of lm-evaluation-harness 0.4. They run by themselves for a run in GPT-2's tokens,
and for any run with --eval_data or --tasks. Everything is computed in float32. Each evaluation adds a line to eval.jsonl in
the run's folder; --compare draws the paper's Figures 2 and 7 to 9 from them.
"""
import functools
import gzip
import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import config  # before torch: from here on Ctrl-C ends without a traceback
import torch

import concepts
import data
from config import UserError, key
from model import (RUN, chunk_rows, find_checkpoint, linear_cross_entropy, load_checkpoint, load_gpt, load_model, model_checkpoint, perplexity,
                   pick_device)


@dataclass(frozen=True)
class Config:
    tokens: int | None = key(None, "tokens of val to evaluate (none: all)", low=2)
    batch_size: int = key(16, "sequences at once", low=1)
    official: bool = key(False, "perplexity also as the official code has it: block_size - 1 targets a block, the remainder dropped")
    tasks: str = key("auto", "all, none or names: piqa,arc_easy; auto: all for a run in GPT-2's tokens or with eval_data, else none", bare="all", follows=r"[a-z_,]+$")
    eval_data: str | None = key(None, "folder with the tasks' documents, NAME.jsonl or NAME.jsonl.gz, fields as on the hub (none: from the hub)")
    limit: int | None = key(None, "documents of each task, the first ones (none: all)", low=1)
    model: str | None = key(None, "evaluate GPT-2 too: gpt2 (from the hub), or a folder or file of its weights")
    dataset: str | None = key(None, "whose val.bin, in GPT-2's tokens, --model is evaluated on (none: on none)")
    every: bool = key(False, "all checkpoints of a run (train.py --keep_checkpoints), not the last alone")
    compare: bool = key(False, "val loss over training and what the first run's end costs the others, read from the logs; nothing is evaluated")
    plot: str | None = key(None, "draw val loss against tokens, FLOPs and time into this .png, .svg or .pdf; no suffix: .png and .svg (--compare: out/compare)")
    steering: bool = key(False, "steer by the most used concepts: how often their own tokens come, and the perplexity, by factor")
    steered: int = key(32, "so many concepts, those that the run predicts most", low=1)
    write: str | None = key(None, "append the rows to this .jsonl file")
    device: str = key("auto", "cpu, cuda, mps; auto takes the fastest there is")


# ---------------------------------------------------------------------------------------------------
# Validation loss

@torch.no_grad()
def evaluate(content, model, device, tokens=None, batch_size=16):
    """A checkpoint's content and its model → dict: loss (nats), perplexity, and for a CoCoMix run concept_loss,
    label_concepts (how many concepts are ever a label), hit_rate and fixed_hit_rate."""
    concept_model = concepts.of_run(content, device)
    val = data.tokens_of_run(content, "val")[:None if tokens is None else tokens + 1]
    loss, concept_loss, hits, count = 0.0, 0.0, 0.0, 0
    labelled = torch.zeros(model.config.n_concepts, dtype=torch.long, device=device)
    with config.progress(len(val) - 1, "evaluate", "tok", unit_scale=True, leave=False) as bar:
        for x, y in data.sequential(val, model.config.block_size, batch_size, model.config.vocab_size):
            x, y = x.to(device), y.to(device)
            labels = None if concept_model is None else concept_model.labels(x, y)
            out = model(x, y, labels)
            loss += out.loss.item() * y.numel()
            if labels is not None:
                concept_loss += out.concept_loss.item() * y.numel()
            if out.concepts is not None:
                hits += (labels[..., :, None] == out.concepts.indices[..., None, :]).any(-1).float().mean(-1).sum().item()
                labelled += torch.bincount(labels.flatten(), minlength=len(labelled))
            count += y.numel()
            bar.update(y.numel())
    row = dict(loss=loss / count, perplexity=perplexity(loss / count), val_tokens=count)
    if concept_model is not None:
        row["concept_loss"] = concept_loss / count
    if model.config.insert == "concept":
        row |= dict(label_concepts=(labelled > 0).sum().item(), hit_rate=hits / count, fixed_hit_rate=(labelled.topk(model.config.concept_k).values.sum() / labelled.sum()).item())
    return row


@torch.no_grad()
def official_perplexity(content, model, device, tokens=None, batch_size=16):
    """Perplexity as the official code has it: each block of block_size tokens predicts all but its first, what is left over is dropped."""
    size = model.config.block_size
    val = data.tokens_of_run(content, "val")[:tokens]
    if len(val) < size:
        raise UserError(f"official: val has {len(val)} tokens, less than one block of {size}")
    blocks = torch.from_numpy(val[:len(val) // size * size].astype("int64")).view(-1, size).to(device)
    loss = sum(model(rows[:, :-1], rows[:, 1:]).loss.item() * len(rows) for rows in blocks.split(batch_size))
    return perplexity(loss / len(blocks))


# ---------------------------------------------------------------------------------------------------
# The seven tasks: prompts and preprocessing of lm-evaluation-harness 0.4, zero-shot

class Question(NamedTuple):
    """What a document asks of a model: how likely is each continuation after its context?"""
    pairs: list    # [(context, continuation)], texts; context None: the whole text, in windows
    gold: int = 0  # which pair is right


class Task(NamedTuple):
    hub: tuple       # its documents there: (dataset, configuration or None, split)
    ask: Callable    # document → Question
    score: Callable  # (document, Question, [(log-likelihood, is it the likeliest?) of each pair]) → {metric: (value, count)}, to be summed up
    metrics: tuple   # the paper's first


def choice(context, endings, gold):
    pairs, gold = [(context, " " + ending) for ending in endings], int(gold)
    if not 0 <= gold < len(pairs):
        raise ValueError(f"the right ending is said to be number {gold} of {len(pairs)}")
    return Question(pairs, gold)


def score_choice(doc, question, answers):
    """acc: the likeliest ending is right; acc_norm: the likeliest by its characters, the space before them not counted."""
    whole = [loglikelihood for loglikelihood, _ in answers]
    each = [loglikelihood / max(1, len(ending) - 1) for loglikelihood, (_, ending) in zip(whole, question.pairs)]
    return {name: (scores.index(max(scores)) == question.gold, 1) for name, scores in (("acc", whole), ("acc_norm", each))}


def hellaswag(doc):
    def clean(text):  # brackets are left over from WikiHow
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    return choice(clean(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"), map(clean, doc["endings"]), doc["label"])


def piqa(doc):
    return choice(f"Question: {doc['goal']}\nAnswer:", (doc["sol1"], doc["sol2"]), doc["label"])


def social_iqa(doc):
    return choice(f"Q: {doc['context']} {doc['question']}\nA:", (doc["answerA"], doc["answerB"], doc["answerC"]), int(doc["label"]) - 1)


def arc_easy(doc):
    return choice(f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"]))


def winogrande(doc):  # the options end the context; what follows the gap is the continuation of both
    before, _, after = doc["sentence"].partition("_")
    return Question([(before + doc[option], " " + after.strip()) for option in ("option1", "option2")], int(doc["answer"]) - 1)


def lambada(doc):
    start, _, last_word = doc["text"].rpartition(" ")
    return Question([(start, " " + last_word)])


def score_lambada(doc, question, answers):
    (loglikelihood, likeliest), = answers
    return dict(perplexity=(loglikelihood, 1), acc=(likeliest, 1))


UNDO_SPACING = (  # of WikiText: pattern → replacement, in this order
    ("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."), *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))


def wikitext(doc):
    return Question([(None, functools.reduce(lambda text, edit: re.sub(*edit, text), UNDO_SPACING, doc["page"]))])


def score_wikitext(doc, question, answers):  # words and bytes of the page as it was
    total = sum(loglikelihood for loglikelihood, _ in answers)
    return dict(word_perplexity=(total, len(re.split(r"\s+", doc["page"]))), byte_perplexity=(total, len(doc["page"].encode())))


TASKS = dict(
    lambada_openai=Task(("EleutherAI/lambada_openai", "default", "test"), lambada, score_lambada, ("perplexity", "acc")),
    wikitext=Task(("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"), wikitext, score_wikitext, ("word_perplexity", "byte_perplexity")),
    hellaswag=Task(("Rowan/hellaswag", None, "validation"), hellaswag, score_choice, ("acc_norm", "acc")),
    piqa=Task(("baber/piqa", None, "validation"), piqa, score_choice, ("acc", "acc_norm")),
    social_iqa=Task(("lighteval/siqa", None, "validation"), social_iqa, score_choice, ("acc",)),
    arc_easy=Task(("allenai/ai2_arc", "ARC-Easy", "test"), arc_easy, score_choice, ("acc", "acc_norm")),
    winogrande=Task(("allenai/winogrande", "winogrande_xl", "validation"), winogrande, score_choice, ("acc",)))


# ---------------------------------------------------------------------------------------------------
# Log-likelihoods

def encode(tokenizer, context, continuation, block_size):
    """Two texts → [(context, continuation)] in tokens, split as the harness splits them.

    White space at the context's end goes to the continuation, whose tokens are those of the joined text beyond the context's; an
    empty context is the end-of-text token. Context None: the text in windows of block_size targets, the first after the end-of-text
    token, the next each after the one token before it; the last and shorter one with a full window of context.
    """
    if context is not None:
        before = tokenizer.encode_ordinary(context.rstrip())
        return [(before or [tokenizer.eot_token], tokenizer.encode_ordinary(context + continuation)[len(before):])]
    tokens = [tokenizer.eot_token] + tokenizer.encode_ordinary(continuation)
    ends = [*range(block_size + 1, len(tokens), block_size), len(tokens)]
    return [(tokens[max(0, end - block_size - 1):start], tokens[start:end]) for start, end in zip([1, *ends], ends) if start < end]


class Sequence(NamedTuple):
    """What goes through the model as one row: a context and then, one after the other, what follows it in each of the pairs."""
    tokens: list     # T
    positions: list  # T: of each token in its own text
    branch: list     # T: 0 for what the pairs share, 1, 2, … for what is a pair's own
    scored: list     # [(place in tokens, the token that should come next, the pair's number)]


def side_by_side(pairs, block_size):
    """{number: (context, continuation) in tokens} → one Sequence."""
    texts = {i: (context + continuation)[-block_size - 1:] for i, (context, continuation) in pairs.items()}
    tokens = list(os.path.commonprefix([text[:-1] for text in texts.values()]))
    shared = len(tokens)
    positions, branch, scored = list(range(shared)), [0] * shared, []
    for n, (i, text) in enumerate(texts.items(), 1):
        end, before = len(text) - 1, len(tokens) - shared  # tokens of other pairs before this one's own
        tokens += text[shared:end]
        positions += range(shared, end)
        branch += [n] * (end - shared)
        scored += [(at if at < shared else at + before, text[at + 1], i) for at in range(max(0, end - len(pairs[i][1])), end)]
    return Sequence(tokens, positions, branch, scored)


@torch.no_grad()
def loglikelihoods(model, questions, batch_size, title="evaluate"):
    """[[(context, continuation), …] a question], in tokens → [[(log-likelihood in nats, is it the likeliest?), …] a question].

    Of context and continuation the last block_size + 1 tokens are kept; a continuation that is longer, which the harness refuses,
    counts by its end. A question is one sequence: the keys and values of its context are computed once, and each continuation sees
    them and itself. Texts that fill the model's window are sequences of their own: cut, they begin at different tokens. The plain
    way is a sequence a pair.
    """
    size, device = model.config.block_size, model.wte.weight.device
    numbers, total, sequences = itertools.count(), sum(map(len, questions)), []
    for question in questions:
        pairs = {i: pair for pair, i in zip(question, numbers)}
        full = any(len(context) + len(continuation) > size for context, continuation in question)
        sequences += [side_by_side(group, size) for group in ([{i: pair} for i, pair in pairs.items()] if full else [pairs]) if group]
    sequences.sort(key=lambda sequence: len(sequence.tokens), reverse=True)
    loglikelihood, likeliest = torch.zeros(total, dtype=torch.float64), torch.ones(total, dtype=torch.bool)
    with config.progress(total, title, "text", leave=False) as bar:
        for i in range(0, len(sequences), batch_size):
            batch = sequences[i:i + batch_size]
            width = len(batch[0].tokens)
            tokens, positions, branch = (torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device) for rows in list(zip(*batch))[:3])
            mask = ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])).tril() if branch.any() else None
            h = model.blocks(model.embed(tokens, positions=positions), 0, model.config.n_layer, mask=mask)[0].flatten(0, 1)
            at, token, pair = torch.tensor([(width * row + place, token, i) for row, sequence in enumerate(batch) for place, token, i in sequence.scored]).T
            logp, best = next_token(model, h, at.to(device), token.to(device))
            loglikelihood.index_add_(0, pair, logp.cpu().double())
            likeliest[pair[~best.cpu()]] = False
            bar.update(len(pair.unique()))
    answers = iter(zip(loglikelihood.tolist(), likeliest.tolist()))
    return [list(itertools.islice(answers, len(pairs))) for pairs in questions]


def next_token(model, h, at, token):
    """Hidden states h (N, d), at the places `at` (M,): (the log-probability that `token` (M,) comes next, whether it is the likeliest), (M,).
    Logits are made for these places alone, each once, a few at a time."""
    places, which = at.unique(return_inverse=True)
    logp, best = h.new_empty(len(at)), torch.empty_like(at, dtype=torch.bool)
    rows = chunk_rows(h.device, model.config.vocab_size)
    for i in range(0, len(places), rows):
        z = model.head(h[places[i:i + rows]])
        here = (which >= i) & (which < i + rows)
        row = which[here] - i
        largest = z.amax(-1, keepdim=True)
        above = z[row, token[here]] - largest[row, 0]  # before z is overwritten
        logp[here], best[here] = above - z.sub_(largest).exp_().sum(-1).log()[row], above == 0
    return logp, best


# ---------------------------------------------------------------------------------------------------
# From documents to numbers

def documents(name, folder, limit):
    """The documents of a task, dicts with the hub's fields: from folder/NAME.jsonl[.gz], without a folder from the hub."""
    dataset, configuration, split = TASKS[name].hub
    if folder is None:
        try:
            import logging

            import datasets
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news; what fails is said below
            datasets.disable_progress_bars()
            print(f"fetching {dataset}", flush=True)
            return list(itertools.islice(datasets.load_dataset(dataset, configuration, split=split), limit))
        except Exception as e:  # offline it raises one of many kinds
            raise UserError(f"{dataset} can't be fetched ({type(e).__name__}); with no network, bring the documents as DIR/{name}.jsonl: --eval_data=DIR") from e
    path = next((path for path in (Path(folder, f"{name}.jsonl"), Path(folder, f"{name}.jsonl.gz")) if path.is_file()), None)
    if path is None:
        raise UserError(f"no {name}.jsonl or {name}.jsonl.gz in {folder}: the documents of {dataset}, a JSON object a line; --tasks chooses other tasks")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in itertools.islice(file, limit)]
    except (ValueError, EOFError, gzip.BadGzipFile) as e:
        raise UserError(f"{path} can't be read as a JSON object a line ({type(e).__name__}): cut short or damaged") from e
    if not found:
        raise UserError(f"{path} is empty: expected the documents of {dataset}, a JSON object a line")
    return found


def mean_and_error(parts):
    """[(value, count)] of documents → (Σ value / Σ count, its standard error: that of a mean, or of a ratio where counts differ)."""
    n, count = len(parts), sum(c for _, c in parts)
    mean = math.fsum(x for x, _ in parts) / count
    spread = math.fsum((x - mean * c) ** 2 for x, c in parts)
    return mean, math.sqrt(spread * n / (n - 1)) / count if n > 1 else None


def run_task(name, docs, model, tokenizer, batch_size):
    """One task → dict: NAME/METRIC and NAME/METRIC_stderr for each of its metrics; NAME/examples, NAME/cut (texts that lost their
    start, being longer than block_size + 1 tokens), NAME/seconds.

    Standard errors of accuracies are the harness's. That of a perplexity is the perplexity times that of the mean log-likelihood; the
    harness resamples LAMBADA's, which comes to the same where it is small beside the perplexity, and gives none for WikiText.
    """
    task, size, start = TASKS[name], model.config.block_size, time.perf_counter()
    try:
        questions = [task.ask(doc) for doc in docs]
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{name}: a document has not the fields of {task.hub[0]} ({type(e).__name__}: {e})") from e
    pairs = [[pair for texts in question.pairs for pair in encode(tokenizer, *texts, size)] for question in questions]
    answers = loglikelihoods(model, pairs, batch_size, name)
    parts = [task.score(*each) for each in zip(docs, questions, answers)]
    row = {}
    for metric in task.metrics:
        value, error = mean_and_error([part[metric] for part in parts])
        if "perplexity" in metric:
            value = perplexity(-value)
            error = error and value * error
        row |= {f"{name}/{metric}": value, f"{name}/{metric}_stderr": error}
    cut = sum(len(context) + len(continuation) > size + 1 for question in pairs for context, continuation in question)
    return row | {f"{name}/examples": len(docs), f"{name}/cut": cut, f"{name}/seconds": time.perf_counter() - start}


# The paper's eight measures, as Table 1 heads them, and its plain means over some of them
MEASURES = {"perplexity": "val ppl", "lambada_openai/perplexity": "LAMBADA ppl", "wikitext/word_perplexity": "WikiText ppl", "hellaswag/acc_norm": "HellaSwag",
            "piqa/acc": "PIQA", "social_iqa/acc": "SIQA", "arc_easy/acc": "ARC-e", "winogrande/acc": "WinoG"}
AVERAGES = dict(average_perplexity=slice(0, 3), task_perplexity=slice(1, 3), average_accuracy=slice(3, 8))  # Table 1, Figures 2 and 4, both


def averages(row):
    """Those of AVERAGES that have all their parts in row."""
    parts = {name: [row.get(measure) for measure in list(MEASURES)[which]] for name, which in AVERAGES.items()}
    return {name: statistics.fmean(values) for name, values in parts.items() if None not in values}


# ---------------------------------------------------------------------------------------------------
# Tables and curves

def training(log):
    """What a run's log says of its training: steps, tokens, seconds, tokens/s, FLOPs a token, machine."""
    start = log[0]
    steps = [line for line in log if "loss" in line]
    end = steps[-1] if steps else dict(step=0, tokens=0, seconds=0.0)
    return dict(step=end["step"], tokens=end["tokens"], seconds=end["seconds"], tokens_per_s=end["tokens"] / end["seconds"] if end["seconds"] else None,
                **{name: start.get(name) for name in ("flops_per_token", "device", "torch", "source_hash", "active_params", "params")})


COLUMNS = (("run", "run", "{}"), ("method", "method", "{}"), ("mix", "mix", "{}"), ("select", "labels by", "{}"), ("loss", "val loss", "{:.4f}"), ("perplexity", "perplexity", "{:.2f}"), ("tokens", "tokens", "{:,}"),
           ("tokens_per_s", "tokens/s", "{:,.0f}"), ("seconds", "train s", "{:.0f}"), ("active_params", "active", "{:,}"), ("params", "params", "{:,}"),
           ("concept_loss", "concept loss", "{:.3f}"), ("label_concepts", "label concepts", "{:,}"), ("hit_rate", "hit rate", "{:.1%}"), ("fixed_hit_rate", "by commonest", "{:.1%}"), ("official_perplexity", "official ppl", "{:.2f}"))
TABLE_1 = (("run", "run", "{}"), ("tokens", "tokens", "{:,}"), *((measure, title, "{:,.2f}" if title.endswith("ppl") else "{:.1%}") for measure, title in MEASURES.items()),
           ("average_perplexity", "avg ppl", "{:,.2f}"), ("average_accuracy", "avg acc", "{:.1%}"))
DETAILS = (("task", "task", "{}"), ("metric", "metric", "{}"), ("value", "value", "{:,.4f}"), ("stderr", "± stderr", "{:,.4f}"), ("examples", "examples", "{:,}"),
           ("cut", "cut", "{:,}"), ("seconds", "seconds", "{:.1f}"), ("speed", "examples/s", "{:.1f}"))


def details(row, names):
    """The rows of a table of all metrics of the tasks `names`, with their standard errors and how long each task took."""
    rows = []
    for name in names:
        examples, cut, seconds = (row[f"{name}/{what}"] for what in ("examples", "cut", "seconds"))
        rows += [dict(task=name, metric=metric, value=row[f"{name}/{metric}"], stderr=row[f"{name}/{metric}_stderr"]) for metric in TASKS[name].metrics]
        rows[-len(TASKS[name].metrics)] |= dict(examples=examples, cut=cut, seconds=seconds, speed=examples / seconds)
    return rows


def table(rows, columns=COLUMNS):
    """Rows (dicts) as lines of text, a column for each of columns that some row has; – where one has no value."""
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[title for _, title, _ in columns]] + [["–" if row.get(name) is None else form.format(row[name]) for name, _, form in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [form == "{}" for _, _, form in columns]
    lines = ["  ".join(cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(row, widths, left)) for row in cells]
    return "\n".join([lines[0], "─" * len(lines[0])] + lines[1:])


def log_of(run):
    """The log.jsonl of a run's folder, or the log itself (results/ keeps logs by name)."""
    path = Path(run) if str(run).endswith(".jsonl") else Path(run) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log at {path}: name a run's folder or a log of one")
    return path


def named(paths):
    """[(a short name, path)]: of the run's folder, or the log's own; with the folders above it where two would be alike."""
    runs = [path.parent if path.name in ("ckpt.pt", "log.jsonl") else path.with_suffix("") for path in paths]
    names = [run.name for run in runs]
    return list(zip(names if len(set(names)) == len(names) else map(str, runs), paths))


class Curve(NamedTuple):
    """The course of one method's training, at the evaluations that all of its seeds share."""
    tokens: list[int]
    seeds: list[int]
    losses: list[list[float]]  # of each seed, at each of tokens
    seconds: list[float]       # of training, at each seed's median tokens/s (other work and pauses leave it alone), mean over the seeds
    flops_per_token: float     # with those that make the labels, wherever they were made

    @property
    def loss(self):
        """Mean over the seeds."""
        return [statistics.fmean(at) for at in zip(*self.losses)]

    def at(self, tokens):
        """{seed: its loss} after so many tokens."""
        return {seed: losses[self.tokens.index(tokens)] for seed, losses in zip(self.seeds, self.losses)}


def spread(values, form=".3f"):
    """Numbers as text: their mean, with half the distance between the least and the largest where there are several."""
    values = list(values)
    mean = f"{statistics.fmean(values):{form}}"
    mean = mean.removeprefix("-") if not mean.strip("-0.%") else mean  # no -0.000
    return mean + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "")


def curves(logs):
    """{name: log lines} → {name: Curve}. Logs called NAME-SEED, with the seed they were trained with, are one method NAME."""
    groups = {}
    for name, log in logs.items():
        seed = str(log[0].get("seed")) if log else "None"
        groups.setdefault(name.removesuffix(f"-{seed}"), []).append(log)
    found = {}
    for name, group in groups.items():
        points = [{line["tokens"]: line for line in log if line.get("tokens") and {"val_loss", "seconds"} <= line.keys()} for log in group]
        shared = sorted(set.intersection(*map(set, points)))
        if not shared:
            raise UserError(f"{name}: no evaluation after the start is in its log" + ("s" if len(group) > 1 else "") + "; train on, or with a smaller --eval_interval")
        start = group[0][0]
        speeds = [statistics.median([line["tokens_per_s"] for line in log if "tokens_per_s" in line] or [max(at) / at[max(at)]["seconds"]]) for log, at in zip(group, points)]
        found[name] = Curve(shared, [log[0].get("seed") for log in group], [[at[t]["val_loss"] for t in shared] for at in points],
                            [statistics.fmean(t / speed for speed in speeds) for t in shared],
                            (start.get("flops_per_token") or 0) + (start.get("concept_flops_per_token") or 0))
    return found


def tokens_to_reach(tokens, losses, goal):
    """Tokens after which a course is first at or below the loss `goal`, linear between its evaluations; None if it never is."""
    before = None
    for at, value in zip(tokens, losses):
        if value <= goal:
            return at if before is None else before[0] + (at - before[0]) * (before[1] - goal) / (before[1] - value)
        before = at, value
    return None


def shared_tokens(runs):
    """After how many tokens all of {name: Curve} were evaluated, in order. UserError: never."""
    shared = sorted(set.intersection(*(set(run.tokens) for run in runs.values())))
    if not shared:
        raise UserError("these runs share no evaluation: compare runs of one eval_interval and batch size")
    return shared


def course(runs, columns=4):
    """{name: Curve} as a Markdown table: val loss at up to `columns` evaluations that all share; what the last is over the first
    run's; what it takes to come to the first run's last loss, in tokens and in FLOPs, as shares of the first run's; FLOPs and
    seconds of the whole run. What is set against the first run is so seed by seed (seeds share batches and what they start
    from, so this varies less than the losses do). ±: half the distance between the least and the largest over the seeds."""
    shared = shared_tokens(runs)
    n = min(columns, len(shared))
    shown = [shared[round((i + 1) * len(shared) / n) - 1] for i in range(n)]
    first = next(iter(runs.values()))
    end, goals = shared[-1], first.at(shared[-1])
    rows = [["run", "seeds", *(f"loss at {tokens / 1e6:.2f}M" for tokens in shown), "over the first", "tokens needed", "FLOPs needed", "FLOPs", "seconds"]]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for name, run in runs.items():
        pairs = [(goals[seed], losses) for seed, losses in zip(run.seeds, run.losses) if seed in goals]
        over = tokens = flops = "–"
        if run is not first and pairs:
            over = spread(losses[run.tokens.index(end)] - goal for goal, losses in pairs)
            needed = [tokens_to_reach(run.tokens, losses, goal) for goal, losses in pairs]
            tokens = flops = "not reached"
            if None not in needed:
                tokens, flops = spread((n / end for n in needed), ".1%"), "–"
                if run.flops_per_token and first.flops_per_token:
                    flops = spread((n / end * run.flops_per_token / first.flops_per_token for n in needed), ".1%")
        rows.append([name, str(len(run.losses)), *(spread(run.at(t).values()) for t in shown), over, tokens, flops,
                     f"{run.flops_per_token * run.tokens[-1]:.2e}" if run.flops_per_token else "–", f"{run.seconds[-1]:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(path, runs, panels=None):
    """{name: Curve}: val loss against tokens, FLOPs and training time, a line for each, a band from its best to its worst seed;
    the steep first fifth of the tokens may be above the picture. panels {title: names}: a row of them for each, instead of all in
    one. A path without a suffix gives a .png and an .svg; returns the paths."""
    plt = config.pyplot()
    panels = {title: some for title, names in (panels or {}).items() if (some := [name for name in names if name in runs])} or {"": list(runs)}
    figure, rows = plt.subplots(len(panels), 3, figsize=(13, 4 if len(panels) == 1 else 3 * len(panels)), sharey="row", squeeze=False, layout="constrained")
    for (title, names), axes in zip(panels.items(), rows):
        late = []
        for name in names:
            run = runs[name]
            best, worst = ([pick(at) for at in zip(*run.losses)] for pick in (min, max))
            late += [loss for losses in (best, worst) for tokens, loss in zip(run.tokens, losses) if tokens >= run.tokens[-1] / 5]
            for axis, at in zip(axes, (run.tokens, [t * run.flops_per_token for t in run.tokens], run.seconds)):
                line, = axis.plot(at, run.loss, marker="o", markersize=3, label=name)
                if len(run.losses) > 1:
                    axis.fill_between(at, best, worst, color=line.get_color(), alpha=0.2, linewidth=0)
        margin = 0.05 * (max(late) - min(late)) or 0.1
        axes[0].set_ylim(min(late) - margin, max(late) + margin)
        for axis, label in zip(axes, ("training tokens", "training FLOPs", "training time (s)")):
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
        axes[0].set_ylabel("validation loss (nats a token)")
        axes[0].set_title(title, loc="left", fontsize=10)
        axes[0].legend(frameon=False, fontsize=7 if len(names) > 6 else None)
    return save_pictures(figure, Path(path))


def save_pictures(figure, path):
    """Write a figure and close it: to path, without a suffix to a .png and an .svg; returns the paths as text."""
    paths = [path] if path.suffix else [Path(f"{path}.png"), Path(f"{path}.svg")]
    for path in paths:
        config.save_figure(figure, path)
    config.pyplot().close(figure)
    return " ".join(map(str, paths))


def plot_tasks(path, evaluations):
    """The paper's measures against training tokens, a line a run, from {name: lines of its eval.jsonl}, beside path: NAME-averages as
    Figure 2 has them, NAME-tasks as Figures 7 to 9. Of several evaluations of a checkpoint the last of the fullest stands. Returns the paths."""
    plt, path, found = config.pyplot(), Path(path), {}
    for name, lines in evaluations.items():
        at = {}
        for line in sorted(lines, key=lambda line: (line.get("limit") or math.inf, line.get("val_tokens", 0))):
            at.setdefault(line["tokens"], {}).update(line)
        found[name] = sorted(at.items())
    titles = {**MEASURES, "task_perplexity": "mean ppl (LAMBADA, WikiText)", "average_accuracy": "mean accuracy (5 tasks)"}
    written = []
    for which, measures, (rows, columns) in (("averages", ("perplexity", "task_perplexity", "average_accuracy"), (1, 3)), ("tasks", MEASURES, (2, 4))):
        figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 3 * rows), layout="constrained")
        for axis, measure in zip(axes.flat, measures):
            for name, lines in found.items():
                points = [(tokens, line[measure]) for tokens, line in lines if measure in line]
                axis.plot([tokens for tokens, _ in points], [value for _, value in points], marker="o", markersize=3, label=name)
            axis.set_title(titles[measure], fontsize=10)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
            if "acc" in measure:
                axis.yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1, decimals=1))
        figure.supxlabel("training tokens", fontsize=10)
        axes.flat[0].legend(frameon=False)
        written.append(save_pictures(figure, path.with_stem(f"{path.stem}-{which}")))
    return " ".join(written)


# ---------------------------------------------------------------------------------------------------
# Steering

FACTORS = (-10.0, -5.0, -2.0, 0.0, 1.0, 2.0, 5.0, 10.0)  # 1 is plain
PROMPTS, PROMPT, NEW, COST = 32, 16, 64, 2048  # prompts, their tokens, the tokens generated; tokens for the perplexity


@torch.no_grad()
def steering(path, content, device, steered):
    """What steering by a concept does and what it costs, for the `steered` concepts that the run predicts most (and
    that were labels, so that they have own tokens): rows with speaker, concept, factor, own, tokens, loss.

    A concept's own tokens are its dictionary's (concepts.py): the NAME tokens that follow it most typically in the *training*
    text, so they don't depend on anything measured here. Each of PROMPTS beginnings of *val* blocks, PROMPT tokens, is
    continued by NEW tokens (temperature 1, all tokens), the concept's logit times the factor at every position:

        own    how many of the generated `tokens` are the concept's own; at factor 1, the plain count: the same prompts, the same
               tokens counted, the same luck (one random number a token for all factors; other luck for other concepts)
        loss   nats a token on COST tokens of val under the same steering, each given those before it: what it does to text
               that has nothing to do with the concept. Its exponential is the perplexity.

    The speakers are the run ("CoCoMix") and its frozen concept model, steered at the same concept in the SAE's space
    (concepts.SteeredSAE). A factor of 10 need not be as strong for the one as for
    the other: compare rates at equal perplexities. A rate can rise because the concept is written about, or because its
    tokens are merely pasted in; the perplexity tells the two apart only in part.
    """
    model = load_model(content, device)
    d = concepts.dictionary_of(path, content, model, device)
    concept_model = concepts.of_run(content, device)
    chosen = [c for c in d.predicted.argsort(descending=True, stable=True).tolist() if d.predicted[c] and d.own[c, 0] >= 0][:steered]
    C, val = model.config.n_concepts, data.tokens_of_run(content, "val")
    rows = []
    for name, speaker in (("CoCoMix", model), ("concept model", concepts.steerable(concept_model))):
        c = speaker.config
        T = min(c.block_size, model.config.block_size)
        blocks = data.Batches(val, T, 1, c.vocab_size, shift=False)
        n = lambda most: range(min(most, blocks.blocks))
        prompts = torch.cat([blocks[i][0][:, :PROMPT] for i in n(PROMPTS)]).to(device)
        below = [(speaker.blocks(speaker.embed(x.to(device)), 0, c.insert_layer)[0], y.to(device)) for x, y in (blocks[i] for i in n(-(-COST // T)))]  # no factor reaches these
        with config.progress(len(chosen), f"steer {name}", "concept", leave=False) as bar:
            for concept in chosen:
                scale = torch.ones(len(FACTORS), 1, C, device=device)
                scale[:, 0, concept] = torch.tensor(FACTORS, device=device)
                texts = speaker.generate(prompts, NEW, scale=scale, generator=torch.Generator(device).manual_seed(concept))[:, prompts.shape[1]:]
                own = torch.isin(texts, d.own[concept, :concepts.NAME].to(device)).view(len(FACTORS), -1)
                for factor, s, hits in zip(FACTORS, scale, own):
                    loss = [linear_cross_entropy(speaker.ln_f(speaker.blocks(h, c.insert_layer, c.n_layer, scale=s)[0]), speaker.wte.weight, y, c.vocab_size)[0].item() for h, y in below]
                    rows.append(dict(speaker=name, concept=concept, factor=factor, own=hits.sum().item(), tokens=hits.numel(), loss=sum(loss) / len(loss)))
                bar.update()
    return rows


def steering_summary(rows):
    """Rows of `steering`, averaged over its concepts: speaker, factor, rate, gain, its standard error, raised, perplexity.

    rate: the share of own tokens. gain: the geometric mean over the concepts of (own + 1) / (own, plain, + 1), so that each
    concept counts alike and one whose tokens never came plain does not count without end; its standard error is over the
    concepts, to first order. raised: the share of concepts whose own tokens came oftener than plain.
    """
    summary = []
    for speaker in dict.fromkeys(row["speaker"] for row in rows):
        at = {factor: [row for row in rows if row["speaker"] == speaker and row["factor"] == factor] for factor in FACTORS}
        own = lambda some: torch.tensor([row["own"] for row in some], dtype=torch.float64)
        for factor, some in at.items():
            logs = ((own(some) + 1) / (own(at[1.0]) + 1)).log()
            gain, error = logs.mean().exp().item(), logs.std(correction=min(1, len(logs) - 1)).item() / len(logs) ** 0.5
            summary.append(dict(speaker=speaker, factor=factor, rate=sum(row["own"] / row["tokens"] for row in some) / len(some), gain=gain, gain_error=gain * error,
                                raised=(logs > 0).double().mean().item(), perplexity=perplexity(sum(row["loss"] for row in some) / len(some))))
    return summary


STEERING = (("speaker", "model", "{}"), ("factor", "factor", "{:g}"), ("rate", "own tokens", "{:.2%}"), ("gain", "× plain", "{:.2f}"), ("gain_error", "± s.e.", "{:.2f}"),
            ("raised", "concepts raised", "{:.0%}"), ("perplexity", "val perplexity", "{:.1f}"))


def plot_steering(path, summary):
    """Own tokens over plain, and perplexity, by factor; and the one against the other: a line a model."""
    plt = config.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for speaker in dict.fromkeys(row["speaker"] for row in summary):
        some = [row for row in summary if row["speaker"] == speaker]
        values = {name: [row[name] for row in some] for name in some[0]}
        plain = next(row["perplexity"] for row in some if row["factor"] == 1)
        cost = [p / plain - 1 for p in values["perplexity"]]
        axes[0].errorbar(values["factor"], values["gain"], values["gain_error"], marker="o", markersize=4, capsize=2, label=speaker)
        axes[1].plot(values["factor"], [100 * c for c in cost], marker="o", markersize=4)
        dear = [(100 * c, *rest) for c, *rest in zip(cost, values["gain"], values["gain_error"], values["factor"]) if c > 0]  # the others have no place on a log scale
        axes[2].errorbar([d[0] for d in dear], [d[1] for d in dear], [d[2] for d in dear], marker="o", markersize=4, capsize=2, linestyle="none")
        for x, y, _, factor in dear:
            axes[2].annotate(f"{factor:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    for axis, x, y in zip(axes, ("factor", "factor", "val perplexity, % over plain"), ("rate of own tokens over plain", "val perplexity, % over plain", "rate of own tokens over plain")):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[2].set_xscale("log")
    axes[0].legend(frameon=False)
    config.save_figure(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------
# The command

def chosen_tasks(cfg, tokenizer):
    """{name: documents} of the tasks that are to run for a model of this tokenizer (its hash)."""
    by_itself = cfg.tasks == "auto" and not cfg.eval_data
    if cfg.tasks == "none" or by_itself and tokenizer != "gpt2":
        return {}
    names = TASKS if cfg.tasks in ("all", "auto") else cfg.tasks.split(",")
    for name in names:
        if name not in TASKS:
            raise UserError(f"tasks={cfg.tasks!r}: no task {name!r}; there are {', '.join(TASKS)}")
    try:
        return {name: documents(name, cfg.eval_data, cfg.limit) for name in names}
    except UserError as e:
        if not by_itself:
            raise
        print(f"the tasks are left out: {e}")
        return {}


def evaluate_run(name, content, model, log, tasks, device, cfg):
    """A row of the tables for a checkpoint's content and its model; log: the run's lines so far, maybe none; tasks {name: documents}.
    Prints the tasks' details."""
    trained = content["train_config"]
    row = dict(run=name, method=trained["method"])
    if model.config.insert != "none":
        row["mix"] = trained["mix"]
    if model.config.insert == "concept":
        row["select"] = trained["select"]
    if log:
        row |= training(log)
    if "step" in content:
        row |= dict(step=content["step"], tokens=content["step"] * trained["batch_size"] * trained["block_size"])
    if trained["dataset"] is not None:
        row |= evaluate(content, model, device, cfg.tokens, cfg.batch_size)
        if cfg.official:
            row["official_perplexity"] = official_perplexity(content, model, device, cfg.tokens, cfg.batch_size)
    elif not tasks:
        raise UserError(f"nothing to evaluate {name} on: --dataset=NAME names a val.bin in GPT-2's tokens, --eval_data=DIR the tasks' documents")
    if tasks:
        tokenizer = data.load_tokenizer(content["tokenizer"])
        for task, docs in tasks.items():
            row |= run_task(task, docs, model, tokenizer, cfg.batch_size)
        row |= averages(row)
        after = f" after {row['tokens']:,} tokens" if "tokens" in row else ""
        print(f"{name}{after}, on {device}:\n{table(details(row, tasks), DETAILS)}\n")
    return row


def append(path, row):
    """Add a row to a .jsonl file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")


def evaluate_all(cfg, runs, device):
    """Evaluate runs, and cfg.model: (rows of the tables, {name: log}). Each checkpoint's row goes to its run's eval.jsonl."""
    rows, logs, tasks = [], {}, functools.cache(functools.partial(chosen_tasks, cfg))
    for name, path in named([find_checkpoint(run) for run in runs or [None][:cfg.model is None]]):
        checkpoints = sorted(path.parent.glob("step_*.pt"), key=lambda p: int(p.stem[5:])) if cfg.every else [path]
        if not checkpoints:
            raise UserError(f"{path.parent} holds its last checkpoint only; with --keep_checkpoints train.py keeps those that --every evaluates")
        log_path = path.parent / "log.jsonl"
        log = config.read_log(log_path) if log_path.is_file() else []
        if log:
            logs[name] = log
        for checkpoint in checkpoints:
            content = load_checkpoint(checkpoint, (*RUN, "step"))
            so_far = [line for line in log if line["step"] <= content["step"]]
            rows.append(evaluate_run(name, content, load_model(content, device), so_far, tasks(content["tokenizer_hash"]), device, cfg))
            append(path.parent / "eval.jsonl", rows[-1] | dict(limit=cfg.limit, batch_size=cfg.batch_size, evaluated_on=str(device)))
    if cfg.model is not None:
        model, tokenizer = load_gpt(cfg.model, device)
        if tokenizer != "gpt2":
            raise UserError(f"model={cfg.model!r} is a run of ours, not GPT-2: name it without --model=")
        content = model_checkpoint(model, train_config=dict(method="gpt2", dataset=cfg.dataset), tokenizer="gpt2", tokenizer_hash="gpt2")
        rows.append(evaluate_run(cfg.model, content, model, [], tasks("gpt2"), device, cfg))
    return rows, logs


def main_steering(cfg, runs, device):
    config.picture_path(cfg.plot)
    if len(runs) > 1:
        raise UserError(f"--steering takes one run, not {len(runs)}: {' '.join(runs)}")
    path = find_checkpoint(runs[0] if runs else None)
    content = load_checkpoint(path, RUN)
    if content["model_config"]["insert"] != "concept" or content["model_config"]["mix"] == "none":
        raise UserError(f"{path}: nothing to steer: --steering needs a cocomix run that mixes its concepts in")
    rows = steering(path, content, device, cfg.steered)
    summary = steering_summary(rows)
    print(table(summary, STEERING))
    for row in rows if cfg.write else ():
        append(cfg.write, row)
    if cfg.plot:
        plot_steering(cfg.plot, summary)
        print(f"curves: {cfg.plot}")


def main(argv):
    cfg, runs = config.parse(Config, argv, __doc__, files=False)
    if cfg.plot and Path(cfg.plot).suffix:
        config.picture_path(cfg.plot)
    if cfg.write and Path(cfg.write).is_dir():
        raise UserError(f"{cfg.write} is a folder; name a file in it")
    if cfg.dataset is not None and cfg.model is None:
        raise UserError("--dataset is for --model; a run is evaluated on its own")
    device = pick_device(cfg.device)
    if cfg.steering:
        return main_steering(cfg, runs, device)
    torch.set_float32_matmul_precision("highest")  # the harness's numbers; TF32's rounding would show in them
    if cfg.compare:
        if not runs:
            raise UserError("--compare needs runs, or logs of runs: python eval.py --compare out/A out/B")
        paths = dict(named([log_of(run) for run in runs]))
        logs, picture = {name: config.read_log(path) for name, path in paths.items()}, cfg.plot or "out/compare"
        print(course(curves(logs)))
        print(f"curves: {plot(picture, curves(logs))}")
        evaluations = {name: config.read_log(path.with_name("eval.jsonl")) for name, path in paths.items() if path.name == "log.jsonl" and path.with_name("eval.jsonl").is_file()}
        if any("/" in measure for lines in evaluations.values() for line in lines for measure in line):
            print(f"tasks: {plot_tasks(picture, evaluations)}")
        return
    rows, logs = evaluate_all(cfg, runs, device)
    if any("loss" in row for row in rows):
        print(table(rows))
    if any("/" in key for row in rows for key in row):
        print(f"\n{table(rows, TABLE_1)}")
    for row in rows if cfg.write else ():
        append(cfg.write, row)
    if cfg.plot:
        if not logs:
            raise UserError("nothing to draw: no log.jsonl beside these checkpoints")
        print(f"curves: {plot(cfg.plot, curves(logs))}")


if __name__ == "__main__":
    config.run(main)
