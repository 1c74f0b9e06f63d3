"""The page of sample.py --serve: its server's answers and refusals, and the page in a browser."""
import http.client
import json
import shutil
import threading
import time

from support.runtime import UserError

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import run

import concepts
import sample
from model import load_model
from support import serve
from support.checkpoint import load_checkpoint
from support.concept_index import describe, index_of_run
from support.engine import generate
from support.steering import scales
from support.tokens import tokenizer_of_run, tokens_of_run

CPU = torch.device("cpu")
BODY = dict(prompt="abc", factors={"3": -8}, tokens=20, temperature=0.8, seed=5)

@pytest.fixture(scope="module")
def served(chain, tmp_path_factory):
    """A running server on any free port, and its Playground."""
    folder = tmp_path_factory.mktemp("serve") / "cocomix"
    shutil.copytree(chain["cocomix"], folder, ignore=shutil.ignore_patterns("concepts.*"))
    content = load_checkpoint(folder)
    model, concept_model = load_model(content), concepts.concept_model_of_run(content, CPU)
    index = index_of_run(folder, content, model, concept_model, CPU, 4000)
    models = {"CoCoMix": model, "concept model": concepts.steerable(concept_model)}
    settings = dict(run="tiny", prompt="abc", factors={}, tokens=20, temperature=0.8, seed=5)
    server = serve.Server(0)
    playground = serve.Playground(models, index, tokenizer_of_run(content),
                                  tokens_of_run(content, "val"), 200, settings)
    thread = threading.Thread(target=server.run, args=[playground])
    thread.start()
    yield server, playground
    server.shutdown()
    thread.join()

