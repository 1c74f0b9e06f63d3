"""A local page to read and steer concepts live: python sample.py RUN --serve.

    GET  /  (serve.html), /info, /find?WORDS, /concept?NUMBER
    POST /generate  {prompt, factors: {concept: factor}, tokens, temperature, seed} → a JSON object
                    a line, as it happens (Playground.events)

Only this computer reaches it, and only its own page: other hosts and origins are refused. No
request names a file. One worker generates, one request after the other.
"""
import json
import queue
import secrets
import select
import socket
import socketserver
import sys
import threading
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

from support.runtime import UserError

import torch

from support.concept_index import describe, find, token_text, used
from support.curves import perplexity
from support.engine import concepts_at, decoder, read, stream
from support.steering import LOSS_TOKENS, scales
from support.tokens import Batches, encode_text

PAGE = Path(__file__).with_name("serve.html")
FACTOR, SLIDERS, TOKENS, HOTTEST = 10, 8, 400, 5  # the most of each; HOTTEST: temperature
CHARACTERS, BODY, WAITING = 8000, 1 << 16, 8  # of a prompt; bytes of a request; requests waiting
STRONGEST = 8  # concepts listed at each token
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'self' data: 'unsafe-inline'; "
           "form-action 'none'; frame-ancestors 'none'"}

def number(values, name, low, high, kind):
    value = values.get(name)
    if type(value) not in (int, kind) or not low <= value <= high:
        raise UserError(f"{name}={str(value)[:40]!r}: expected a {'whole ' * (kind is int)}number "
                        f"from {low} to {high}")
    return value

