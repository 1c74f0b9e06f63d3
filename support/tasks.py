"""The paper's seven tasks, with the numbers of lm-evaluation-harness 0.4.

    documents → questions → (context, continuation) pairs in tokens → log-likelihoods → metrics

All continuations of a question go through the model in one row, which computes their context once.
"""
import gzip
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.runtime import UserError, progress

import torch

from support.curves import perplexity
from support.kernels import chunk_rows

class Question(NamedTuple):
    """What a document asks: how likely is each continuation, given its context?"""
    pairs: list    # [(context, continuation)], texts; context None: the whole text, in windows
    gold: int = 0  # index of the correct pair

class Task(NamedTuple):
    hub: tuple       # where its documents are: (dataset, configuration or None, split)
    ask: Callable    # document → Question
    score: Callable  # (document, Question, [(log-likelihood, greedy?)]) → {metric: (value, count)}
    metrics: tuple   # the one the paper reports first

def choice(context, endings, gold):
    pairs, gold = [(context, " " + ending) for ending in endings], int(gold)
    if not 0 <= gold < len(pairs):
        raise ValueError(f"the answer is ending number {gold} of {len(pairs)}")
    return Question(pairs, gold)

def score_choice(doc, question, answers):
    """acc picks the most likely ending, acc_norm the most likely per character (without the space
    before the ending)."""
    acc = [loglikelihood for loglikelihood, _ in answers]
    acc_norm = [loglikelihood / max(1, len(ending) - 1)
                for loglikelihood, (_, ending) in zip(acc, question.pairs, strict=True)]
    return {name: (values.index(max(values)) == question.gold, 1)
            for name, values in (("acc", acc), ("acc_norm", acc_norm))}

