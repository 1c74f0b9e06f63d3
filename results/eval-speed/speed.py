"""How fast eval.py is beside lm-evaluation-harness: the same GPT-2, the same documents, batches of the same size.

    python results/eval-speed/speed.py DIR        # DIR: the tasks' documents (--eval_data); writes table.md

The harness runs its own class for transformers' models (HFLM). Of every task the same share of its documents is taken, evenly
spaced, so the last line of each size says what all of them would. Needs lm_eval, transformers and accelerate.
"""
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "tests")]
import torch

import data
import eval as evaluation
from harness import load_tasks
from model import load_gpt

BATCH = 16
SIZES = (("4 layers × 128", 4, 128, 20), ("8 layers × 512", 8, 512, 100), ("12 layers × 768 (GPT-2 124M)", 12, 768, 200))  # name, layers, width, every so manyth document


def tokenizer_of_transformers(tokenizer, folder):
    """tiktoken's GPT-2 tokenizer as transformers'."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    data.save_bpe(tokenizer._mergeable_ranks, folder / "gpt2.tiktoken")
    converted = TikTokenConverter(vocab_file=str(folder / "gpt2.tiktoken"), pattern=tokenizer._pat_str, extra_special_tokens=[data.END_OF_TEXT]).converted()
    return PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=data.END_OF_TEXT, eos_token=data.END_OF_TEXT)


def measure(documents, n_layer, n_embd, share, folder):
    """Rows (task, documents, the harness's seconds, ours), processor time of one thread."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64)).eval()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    (ours, _), tokenizer = load_gpt(str(folder)), data.load_tokenizer("gpt2")
    lm = HFLM(pretrained=theirs, tokenizer=tokenizer_of_transformers(tokenizer, folder), batch_size=BATCH, device="cpu")
    rows = []
    for name, docs in documents.items():
        docs = docs[::share]
        task = load_tasks({name: docs})
        start = time.process_time()
        expected = lm_eval.evaluate(lm, task, bootstrap_iters=0, log_samples=False)["results"][name]
        middle = time.process_time()
        row = evaluation.run_task(name, docs, ours, tokenizer, BATCH)
        rows.append((name, len(docs), middle - start, time.process_time() - middle))
        for metric in evaluation.TASKS[name].metrics:
            assert abs(row[f"{name}/{metric}"] / expected[f"{metric},none"] - 1) < 1e-4 if expected[f"{metric},none"] else row[f"{name}/{metric}"] == 0, metric
        print(rows[-1], flush=True)
    return rows


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    documents = {name: evaluation.documents(name, sys.argv[1], None) for name in evaluation.TASKS}
    lines = ["| model | task | documents | harness (s) | eval.py (s) | times as fast |", "|---|---|---:|---:|---:|---:|"]
    for size, n_layer, n_embd, share in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(documents, n_layer, n_embd, share, Path(folder))
        rows.append((f"all, every {share}th document", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        lines += [f"| {size} | {name} | {n} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |" for name, n, theirs, ours in rows]
        (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
