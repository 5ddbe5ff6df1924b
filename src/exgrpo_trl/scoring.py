"""Score stored completions under the current policy, in batches of similar length, evenly over the processes."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.distributed import fsdp

from .experience import Candidate, Experience

# (input_ids, attention_mask, logits_to_keep) -> (per-token log-probabilities, per-token entropies), each (B, T).
Forward = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def deal_forwards(lengths: Sequence[int], num_processes: int, batch_size: int) -> list[list[list[int]]]:
    """
    Deal sequences out so that every process makes the same number of forwards, of similar size at the same time.

    FSDP and ZeRO-3 need the former: a forward waits for all processes. Where the sequences do not go round, the last
    ones are dealt twice.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each sequence.
        num_processes (`int`):
            Processes that share the work.
        batch_size (`int`):
            Most sequences of a forward.

    Returns:
        `list[list[list[int]]]`:
            Indices of the sequences by process and forward, longest first.
    """
    if not lengths:
        return [[] for _ in range(num_processes)]
    num_forwards = -(-len(lengths) // (num_processes * batch_size))
    longest_first = np.argsort([-length for length in lengths], kind="stable")
    batches = [batch.tolist() for batch in np.array_split(longest_first, num_forwards * num_processes)]
    shortest = [batch for batch in batches if batch][-1]
    batches = [batch or shortest for batch in batches]
    return [batches[process::num_processes] for process in range(num_processes)]


@torch.no_grad()
def score_completions(
    pairs: Sequence[tuple[Sequence[int], Experience]],
    forward: Forward,
    *,
    pad_token_id: int,
    device: torch.device | str,
) -> list[Candidate]:
    """
    Mean token entropy and mean negative log-likelihood of stored completions under the current policy, in one forward.

    Args:
        pairs (`Sequence[tuple[Sequence[int], Experience]]`):
            Prompt token ids and stored completions.
        forward (`Callable`):
            Maps `(input_ids, attention_mask, logits_to_keep)` to per-token log-probabilities and entropies.
        pad_token_id (`int`):
            Padding token.
        device (`torch.device` or `str`):
            Where to put the inputs.

    Returns:
        `list[Candidate]`:
            In the order of `pairs`; entropy and negative log-likelihood in nats per completion token (section 4
            of the method: the mean over the completion's own tokens, its end-of-sequence token included).
    """
    longest_prompt = max(len(prompt) for prompt, _ in pairs)
    longest_completion = max(experience.num_tokens for _, experience in pairs)
    input_ids = torch.full((len(pairs), longest_prompt + longest_completion), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, experience) in enumerate(pairs):
        begin, end = longest_prompt - len(prompt), longest_prompt + experience.num_tokens
        completion = torch.from_numpy(experience.token_ids.astype("int64"))
        input_ids[row, begin:end] = torch.cat([torch.tensor(prompt, dtype=torch.long), completion])
        attention_mask[row, begin:end] = 1
    logps, entropies = forward(input_ids.to(device), attention_mask.to(device), longest_completion)
    mask = attention_mask[:, longest_prompt:].to(device).bool()
    num_tokens = mask.sum(-1)
    mean_logp = torch.where(mask, logps.float(), 0.0).sum(-1) / num_tokens
    mean_entropy = torch.where(mask, entropies.float(), 0.0).sum(-1) / num_tokens
    return [
        Candidate(experience, entropy=entropy, negative_log_likelihood=-logp)
        for (_, experience), entropy, logp in zip(pairs, mean_entropy.tolist(), mean_logp.tolist(), strict=True)
    ]


def reshard(model: torch.nn.Module) -> None:
    """
    Give back what FSDP2 keeps whole after a forward without a backward: the parameters of the outermost module.

    TRL reads the shards when it sends the weights to vLLM.

    Args:
        model ([`~torch.nn.Module`]):
            Model, sharded or not.
    """
    sharded = getattr(fsdp, "FSDPModule", ())  # torch below 2.6 has none
    for module in model.modules():
        if isinstance(module, sharded):
            module.reshard()
