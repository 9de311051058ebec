"""Read a choice from a config: `'pgd(linf(8/255), steps=20)'` becomes the value that this text is in Python.

Never `eval`: the text is parsed, and only calls of names in a table, names of given values, literals, tuples, keyword
arguments and arithmetic on numbers are allowed.
"""

import ast
import difflib
import inspect
import math
import numbers
import operator
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from topgap_jax.errors import UserError

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


LONGEST = 100_000  # characters of a text: of what is longer Python's parser makes a tree of any size


def build(text: str, table: Mapping[str, Callable], values: Mapping[str, Any] | None = None, where: str = "") -> Any:
    """The value of `text`; a list separated by commas is a tuple.

    table: name -> function that may be called; values: name -> value that may be named; where: the config key, for
    errors. Raises UserError, and nothing else, with the choices, the signature and the closest match in one line.

    >>> build("f(8/255, steps=4)", {"f": lambda eps, steps: (round(eps, 3), steps)})
    (0.031, 4)
    """
    if not isinstance(text, str):
        raise UserError(f"{_at(where)}expected text like 'pgd(linf(8/255))', got {_short(text)}")
    try:
        return _value(_parsed(text).body, table, values or {}, where)
    except UserError:
        raise
    except SyntaxError as error:
        column = f" at column {error.offset}" if error.offset else ""
        raise UserError(f"{_at(where)}{_short(text)} is not an expression: {_line(error.msg)}{column}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        # ast.parse raises ValueError on NUL bytes and integers of thousands of digits, the others on deep nesting.
        raise UserError(f"{_at(where)}{_short(text)} cannot be read: {_line(error)}") from None


def table(*functions: Callable) -> dict[str, Callable]:
    """{name: function} of functions by their own names: the rows that a family of methods adds to its room's table."""
    return merged(*({function.__name__: function} for function in functions))


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """One table of several; a name that stands in two of them is a ValueError.

    >>> merged({"a": 1}, {"b": 2})
    {'a': 1, 'b': 2}
    """
    rows: dict[str, Any] = {}
    for row in tables:
        if twice := sorted(set(rows) & set(row)):
            raise ValueError(f"two functions are named '{twice[0]}'; every name stands for one thing")
        rows |= row
    return rows


def signature(name: str, function: Any) -> str:
    """`pgd(ball, *, score=cross_entropy, steps=20)`, without annotations, defaults by their name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return f"{name}(...)"
    parts, star = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        default = "" if p.default is p.empty else f"={_name(p.default, function)}"
        parts.append({p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name + default)
        star = star or p.kind is p.VAR_POSITIONAL
    return f"{name}({', '.join(parts)})"


def _name(default: Any, function: Any) -> str:
    """A default by its name; rules have it where the function was written."""
    if isinstance(default, Mapping):
        around = getattr(function, "__globals__", {})
        return next((name for name, value in around.items() if value is default), repr(default))
    return getattr(default, "__name__", None) or repr(default)


def _value(node: ast.AST, table: Mapping[str, Callable], values: Mapping[str, Any], where: str) -> Any:
    read = lambda child: _value(child, table, values, where)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str) and "\0" in node.value:
            raise UserError(f"{_at(where)}{_short(node.value)} holds a character NUL, which no path and no name may")
        if node.value is None or isinstance(node.value, (bool, int, float, str)):
            return node.value
        raise UserError(f"{_at(where)}{_short(node.value)} is not a number, text, True, False or None")
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(read(item) for item in node.elts)
    if isinstance(node, ast.Name):
        if node.id in values:
            return values[node.id]
        if node.id in table:
            raise UserError(f"{_at(where)}'{node.id}' must be called: {signature(node.id, table[node.id])}")
        raise UserError(f"{_at(where)}unknown name '{node.id}'; {_near(node.id, [*values, *table])}")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = read(node.operand)
        return _arithmetic(lambda: -value if isinstance(node.op, ast.USub) else value, node, where, value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = read(node.left), read(node.right)
        return _arithmetic(lambda: OPERATORS[type(node.op)](left, right), node, where, left, right)
    if isinstance(node, ast.Call):
        return _call(node, table, values, where)
    raise UserError(
        f"{_at(where)}'{_short(ast.unparse(node))[1:-1]}' is not allowed: "
        "only calls, names, numbers, text and tuples are"
    )


def _arithmetic(compute, node, where, *operands):
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in operands):
        raise UserError(f"{_at(where)}arithmetic is for numbers only, in '{ast.unparse(node)}'")
    try:
        return compute()
    except (ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{_at(where)}{error} in '{ast.unparse(node)}'") from None


def _call(node: ast.Call, table: Mapping[str, Callable], values: Mapping[str, Any], where: str) -> Any:
    if not isinstance(node.func, ast.Name):
        raise UserError(f"{_at(where)}only plain names can be called, not '{ast.unparse(node.func)}'")
    name = node.func.id
    if name not in table:
        fault = f"'{name}' is a value and cannot be called" if name in values else f"unknown name '{name}'"
        raise UserError(f"{_at(where)}{fault}; {_near(name, list(table))}")
    function = table[name]
    if any(isinstance(item, ast.Starred) for item in node.args) or any(word.arg is None for word in node.keywords):
        raise UserError(f"{_at(where)}'*' is not allowed in the arguments of '{name}'")
    names = [word.arg for word in node.keywords]
    for word in names:
        if names.count(word) > 1:  # Python's own check comes after the parser, which is all that runs here
            raise UserError(
                f"{_at(where)}{name}: '{word}' is given {names.count(word)} times; usage: {signature(name, function)}"
            )
    args = [_value(item, table, values, where) for item in node.args]
    words = {word.arg: _value(word.value, table, values, where) for word in node.keywords}
    try:
        bound = inspect.signature(function).bind(*args, **words)
    except TypeError as error:
        parameters = list(inspect.signature(function).parameters)
        wrong = [word for word in words if word not in parameters]
        hint = f"; {did_you_mean(wrong[0], parameters, n=1)}".rstrip("; ") if wrong else ""
        raise UserError(f"{_at(where)}{name}: {error}{hint}; usage: {signature(name, function)}") from None
    for parameter, value in bound.arguments.items():
        kinds = _kinds(bound.signature.parameters[parameter])
        if kinds and not any(fits(value) for _, fits in kinds):
            due = " or ".join(dict.fromkeys(kind for kind, _ in kinds))
            raise UserError(
                f"{_at(where)}{name}: {parameter} must be {due}, got {_short(value)}; "
                f"usage: {signature(name, function)}"
            )
    try:
        return function(*bound.args, **bound.kwargs)
    except UserError as error:
        text = str(error).removeprefix(f"{name}: ")  # Python callers need the name in it
        if where and text.startswith(where):
            raise UserError(text) from None
        said = text.startswith(f"{name}(")  # folder('ROOT') names itself
        raise UserError(f"{_at(where)}{text if said else f'{name}: {text}'}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, AssertionError) as error:
        # A mistyped argument whose annotation says too little shows itself as one of these inside the function.
        raise UserError(f"{_at(where)}{name}: {_line(error)}; usage: {signature(name, function)}") from None
    except Exception as error:  # of a user's own function
        raise UserError(f"{_at(where)}{name} raised {type(error).__name__}: {_line(error)}") from error


def _kinds(parameter: inspect.Parameter) -> list[tuple[str, Callable]]:
    """(name, test) of what a parameter's annotation allows.

    Empty where nothing is known, or where the function's own checks say it better (numbers, text).
    """
    kinds, known, annotation = [], False, parameter.annotation
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return []
    for kind in typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,):
        if kind in (int, float):
            kinds.append(("a number", lambda value: isinstance(value, (int, float))))
        elif kind is type(None):
            kinds.append(("None", lambda value: value is None))
        elif isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
            kinds.append((f"a value of type {kind.__name__}", lambda value, kind=kind: isinstance(value, kind)))
            known = True
        elif getattr(kind, "_is_protocol", False) or typing.get_origin(kind) is Callable or kind is Callable:
            kinds.append((f"a function of type {getattr(kind, '__name__', 'Callable')}", callable))
            known = True
        else:
            return []
    return kinds if known else []


def names(text: str) -> list[str]:
    """The names that `text` takes a value from: not those it calls, not keywords, not what stands in quotes.

    >>> names("robust(pgd(linf(eps), steps=steps)), layer('eps')")
    ['eps', 'steps']
    """
    return [name for name, called in _named(text) if not called]


def calls(text: str) -> list[str]:
    """The names that `text` calls.

    >>> calls("robust(pgd(linf(eps), steps=steps))")
    ['robust', 'pgd', 'linf']
    """
    return [name for name, called in _named(text) if called]


def _named(text):
    """(name, is it called) of the names in `text`, each once; none where it is no expression, which `build` says."""
    try:
        nodes = list(ast.walk(_parsed(text)))
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        return []
    functions = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return list(dict.fromkeys((node.id, id(node) in functions) for node in nodes if isinstance(node, ast.Name)))


def did_you_mean(name: str, choices: Iterable[str], n: int = 3) -> str:
    """`did you mean 'pgd' or 'apgd'? `: at most n names that look like this one, "" where none does."""
    near = [f"'{each}'" for each in difflib.get_close_matches(name, list(choices), n=n)]
    return f"did you mean {' or '.join(near)}? " if near else ""


def _parsed(text: str) -> ast.Expression:
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text):,} characters, and at most {LONGEST:,} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of '\\d' and '1if'; what is wrong there is an error of `build`
        return ast.parse(text.strip().replace("\n", " "), mode="eval")  # a long list may go over several lines


def _near(name: str, choices: list[str]) -> str:
    return f"{did_you_mean(name, choices)}'topgap help' lists the names"


def _line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, whole: bool = False) -> None:
    """Raise a UserError unless `value` is a finite number (a whole one) within [low, high]."""
    kind = numbers.Integral if whole else numbers.Real  # NumPy's too
    if (
        isinstance(value, bool)
        or not isinstance(value, kind)
        or not low <= value <= high
        or value in (math.inf, -math.inf)
    ):
        bounds = {
            (False, False): "",
            (True, False): f" of at least {low:g}",
            (False, True): f" of at most {high:g}",
            (True, True): f" in [{low:g}, {high:g}]",
        }[low > -math.inf, high < math.inf]
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number{bounds}, got {_short(value)}")
