"""eval.py next to lm-evaluation-harness: the same GPT-2, documents and batch size.

    python results/eval-speed/speed.py DIR        # DIR: the tasks' documents; writes table.md

The harness runs its own class for transformers' models (HFLM). The same share of each task's
documents is taken, evenly spaced, so the last line of each size estimates the whole. Needs lm_eval,
transformers and accelerate.
"""
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from harness import load_tasks

from model import load_gpt
from support.bpe import save_bpe
from support.tasks import TASKS, documents, run_task
from support.tokens import END_OF_TEXT, load_tokenizer

HERE = Path(__file__).resolve().parent
BATCH = 16
SIZES = (("4 layers × 128", 4, 128, 20), ("8 layers × 512", 8, 512, 100),
         ("12 layers × 768 (GPT-2 124M)", 12, 768, 200))  # name, layers, width, every n-th document

def tokenizer_of_transformers(tokenizer, folder):
    """tiktoken's GPT-2 tokenizer as transformers'."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    save_bpe(tokenizer._mergeable_ranks, folder / "gpt2.tiktoken")
    converter = TikTokenConverter(vocab_file=str(folder / "gpt2.tiktoken"),
                                  pattern=tokenizer._pat_str, extra_special_tokens=[END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token=END_OF_TEXT,
                                   eos_token=END_OF_TEXT)

def check_same(name, ours, theirs):
    for metric in TASKS[name].metrics:
        a, b = ours[f"{name}/{metric}"], theirs[f"{metric},none"]
        assert a == 0 if b == 0 else abs(a / b - 1) < 1e-4, metric

def measure(docs_of, n_layer, n_embd, every, folder):
    """Rows (task, documents, the harness's seconds, ours), processor time of one thread."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64)
    theirs = GPT2LMHeadModel(config).eval()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (ours, _), tokenizer = load_gpt(str(folder)), load_tokenizer("gpt2")
    lm = HFLM(pretrained=theirs, tokenizer=tokenizer_of_transformers(tokenizer, folder),
              batch_size=BATCH, device="cpu")
    rows = []
    for name, docs in docs_of.items():
        docs = docs[::every]
        task = load_tasks({name: docs})
        start = time.process_time()
        expected = lm_eval.evaluate(lm, task, bootstrap_iters=0, log_samples=False)["results"][name]
        middle = time.process_time()
        row = run_task(name, docs, ours, tokenizer, BATCH)
        rows.append((name, len(docs), middle - start, time.process_time() - middle))
        check_same(name, row, expected)
        print(rows[-1], flush=True)
    return rows

def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    docs_of = {name: documents(name, sys.argv[1], None) for name in TASKS}
    lines = ["| model | task | documents | harness (s) | eval.py (s) | times as fast |",
             "|---|---|---:|---:|---:|---:|"]
    for size, n_layer, n_embd, every in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(docs_of, n_layer, n_embd, every, Path(folder))
        totals = [sum(row[i] for row in rows) for i in (1, 2, 3)]
        rows.append((f"all, every {every}th document", *totals))
        lines += [f"| {size} | {name} | {n} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |"
                  for name, n, theirs, ours in rows]
        (HERE / "table.md").write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    main()
