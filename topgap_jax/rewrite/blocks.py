"""A transformer as its blocks: what each attention looks at, what each block leaves, and the head behind them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax

from topgap_jax.errors import UserError
from topgap_jax.rewrite.body import body_of
from topgap_jax.rewrite.interpreter import bind, evaluate, inline, trace
from topgap_jax.rewrite.operations import match
from topgap_jax.types import Array


class Blocks(NamedTuple):
    """A network of images, seen block by block.

    probabilities                                        shape of each block's attention, the softmax, keys last
    tokens(changes) -> [tokens of each block]            with changes[i] added to the attention of block i
    head(tokens) -> logits                               the network behind the last block
    """

    probabilities: tuple[tuple[int, ...], ...]
    tokens: Callable[[Sequence[Array]], list[Array]]
    head: Callable[[Array], Any]


def blocks(f: Callable, images: Array) -> Blocks:
    """The blocks of f(images): each from one product of a softmax and values to the last sum before the next of them.

    UserError where there is none, as in a loop, which cannot be entered, or without a sum behind it.
    """
    closed, arrays, restore = trace(f, (images,), {})
    flat = inline(closed, arrays, remat=True)
    body = body_of(flat.jaxpr)
    places, attentions, ends = {}, [], []
    for eqn in flat.jaxpr.eqns:
        name, operation = match(eqn, body, ("attention", "add"))
        if name == "attention":
            places[id(eqn)] = len(attentions)
            attentions.append(operation)
            ends.append(None)
        elif name == "add" and ends:
            ends[-1] = eqn
    if not attentions or None in ends:
        raise UserError(
            "the network has no attention that could be found: a product of a softmax and values, outside of loops, and"
            " a sum with what was before it"
        )
    order = {id(eqn): i for i, eqn in enumerate(ends)}

    def tokens(changes: Sequence[Array]) -> list[Array]:
        left: list[Any] = [None] * len(ends)

        def rule(eqn, values, read):
            if id(eqn) in places:
                operation = attentions[places[id(eqn)]]
                probabilities, others = map(read, operation.operands)
                return [operation.function(probabilities + changes[places[id(eqn)]], others)]
            if id(eqn) in order:
                (left[order[id(eqn)]],) = outs = bind(eqn, values)
                # Each block's tokens are its own: nothing behind the block is differentiated by what is in it.
                return [lax.stop_gradient(out) for out in outs]
            return None

        evaluate(flat.jaxpr, flat.consts, arrays, rule)
        return left

    def head(value: Array) -> Any:
        rule = lambda eqn, values, read: [value] if eqn is ends[-1] else None
        return restore(evaluate(flat.jaxpr, flat.consts, arrays, rule))

    return Blocks(tuple(each.operands[0].aval.shape for each in attentions), tokens, head)