class Playground:
    """Generates for the page. models: {name: GPT}, the run first; index: its ConceptIndex; val: its
    validation tokens, or None; settings: what the page shows first."""
    def __init__(self, models, index, tokenizer, val, top_k, settings):
        self.models, self.index, self.tokenizer, self.top_k = models, index, tokenizer, top_k
        first, self.prompt, self.held_out, self.unsteered = [*models.values()][0], None, [], {}
        self.block_size = min(gpt.config.block_size for gpt in models.values())
        self.device = first.wte.weight.device
        self.info = settings | dict(models=list(models), concepts=len(index.labelled),
                                    factor=FACTOR, sliders=SLIDERS, most_tokens=TOKENS,
                                    session=secrets.token_hex(8))
        if val is not None:
            blocks = Batches(val, self.block_size, 1, first.config.vocab_size, shift=False,
                             split="val")
            n = min(-(-LOSS_TOKENS // self.block_size), blocks.blocks)
            self.held_out = [[t.to(self.device) for t in blocks[i]] for i in range(n)]
        self.info["held_out"] = len(self.held_out) * self.block_size

    @cached_property
    def entries(self):
        return [describe(self.index, concept, self.tokenizer) for concept in used(self.index)]

    def name(self, concept):
        return [token_text(self.tokenizer, t) for t in self.index.next_ids(concept, 4)]

    def describe(self, text):
        return describe(self.index, self.concept_id(text), self.tokenizer)

    def concept_id(self, text):
        if not text.isdecimal() or len(text) > 9 or int(text) >= self.info["concepts"]:
            raise UserError(f"{text[:40]!r} is not a concept: 0 to {self.info['concepts'] - 1}")
        return int(text)

    def find(self, words):
        """[[concept, its name], …] for words or a number."""
        if words.isdecimal():
            found = [self.concept_id(words)]
        else:
            found = [e["id"] for e in find(self.entries, words[:200])[:12]]
        return [[concept, self.name(concept)] for concept in found]

    def check(self, body):
        """A decoded body of /generate → the arguments of `events`. UserError: what is wrong."""
        if not isinstance(body, dict) or not isinstance(body.get("factors"), dict):
            raise UserError("expected an object of prompt, factors, tokens, temperature, seed")
        if body.get("session", self.info["session"]) != self.info["session"]:
            raise UserError("sample.py was started again since: reload this page")
        text, factors = body.get("prompt"), body["factors"]
        if not isinstance(text, str) or len(text) > CHARACTERS or len(factors) > SLIDERS:
            raise UserError(f"at most {CHARACTERS:,} characters of text and {SLIDERS} concepts")
        prompt = encode_text(self.tokenizer, text, special=True) or [self.tokenizer.eot_token]
        if len(prompt) > self.block_size:
            raise UserError(f"a prompt of {len(prompt)} tokens; at most {self.block_size} fit")
        factors = {self.concept_id(concept): number(factors, concept, -FACTOR, FACTOR, float)
                   for concept in factors}
        return (prompt, factors, number(body, "tokens", 1, TOKENS, int),
                number(body, "temperature", 0, HOTTEST, float),
                number(body, "seed", 0, 2**32 - 1, int))

    @torch.no_grad()
    def events(self, prompt, factors, tokens, temperature, seed):
        """Continue the tokens of a prompt by at most `tokens`, plain and, with factors, steered.
        Yields {prompt}, the text of each token; {model, pieces}, the next one of each row (None: it
        has ended); {model, perplexity} of each row; {concepts, names} at each token of each row."""
        idx = torch.tensor([prompt], device=self.device)
        variants = [{}, factors] if factors else [{}]
        scale = scales(variants, self.info["concepts"], self.device)
        yield dict(prompt=list(map(decoder(self.tokenizer), prompt)))
        if prompt != self.prompt:  # new factors don't change what the lower blocks read
            self.readings = [read(gpt, idx) for gpt in self.models.values()]
            self.prompt = prompt
        end = self.tokenizer.eot_token
        streams = [stream(gpt, idx, tokens, temperature, self.top_k, scale,
                          torch.Generator(self.device).manual_seed(seed), stop=end, prompt=reading)
                   for gpt, reading in zip(self.models.values(), self.readings, strict=True)]
        rows = [[(list(prompt), decoder(self.tokenizer)) for _ in variants] for _ in streams]
        for step in zip_longest(*streams, fillvalue=()):
            for model, new in enumerate(step):
                pieces = [None] * len(variants)
                for row, token in enumerate(new):
                    if token != end:
                        so_far, text = rows[model][row]
                        so_far.append(token.item())
                        pieces[row] = text(token.item())
                yield dict(model=model, pieces=pieces)
        for model, gpt in enumerate(self.models.values()):
            yield dict(model=model, perplexity=self.perplexities(gpt, scale))
        yield self.concepts(rows, scale)

    def perplexities(self, gpt, scale):
        """Of the held-out tokens under each row of scale; of the first, plain row only once."""
        def measure(factors):
            losses = [gpt(x, y, scale=factors).loss.item() for x, y in self.held_out]
            return perplexity(sum(losses) / len(losses))
        if self.held_out and gpt not in self.unsteered:
            self.unsteered[gpt] = measure(scale[0])
        return [self.unsteered[gpt], *map(measure, scale[1:])] if self.held_out else None

    def concepts(self, rows, scale):
        found, seen = [], set()
        for gpt, texts in zip(self.models.values(), rows, strict=True):
            found.append([])
            for (tokens, _), factors in zip(texts, scale, strict=True):
                top = concepts_at(gpt, torch.tensor([tokens], device=self.device), factors)
                ids, values = top.indices[0, :, :STRONGEST], top.values[0, :, :STRONGEST]
                found[-1].append(torch.stack((ids, values), dim=-1).tolist())
                seen.update(ids.flatten().tolist())
        return dict(concepts=found, names={i: self.name(i) for i in seen})

class Server(socketserver.ThreadingTCPServer):
    """Takes the port at once; `run` answers."""
    allow_reuse_address, daemon_threads, request_queue_size = sys.platform != "win32", True, 16

    def __init__(self, port):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            raise UserError(f"port {port} can't be used ({e.strerror}); choose another one: "
                            f"--serve={port + 1 if 1024 <= port < 65535 else 8000}") from e
        port = self.server_address[1]
        self.hosts = [f"{host}:{port}" for host in ("127.0.0.1", "localhost")]
        self.hosts += ["127.0.0.1", "localhost"] if port == 80 else []  # HTTP's own, left out
        self.jobs, self.closing = queue.Queue(WAITING), False

    def run(self, playground):
        self.playground = playground
        threading.Thread(target=self.work).start()
        try:
            print(f"open http://{self.hosts[0]} in a browser; Ctrl-C ends", flush=True)
            self.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped")
        finally:
            self.closing = True
            self.jobs.put(None)
            self.server_close()

    def work(self):
        """The worker. A job is a request, a queue for its events, and an Event that ends it."""
        for request, events, gone in iter(self.jobs.get, None):
            try:
                for event in self.playground.events(*request):
                    events.put(event)
                    if gone.is_set() or self.closing:
                        break
            except Exception as e:  # the next request may work
                print(f"error: {type(e).__name__}: {e}", file=sys.stderr)
                events.put(dict(error=f"{type(e).__name__}: {e}"))
            events.put(None)

    def handle_error(self, *_):
        if not issubclass(sys.exc_info()[0], OSError):  # such as a page that was closed
            super().handle_error(*_)

class Handler(BaseHTTPRequestHandler):
    timeout, log_message = 30, lambda *_: None  # seconds without a byte

    def reply(self, status, content, kind="application/json"):
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}).items():
            self.send_header(name, value)
        self.end_headers()
        text = content if isinstance(content, str) else json.dumps(content)
        self.wfile.write(text.encode())

    def parse_request(self):
        """False, after a refusal, for what is not our page's: DNS rebinding, another site's."""
        if not super().parse_request():
            return False
        origins = [None, *(f"http://{host}" for host in self.server.hosts)]
        ours = self.headers["Host"] in self.server.hosts and self.headers["Origin"] in origins
        if not ours:
            self.reply(403, dict(error=f"open http://{self.server.hosts[0]} on this computer"))
        return ours

    def do_GET(self):
        playground, (path, _, query) = self.server.playground, self.path.partition("?")
        answers = {"/info": lambda: playground.info,
                   "/find": lambda: playground.find(unquote(query)),
                   "/concept": lambda: playground.describe(unquote(query))}
        if path == "/":
            return self.reply(200, PAGE.read_text("utf-8"), "text/html")
        if path not in answers:
            return self.reply(404, dict(error="there is no such page"))
        try:
            self.reply(200, answers[path]())
        except UserError as e:
            self.reply(400, dict(error=str(e)))

    def next_event(self, events):
        """None at the end, or once the page has gone."""
        while True:
            with suppress(queue.Empty):
                return events.get(timeout=0.2)
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return None

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/generate" or self.headers.get_content_type() != "application/json":
            return self.reply(404, dict(error="expected JSON to /generate"))
        if not length.isdecimal() or len(length) > 9 or int(length) > BODY:
            return self.reply(413, dict(error=f"expected a body of at most {BODY} bytes"))
        try:
            request = self.server.playground.check(json.loads(self.rfile.read(int(length))))
        except (UserError, ValueError, RecursionError) as e:
            return self.reply(400, dict(error=str(e)))
        events, gone = queue.SimpleQueue(), threading.Event()
        try:
            self.server.jobs.put_nowait((request, events, gone))
        except queue.Full:
            return self.reply(503, dict(error="too many requests are waiting"))
        try:
            self.reply(200, "", "application/x-ndjson")
            while (event := self.next_event(events)) is not None:
                self.wfile.write(json.dumps(event).encode() + b"\n")
        finally:  # also if the page has gone, or has moved on to other settings
            gone.set()