def hellaswag(doc):
    def clean(text):  # brackets are left over from WikiHow
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
    context = clean(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
    return choice(context, map(clean, doc["endings"]), doc["label"])

def piqa(doc):
    return choice(f"Question: {doc['goal']}\nAnswer:", (doc["sol1"], doc["sol2"]), doc["label"])

def social_iqa(doc):
    answers = (doc[f"answer{letter}"] for letter in "ABC")
    return choice(f"Q: {doc['context']} {doc['question']}\nA:", answers, int(doc["label"]) - 1)

def arc_easy(doc):
    gold = doc["choices"]["label"].index(doc["answerKey"])
    return choice(f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"], gold)

def winogrande(doc):  # the options differ in the context; both have the same continuation
    before, _, after = doc["sentence"].partition("_")
    pairs = [(before + doc[option], " " + after.strip()) for option in ("option1", "option2")]
    return Question(pairs, int(doc["answer"]) - 1)

def lambada(doc):
    start, _, last_word = doc["text"].rpartition(" ")
    return Question([(start, " " + last_word)])

def score_lambada(doc, question, answers):
    (loglikelihood, greedy), = answers
    return dict(perplexity=(loglikelihood, 1), acc=(greedy, 1))

UNDO_SPACING = (  # WikiText's: pattern → replacement, in the harness's order
    ("s '", "s'"), (r"/' [0-9]/", "/'[0-9]/"), (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."),
    *((rf" \{mark} ", f"{mark} ") for mark in ":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"),
    ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))

def wikitext(doc):
    page = doc["page"]
    for pattern, replacement in UNDO_SPACING:
        page = re.sub(pattern, replacement, page)
    return Question([(None, page)])

def score_wikitext(doc, question, answers):  # words and bytes are those of the original page
    total = sum(loglikelihood for loglikelihood, _ in answers)
    return dict(word_perplexity=(total, len(re.split(r"\s+", doc["page"]))),
                byte_perplexity=(total, len(doc["page"].encode())))

TASKS = dict(
    lambada_openai=Task(("EleutherAI/lambada_openai", "default", "test"),
                        lambada, score_lambada, ("perplexity", "acc")),
    wikitext=Task(("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
                  wikitext, score_wikitext, ("word_perplexity", "byte_perplexity")),
    hellaswag=Task(("Rowan/hellaswag", None, "validation"),
                   hellaswag, score_choice, ("acc_norm", "acc")),
    piqa=Task(("baber/piqa", None, "validation"), piqa, score_choice, ("acc", "acc_norm")),
    social_iqa=Task(("lighteval/siqa", None, "validation"), social_iqa, score_choice, ("acc",)),
    arc_easy=Task(("allenai/ai2_arc", "ARC-Easy", "test"),
                  arc_easy, score_choice, ("acc", "acc_norm")),
    winogrande=Task(("allenai/winogrande", "winogrande_xl", "validation"),
                    winogrande, score_choice, ("acc",)))

def documents(name, folder, limit):
    """A task's first `limit` documents (None: all), dicts with the hub's fields, from
    folder/NAME.jsonl[.gz] or, where folder is None, from the hub."""
    if folder is None:
        return hub_documents(name, limit)
    expected = f"expected the documents of {TASKS[name].hub[0]}, one JSON object per line"
    paths = [Path(folder, name + suffix) for suffix in (".jsonl", ".jsonl.gz")]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise UserError(f"no {name}.jsonl or {name}.jsonl.gz in {folder}: {expected}; or choose "
                        "other --tasks")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            lines = filter(str.strip, f)
            found = [json.loads(line) for line in itertools.islice(lines, limit)]
    except (ValueError, EOFError, gzip.BadGzipFile) as e:
        raise UserError(f"{path} is cut short or damaged ({type(e).__name__}): {expected}") from e
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
        return list(itertools.islice(found, limit))
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
    """Two texts → [(context, continuation)] in tokens, split as the harness splits them.

    White space at the end of the context moves to the continuation: whatever the joined text has
    beyond the context's tokens. An empty context becomes the end-of-text token. Context None: the
    text is cut into windows of block_size targets, which start after the end-of-text token; the
    last, shorter one has as much context as fits.
    """
    if context is not None:
        before = tokenizer.encode_ordinary(context.rstrip())
        joined = tokenizer.encode_ordinary(context + continuation)
        return [(before or [tokenizer.eot_token], joined[len(before):])]
    tokens = [tokenizer.eot_token] + tokenizer.encode_ordinary(continuation)
    bounds = [1, *range(block_size + 1, len(tokens), block_size), len(tokens)]
    return [(tokens[max(0, end - block_size - 1):start], tokens[start:end])
            for start, end in itertools.pairwise(bounds) if start < end]

class Row(NamedTuple):
    """One row through the model: a shared context, then the rest of each pair, side by side."""
    tokens: list     # T
    positions: list  # T, the position of each token in its own text
    branch: list     # T, 0 for the shared context; 1, 2, … for the tokens of one pair
    scored: list     # [(index into tokens, the token that should come next, the pair's number)]

def pack(pairs, block_size):
    """{number: (context, continuation) in tokens} → one Row."""
    texts = {i: (context + continuation)[-block_size - 1:]
             for i, (context, continuation) in pairs.items()}
    tokens = list(os.path.commonprefix([text[:-1] for text in texts.values()]))
    shared = range(len(tokens))
    row = Row(tokens, [*shared], [0 for _ in shared], [])
    for n, (i, text) in enumerate(texts.items(), 1):
        own = text[len(shared):-1]
        places = [*shared, *range(len(tokens), len(tokens) + len(own))]  # of the text in the row
        row.tokens.extend(own)
        row.positions.extend(range(len(shared), len(places)))
        row.branch.extend([n] * len(own))
        first = max(0, len(places) - len(pairs[i][1]))
        row.scored.extend((places[t], text[t + 1], i) for t in range(first, len(places)))
    return row

def pack_all(questions, block_size):
    """[[(context, continuation), …] per question] → Rows, longest first; pairs numbered in order.

    A question is one row; where a text fills the window and is cut, each of its texts is a row.
    """
    numbers, groups = itertools.count(), []
    for question in questions:
        pairs = {next(numbers): pair for pair in question}
        fits = all(len(a) + len(b) <= block_size for a, b in question)
        groups += [pairs] if fits else [{i: pair} for i, pair in pairs.items()]
    rows = [pack(pairs, block_size) for pairs in groups if pairs]
    return sorted(rows, key=lambda row: len(row.tokens), reverse=True)

def final_states(model, rows):
    """Rows → hidden states after the last block (B, T, d). A pair sees its context and itself."""
    c, device, width = model.config, model.wte.weight.device, len(rows[0].tokens)
    tokens, positions, branch = (
        torch.tensor([t + [0] * (width - len(t)) for t in lists], device=device)
        for lists in zip(*(row[:3] for row in rows), strict=True))
    mask = None
    if branch.any():
        mask = ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])).tril()
    h = model.forward_blocks(model.embed(tokens, positions=positions), 0, c.insert_at, mask=mask)
    h = model.mix(h).h
    if mask is not None and c.interleaved:  # each token is now two positions, h_t and ĉ_t
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).tril()
    return model.forward_blocks(h, c.insert_at, c.n_layer, mask=mask)

