# SPDX-License-Identifier: MIT
"""Whom ssmk is compared with: PyTorch, and the code that transformers runs where no kernel is.

A peer that is not there is said to be absent, with the reason; it is never estimated.
"""

import importlib
import inspect

import numpy as np

from .method import Skip


def torch_module():
    try:
        import torch
    except ImportError:
        raise Skip("torch is not installed") from None
    return torch


def shared(array):
    """A torch tensor on the memory of a NumPy array."""
    torch = torch_module()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor):
    """The values of a torch tensor in double precision."""
    return tensor.detach().double().numpy()


def transformers_function(model, name):
    """(its name in reports, the function): transformers' own PyTorch code, no kernel."""
    torch_module()
    try:
        import transformers
    except ImportError:
        raise Skip("transformers is not installed") from None
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    function = getattr(module, name, None)
    if function is None:
        raise Skip(f"transformers {transformers.__version__} has no {name}: 5.23 has")
    return f"transformers {name}", inspect.unwrap(function)


def set_threads(threads):
    """Peers use as many threads as ssmk."""
    try:
        torch_module().set_num_threads(threads)
    except Skip:
        pass  # then there is no peer to set
