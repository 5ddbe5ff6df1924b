"""Score stored completions under the current policy, in batches of similar length."""

from collections.abc import Callable, Sequence

import torch

from .experience import Candidate, Experience

# (input_ids, attention_mask, logits_to_keep) -> (per-token log-probabilities, per-token entropies), each (B, T).
Forward = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def score_completions(
    prompts: Sequence[Sequence[int]],
    experiences: Sequence[Experience],
    forward: Forward,
    *,
    pad_token_id: int,
    batch_size: int,
    device: torch.device | str,
) -> list[Candidate]:
    """
    Mean token entropy and mean negative log-likelihood of stored completions under the current policy.

    Args:
        prompts (`Sequence[Sequence[int]]`):
            Prompt token ids, one per completion.
        experiences (`Sequence[Experience]`):
            Stored completions.
        forward (`Callable`):
            Maps `(input_ids, attention_mask, logits_to_keep)` to per-token log-probabilities and entropies.
        pad_token_id (`int`):
            Padding token.
        batch_size (`int`):
            Completions per forward.
        device (`torch.device` or `str`):
            Where to put the inputs.

    Returns:
        `list[Candidate]`:
            In the order of `experiences`; entropy and negative log-likelihood in nats per completion token (section 4
            of the method: the mean over the completion's own tokens, its end-of-sequence token included).
    """
    candidates: dict[int, Candidate] = {}
    by_length = sorted(range(len(experiences)), key=lambda i: (experiences[i].num_tokens, len(prompts[i])))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        longest_prompt = max(len(prompts[i]) for i in batch)
        longest_completion = max(experiences[i].num_tokens for i in batch)
        input_ids = torch.full((len(batch), longest_prompt + longest_completion), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            begin, end = longest_prompt - len(prompts[i]), longest_prompt + experiences[i].num_tokens
            completion = torch.from_numpy(experiences[i].token_ids.astype("int64"))
            input_ids[row, begin:end] = torch.cat([torch.tensor(prompts[i], dtype=torch.long), completion])
            attention_mask[row, begin:end] = 1
        logps, entropies = forward(input_ids.to(device), attention_mask.to(device), longest_completion)
        mask = attention_mask[:, longest_prompt:].to(device).bool()
        num_tokens = mask.sum(-1)
        mean_logp = torch.where(mask, logps.float(), 0.0).sum(-1) / num_tokens
        mean_entropy = torch.where(mask, entropies.float(), 0.0).sum(-1) / num_tokens
        for i, entropy, logp in zip(batch, mean_entropy.tolist(), mean_logp.tolist(), strict=True):
            candidates[i] = Candidate(experiences[i], entropy=entropy, negative_log_likelihood=-logp)
    return [candidates[i] for i in range(len(experiences))]
