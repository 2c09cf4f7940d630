"""
`echoatt serve`: the server of `transformers serve`, which knows only the classes that are in transformers itself.

All that is taken from inside of transformers is in this file: `Serve`, the class of its command, with the arguments below,
where its server looks for models, and how it is built.
"""

import functools
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ..modeling_echoatt import EchoAttForCausalLM
from ..models.devices import default_device
from ..models.loading import builtin_teacher_path, load_config
from ..settings import BUILTIN_TEACHER, ServingSettings


__all__ = ["check_server", "serve"]

NEEDED = ("fastapi", "openai", "uvicorn")
"""Packages that the server of transformers needs, of its extra `serving`."""

CPU_CACHE_BLOCKS, CPU_BATCH_TOKENS = 64, 512
"""
Blocks of a paged cache, of 256 tokens each, and tokens that are computed together, on a CPU: for both transformers would take
all the memory that is free.
"""


def check_server(model: str, settings: ServingSettings) -> str:
    """
    Check that a model can be served, before it is loaded.

    Args:
        model (`str`):
            `"builtin"`, a folder, or a repository of the Hub, of which `"owner/name@revision"` is a branch, tag or commit.
        settings ([`ServingSettings`]):
            How it is to run.

    Returns:
        `str`: the name that requests have for it.

    Raises:
        `FileNotFoundError`: there is no such model.
        `OSError`: another program has the port.
        `ValueError`: packages are missing, or the server would take the name for another.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f'Serving needs {", ".join(missing)}, not installed: `pip install "echoatt-hf[serve]"`.')
    name = str(builtin_teacher_path()) if model == BUILTIN_TEACHER else model
    if "@" in name and Path(name).exists():
        raise ValueError(
            f"The folder {name!r} has an @ in its name, after which the server expects a revision: give it another."
        )
    load_config(name)
    _check_port(settings.host, settings.port)
    return name


def _check_port(host: str, port: int) -> None:
    """Check that a port is free, before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise OSError(
            f"Nothing can listen at {host}:{port} ({error.strerror}): give another --port or --host."
        ) from error


def serve(name: str, settings: ServingSettings) -> None:
    """
    Serve a model over HTTP until the process is stopped.

    Args:
        name (`str`): as from [`check_server`].
        settings ([`ServingSettings`]): how it runs.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    # Its server loads the class that `architectures` names in the module `transformers`.
    model_manager.transformers.EchoAttForCausalLM = EchoAttForCausalLM
    # It would list what the cache of the Hub holds, and take requests for nothing of that.
    listed = {"id": name, "object": "model", "owned_by": "", "created": int(time.time())}
    model_manager.ModelManager.get_gen_models = staticmethod(lambda *_: [listed])
    states = []
    server.build_server = functools.partial(_build_server, server.build_server, states)
    is_cpu = settings.device == "cpu" or settings.device == "auto" and default_device() == "cpu"
    try:
        Serve(
            force_model=name,
            host=settings.host,
            port=settings.port,
            device="cpu" if is_cpu else settings.device,
            dtype="float32" if is_cpu and settings.dtype == "auto" else settings.dtype,
            attn_implementation=settings.attention,
            continuous_batching=settings.continuous_batching,
            cb_num_blocks=settings.cache_blocks or (CPU_CACHE_BLOCKS if is_cpu else None),
            cb_max_batch_tokens=CPU_BATCH_TOKENS if is_cpu else None,
        )
    finally:
        for state in states:  # else the thread that computes requests together goes on
            state.shutdown()


def _build_server(build: Callable, states: list, *args, **kwargs):
    """The application, in which what cannot be done with a request is the fault of the request."""
    from fastapi.responses import JSONResponse

    async def answer(request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": " ".join(str(error).split())}, status_code=400)

    states.append(kwargs["generation_state"])
    app = build(*args, **kwargs)
    app.add_exception_handler(ValueError, answer)  # such as: there is no chat template
    return app
