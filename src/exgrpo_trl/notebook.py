"""The table of progress that transformers shows in a notebook, with columns of replay. Imports IPython."""

from typing import Any

from transformers.utils.notebook import NotebookProgressCallback

COLUMNS = (
    "fresh/pass_rate",
    "replay/fraction",
    "replay/questions",
    "replay/retired",
    "replay/effective_sample_size",
)
_NOT_LOGGED = "No Log"  # as transformers has it


class ReplayProgress(NotebookProgressCallback):
    """
    The callback of transformers; each line also says what the latest log line tells of replay.

    Without evaluation there is a line for every log line, with it one for every evaluation.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if logs and "loss" in logs and args.eval_strategy == "no":
            self._complete_line(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        latest: dict[str, Any] = next((line for line in reversed(state.log_history) if "loss" in line), {})
        if self.training_tracker is not None:
            self._complete_line(latest)

    def _complete_line(self, logs: dict[str, Any]) -> None:
        """Add the columns of replay to the line that was just written."""
        header, *_, line = self.training_tracker.inner_table
        values = {name: logs.get(name, _NOT_LOGGED) for name in COLUMNS}
        for name in ("replay/questions", "replay/retired"):
            if isinstance(values[name], float):
                values[name] = f"{values[name]:.0f}"
        self.training_tracker.write_line({header[0]: line[0], **values})


def show_replay(handler: Any) -> None:
    """
    Let the table of a trainer have columns of replay; a progress of another kind stays as it is.

    Args:
        handler (`transformers.trainer_callback.CallbackHandler`):
            `trainer.callback_handler`.
    """
    handler.callbacks[:] = [
        ReplayProgress() if type(callback) is NotebookProgressCallback else callback for callback in handler.callbacks
    ]
