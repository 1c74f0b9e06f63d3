"""lm-evaluation-harness on our models: what eval.py is held against.

`harness(model, tokenizer, documents)` runs its seven tasks, with its own prompts, preprocessing and aggregation, over given
documents. `python tests/harness.py` writes eval_fixtures.json: what it says of a few documents made up here, so that the
quick tests need no lm_eval.
"""
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data
from model import GPT, ModelConfig

FIXTURES = HERE / "eval_fixtures.json"
FOLDERS = dict(lambada_openai="lambada", wikitext="wikitext", hellaswag="hellaswag", piqa="piqa", social_iqa="siqa", arc_easy="arc", winogrande="winogrande")


def random_model(vocab_size, seed=0, std=0.3, **settings):
    """A GPT of random weights that are the same on every machine and with every torch (numpy's generator)."""
    rng, model = np.random.default_rng(seed), GPT(ModelConfig(vocab_size=vocab_size, **settings))
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.from_numpy(rng.normal(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0, std, tuple(p.shape))))
    return model.eval()


def load_tasks(documents):
    """The harness's own tasks for {task: documents}, over these documents, whichever split a task takes."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    def download(self, dataset_kwargs=None, **kwargs):
        docs = datasets.Dataset.from_list(documents[self.config.task])
        self.dataset = dict(train=docs, validation=docs, test=docs)

    folder, kept = Path(lm_eval.__file__).parent / "tasks", ConfigurableTask.download
    ConfigurableTask.download = download
    try:
        return TaskManager(include_path=[str(folder / FOLDERS[name]) for name in documents], include_defaults=False).load(list(documents))
    finally:
        ConfigurableTask.download = kept


def harness(model, tokenizer, documents):
    """{task: documents} → {task: (metrics by the harness's names, the log-likelihoods and likeliest flags of each document)}. Our model is wrapped
    as a user of the harness would, a forward pass over each whole text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _harness(model, tokenizer, documents)


def _harness(model, tokenizer, documents):
    os.environ["DISABLE_MULTIPROC"] = "1"  # no processes for its resampling
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Wrapped(TemplateLM):
        eot_token_id = tokenizer.eot_token

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode_ordinary(string)

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm=True):
            answers, size = [], model.config.block_size
            for _, context, continuation in requests:
                assert 0 < len(continuation) <= size and context  # as the harness's own models have it
                tokens = torch.tensor((context + continuation)[-size - 1:])
                h = model.blocks(model.embed(tokens[None, :-1]), 0, model.config.n_layer)[0]
                logp = model.head(h[0, -len(continuation):]).log_softmax(-1)
                target = tokens[-len(continuation):]
                answers.append((logp.gather(-1, target[:, None]).sum().item(), bool((logp.argmax(-1) == target).all())))
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            windows = [[(None, *utils.make_disjoint_window(window)) for window in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, model.config.block_size, 1)] for request in requests]
            return [sum(loglikelihood for loglikelihood, _ in self._loglikelihood_tokens(pairs)) for pairs in windows]

        def generate_until(self, requests, disable_tqdm=True):
            raise NotImplementedError

    results = lm_eval.evaluate(Wrapped(), load_tasks(documents), bootstrap_iters=2)  # some, for accuracies' errors, too, though those are formulas

    def answers(sample):  # a number for a whole text, else (log-likelihood, likeliest) pairs
        return [response[0] if isinstance(response[0], (tuple, list)) else (response[0], None) for response in sample["resps"]]
    return {name: ({key.removesuffix(",none"): value for key, value in results["results"][name].items()},
                   [answers(sample) for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])]) for name in documents}


