"""A model whose batch norm keeps its statistics while it is trained: for fine-tuning on few images."""

import inspect
import warnings

import flax.linen as nn

from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.types import Model


def frozen_statistics(model: Model, *layers: str) -> Model:
    """The model with Linen's batch norm in evaluation mode also in training: it normalises with its running
    statistics, which stay as they are, and its scale and bias learn.

    layers: names such as 'stem' or 'backbone/stage1', inside which this is done; everywhere where none is given.
    Dropout and whatever else differs in training is untouched, also a batch norm of the module's own. UserError where
    there is none of Linen's.
    """

    def apply(variables, images, *, train=False, keys=None, targets=None, step=None):
        if not train:
            return model.apply(variables, images, train=False, keys=keys, targets=targets, step=step)
        frozen = set()

        def freeze(next_fun, args, kwargs, context):
            norm, path = context.module, "/".join(context.module.path)
            inside = not layers or any(f"/{layer.strip('/')}/" in f"/{path}/" for layer in layers)
            if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__" or not inside:
                return next_fun(*args, **kwargs)
            if "use_running_average" not in inspect.signature(context.orig_method).parameters:
                return next_fun(*args, **kwargs)  # of a class of its own, which calls Linen's in turn
            frozen.add(path)
            before = norm.use_running_average
            # Linen's modules are frozen dataclasses, and the argument of the call is refused where the field is set.
            object.__setattr__(norm, "use_running_average", None)
            try:
                return next_fun(args[0] if args else kwargs["x"], use_running_average=True, mask=kwargs.get("mask"))
            finally:
                object.__setattr__(norm, "use_running_average", before)

        with nn.intercept_methods(freeze), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*batch statistics did not move")  # they are not meant to
            output = model.apply(variables, images, train=True, keys=keys, targets=targets, step=step)
        missing = [layer for layer in layers if not any(f"/{layer.strip('/')}/" in f"/{path}/" for path in frozen)]
        if missing or not frozen:
            where = f" in '{missing[0]}'" if missing else ""
            raise UserError(f"frozen_statistics: the model has no batch norm of Linen's{where}")
        return output

    return model._replace(apply=apply)


TABLE = table(frozen_statistics)
