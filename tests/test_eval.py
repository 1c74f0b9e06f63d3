"""The seven tasks give lm-evaluation-harness's numbers; the commands around them."""
import gzip
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import harness
import train
from config import read_log
from conftest import TINY, run, tiny_gpt
from model import GPT, load_checkpoint, load_model

SHARED = Path(train.__file__).resolve().parent.parent / "shared"  # optional: the real tasks' documents, and GPT-2's tokenizer
METHODS = [("none", "interleave"), ("pause", "interleave"), ("pause", "add"), *(("concept", mix) for mix in ("interleave", "interleave_residual", "add", "none"))]


def ours(model, tokenizer, name, docs):
    """(run_task's row, the answers to each document as the harness has them: for WikiText a whole page's)."""
    row = evaluation.run_task(name, docs, model, tokenizer, batch_size=4)
    pairs = [[pair for texts in evaluation.TASKS[name].ask(doc).pairs for pair in evaluation.encode(tokenizer, *texts, model.config.block_size)] for doc in docs]
    answers = evaluation.loglikelihoods(model, pairs, 8)
    return row, [[(sum(x for x, _ in answer), None)] for answer in answers] if name == "wikitext" else answers


def compare(row, answers, name, metrics, expected):
    """Every log-likelihood within 1e-3, every metric equal, and the standard errors of accuracies."""
    assert len(answers) == len(expected)
    for mine, theirs in zip(answers, expected):
        assert [likeliest for _, likeliest in mine] == [likeliest for _, likeliest in theirs]
        assert [x for x, _ in mine] == pytest.approx([x for x, _ in theirs], abs=1e-3, rel=0)
    for metric in evaluation.TASKS[name].metrics:
        assert row[f"{name}/{metric}"] == pytest.approx(metrics[metric], rel=1e-9 if "acc" in metric else 1e-5), metric
        if "acc" in metric and len(answers) > 1:
            assert row[f"{name}/{metric}_stderr"] == pytest.approx(metrics[f"{metric}_stderr"], rel=1e-9), metric


# -- log-likelihoods ----------------------------------------------------------------------------------

@pytest.mark.parametrize("which, name, metrics, answers", json.loads(harness.FIXTURES.read_text()))
def test_tasks_equal_the_harness(which, name, metrics, answers):
    row, mine = ours(harness.fixture_model(which), data.load_tokenizer("stdlib"), name, harness.DOCUMENTS[name])
    compare(row, mine, name, metrics, [[tuple(pair) for pair in pairs] for pairs in answers])
    assert name not in ("arc_easy", "lambada_openai") or row[f"{name}/cut"] > 0  # texts beyond the window are among them