# What the preprocessing has to deal with: brackets, doubled and trailing spaces, an empty context, gaps at either end, numbered answers, texts longer
# than the model's window, and every kind of WikiText's spacing.
PAGE = ''' = The Old "  Mill " = 
 
 The mill ' s wheel was built in 1 @,@ 801 by Jan ( or " Hans " ) de Groot ; it turned 2 @.@ 5 times a minute , it is said ! 
 = = History = = 
 
 It burnt down twice [ 1905 and 1931 ] . The well @-@ known painter 's sister asked : " why ? " { no answer } . At 4 ° N the rivers ' banks /' 5/ rose . 
 = = = Today = = = 
 = = = = Visits = = = = 
 '''
DOCUMENTS = dict(
    lambada_openai=[dict(text="The ferry left at nine, and when it was gone she sat on the pier with her  old dog"), dict(text="\"Who is there?\" he asked.\n\n\"Only me,\" said Ann"),
                    dict(text="Rain"), dict(text=" ".join(["They walked along the river and talked of the harvest."] * 12) + " Then they went home")],
    wikitext=[dict(page=PAGE), dict(page=PAGE * 4 + " The end . \n"), dict(page=" A short one . ")],
    hellaswag=[dict(activity_label="Baking bread", ctx_a="A woman kneads dough [substeps] on a table.", ctx_b="she", label="2", ctx="",
                    endings=["throws it into the river.", "reads [title] a book about  dogs.", "puts it into the oven and waits.", "[step] sings."]),
               dict(activity_label="Mowing", ctx_a="[header] How to mow [title] Sharpen the blade. ", ctx_b="", label="0", ctx="",
                    endings=["Use a file.", "Use a file. Then sleep for a week and think of nothing else at all.", "Eat it.", "A file is a list."])],
    piqa=[dict(goal="To open a jar", sol1="run hot water over the lid ", sol2=" hit it with  a fish", label=0),
          dict(goal="how do you dry a wet book? ", sol1="Stand it up, open, in a warm and airy room.", sol2="Stand it up, open, in a warm and airy lake.", label=1)],
    social_iqa=[dict(context="Kim lent Lee a bicycle.", question="How would Lee feel?", answerA="grateful", answerB="robbed of sleep", answerC="like a bicycle", label="1"),
                dict(context="Sam forgot the keys again.", question="What will Sam do next?", answerA="dance", answerB="call the neighbour", answerC="fly away", label="2")],
    arc_easy=[dict(question="Which of these is a metal?", choices=dict(text=["wood", "iron", "wool", "salt water"], label=["A", "B", "C", "D"]), answerKey="B"),
              dict(question="What falls from clouds?", choices=dict(text=["rain", "stones", "keys"], label=["1", "2", "3"]), answerKey="1"),
              dict(question=" ".join(["A plant stands in the sun all day."] * 10) + " What does it need?", choices=dict(text=["water", "a hat", "shoes", "a cup of tea", "wax"],
                   label=["A", "B", "C", "D", "E"]), answerKey="D")],
    winogrande=[dict(sentence="The trophy did not fit into the case because the _ was too large.", option1="trophy", option2="case", answer="1"),
                dict(sentence="Ann paid for Beth's lunch, since _ had no money ", option1="Ann", option2="Beth", answer="2"),
                dict(sentence="_ lent a pen to Tom, who had none.", option1="Tom", option2="Mary Ann", answer="2")])
MODELS = dict(gpt=dict(), cocomix=dict(insert="concept", insert_layer=1, n_concepts=40, concept_k=4))


def fixture_model(which):
    return random_model(data.load_tokenizer("stdlib").n_vocab, block_size=96, n_layer=3, n_head=2, n_embd=16, **MODELS[which]).double()


if __name__ == "__main__":
    lines = []
    for which in MODELS:
        for name, (metrics, answers) in harness(fixture_model(which), data.load_tokenizer("stdlib"), DOCUMENTS).items():
            metrics = {metric: value for metric, value in metrics.items() if isinstance(value, float)}
            lines.append(json.dumps([which, name, metrics, [[(round(loglikelihood, 5), likeliest) for loglikelihood, likeliest in pairs] for pairs in answers]]))
    FIXTURES.write_text("[" + ",\n".join(lines) + "]\n")
