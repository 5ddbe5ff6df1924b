import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of a tiny model that vLLM and transformers load."""
    from engines import save_vllm_model

    folder = tmp_path_factory.mktemp("model")
    save_vllm_model(folder)
    return folder


@pytest.fixture(scope="session")
def server(model_folder, tmp_path_factory):
    """A real vLLM server, and TRL's client made to send weights to it without NCCL."""
    from engines import Server, use_file_transport

    server = Server(model_folder, tmp_path_factory.mktemp("server") / "log.txt")
    try:
        server.client_class = use_file_transport()
        server.wait()
        yield server
    finally:
        server.stop()
