"""Command lines, config files and datasets under inputs that hypothesis generates."""
from dataclasses import dataclass
from typing import Literal

from support.runtime import UserError

import numpy as np
import pytest
import tiktoken

import train
from support.cli import key, parse
from support.prepare import write_meta, write_tokens
from support.tokens import END_OF_TEXT, SPLIT_PATTERN, Batches, load_tokens, sequential

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis (requirements-test.txt)")
given, st = hypothesis.given, hypothesis.strategies
hypothesis.settings.register_profile(
    "quick", max_examples=100, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture,
                           hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("quick")

# -- command lines and config files ----------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    number: int = key(3, "an integer", low=-10**9, high=10**9)
    maybe: int | None = key(None, "an integer or none")
    rate: float = key(0.5, "a number")
    flag: bool = key(False, "true or false")
    choice: Literal["one", "two", "three"] = key("one", "a word")
    size: int | Literal["auto"] = key("auto", "a number or auto", low=1)
    text: str = key("", "text")
    many: tuple[str, ...] = key((), "texts")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
values = st.fixed_dictionaries(dict(
    number=st.integers(-10**9, 10**9), maybe=st.none() | st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False), flag=st.booleans(),
    choice=st.sampled_from(["one", "two", "three"]), size=st.just("auto") | st.integers(1, 10**18),
    text=texts, many=st.lists(texts, min_size=1, max_size=4).map(tuple)))

@given(values)
def test_any_value_of_a_config_is_read_from_the_command_line(expected):
    argv = [f"--{name}={value}" for name, value in expected.items() if name != "many"]
    argv += [f"--many={value}" for value in expected["many"]]
    assert parse(Example, argv) == (Example(**expected), [])

@given(values)
def test_any_value_of_a_config_is_read_from_a_file(tmp_path, expected):
    path = tmp_path / "a.py"
    lines = [f"{name} = {value!r}\n" for name, value in expected.items()]
    path.write_text("".join(lines), encoding="utf-8")
    assert parse(Example, [str(path)]) == (Example(**expected), [])

names = st.sampled_from([*Example.__dataclass_fields__, "method", "n_layer", "debug", "", "="])
assignments = st.tuples(names, texts).map(lambda pair: f"--{pair[0]}={pair[1]}")
arguments = st.lists(st.one_of(texts, names.map("--{}".format), assignments,
                               st.integers().map(str), st.floats().map(str)), max_size=6)

@given(st.sampled_from([Example, train.Config]), arguments)
def test_no_command_line_gives_a_traceback(cls, argv):
    argv = [arg for arg in argv if arg not in ("-h", "--help")]
    try:
        cfg, rest = parse(cls, argv, files=False)
    except UserError as e:
        assert str(e)
    else:
        assert isinstance(cfg, cls) and set(rest) <= set(argv)

plain = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=4)
nested = st.lists(plain, max_size=3) | st.dictionaries(texts, plain, max_size=2)
contents = st.dictionaries(names.filter(str.isidentifier), plain | nested, max_size=4)

@given(contents)
def test_no_config_file_of_plain_values_gives_a_traceback(tmp_path, content):
    path = tmp_path / "a.py"
    lines = [f"{name} = eval({repr(value)!r}, dict(nan=float('nan'), inf=float('inf')))\n"
             for name, value in content.items()]
    path.write_text("".join(lines), encoding="utf-8")
    try:
        assert isinstance(parse(Example, [str(path)])[0], Example)
    except UserError as e:
        assert str(path) in str(e)

# -- datasets --------------------------------------------------------------------------------------

BYTES = tiktoken.Encoding("bytes", pat_str=SPLIT_PATTERN, special_tokens={END_OF_TEXT: 256},
                          mergeable_ranks={bytes([b]): b for b in range(256)})

@given(st.lists(st.tuples(texts, st.booleans()), max_size=8))
def test_what_is_written_is_read_again(tmp_path, pieces):
    path = tmp_path / "train.bin"
    n = write_tokens(path, iter(pieces), BYTES)
    assert n * 2 == path.stat().st_size and not list(tmp_path.glob("*.tmp"))
    tokens = np.fromfile(path, "<u2").tolist()
    assert len(tokens) == n == sum(len(text.encode()) + ends for text, ends in pieces)
    assert BYTES.decode(tokens) == "".join(text + END_OF_TEXT * ends for text, ends in pieces)

@given(st.binary(max_size=64), st.integers(-1, 40))
def test_a_file_that_does_not_fit_its_meta_is_refused(tmp_path, content, expected):
    (tmp_path / "train.bin").write_bytes(content)
    write_meta(tmp_path, "gpt2", BYTES, dict(train=expected, val=0))
    if content and len(content) == 2 * expected:
        assert load_tokens(tmp_path, "train").tobytes() == content
    else:
        with pytest.raises(UserError, match="train.bin"):
            load_tokens(tmp_path, "train")

@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 3), st.integers(1, 3),
       st.integers(0, 5), st.booleans())
def test_an_epoch_has_every_block_once_and_the_processes_share_it(
        block, more, rows, processes, seed, shift):
    tokens = np.arange(2 * block + more, dtype=np.uint16)

    def batches(rank, size):
        return Batches(tokens, block, rows * processes, 1000, seed, shift, rank, size)
    whole, parts = batches(0, 1), [batches(rank, processes) for rank in range(processes)]
    n = whole.blocks
    steps = -(-2 * n // (rows * processes))  # two epochs, and the rest of the last step
    starts = np.concatenate([whole.starts(step) for step in range(steps)])
    for epoch in (0, 1):
        found = np.sort(starts[epoch * n:(epoch + 1) * n])
        assert len(found) == n and (np.diff(found) == block).all()
        assert 0 <= found[0] < (block if shift else 1) and found[-1] + block < len(tokens)
    left_out = len(tokens) - 1 - n * block  # no more than necessary
    assert left_out < (2 * block if shift else block)
    shared = [part.starts(step) for step in range(steps) for part in parts]
    assert np.array_equal(starts, np.concatenate(shared))
    x, y = parts[-1][steps - 1]
    assert (y == x + 1).all() and x.shape == (rows, block)
    assert x[:, 0].tolist() == parts[-1].starts(steps - 1).tolist()

@given(st.integers(2, 200), st.integers(1, 9), st.integers(1, 4))
def test_in_sequence_every_token_but_the_first_is_a_target_once(n, block, rows):
    pairs = list(sequential(np.arange(n, dtype=np.uint16), block, rows, n))
    assert np.concatenate([y.flatten() for _, y in pairs]).tolist() == list(range(1, n))
    for x, y in pairs:
        assert (y == x + 1).all() and x.shape[0] <= rows and x.shape[1] <= block

@given(st.integers(2, 50), st.integers(0, 70_000))
def test_a_token_beyond_the_vocabulary_is_refused(n, token):
    tokens = np.zeros(n, dtype=np.uint16)
    tokens[n // 2] = min(token, 65_535)
    if tokens.max() < 300:
        assert list(sequential(tokens, 4, 2, 300))
    else:
        with pytest.raises(UserError, match=f"token {tokens.max()} "):
            list(sequential(tokens, 4, 2, 300))
