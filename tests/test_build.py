"""The reader of `'pgd(linf(8/255), steps=20)'`: values, errors, and nothing else whatever the text."""

import ast
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topgap_jax import attacks, balls, pool, scores
from topgap_jax.build import build, calls, check_number, merged, names, signature, table
from topgap_jax.errors import UserError
from topgap_jax.types import Attack

TABLE = {**pool.TABLE, **balls.TABLE, **attacks.TABLE, "echo": lambda *args, **words: (args, words)}
VALUES = {**scores.VALUES, "eps": 8 / 255, "steps": 7, "mean": (0.5, 0.5, 0.5)}
VALID = [
    "pgd(linf(8/255), score=margin, steps=20)",
    "top_gap(k=4)",
    "gap(), gmp()",
    "echo(-1.5, (1, 'a'), x=[True, None])",
    "lse(r=2*3%4)",
]


def error(text, where=""):
    """The one line that `text` is refused with."""
    with pytest.raises(UserError) as raised:
        build(text, TABLE, VALUES, where)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_a_users_own_function_raises_is_one_line():
    def broken():
        raise RuntimeError("no such\ncheckpoint")

    with pytest.raises(UserError) as raised:
        build("broken()", {"broken": broken}, {}, "config.model")
    assert str(raised.value) == "config.model: broken raised RuntimeError: no such checkpoint"
    assert raised.value.__cause__ is not None, "--traceback shows it"


def test_values():
    assert build("echo(8/255, 1 + 2*3 - 4//3 % 2, +1, -2.5)", TABLE)[0] == (8 / 255, 6, 1, -2.5)
    assert build("echo('a', x=[1, (2, None)], y=True)", TABLE) == (("a",), {"x": (1, (2, None)), "y": True})
    assert build(" 1,\n 'b' ", TABLE) == (1, "b")
    assert build("mean", TABLE, VALUES) == (0.5, 0.5, 0.5)
    attack = build("pgd(linf(eps), score=margin, steps=steps)", TABLE, VALUES)
    assert isinstance(attack, Attack) and attack.steps == 7
    assert attack.name == "pgd-7 on margin, linf(8/255)"


def test_signature():
    assert signature("pgd", attacks.pgd) == PGD.removeprefix("usage: ")
    assert signature("f", lambda a, *rest, b, **words: None) == "f(a, *rest, b, **words)"


PGD = (
    "usage: pgd(ball, *, score=cross_entropy, steps=20, step_size=None, start='random', optimizer=None, targets=0, "
    "restarts=1, samples=None)"
)
ERRORS = {
    "top_gapp(k=3)": "unknown name 'top_gapp'; did you mean 'top_gap'? 'topgap help' lists the names",
    "pgd(linf(epz))": "unknown name 'epz'; did you mean 'eps'? 'topgap help' lists the names",
    "gap": "'gap' must be called: gap()",
    "pgd(linf)": "'linf' must be called: linf(eps)",
    "eps(3)": "'eps' is a value and cannot be called; 'topgap help' lists the names",
    "zzzzz": "unknown name 'zzzzz'; 'topgap help' lists the names",
    "pgd(linf(.1), step=3)": f"pgd: got an unexpected keyword argument 'step'; did you mean 'steps'?; {PGD}",
    "pgd()": f"pgd: missing a required argument: 'ball'; {PGD}",
    "pgd(linf(.1), 3)": f"pgd: too many positional arguments; {PGD}",
    "pgd(8)": f"pgd: ball must be a value of type Ball, got 8; {PGD}",
    "pgd(linf(.1), score='margin')": f"pgd: score must be a function of type Score, got 'margin'; {PGD}",
    "pgd(linf(.1), steps=2.5)": "pgd: steps must be a whole number of at least 1, got 2.5",
    "top_gap(k='4')": (
        "top_gap: k must be a number or a function of type Callable or None, got '4'; usage: top_gap(k=None, *,"
        " fraction=None)"
    ),
    "top_gap(k=1, k=2)": "top_gap: 'k' is given 2 times; usage: top_gap(k=None, *, fraction=None)",
    "linf('a')": "linf: eps must be a number in [0, 1e+06], got 'a'",
    "linf(1e999)": "linf: eps must be a number in [0, 1e+06], got inf",
    "linf(1e999 - 1e999)": "linf: eps must be a number in [0, 1e+06], got nan",
    "top_gap(fraction=2)": "top_gap: fraction must be a number in [1e-09, 1], got 2",
    "gap(*[1])": "'*' is not allowed in the arguments of 'gap'",
    "gap(**{})": "'*' is not allowed in the arguments of 'gap'",
    "gap()()": "only plain names can be called, not 'gap()'",
    "gap().__class__": "'gap().__class__' is not allowed: only calls, names, numbers, text and tuples are",
    "eps.real": "'eps.real' is not allowed: ",
    "mean[0]": "'mean[0]' is not allowed: ",
    "9**9**9": "'9 ** 9 ** 9' is not allowed: ",
    "10**100": "'10 ** 100' is not allowed: ",
    "2 << 10000": "'2 << 10000' is not allowed: ",
    "'a' * 1000000000": "arithmetic is for numbers only, in ''a' * 1000000000'",
    "mean * 2": "arithmetic is for numbers only, in 'mean * 2'",
    "True + 1": "arithmetic is for numbers only, in 'True + 1'",
    "1 / 0": "division by zero in '1 / 0'",
    "1 % 0": "by zero in '1 % 0'",
    "f'{1}'": "is not allowed: ",
    "lambda: 1": "'lambda: 1' is not allowed: ",
    "[x for x in mean]": "is not allowed: ",
    "(x := 1)": "'(x := 1)' is not allowed: ",
    "1j": "1j is not a number, text, True, False or None",
    "b'a'": "b'a' is not a number, text, True, False or None",
    "sum(1": "'sum(1' is not an expression: '(' was never closed at column 4",
    "import os": "'import os' is not an expression: invalid syntax at column 1",
    "": "'' is not an expression: invalid syntax",
    "a\nb": "'a\\nb' is not an expression: ",
    "\0": "source code string cannot contain null bytes",
    "'\ud800'": "cannot be read: 'utf-8' codec can't encode character",
    "1" * 5000: "Exceeds the limit",
    "(" * 500: "too many nested parentheses",
    "-" * 100_000 + "1": "cannot be read: ",
    "1+" * 20_000 + "1": "cannot be read: ",
}