def score_tokens(model, h, at, token):
    """h (N, d), rows `at` of it, tokens (M,) → (log-probability that the token comes next, whether
    it is the most likely one), (M,). Logits are computed once per distinct row, in chunks."""
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
    token of the continuation the most likely one?), …] per question].

    Only the last block_size + 1 tokens of a text are kept, of a longer continuation its end.
    """
    rows, total = pack_all(questions, model.config.block_size), sum(map(len, questions))
    loglikelihood = torch.zeros(total, dtype=torch.float64)
    greedy = torch.ones(total, dtype=torch.bool)
    with progress(total, title, "text", leave=False) as bar:
        for i in range(0, len(rows), batch_size):
            batch = rows[i:i + batch_size]
            h = final_states(model, batch)
            scored = [(n * h.shape[1] + at, token, pair)
                      for n, row in enumerate(batch) for at, token, pair in row.scored]
            at, token, pair = torch.tensor(scored).T
            logp, best = score_tokens(model, h.flatten(0, 1), at.to(h.device), token.to(h.device))
            loglikelihood.index_add_(0, pair, logp.cpu().double())
            greedy[pair[~best.cpu()]] = False
            bar.update(len(pair.unique()))
    answers = iter(zip(loglikelihood.tolist(), greedy.tolist(), strict=True))
    return [list(itertools.islice(answers, len(pairs))) for pairs in questions]

def mean_and_error(parts):
    """[(value, count)] per document → (Σ value / Σ count, its standard error: that of a mean, or of
    a ratio where the counts differ; None for a single document)."""
    n, count = len(parts), sum(c for _, c in parts)
    mean = math.fsum(x for x, _ in parts) / count
    if n == 1:
        return mean, None
    squares = math.fsum((x - mean * c) ** 2 for x, c in parts)
    return mean, math.sqrt(squares * n / (n - 1)) / count

def run_task(name, docs, model, tokenizer, batch_size):
    """One task → dict: NAME/METRIC and NAME/METRIC_stderr for each metric, NAME/examples, NAME/cut
    (texts that lost their start: longer than block_size + 1 tokens) and NAME/seconds.

    Standard errors of accuracies are the harness's. That of a perplexity is the perplexity times
    that of the mean log-likelihood; the harness bootstraps LAMBADA's and has none for WikiText.
    """
    task, size, start = TASKS[name], model.config.block_size, time.perf_counter()
    try:
        questions = [task.ask(doc) for doc in docs]
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{name}: a document does not have the fields of {task.hub[0]} "
                        f"({type(e).__name__}: {e})") from e
    pairs = [[pair for texts in question.pairs for pair in encode(tokenizer, *texts, size)]
             for question in questions]
    answers = loglikelihoods(model, pairs, batch_size, name)
    scores, row = list(map(task.score, docs, questions, answers)), {}
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
    """The rows of a table of all metrics of the tasks `names`, their standard errors and speed."""
    rows = []
    for name in names:
        for metric in TASKS[name].metrics:
            rows.append(dict(task=name, metric=metric, value=row[f"{name}/{metric}"],
                             stderr=row[f"{name}/{metric}_stderr"]))
        rows[-1] |= {what: row[f"{name}/{what}"] for what in ("examples", "cut", "seconds")}
        rows[-1]["speed"] = rows[-1]["examples"] / rows[-1]["seconds"]
    return rows