def ask(server, method, path, body=None, **headers):
    """(status, the body) of a request; headers: None removes one."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.putrequest(method, path, skip_host=True)
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Host": server.hosts[0], "Content-Type": "application/json"}
    if method == "POST":
        given["Content-Length"] = str(len(text))
    for name, value in (given | {k.replace("_", "-"): v for k, v in headers.items()}).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(text if method == "POST" else None)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

def play(server, **changes):
    status, text = ask(server, "POST", "/generate", BODY | changes)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]

def rows_of(events, model):
    """[plain, steered] text of a model."""
    pieces = [event["pieces"] for event in events if event.get("model") == model
              and "pieces" in event]
    return ["".join(piece or "" for piece in row) for row in zip(*pieces, strict=True)]

def test_the_texts_are_those_of_generate_with_the_same_random_numbers(served):
    server, playground = served
    for prompt, factors in (("abc", {3: -8}), ("abc", {3: 5, 17: -9}), ("xyz", {3: 5})):
        named = {str(concept): factor for concept, factor in factors.items()}
        events = play(server, prompt=prompt, factors=named)
        ids = playground.tokenizer.encode_ordinary(prompt)
        assert events[0] == dict(prompt=list(prompt))
        for number, model in enumerate(playground.models.values()):
            expected = generate(model, torch.tensor([ids]), 20, 0.8, 200,
                                scales([{}, factors], 48, CPU), torch.Generator().manual_seed(5))
            texts = [playground.tokenizer.decode(row[len(ids):].tolist()) for row in expected]
            texts = [text.partition("<|endoftext|>")[0].rstrip("\ufffd") for text in texts]
            assert [text.rstrip("\ufffd") for text in rows_of(events, number)] == texts

def test_new_factors_do_not_make_the_lower_blocks_read_the_prompt_again(served):
    server, playground = served
    lengths = []
    hook = playground.models["CoCoMix"].h[0].register_forward_hook(
        lambda block, args, out: lengths.append(args[0].shape[1]))
    playground.held_out, held_out = [], playground.held_out
    play(server, prompt="hello", tokens=1, factors={})
    first = lengths.count(5)
    play(server, prompt="hello", tokens=1, factors={"3": 4})
    hook.remove()
    playground.held_out = held_out
    assert first == 1 and lengths.count(5) == 1

def test_the_cost_and_the_concepts_of_each_token(served):
    server, playground = served
    events = play(server, factors={"3": 8})
    model, scale = playground.models["CoCoMix"], scales([{}, {3: 8.0}], 48, CPU)
    costs = [event["perplexity"] for event in events if "perplexity" in event]
    losses = [sum(model(x, y, scale=s).loss.item() for x, y in playground.held_out)
              / len(playground.held_out) for s in scale]
    assert costs[0] == pytest.approx(torch.tensor(losses).exp().tolist(), rel=1e-4)
    found, names = events[-1]["concepts"], events[-1]["names"]
    kept = playground.models["CoCoMix"].concepts(torch.tensor([[97, 98, 99]])).indices[0].tolist()
    assert [[i for i, _ in token] for token in found[0][0][:3]] == [row[:8] for row in kept]
    tokens = [event["pieces"][1] for event in events if event.get("pieces") and not event["model"]]
    assert len(found[0][1]) == 3 + len(tokens) - tokens.count(None)
    assert names["3"] == playground.name(3)

def test_concepts_are_described_and_found(served):
    server, playground = served
    described = describe(playground.index, 3, playground.tokenizer)
    assert json.loads(ask(server, "GET", "/concept?3")[1]) == json.loads(json.dumps(described))
    assert json.loads(ask(server, "GET", "/find?17")[1])[0][0] == 17
    word = playground.name(3)[0]
    assert 3 in [i for i, _ in json.loads(ask(server, "GET", f"/find?{word}")[1])]
    for path in ("/concept?48", "/concept?-1", "/concept?x", "/concept", "/find?99"):
        status, text = ask(server, "GET", path)
        assert status == 400 and "is not a concept: 0 to 47" in text, path

def test_only_our_own_page_is_answered(served):
    server, _ = served
    port = server.server_address[1]
    good = [dict(), dict(Host=f"localhost:{port}"), dict(Origin=f"http://127.0.0.1:{port}")]
    bad = [dict(Host="evil.example"), dict(Host=f"evil.example:{port}"), dict(Host=None),
           dict(Origin="http://evil.example"), dict(Origin="null"), dict(Host="127.0.0.1:1"),
           dict(Origin=f"https://127.0.0.1:{port}"), dict(Origin="http://127.0.0.1:1")]
    for headers, expected in [(h, 200) for h in good] + [(h, 403) for h in bad]:
        assert ask(server, "GET", "/info", **headers)[0] == expected, headers
        assert ask(server, "POST", "/generate", BODY | dict(tokens=1), **headers)[0] == expected
    assert server.server_address[0] == "127.0.0.1"
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        assert ask(server, "POST", "/generate", BODY, Content_Type=kind)[0] == 404

def test_no_request_reads_a_file(served, tmp_path):
    server, _ = served
    (tmp_path / "secret").write_text("hidden words")
    events = play(server, prompt=f"FILE:{tmp_path}/secret"[-30:], tokens=1)
    assert "".join(events[0]["prompt"]) == f"FILE:{tmp_path}/secret"[-30:]
    events = play(server, prompt="FILE:/etc/hostname", tokens=1)
    assert "".join(events[0]["prompt"]) == "FILE:/etc/hostname"
    for path in ("/serve.py", "/../serve.py", "/%2e%2e/serve.py", "//etc/passwd", "/etc/passwd"):
        assert ask(server, "GET", path)[0] == 404

@pytest.mark.parametrize("change", [
    dict(prompt=3), dict(prompt="x" * 8001), dict(prompt="x" * 33), dict(factors=[3]),
    dict(factors={"48": 2}), dict(factors={"-1": 2}), dict(factors={"a": 2}),
    dict(factors={"3": 11}), dict(factors={"3": "2"}), dict(factors={"3": True}),
    dict(factors={"3": None}), dict(factors={"3": float("nan")}),
    dict(factors={str(i): 2 for i in range(9)}), dict(tokens=0), dict(tokens=401), dict(tokens=2.5),
    dict(tokens=None), dict(temperature=-1), dict(temperature=float("inf")), dict(seed=-1),
    dict(seed=2**32), dict(seed="1")])
def test_wrong_values_are_refused_in_one_line(served, change):
    status, text = ask(served[0], "POST", "/generate", BODY | change)
    assert status == 400 and json.loads(text)["error"] and "\n" not in text

@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 60_000])
def test_what_is_no_request_is_refused(served, body):
    assert ask(served[0], "POST", "/generate", body)[0] == 400

def test_a_long_body_and_a_full_queue_are_refused(served, monkeypatch):
    server, _ = served
    assert ask(server, "POST", "/generate", b"x" * ((1 << 16) + 1))[0] == 413
    for length in ("-1", "x", "9" * 30):
        assert ask(server, "POST", "/generate", b"{}", Content_Length=length)[0] == 413
    monkeypatch.setattr(server.jobs, "maxsize", 1)
    monkeypatch.setattr(server.jobs, "_qsize", lambda: 1)
    assert ask(server, "POST", "/generate", BODY)[0] == 503

def test_requests_of_a_page_that_has_gone_make_room(served, monkeypatch):
    server, playground = served
    busy, gone_on = threading.Event(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(playground, "perplexities",
                      lambda *_: busy.set() or gone_on.wait(30) and None)
        first = threading.Thread(target=play, args=[server])
        first.start()
        assert busy.wait(30)
        text = json.dumps(BODY)
        for _ in range(serve.WAITING):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
            connection.request("POST", "/generate", text, {"Content-Type": "application/json"})
            connection.close()
        time.sleep(1)  # the server notices
        gone_on.set()
        first.join()
    assert "concepts" in play(server)[-1]

def test_an_error_ends_one_request_only(served, monkeypatch, capfd):
    server, playground = served
    with monkeypatch.context() as patch:
        patch.setattr(playground, "concepts", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in play(server)[-1]["error"]
    assert "concepts" in play(server)[-1]

def test_a_port_that_is_taken_and_keys_that_do_not_apply_end_in_one_line(served, chain):
    port = served[0].server_address[1]
    status, _, err = run(sample.main, chain["cocomix"], f"--serve={port}", "--device=cpu")
    assert status == 1 and f"port {port} can't be used" in err and len(err.splitlines()) == 1
    with pytest.raises(UserError, match=f"--serve={port + 1}"):
        serve.Server(port)
    for key in ("--inspect", "--num_samples=2", "--steer_sweep", "--stop=false"):
        status, _, err = run(sample.main, chain["cocomix"], "--serve=0", key, "--device=cpu")
        assert status == 1 and "is not for --serve" in err, key
    status, _, err = run(sample.main, chain["ntp"], "--serve=0", "--device=cpu")
    assert status == 1 and "need a cocomix run" in err

@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_in_a_browser(served, tmp_path):
    server, _ = served
    done = "document.body && document.body.dataset.busy === 'no'"
    steered = "document.querySelector(\"[data-row='0-1']\").textContent"
    with Browser(tmp_path) as browser:
        browser.call("Page.navigate", url=f"http://{server.hosts[0]}/")
        browser.wait(done)
        browser.click("#prompt")
        browser.call("Input.insertText", text="ab")
        browser.click("#go")
        browser.wait("document.querySelector(\"[data-row='0-0'] .prompt + .prompt\")")
        browser.wait(done)
        plain = browser.run("document.querySelector(\"[data-row='0-0']\").textContent")
        assert "ab" in plain[:5] and len(plain) == 25
        browser.click("[data-row='0-0'] span", 4)                    # a token: its concepts
        browser.wait("document.querySelector('#token .concept')")
        browser.click("#token .concept")                             # one of them: what it is
        browser.wait("document.getElementById('steer')")
        browser.click("#steer")                                      # a slider for it
        browser.wait(f"document.querySelector(\"[data-row='0-1']\") && {done}")
        before = browser.run(steered)
        browser.run("document.querySelector('[data-slider]').focus()")
        for _ in range(6):                                           # moved by keys
            browser.press("ArrowLeft", 37)
        browser.wait(f"{steered} !== {json.dumps(before)} && {done}")
        assert browser.run("document.querySelectorAll('[data-row=\"0-1\"] .new').length")
        assert browser.run("document.querySelectorAll('.cost').length") == 2
        assert browser.run("document.querySelector(\"[data-row='0-0']\").textContent") == plain
        assert browser.run("document.activeElement.dataset.slider")  # the keys stay with it
        browser.click("[data-row='0-1'] span", 5)
        browser.press("ArrowRight", 39)
        assert browser.run("document.querySelectorAll('.chosen').length") == 1
        before = browser.run(steered)
        browser.run("document.querySelector('[data-slider]').focus()")
        for _ in range(30):
            browser.press("ArrowRight", 39)
        browser.wait(f"{steered} !== {json.dumps(before)} && {done}")
        browser.wait("document.querySelector('#token .concept')")
        shown = browser.run("document.querySelector('#token h2').textContent")
        chosen = browser.run("visible(document.querySelector('.chosen').textContent)")
        assert shown == f"At {chosen}"
        browser.click("#sliders [aria-label^=remove]")               # the steered text goes
        browser.wait(f"!document.querySelector(\"[data-row='0-1']\") && {done}")
        assert browser.run("document.getElementById('token').hidden")
        assert browser.run("document.activeElement.id") == "find"
        for width in (390, 1200):
            browser.resize(width, 800)
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")

def test_a_page_of_an_earlier_start_is_told_to_reload(served):
    server, playground = served
    session = json.loads(ask(server, "GET", "/info")[1])["session"]
    assert play(server, session=session)
    status, text = ask(server, "POST", "/generate", BODY | dict(session="another"))
    assert status == 400 and "reload this page" in text

def test_a_closed_pipe_ends_the_server(served, monkeypatch):
    server = serve.Server(0)

    def fail(*_, **__):
        raise BrokenPipeError
    monkeypatch.setattr("builtins.print", fail)
    with pytest.raises(BrokenPipeError):
        server.run(served[1])
    assert server.closing
