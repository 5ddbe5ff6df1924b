"""Worker extension of a vLLM server: TRL sends weights through NCCL, which a CPU does not have; here from a file."""

from typing import Any


class ReloadOnCPU:
    """Methods that `/collective_rpc` finds on the worker."""

    def reload_from(self: Any, folder: str) -> None:
        """Load the weights of `folder`; a tied head keeps the copy that was packed for its matrix product."""
        self.reload_weights(weights_path=folder)
        head = self.model_runner.get_model().lm_head
        head.quant_method.process_weights_after_loading(head)
