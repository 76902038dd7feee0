"""Compiled in parts: blocks and transitions each by themselves, the choice between them on the host as it is.

What a whole run does hangs on its images, in sizes that the host reads at each transition, so a compiler that is given all of it
breaks it into pieces of its own choosing, or fails. Parts see token counts as symbols and are compiled once.
"""

import warnings

import torch
from torch import Tensor, nn

MAX_GRAPHS = 128  # of compiled models; torch would stop at 8


def make_room() -> None:
    """For the graphs of a model at all its budgets."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)


def compile_parts(*parts: nn.Module, **options) -> None:
    """Each in place, with the options of `torch.compile`."""
    make_room()
    for part in parts:
        part.compile(**options)


@torch.compiler.disable(reason="the model is compiled in its parts; leave out fullgraph, or use iret.FixedCounts")
def run_in_parts(model: nn.Module, *args, **kwargs) -> Tensor:
    """What `torch.compile(model)` runs in place of a trace: the model, compiled in its parts with the default options."""
    if model.get_submodule("stages.0")._compiled_call_impl is None:
        warnings.warn(
            "torch.compile(model) compiles this model in its parts, in place and with default options; model.compile(...) does "
            "so with those that it is given.",
            stacklevel=2,
        )
        model.compile()
    return model(*args, **kwargs)