@pytest.mark.parametrize("text", ERRORS, ids=lambda text: repr(text)[:40])
def test_errors_say_what_would_be_right(text):
    message = error(text, "config.pool")
    assert message.startswith("config.pool: ") and message.count("config.pool") == 1
    assert ERRORS[text] in message
    assert len(message) < 500


def test_at_most_three_names_are_proposed():
    table = {f"top_{letter}": len for letter in "abcdef"}
    with pytest.raises(UserError) as raised:
        build("top_(1)", table)
    assert (
        str(raised.value)
        == "unknown name 'top_'; did you mean 'top_f' or 'top_e' or 'top_d'? 'topgap help' lists the names"
    )


def test_names_and_calls():
    text = "with_drop(network, 'stage3', sgdrop(rate=rate, granularity=('a', kind))), eps"
    assert set(names(text)) == {"network", "rate", "kind", "eps"} and calls(text) == ["with_drop", "sgdrop"]
    assert names("a + f(b") == calls("(" * 500) == names("\0") == []


def test_a_table_refuses_two_functions_of_one_name():
    def twin():
        pass

    with pytest.raises(ValueError, match="two functions are named 'twin'; every name stands for one thing"):
        table(twin, twin)
    with pytest.raises(ValueError, match="two functions are named 'gap'"):
        merged(pool.TABLE, {"gap": twin})


def test_not_a_text():
    assert error(5, "config.pool") == "config.pool: expected text like 'pgd(linf(8/255))', got 5"


def test_a_warning_of_the_parser_is_not_shown():
    # pytest turns warnings into errors; Python 3.12 warns of both.
    assert build("'\\d'", TABLE) == "\\d"
    assert "is not allowed" in error("1if 1 else 2")


def test_check_number():
    for value, low, high, whole in [
        (3, 3, 3, True),
        (np.int64(3), 3, 3, True),
        (np.float32(0.5), 0, 1, False),
        (0.5, 0, 1, False),
        (-1e30, -(2**300), 2**300, False),
    ]:
        check_number("x", value, low, high, whole)
    check_number("x", np.float32(0.5), 0, 1)
    check_number("x", np.int64(3), 3, 3, whole=True)
    for arguments, text in {
        (True,): "x must be a number, got True",
        (2, 3): "x must be a number of at least 3, got 2",
        (2, -float("inf"), 1): "x must be a number of at most 1, got 2",
        (2.0, 1, 3, True): "x must be a whole number in [1, 3], got 2.0",
        (float("inf"),): "x must be a number, got inf",
    }.items():
        with pytest.raises(UserError) as raised:
            check_number("x", *arguments)
        assert str(raised.value) == text


def value_or_error(text):
    try:
        build(text, TABLE, VALUES, "here")
    except UserError as refusal:
        assert str(refusal).startswith("here: ") and "\n" not in str(refusal)


@given(st.text(max_size=60) | st.text(string.printable, max_size=60))
def test_any_text(text):
    value_or_error(text)


@given(
    st.sampled_from(VALID),
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 3), st.text("()[]{}*,=.'\"+-/%:09aegkx \n\\", max_size=3)),
        min_size=1,
        max_size=4,
    ),
)
def test_mutated_text(text, edits):
    for place, length, new in edits:
        text = text[:place] + new + text[place + length :]
    value_or_error(text)


def trees():
    """Random expressions, allowed or not."""
    names = st.sampled_from([*TABLE, *VALUES, "unknown", "__import__"])
    words = st.sampled_from(["k", "fraction", "r", "eps", "score", "steps", "ball", "other"])
    leaves = (
        st.integers(-(10**30), 10**30).map(ast.Constant)
        | st.floats().map(ast.Constant)
        | st.sampled_from([None, True, "", "a" * 9, b"b", 1j, ...]).map(ast.Constant)
        | names.map(lambda name: ast.Name(name, ast.Load()))
    )

    def grow(children):
        operators = st.sampled_from(
            [ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.LShift, ast.BitOr, ast.MatMult]
        )
        keywords = st.lists(st.builds(ast.keyword, words, children), max_size=3)
        functions = names.map(lambda name: ast.Name(name, ast.Load()))
        return (
            st.builds(ast.BinOp, children, operators.map(lambda kind: kind()), children)
            | st.builds(
                ast.UnaryOp,
                st.sampled_from([ast.USub, ast.UAdd, ast.Not, ast.Invert]).map(lambda kind: kind()),
                children,
            )
            | st.builds(ast.Call, functions | children, st.lists(children, max_size=3), keywords)
            | st.lists(children, max_size=3).map(lambda items: ast.Tuple(items, ast.Load()))
            | children.map(lambda value: ast.Attribute(value, "__class__", ast.Load()))
            | st.builds(ast.Subscript, children, children, st.just(ast.Load()))
            | st.builds(ast.IfExp, children, children, children)
        )

    return st.recursive(leaves, grow, max_leaves=8)


@given(trees())
def test_any_expression(tree):
    value_or_error(ast.unparse(ast.fix_missing_locations(ast.Expression(tree))))
