"""lm-evaluation-harness on our models, which support/tasks.py must agree with.

harness(model, tokenizer, documents) runs its seven tasks over given documents, with its own
prompts, preprocessing and aggregation. `python tests/harness.py` writes eval_fixtures.json, its
answers to the few documents below, so that the quick tests do not need lm_eval.
"""
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, ModelConfig
from support.tokens import load_tokenizer

FIXTURES = Path(__file__).with_name("eval_fixtures.json")
FOLDERS = dict(lambada_openai="lambada", wikitext="wikitext", hellaswag="hellaswag", piqa="piqa",
               social_iqa="siqa", arc_easy="arc", winogrande="winogrande")

def random_model(vocab_size, seed=0, std=0.3, **settings):
    """A GPT with random weights, the same on every machine and torch version (numpy's generator).

    Parameters are drawn in the order of the names they had when the fixtures were written, when
    the mixer was called `inserted` and its pre_bias `bias`.
    """
    def old_name(pair):
        return pair[0].replace("mixer.", "inserted.").replace("pre_bias", "bias")

    rng, model = np.random.default_rng(seed), GPT(ModelConfig(vocab_size=vocab_size, **settings))
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=old_name):
            gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            p.copy_(torch.from_numpy(rng.normal(1.0 if gain else 0.0, std, tuple(p.shape))))
    return model.eval()

def load_tasks(documents):
    """The harness's own tasks for {task: documents}; every split consists of these documents."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    def download(self, dataset_kwargs=None, **kwargs):
        docs = datasets.Dataset.from_list(documents[self.config.task])
        self.dataset = dict(train=docs, validation=docs, test=docs)

    folder, kept = Path(lm_eval.__file__).parent / "tasks", ConfigurableTask.download
    paths = [str(folder / FOLDERS[name]) for name in documents]
    ConfigurableTask.download = download
    try:
        return TaskManager(include_path=paths, include_defaults=False).load(list(documents))
    finally:
        ConfigurableTask.download = kept

def harness(model, tokenizer, documents):
    """{task: documents} → {task: (metrics under the harness's names, per document its answers:
    [(log-likelihood, greedy?)])}."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = run_harness(model, tokenizer, documents)
    found = {}
    for name in documents:
        metrics = {key.removesuffix(",none"): value
                   for key, value in results["results"][name].items()}
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        found[name] = metrics, [answers_of(sample) for sample in samples]
    return found

def answers_of(sample):
    """The responses to a document; one for a whole text is a number, without a greedy flag."""
    responses = [response[0] for response in sample["resps"]]
    return [r if isinstance(r, (tuple, list)) else (r, None) for r in responses]

