"""The paper's seven tasks, with the numbers of lm-evaluation-harness 0.4.

    documents → questions → (context, continuation) pairs in tokens → log-likelihoods → metrics

All continuations of a question go through the model in one row, which computes their context once.
"""
import gzip
import json
import logging
import math
import os
import re
import time
import zlib
from collections.abc import Callable
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

from support.runtime import UserError, explain, progress

import torch

from support.curves import perplexity
from support.kernels import chunk_rows
from support.tokens import encode_text

class Question(NamedTuple):
    """What a document asks: how likely is each continuation, given its context?"""
    pairs: list      # [(context, continuation)], texts; context None: the whole text, in windows
    score: Callable  # [(log-likelihood, greedy?) per pair] → {metric: (value, count)}

class Task(NamedTuple):
    hub: tuple      # where its documents are: (dataset, configuration or None, split)
    ask: Callable   # document → Question
    metrics: tuple  # the one the paper reports first

def choice(contexts, endings, gold):
    pairs = [(context, f" {ending}") for context, ending in zip(contexts, endings, strict=False)]
    gold = int(gold)
    if not 0 <= gold < len(pairs):
        raise ValueError(f"the answer is ending number {gold} of {len(pairs)}")

    def score(answers):  # acc_norm is per character, without the space before the ending
        acc = [loglikelihood for loglikelihood, _ in answers]
        norm = [x / max(1, len(ending) - 1) for x, (_, ending) in zip(acc, pairs, strict=True)]
        return {metric: (values.index(max(values)) == gold, 1)
                for metric, values in (("acc", acc), ("acc_norm", norm))}
    return Question(pairs, score)

def hellaswag(doc):
    def clean(text):  # brackets are left over from WikiHow
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = clean(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
    return choice(repeat(context), map(clean, doc["endings"]), doc["label"])

def piqa(doc):
    context = f"Question: {doc['goal']}\nAnswer:"
    return choice(repeat(context), (doc["sol1"], doc["sol2"]), doc["label"])

def social_iqa(doc):
    context = f"Q: {doc['context']} {doc['question']}\nA:"
    answers = (doc[f"answer{letter}"] for letter in "ABC")
    return choice(repeat(context), answers, int(doc["label"]) - 1)

def arc_easy(doc):
    context, choices = f"Question: {doc['question']}\nAnswer:", doc["choices"]
    return choice(repeat(context), choices["text"], choices["label"].index(doc["answerKey"]))

def winogrande(doc):  # the options differ in the context; both have the same continuation
    before, _, after = doc["sentence"].partition("_")
    contexts = before + doc["option1"], before + doc["option2"]
    return choice(contexts, repeat(after.strip()), int(doc["answer"]) - 1)

def lambada(doc):
    def score(answers):
        (loglikelihood, greedy), = answers
        return dict(perplexity=(loglikelihood, 1), acc=(greedy, 1))
    start, _, last_word = doc["text"].rpartition(" ")
    return Question([(start, " " + last_word)], score)

UNDO_SPACING = (  # WikiText's: pattern → replacement, in the harness's order
    ("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."),
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))

def wikitext(doc):
    def score(answers):  # words and bytes are those of the original page
        total = sum(loglikelihood for loglikelihood, _ in answers)
        return dict(word_perplexity=(total, len(re.split(r"\s+", doc["page"]))),
                    byte_perplexity=(total, len(doc["page"].encode())))
    page = doc["page"]
    for pattern, replacement in UNDO_SPACING:
        page = re.sub(pattern, replacement, page)
    return Question([(None, page)], score)

TASKS = dict(
    lambada_openai=Task(("EleutherAI/lambada_openai", "default", "test"), lambada,
                        ("perplexity", "acc")),
    wikitext=Task(("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"), wikitext,
                  ("word_perplexity", "byte_perplexity")),
    hellaswag=Task(("Rowan/hellaswag", None, "validation"), hellaswag, ("acc_norm", "acc")),
    piqa=Task(("baber/piqa", None, "validation"), piqa, ("acc", "acc_norm")),
    social_iqa=Task(("lighteval/siqa", None, "validation"), social_iqa, ("acc",)),
    arc_easy=Task(("allenai/ai2_arc", "ARC-Easy", "test"), arc_easy, ("acc", "acc_norm")),
    winogrande=Task(("allenai/winogrande", "winogrande_xl", "validation"), winogrande, ("acc",)))

