"""Generation with vLLM, server or engine: neither is asked for the rows that stored completions take."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ..batch import Batch
from ..processes import Processes
from ..rows import loss_mask
from .base import Generate, Rollouts

# What TRL generates with, an attribute of its `VLLMGeneration` by mode.
ENGINES = {"server": "vllm_client", "colocate": "llm"}
# What TRL's trainer reads of a server's answer, one for each completion.
_FIELDS = ("completion_ids", "logprobs")


class VLLMRollouts(Rollouts):
    """Keeps the rows of stored completions from vLLM, whose answer TRL cuts into parts of equal length."""

    def __init__(
        self, vllm: Any, processes: Processes, tensor_parallel_size: int, stand_in: list[int] | None = None
    ) -> None:
        super().__init__(stand_in)
        self.vllm = vllm
        self.processes = processes
        # A server generates for all processes, an engine for those that share it.
        self.first_process: int = (
            0 if vllm.mode == "server" else processes.rank - processes.rank % max(1, tensor_parallel_size)
        )

    def generate_fresh(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        images: Any,
        multimodal_fields: Mapping[str, Any],
        batch: Batch,
    ) -> tuple[Any, ...]:
        first_row = self.first_process * len(prompt_ids)
        # TRL asks a server for one prompt of each group; environments may show another to each rollout.
        own = prompt_ids if self.processes.count == 1 and batch.shows_own_prompts else None
        with (
            self.processes.together("generating completions"),
            fresh_rows_only(self.vllm, batch.stored_rows, first_row, own),
        ):
            forget_images(self.vllm)
            return generate(prompt_ids, images, multimodal_fields)


def forget_images(vllm: Any) -> None:
    """
    Let an engine compute images anew.

    It keeps what it has computed of an image beyond a change of its weights. TRL does not clear that, and replay shows
    the images of a question again within a few steps.
    """
    engine: Any = getattr(getattr(vllm, "llm", None), "llm_engine", None)
    if hasattr(engine, "reset_encoder_cache"):
        engine.reset_encoder_cache()


@contextmanager
def fresh_rows_only(
    vllm: Any, stored_rows: Collection[int], first_row: int, own_prompts: Sequence[Any] | None = None
) -> Iterator[None]:
    """
    Keep the rows of stored completions from vLLM while the block generates whole groups.

    TRL cuts the answer of a server, and that of engines in tensor parallelism, into parts of equal length for the
    processes, so that it must be asked for all rows. What reaches vLLM itself are the fresh rows; in the answer, a
    stored row has an empty completion. A failure of vLLM is raised at the end of the block, when no process waits for
    an answer any more. A server is asked with `own_prompts`, where they are given, in the place of one for each group.
    """
    name = ENGINES[vllm.mode]
    engine = getattr(vllm, name, None)
    if engine is None:  # the main process alone talks to a server
        yield
        return
    fresh = (_FreshFromServer if vllm.mode == "server" else _FreshFromEngine)(engine, stored_rows, first_row)
    fresh.own_prompts = own_prompts
    setattr(vllm, name, fresh)
    try:
        yield
    except Exception:
        if fresh.error is None:  # otherwise a consequence of that error
            raise
    finally:
        setattr(vllm, name, engine)
    if fresh.error is not None:
        raise fresh.error


class _Fresh:
    """Stands before a client or an engine of vLLM."""

    def __init__(self, engine: Any, stored_rows: Collection[int], first_row: int) -> None:
        self._engine = engine
        self._stored_rows = stored_rows
        self._first_row = first_row
        self.own_prompts: Sequence[Any] | None = None
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _fresh_rows(self, num_rows: int) -> list[int]:
        return [row for row in range(num_rows) if self._first_row + row not in self._stored_rows]

    def _ask(self, num_rows: int, generate: Callable[[], list[Any]]) -> list[Any]:
        """Completions of the fresh rows, or `None` for each after a failure."""
        try:
            completions = generate()
            if len(completions) != num_rows:
                raise RuntimeError(f"vLLM was asked for {num_rows} completions and returned {len(completions)}.")
            return completions
        except Exception as error:
            self.error = error
            return [None] * num_rows


class _FreshFromServer(_Fresh):
    """Asks for the prompts of fresh rows, in one request."""

    def generate(self, prompts: Sequence[Any], *, n: int, **kwargs: Any) -> dict[str, Any]:
        num_rows = len(prompts) * n
        rows = self._fresh_rows(num_rows)
        # A request has one `n` for all of its prompts.
        if len(rows) == num_rows and self.own_prompts is None:
            asked, num_each, of_prompts = prompts, n, {}
        else:
            asked, num_each = (
                [prompts[row // n] if self.own_prompts is None else self.own_prompts[row] for row in rows],
                1,
            )
            # Images, or features of them: one entry for each prompt.
            of_prompts = {
                name: [value[row // n] for row in rows]
                for name, value in kwargs.items()
                if isinstance(value, list) and len(value) == len(prompts)
            }

        def generate() -> list[Any]:
            if not rows:
                return []
            answer = self._engine.generate(prompts=asked, n=num_each, **kwargs | of_prompts)
            return list(zip(*(answer[field] for field in _FIELDS), strict=True))

        nothing: tuple[list[Any], ...] = tuple([] for _ in _FIELDS)
        by_row = dict(zip(rows, self._ask(len(rows), generate), strict=True))
        completions = [by_row.get(row) or nothing for row in range(num_rows)]
        return {"prompt_ids": prompts} | dict(zip(_FIELDS, map(list, zip(*completions, strict=True)), strict=True))


class _FreshFromEngine(_Fresh):
    """Asks for the prompts of fresh rows."""

    def generate(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
        rows = self._fresh_rows(len(prompts))

        def generate() -> list[Any]:
            return self._engine.generate([prompts[row] for row in rows], *args, **kwargs) if rows else []

        nothing = SimpleNamespace(prompt_token_ids=[], outputs=[SimpleNamespace(token_ids=[], logprobs=[])])
        by_row = dict(zip(rows, self._ask(len(rows), generate), strict=True))
        return [by_row.get(row) or nothing for row in range(len(prompts))]


def correct_fresh_only(
    output: dict[str, Any],
    batch: Batch,
    gather: Callable[[torch.Tensor], torch.Tensor],
    *,
    by_sequence: bool,
) -> dict[str, float]:
    """Keep TRL's correction for the distance between sampler and policy from stored rows; returns its metrics anew."""
    is_fresh = torch.ones(batch.num_rows, dtype=torch.bool, device=output["completion_ids"].device)
    is_fresh[list(batch.stored)] = False
    metrics = sampling_metrics(output, is_fresh, gather, by_sequence=by_sequence)
    output["importance_sampling_ratio"] = output["importance_sampling_ratio"].where(is_fresh.unsqueeze(1), 1.0)
    return metrics


