"""Score stored completions under the current policy, in batches of similar length, evenly over the processes."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.distributed import fsdp

from .processes import Processes
from .records import Scores

T = TypeVar("T")


class TokenScores(NamedTuple):
    """What a forward of a policy says of a completion, token by token.

    Attributes:
        logps (`np.ndarray`):
            Log-probabilities of the tokens, nats, float32 of shape `(T,)`.
        entropy (`float`):
            Mean token entropy, nats.
    """

    logps: np.ndarray
    entropy: float


class Prompted(NamedTuple):
    """A stored completion with its prompt.

    Attributes:
        prompt (`Sequence[int]`):
            Prompt token ids; empty where images are part of it, to be rendered by the process that scores it.
        completion (`np.ndarray`):
            Completion token ids, shape `(T,)`.
        is_model (`np.ndarray` or `None`):
            Which of them the model wrote, shape `(T,)`; `None` for all.
        row (`dict` or `None`):
            Dataset row with its prompt as shown, where there are images.
        messages (`list` or `None`):
            Completion messages, where tools returned images.
        behavior_logps (`np.ndarray` or `None`):
            Log-probabilities under the policy that generated it, shape `(T,)`; `None` where drift is not asked for.
    """

    prompt: Sequence[int]
    completion: np.ndarray
    is_model: np.ndarray | None = None
    row: Mapping[str, Any] | None = None
    messages: Any = None
    behavior_logps: np.ndarray | None = None


# (input_ids, attention_mask, logits_to_keep) -> (per-token log-probabilities, per-token entropies), each (B, T).
Forward = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def deal_forwards(lengths: Sequence[int], num_processes: int, batch_size: int) -> list[list[list[int]]]:
    """
    Deal sequences out so that every process makes the same number of forwards, of similar size at the same time.

    FSDP and ZeRO-3 need the former: a forward waits for all processes. Where the sequences do not go round, the last
    ones are dealt twice.
    """
    if not lengths:
        return [[] for _ in range(num_processes)]
    num_forwards = -(-len(lengths) // (num_processes * batch_size))
    longest_first = np.argsort([-length for length in lengths], kind="stable")
    batches = [batch.tolist() for batch in np.array_split(longest_first, num_forwards * num_processes)]
    shortest = [batch for batch in batches if batch][-1]
    batches = [batch or shortest for batch in batches]
    return [batches[process::num_processes] for process in range(num_processes)]


def score_candidates(
    prompted: Sequence[Prompted],
    score: Callable[[Sequence[Prompted]], list[T]],
    processes: Processes,
    batch_size: int,
    with_images: Sequence[Prompted] = (),
) -> dict[int, T]:
    """
    Scores by number of the completion, on the main process; all processes call this, and each makes its share.

    Where completions came without their images, `with_images` has them on the main process, which sends out shares.
    """
    if not prompted:
        return {}
    lengths = [len(of_one.prompt) + len(of_one.completion) for of_one in prompted]
    # With images one by one: models differ in how they lay out the pixels of several rows.
    batch_size = 1 if any(of_one.row is not None for of_one in prompted) else batch_size
    dealt = deal_forwards(lengths, processes.count, batch_size)
    if processes.count > 1 and any(of_one.row is not None for of_one in prompted):
        numbers = [list(itertools.chain(*forwards)) for forwards in dealt]
        whole = processes.scatter([{n: with_images[n] for n in of_rank} for of_rank in numbers] if with_images else [])
        prompted = [whole.get(number, of_one) for number, of_one in enumerate(prompted)]
    with processes.together("scoring the candidates"):
        mine = [
            scores for forward in dealt[processes.rank] for scores in score([prompted[number] for number in forward])
        ]
    by_number: dict[int, T] = {}
    for share, scored in zip(dealt, processes.gather(mine), strict=False):
        by_number.update(zip(itertools.chain(*share), scored, strict=True))
    return by_number


def without_images(of_one: Prompted) -> Prompted:
    """The completion for processes that do not score it: they deal alike."""
    return of_one if of_one.row is None else of_one._replace(row={}, messages=None)


@torch.no_grad()
def score_completions(
    prompted: Sequence[Prompted],
    forward: Forward,
    *,
    pad_token_id: int,
    device: torch.device | str,
) -> list[Scores]:
    """
    Mean token entropy and mean negative log-likelihood of stored completions under the current policy, in one forward.

    Means are taken over the tokens that the model wrote.
    """
    return mean_scores(*_of_tokens(prompted, forward, pad_token_id=pad_token_id, device=device))


@torch.no_grad()
def score_tokens(
    prompted: Sequence[Prompted],
    forward: Forward,
    *,
    pad_token_id: int,
    device: torch.device | str,
) -> list[TokenScores]:
    """Log-probability of every token of completions that the model wrote all of, under the current policy."""
    logps, entropies, _, mask = _of_tokens(prompted, forward, pad_token_id=pad_token_id, device=device)
    return [
        TokenScores(of_row[: len(of_one.completion)].copy(), mean)
        for of_one, of_row, mean in zip(prompted, logps, masked_means(entropies, mask).tolist(), strict=True)
    ]


def _of_tokens(
    prompted: Sequence[Prompted], forward: Forward, *, pad_token_id: int, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    One forward: log-probabilities, entropies, log-probabilities of the behaviour policy and what the model wrote.

    All of shape `(B, T)`, padded on the right.
    """
    longest_prompt = max(len(of_one.prompt) for of_one in prompted)
    shape = len(prompted), max(len(of_one.completion) for of_one in prompted)
    input_ids = torch.full((shape[0], longest_prompt + shape[1]), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    mask, behavior_logps = np.zeros(shape, dtype=bool), np.full(shape, np.nan, dtype=np.float32)
    for row, of_one in enumerate(prompted):
        prompt, completion, is_model = of_one.prompt, of_one.completion, of_one.is_model
        begin, end = longest_prompt - len(prompt), longest_prompt + len(completion)
        input_ids[row, begin:longest_prompt] = torch.tensor(prompt, dtype=torch.long)
        input_ids[row, longest_prompt:end] = torch.from_numpy(completion.astype("int64"))
        attention_mask[row, begin:end] = 1
        mask[row, : len(completion)] = True if is_model is None else is_model
        if of_one.behavior_logps is not None:
            behavior_logps[row, : len(completion)] = of_one.behavior_logps
    logps, entropies = forward(input_ids.to(device), attention_mask.to(device), shape[1])
    return on_cpu(logps), on_cpu(entropies), behavior_logps, mask


def mean_scores(
    logps: np.ndarray, entropies: np.ndarray, behavior_logps: np.ndarray, mask: np.ndarray
) -> list[Scores]:
    """
    Scores of completions, from what a forward says of their tokens.

    Args:
        logps, entropies, behavior_logps (`np.ndarray`):
            Log-probabilities under the policy of the forward, its entropies, and log-probabilities under the policy
            that generated the completions (NaN where they are not given), nats, float32 of shape `(B, T)`.
        mask (`np.ndarray`):
            Which tokens the model wrote, booleans of shape `(B, T)`.
    """
    means = masked_means(np.stack([entropies, logps, np.abs(logps - behavior_logps)]), mask)
    return [Scores(entropy, -logp, None if math.isnan(drift) else drift) for entropy, logp, drift in means.T.tolist()]


def on_cpu(values: torch.Tensor) -> np.ndarray:
    """Values of tokens in float32, without their graph."""
    return values.detach().float().cpu().numpy()


def masked_means(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Means over the tokens that the mask has, shape `(..., B)` of `(..., B, T)`; NaN where it has none."""
    sums = np.where(mask, values, np.float32(0)).sum(-1, dtype=np.float64)
    counts = mask.sum(-1)
    return np.asarray(sums / np.where(counts > 0, counts, np.nan))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, which would blur the comparison of completions; the mode is what it was at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def reshard(model: torch.nn.Module) -> None:
    """
    Give back what FSDP2 keeps whole after a forward without a backward: the parameters of the outermost module.

    TRL reads the shards when it sends the weights to vLLM.
    """
    sharded = getattr(fsdp, "FSDPModule", ())  # torch below 2.6 has none
    for module in model.modules():
        if isinstance(module, sharded):
            module.reshard()