def documents(name, folder, limit):
    """A task's first `limit` documents (None: all), dicts with the hub's fields, from
    folder/NAME.jsonl[.gz] or, where folder is None, from the hub."""
    if folder is None:
        return hub_documents(name, limit)
    expected = f"expected the documents of {TASKS[name].hub[0]}, one JSON object per line"
    path, opener = Path(folder, f"{name}.jsonl"), open
    if not path.is_file():
        path, opener = Path(f"{path}.gz"), gzip.open
    if not path.is_file():
        raise UserError(f"no {name}.jsonl or {path.name} in {folder}: {expected}; or choose other "
                        "--tasks")
    damage = ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error
    with (explain(f"{path} is cut short or damaged", expected, damage),
          opener(path, "rt", encoding="utf-8-sig") as file):
        found = [json.loads(line) for line in islice(filter(str.strip, file), limit)]
    if not found:
        raise UserError(f"{path} is empty: {expected}")
    return found

def hub_documents(name, limit):
    dataset, configuration, split = TASKS[name].hub
    try:
        import datasets
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries
        datasets.disable_progress_bars()
        print(f"fetching {dataset}", flush=True)
        found = datasets.load_dataset(dataset, configuration, split=split)
        return list(islice(found, limit))
    except Exception as e:  # offline it raises one of many kinds
        raise UserError(f"{dataset} can't be fetched ({type(e).__name__}); copy its documents to "
                        f"DIR/{name}.jsonl and add --eval_data=DIR") from e

def choose_tasks(names, folder, limit, tokenizer_hash):
    """{task: documents} for the key --tasks: all, none, auto or names separated by commas."""
    default = names == "auto" and not folder
    if names == "none" or default and tokenizer_hash != "gpt2":
        return {}
    chosen = TASKS if names in ("all", "auto") else names.split(",")
    if unknown := [name for name in chosen if name not in TASKS]:
        raise UserError(f"tasks={names!r}: no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    try:
        return {name: documents(name, folder, limit) for name in chosen}
    except UserError as e:
        if not default:
            raise
        print(f"the tasks are skipped: {e}")
        return {}

# --------------------------------------------------------------------------------------------------
# Log-likelihoods

def encode(tokenizer, context, continuation, block_size):
    """Two texts → [(context, continuation)] in tokens, split as the harness splits them: white
    space at the end of the context moves to the continuation, an empty context becomes the
    end-of-text token. Context None: the text, after an end-of-text token, is cut into windows of
    block_size targets; the last, shorter one has as much context as fits."""
    if context is not None:
        before = encode_text(tokenizer, context.rstrip())
        joined = encode_text(tokenizer, context + continuation)
        return [(before or [tokenizer.eot_token], joined[len(before):])]
    tokens = [tokenizer.eot_token] + encode_text(tokenizer, continuation)
    bounds = [1, *range(block_size + 1, len(tokens), block_size), len(tokens)]
    return [(tokens[max(0, end - block_size - 1):start], tokens[start:end])
            for start, end in pairwise(bounds) if start < end]

def pack(pairs, block_size):
    """{number: (context, continuation) in tokens} → a row: the start that all texts share, then the
    rest of each. Returns [(token, position in its text, branch: 0 for the start, then 1, 2, …)] and
    what to score, [(index into the row, token that should come next, the pair's number)]."""
    texts = [(context + continuation)[-block_size - 1:] for context, continuation in pairs.values()]
    shared = len(os.path.commonprefix([text[:-1] for text in texts]))
    row, scored = [(texts[0][t], t, 0) for t in range(shared)], []
    for branch, (number, text) in enumerate(zip(pairs, texts, strict=True), 1):
        end, offset = len(text) - 1, len(row) - shared
        row += [(text[t], t, branch) for t in range(shared, end)]
        first = max(0, end - len(pairs[number][1]))
        scored += [(t if t < shared else t + offset, text[t + 1], number)
                   for t in range(first, end)]
    return row, scored

def final_states(model, rows):
    """Rows of `pack` → final hidden states (B, T, d). A branch sees the start and itself."""
    c, width = model.config, max(map(len, rows))
    padded = [row + [(0, 0, 0)] * (width - len(row)) for row in rows]
    tokens, positions, branch = torch.tensor(padded, device=model.wte.weight.device).unbind(-1)
    mask = None
    if branch.any():
        mask = ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])).tril()
    h = model.forward_blocks(model.embed(tokens, positions=positions), 0, c.insert_at, mask=mask)
    h = model.mix(h).h
    if mask is not None and c.interleaved:  # each token is now two positions, h_t and ĉ_t
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).tril()
    return model.forward_blocks(h, c.insert_at, c.n_layer, mask=mask)

def score_tokens(model, h, at, token):
    """h (N, d), rows `at` of it, next tokens (M,) → (their log-probabilities, whether each is the
    most likely one), (M,). Logits are computed once per distinct row, in chunks."""
    places, which = at.unique(return_inverse=True)
    logp, greedy = h.new_empty(len(at)), torch.empty_like(at, dtype=torch.bool)
    chunk = chunk_rows(h.device, model.config.vocab_size)
    for i in range(0, len(places), chunk):
        z = model.head(h[places[i:i + chunk]])
        here = (which >= i) & (which < i + chunk)
        row, largest = which[here] - i, z.amax(-1, keepdim=True)
        above = z[row, token[here]] - largest[row, 0]  # before z is overwritten
        logp[here] = above - z.sub_(largest).exp_().sum(-1).log()[row]
        greedy[here] = above == 0
    return logp, greedy