def sampling_metrics(
    output: Mapping[str, torch.Tensor],
    is_fresh: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
    *,
    by_sequence: bool,
) -> dict[str, float]:
    """TRL's metrics of the distance between sampler and policy, of fresh rows alone. Called by all processes."""
    mask = loss_mask(output).bool() & is_fresh.unsqueeze(1)
    differences = (output["old_per_token_logps"] - output["sampling_per_token_logps"]).abs()[mask]
    differences = differences[~differences.isnan()]
    ratios = output["importance_sampling_ratio"][is_fresh if by_sequence else mask].flatten()
    nothing = mask.new_full((), torch.nan, dtype=torch.float32)
    mine = [
        differences.mean() if len(differences) else nothing,
        differences.max() if len(differences) else nothing,
        ratios.min() if len(ratios) else nothing,
        ratios.mean() if len(ratios) else nothing,
        ratios.max() if len(ratios) else nothing,
    ]
    difference_mean, difference_max, ratio_min, ratio_mean, ratio_max = gather(torch.stack(mine).float()[None]).T
    known = {
        "sampling/sampling_logp_difference/mean": difference_mean.nanmean(),
        "sampling/sampling_logp_difference/max": difference_max.nan_to_num(-torch.inf).max(),
        "sampling/importance_sampling_ratio/min": ratio_min.nan_to_num(torch.inf).min(),
        "sampling/importance_sampling_ratio/mean": ratio_mean.nanmean(),
        "sampling/importance_sampling_ratio/max": ratio_max.nan_to_num(-torch.inf).max(),
    }
    return {name: value.item() if value.isfinite() else 0.0 for name, value in known.items()}
