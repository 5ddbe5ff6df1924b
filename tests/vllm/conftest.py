from contextlib import contextmanager

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of a tiny model that vLLM and transformers load."""
    from engines import save_vllm_model

    folder = tmp_path_factory.mktemp("model")
    save_vllm_model(folder)
    return folder


@pytest.fixture(scope="session")
def tool_model_folder(tmp_path_factory):
    """Folder of a tiny model that often calls tools."""
    from agents import save_tool_model, tool_tokenizer

    folder = tmp_path_factory.mktemp("tool_model")
    save_tool_model(folder)
    tool_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def started(*args, **kwargs):
    """A real vLLM server, and TRL's client made to send weights to it without NCCL."""
    from engines import Server, use_file_transport

    server = Server(*args, **kwargs)
    try:
        server.client_class = use_file_transport()
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(model_folder, tmp_path_factory):
    """A server of the tiny model."""
    with started(model_folder, tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


@pytest.fixture(scope="session")
def tool_server(tool_model_folder, tmp_path_factory):
    """A server of the tiny model that calls tools."""
    log = tmp_path_factory.mktemp("tool_server") / "log.txt"
    with started(tool_model_folder, log, max_length=1024) as server:
        yield server