@torch.no_grad()
def loglikelihoods(model, questions, batch_size, title="evaluate"):
    """[[(context, continuation), …] per question], in tokens → [[(log-likelihood in nats, is every
    token of the continuation the most likely one?), …] per question]. Only the last block_size + 1
    tokens of a text are kept. A question is one row; where one of its texts fills the window, each
    text is a row of its own."""
    rows, total, size = [], 0, model.config.block_size
    for question in questions:
        pairs = dict(enumerate(question, total))
        total += len(question)
        fits = all(len(context) + len(continuation) <= size for context, continuation in question)
        groups = [pairs] if fits else [{number: pair} for number, pair in pairs.items()]
        rows += [pack(group, size) for group in groups if group]
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    loglikelihood = torch.zeros(total, dtype=torch.float64)
    greedy = torch.ones(total, dtype=torch.bool)
    with progress(total, title, "text", leave=False) as bar:
        for i in range(0, len(rows), batch_size):
            read, scored = zip(*rows[i:i + batch_size], strict=True)
            h = final_states(model, read)
            scored = [(n * h.shape[1] + at, token, pair)
                      for n, some in enumerate(scored) for at, token, pair in some]
            at, token, pair = torch.tensor(scored).T
            logp, best = score_tokens(model, h.flatten(0, 1), at.to(h.device), token.to(h.device))
            loglikelihood.index_add_(0, pair, logp.cpu().double())
            greedy[pair[~best.cpu()]] = False
            bar.update(len(pair.unique()))
    answers = iter(zip(loglikelihood.tolist(), greedy.tolist(), strict=True))
    return [list(islice(answers, len(pairs))) for pairs in questions]

def mean_and_error(parts):
    """[(value, count)] per document → (Σ value / Σ count, its standard error as that of a ratio, or
    of a mean where all counts are equal; None for a single document)."""
    n, count = len(parts), sum(c for _, c in parts)
    if not count:
        raise UserError("these documents hold nothing to score")
    mean = math.fsum(x for x, _ in parts) / count
    if n == 1:
        return mean, None
    squares = math.fsum((x - mean * c) ** 2 for x, c in parts)
    return mean, math.sqrt(squares * n / (n - 1)) / count

def run_task(name, docs, model, tokenizer, batch_size):
    """One task → dict: NAME/METRIC and NAME/METRIC_stderr for each metric, NAME/examples, NAME/cut
    (texts longer than block_size + 1 tokens, which lost their start) and NAME/seconds. The standard
    error of a perplexity is the perplexity times that of the mean log-likelihood; the harness
    bootstraps LAMBADA's and has none for WikiText."""
    task, size, start = TASKS[name], model.config.block_size, time.perf_counter()
    with explain(f"{name}: a document lacks the fields of {task.hub[0]}", "copy them again"):
        questions = list(map(task.ask, docs))
    pairs = [[pair for texts in question.pairs for pair in encode(tokenizer, *texts, size)]
             for question in questions]
    answers = loglikelihoods(model, pairs, batch_size, name)
    scores = [question.score(some) for question, some in zip(questions, answers, strict=True)]
    row = {}
    for metric in task.metrics:
        value, error = mean_and_error([score[metric] for score in scores])
        if "perplexity" in metric:
            value = perplexity(-value)
            error = error and value * error
        row |= {f"{name}/{metric}": value, f"{name}/{metric}_stderr": error}
    cut = sum(len(context) + len(continuation) > size + 1
              for question in pairs for context, continuation in question)
    return row | {f"{name}/examples": len(docs), f"{name}/cut": cut,
                  f"{name}/seconds": time.perf_counter() - start}

DETAILS = (("task", "task", "{}"), ("metric", "metric", "{}"), ("value", "value", "{:,.4f}"),
           ("stderr", "± stderr", "{:,.4f}"), ("examples", "examples", "{:,}"),
           ("cut", "cut", "{:,}"), ("seconds", "seconds", "{:.1f}"),
           ("speed", "examples/s", "{:.1f}"))

def details(row, names):
    """A row of run_task → the rows of a table, one for each metric of the tasks `names`."""
    rows = []
    for name in names:
        for metric in TASKS[name].metrics:
            rows.append(dict(task=name, metric=metric, value=row[f"{name}/{metric}"],
                             stderr=row[f"{name}/{metric}_stderr"]))
        rows[-1] |= {what: row[f"{name}/{what}"] for what in ("examples", "cut", "seconds")}
        rows[-1]["speed"] = rows[-1]["examples"] / rows[-1]["seconds"]
    return rows