def run_harness(model, tokenizer, documents):
    """lm_eval.evaluate, with one forward pass per text."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # no processes for its bootstrap
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    size = model.config.block_size

    class Wrapped(TemplateLM):
        eot_token_id = tokenizer.eot_token

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode_ordinary(string)

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm=True):
            answers = []
            for _, context, continuation in requests:
                n = len(continuation)
                assert 0 < n <= size and context  # as the harness's own models require
                tokens = torch.tensor((context + continuation)[-size - 1:])
                logp = model(tokens[None, :-1]).logits[0, -n:].log_softmax(-1)
                greedy = bool((logp.argmax(-1) == tokens[-n:]).all())
                answers.append((logp.gather(-1, tokens[-n:, None]).sum().item(), greedy))
            return answers

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            totals = []
            for request in requests:
                tokens = self.tok_encode(request.args[0])
                windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, size, 1)
                pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(x for x, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests, disable_tqdm=True):
            raise NotImplementedError

    # without a bootstrap there are no standard errors, not even those that are formulas
    return lm_eval.evaluate(Wrapped(), load_tasks(documents), bootstrap_iters=2)

# Cases for the preprocessing: brackets, double and trailing spaces, an empty context, gaps at
# either end, numbered answers, texts longer than the model's window, all of WikiText's spacing.
PAGE = (
    ' = The Old "  Mill " = \n'
    " \n"
    " The mill ' s wheel was built in 1 @,@ 801 by Jan ( or \" Hans \" ) de Groot ;"
    " it turned 2 @.@ 5 times a minute , it is said ! \n"
    " = = History = = \n"
    " \n"
    " It burnt down twice [ 1905 and 1931 ] . The well @-@ known painter 's sister asked :"
    ' " why ? " { no answer } . At 4 ° N the rivers \' banks /\' 5/ rose . \n'
    " = = = Today = = = \n"
    " = = = = Visits = = = = \n"
    " ")
LONG = " ".join(["They walked along the river and talked of the harvest."] * 12)
LONG_QUESTION = " ".join(["A plant stands in the sun all day."] * 10) + " What does it need?"
DOCUMENTS = dict(
    lambada_openai=[
        dict(text="The ferry left at nine, and when it was gone she sat on the pier with her  old "
                  "dog"),
        dict(text="\"Who is there?\" he asked.\n\n\"Only me,\" said Ann"),
        dict(text="Rain"),
        dict(text=LONG + " Then they went home")],
    wikitext=[
        dict(page=PAGE),
        dict(page=PAGE * 4 + " The end . \n"),
        dict(page=" A short one . ")],
    hellaswag=[
        dict(activity_label="Baking bread", ctx_b="she", label="2", ctx="",
             ctx_a="A woman kneads dough [substeps] on a table.",
             endings=["throws it into the river.", "reads [title] a book about  dogs.",
                      "puts it into the oven and waits.", "[step] sings."]),
        dict(activity_label="Mowing", ctx_b="", label="0", ctx="",
             ctx_a="[header] How to mow [title] Sharpen the blade. ",
             endings=["Use a file.",
                      "Use a file. Then sleep for a week and think of nothing else at all.",
                      "Eat it.", "A file is a list."])],
    piqa=[
        dict(goal="To open a jar", label=0,
             sol1="run hot water over the lid ", sol2=" hit it with  a fish"),
        dict(goal="how do you dry a wet book? ", label=1,
             sol1="Stand it up, open, in a warm and airy room.",
             sol2="Stand it up, open, in a warm and airy lake.")],
    social_iqa=[
        dict(context="Kim lent Lee a bicycle.", question="How would Lee feel?", label="1",
             answerA="grateful", answerB="robbed of sleep", answerC="like a bicycle"),
        dict(context="Sam forgot the keys again.", question="What will Sam do next?", label="2",
             answerA="dance", answerB="call the neighbour", answerC="fly away")],
    arc_easy=[
        dict(question="Which of these is a metal?", answerKey="B",
             choices=dict(text=["wood", "iron", "wool", "salt water"], label=["A", "B", "C", "D"])),
        dict(question="What falls from clouds?", answerKey="1",
             choices=dict(text=["rain", "stones", "keys"], label=["1", "2", "3"])),
        dict(question=LONG_QUESTION, answerKey="D",
             choices=dict(text=["water", "a hat", "shoes", "a cup of tea", "wax"],
                          label=["A", "B", "C", "D", "E"]))],
    winogrande=[
        dict(sentence="The trophy did not fit into the case because the _ was too large.",
             option1="trophy", option2="case", answer="1"),
        dict(sentence="Ann paid for Beth's lunch, since _ had no money ",
             option1="Ann", option2="Beth", answer="2"),
        dict(sentence="_ lent a pen to Tom, who had none.",
             option1="Tom", option2="Mary Ann", answer="2")])
MODELS = dict(gpt={}, cocomix=dict(insert="concept", insert_layer=1, n_concepts=40, concept_k=4))

def fixture_model(which):
    vocab_size = load_tokenizer("stdlib").n_vocab
    return random_model(vocab_size, block_size=96, n_layer=3, n_head=2, n_embd=16,
                        **MODELS[which]).double()

def fixture_lines():
    """A line of eval_fixtures.json per model and task: [model, task, metrics, answers]."""
    for which in MODELS:
        found = harness(fixture_model(which), load_tokenizer("stdlib"), DOCUMENTS)
        for name, (metrics, answers) in found.items():
            metrics = {key: value for key, value in metrics.items() if isinstance(value, float)}
            answers = [[(round(x, 5), greedy) for x, greedy in pairs] for pairs in answers]
            yield json.dumps([which, name, metrics, answers])

if __name__ == "__main__":
    FIXTURES.write_text("[" + ",\n".join(fixture_lines()) + "]\n")
