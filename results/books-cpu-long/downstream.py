"""Measures that can move at this size, of the models of results/books-cpu-long.

    python results/books-cpu-long/downstream.py out/books-cpu-long/*-1337

Adds a line per run to downstream.jsonl, or replaces it where the run's weights are other ones, and
writes downstream.md. A run whose folder is gone keeps its line.

    held-out     nats per token on the validation split, 592,083 tokens of 40 held-out books
    books        word perplexity, and the perplexity of a held-out passage's last word, greedy
                 accuracy on it, and accuracy in choosing it among four words (chance: 25%)
    LAMBADA      perplexity; greedy accuracy, which is almost zero, only in downstream.jsonl
    WikiText-2   word perplexity

± is the standard error over documents (the 40 books for word perplexity, else passages, of which 50
are from one book); vs NTP it is paired, book by book. The other three words are last words of other
passages and about as frequent in the training text.
"""
import json
import lzma
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.runtime import run

import torch

import eval as evaluation
from model import load_model
from support import tasks
from support.checkpoint import RUN, find_checkpoint, load_checkpoint, model_hash
from support.cli import key, parse
from support.curves import append_rows, markdown
from support.log import read_log
from support.tokens import tokenizer_of_run

HERE = Path(__file__).resolve().parent
PASSAGE, PASSAGES = 700, 50  # characters; per book

@dataclass(frozen=True)
class Config:
    books: str = key(os.environ.get("BOOKS", "../shared/corpus"), "the folder of the books")
    eval_data: str | None = key(os.environ.get("EVAL_DATA"),
                                "the folder of the tasks' documents (none: download them)")

def read_books(path):
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]

def passages(books):
    """[(context, last word)]: for each book, PASSAGES passages of about PASSAGE characters that end
    with a lower-case word of four letters or more at the end of a sentence."""
    found, chance = [], random.Random(0)
    for text in books:
        ends = [m.end(1) for m in re.finditer(r"\s([a-z]{4,})[.!?]", text) if m.end(1) > PASSAGE]
        for end in sorted(chance.sample(ends, min(PASSAGES, len(ends)))):
            start = text.index(" ", end - PASSAGE) + 1
            context, _, word = text[start:end].rpartition(text[text.rindex(" ", 0, end)])
            if context.strip() and re.fullmatch("[a-z]{4,}", word):
                found.append((" ".join(context.split()), word))
    return found

def with_choices(found, counts):
    """[{context, word, others}]: three other words each, of about the same frequency."""
    words = sorted({word for _, word in found}, key=lambda word: (counts[word], word))
    place, chance = {word: i for i, word in enumerate(words)}, random.Random(1)
    docs = []
    for context, word in found:
        near = [w for w in words[max(0, place[word] - 10):place[word] + 11] if w != word]
        docs.append(dict(context=context, word=word, others=chance.sample(near, 3)))
    return docs

def last_word(doc):
    """The passage's last word, and three others: a Question for support/tasks.py."""
    def score(answers):
        (likely, greedy), *others = answers
        return dict(perplexity=(likely, 1), acc=(greedy, 1),
                    choice=(likely > max(other for other, _ in others), 1))
    words = doc["word"], *doc["others"]
    return tasks.Question([(doc["context"], f" {word}") for word in words], score)

def whole_book(doc):
    def score(answers):
        doc["nats"] = sum(likely for likely, _ in answers)
        return dict(word_perplexity=(doc["nats"], len(doc["text"].split())))
    return tasks.Question([(None, doc["text"])], score)

tasks.TASKS |= dict(
    books=tasks.Task(("the books", None, "val"), whole_book, ("word_perplexity",)),
    last_word=tasks.Task(("the books", None, "val"), last_word, ("perplexity", "acc", "choice")))

COLUMNS = {  # key: (heading, format)
    "loss": ("held-out loss", "{:.3f}"),
    "books/word_perplexity": ("books, word ppl", "{:.1f}"),
    "last_word/perplexity": ("last word ppl", "{:.0f}"),
    "last_word/acc": ("last word acc", "{:.1%}"),
    "last_word/choice": ("last word of 4", "{:.1%}"),
    "lambada_openai/perplexity": ("LAMBADA ppl", "{:.0f}"),
    "wikitext/word_perplexity": ("WikiText word ppl", "{:.0f}")}

def versus_ntp(row, rows):
    """The difference of a run and the same seed's NTP in nats per word, ± its standard error over
    the books: both read the same ones."""
    name, ntp = row["run"], f"ntp-{row['run'].rpartition('-')[2]}"
    if name == ntp or ntp not in rows:
        return "–"
    nats, words = (list(zip(row[f"books/{k}"], rows[ntp][f"books/{k}"], strict=True))
                   for k in ("nats", "words"))
    mean, error = tasks.mean_and_error([(b - a, n) for (a, b), (n, _) in zip(nats, words,
                                                                             strict=True)])
    return f"{mean:.3f} ± {error:.3f}"

def table(rows):
    def cell(row, name, form):
        error = row.get(f"{name}_stderr")
        return form.format(row[name]) + (f" ± {form.format(error)}" if error else "")
    named = {row["run"]: row for row in rows}
    return markdown(
        ["run", "nats per word vs NTP", *(heading for heading, _ in COLUMNS.values())],
        [[row["run"], versus_ntp(row, named),
          *(cell(row, name, form) for name, (_, form) in COLUMNS.items())]
         for row in sorted(rows, key=lambda row: row["loss"])])

def main(argv):
    cfg, runs = parse(Config, argv, __doc__, files=False)
    path, device = HERE / "downstream.jsonl", torch.device("cpu")
    rows = {row["run"]: row for row in read_log(path)} if path.is_file() else {}
    docs = None
    for folder in map(Path, runs):
        if folder.name in rows and not folder.is_dir():
            continue  # its row is kept
        content = load_checkpoint(find_checkpoint(folder), RUN)
        model, tokenizer = load_model(content, device), tokenizer_of_run(content)
        if rows.get(folder.name, {}).get("model_hash") == model_hash(model):
            continue
        if docs is None:
            held_out = read_books(Path(cfg.books, "books-val.jsonl.xz"))
            counts = Counter()
            for text in read_books(Path(cfg.books, "books-train.jsonl.xz"))[::10]:
                counts.update(re.findall("[a-z]{4,}", text))
            docs = dict(books=[dict(text=text) for text in held_out],
                        last_word=with_choices(passages(held_out), counts))
            docs |= {name: tasks.documents(name, cfg.eval_data, None)
                     for name in ("lambada_openai", "wikitext")}
        row = dict(run=folder.name, step=content["step"], model_hash=model_hash(model))
        row |= evaluation.evaluate(content, model, device)
        for name, some in docs.items():
            row |= tasks.run_task(name, some, model, tokenizer, batch_size=16)
        row = {k: v for k, v in row.items() if k != "perplexity" and not k.endswith("/seconds")}
        row["books/nats"] = [round(doc["nats"], 1) for doc in docs["books"]]
        row["books/words"] = [len(doc["text"].split()) for doc in docs["books"]]
        rows[folder.name] = row
        path.unlink(missing_ok=True)
        append_rows(path, *rows.values())
        print(f"{folder.name}: {math.exp(row['loss']):.2f}", flush=True)
    text = table(list(rows.values()))
    (HERE / "downstream.md").write_text(text + "\n")
    print(text)

if __name__ == "__main__":
    run(main)
