"""vLLM is asked for fresh rows only, and every answer comes back to its row."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exgrpo_trl.rollouts.vllm import fresh_rows_only, sampling_metrics


def layouts():
    """Prompts of groups, completions for each, and rows that are not generated: one of a group at most."""
    rng = np.random.default_rng(0)
    yield 3, 4, set()
    yield 1, 2, {1}
    for _ in range(30):
        num_groups, group_size = int(rng.integers(1, 6)), int(rng.integers(2, 5))
        groups = rng.permutation(num_groups)[: rng.integers(0, num_groups + 1)]
        yield num_groups, group_size, {int(group * group_size + rng.integers(group_size)) for group in groups}


@pytest.mark.parametrize(("num_groups", "group_size", "stored_rows"), list(layouts()))
def test_a_server(num_groups, group_size, stored_rows):
    asked = []

    class Client:
        base_url = "http://there"

        def generate(self, prompts, n, temperature):
            asked.extend(tuple(prompt) for prompt in prompts for _ in range(n))
            rows = [[*prompt, slot] for prompt in prompts for slot in range(n)]
            return {"prompt_ids": prompts, "completion_ids": rows, "logprobs": [[[-1.0]] * 2 for _ in rows], "more": 1}

    client = Client()
    vllm = SimpleNamespace(mode="server", vllm_client=client)
    prompts = [[100 + group] for group in range(num_groups)]
    with fresh_rows_only(vllm, stored_rows, 0):
        assert vllm.vllm_client.base_url == "http://there"
        answer = vllm.vllm_client.generate(prompts=prompts, n=group_size, temperature=1.0)
    assert vllm.vllm_client is client
    num_rows = num_groups * group_size
    fresh = [row for row in range(num_rows) if row not in stored_rows]
    assert asked == [tuple(prompts[row // group_size]) for row in fresh]
    assert answer["prompt_ids"] == prompts
    for row in range(num_rows):
        if row in stored_rows:
            assert answer["completion_ids"][row] == answer["logprobs"][row] == []
        else:
            assert answer["completion_ids"][row][:1] == prompts[row // group_size]
            assert answer["logprobs"][row] == [[-1.0]] * 2
    # No completion is used twice: those of a prompt differ in their slot, or each was asked for by itself.
    if not stored_rows:
        assert len({tuple(ids) for ids in answer["completion_ids"]}) == num_rows


@pytest.mark.parametrize("first_row", [0, 8])
@pytest.mark.parametrize(("num_groups", "group_size", "stored_rows"), list(layouts()))
def test_an_engine(num_groups, group_size, stored_rows, first_row):
    asked = []

    class Engine:
        def generate(self, prompts, sampling_params, use_tqdm):
            assert prompts, "vLLM has nothing to do with no prompt"
            asked.extend(prompts)
            return [
                SimpleNamespace(prompt_token_ids=[prompt], outputs=[SimpleNamespace(token_ids=[prompt], logprobs=[1])])
                for prompt in prompts
            ]

    engine = Engine()
    vllm = SimpleNamespace(mode="colocate", llm=engine)
    num_rows = num_groups * group_size
    with fresh_rows_only(vllm, {first_row + row for row in stored_rows} | {first_row + num_rows, -1}, first_row):
        outputs = vllm.llm.generate(list(range(num_rows)), sampling_params=None, use_tqdm=False)
    assert vllm.llm is engine
    assert asked == [row for row in range(num_rows) if row not in stored_rows]
    completions = [completion for output in outputs for completion in output.outputs]
    assert [c.token_ids for c in completions] == [[] if row in stored_rows else [row] for row in range(num_rows)]
    assert all(completions[row].logprobs == [] for row in stored_rows)


def test_an_engine_without_fresh_rows_is_not_asked():
    vllm = SimpleNamespace(mode="colocate", llm=SimpleNamespace(generate=lambda *args, **kwargs: pytest.fail("asked")))
    with fresh_rows_only(vllm, {0, 1}, 0):
        assert [output.outputs[0].token_ids for output in vllm.llm.generate([[1], [2]])] == [[], []]


def test_a_process_without_a_client_has_nothing_to_wrap():
    vllm = SimpleNamespace(mode="server")
    with fresh_rows_only(vllm, {0}, 0):
        assert not hasattr(vllm, "vllm_client")


def test_a_failure_is_raised_when_nobody_waits_any_more():
    def fail(**kwargs):
        raise ConnectionError("the server is gone")

    client = SimpleNamespace(generate=fail)
    vllm = SimpleNamespace(mode="server", vllm_client=client)
    reached = []

    def generate():
        with fresh_rows_only(vllm, {1}, 0):
            answer = vllm.vllm_client.generate(prompts=[[1], [2]], n=2)
            reached.append(answer["completion_ids"])  # TRL sends it to the other processes, which wait for it
            raise IndexError("a consequence of the empty answer")

    with pytest.raises(ConnectionError, match="the server is gone"):
        generate()
    assert reached == [[[], [], [], []]]
    assert vllm.vllm_client is client


def test_too_few_completions_are_noticed():
    client = SimpleNamespace(generate=lambda prompts, n: {"completion_ids": [[1]], "logprobs": [[[0.0]]]})
    vllm = SimpleNamespace(mode="server", vllm_client=client)
    with pytest.raises(RuntimeError, match="asked for 3 completions and returned 1"), fresh_rows_only(vllm, {1}, 0):
        vllm.vllm_client.generate(prompts=[[1], [2]], n=2)


@pytest.mark.parametrize("by_sequence", [True, False])
def test_sampling_metrics(by_sequence):
    rng = np.random.default_rng(1)
    old, sampled = torch.tensor(rng.normal(size=(2, 4, 3)), dtype=torch.float32)
    sampled[2, 1] = torch.nan
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]])
    is_fresh = torch.tensor([True, False, True, True])
    ratio = (old - sampled).nan_to_num(0).sum(1, keepdim=True).exp() if by_sequence else (old - sampled).exp()
    output = {
        "completion_mask": mask,
        "old_per_token_logps": old,
        "sampling_per_token_logps": sampled,
        "importance_sampling_ratio": ratio.nan_to_num(1.0),
    }
    elsewhere = torch.tensor([[0.5, 9.0, 0.1, 1.0, 5.0], [torch.nan] * 5])  # a process with fresh rows, one without
    metrics = sampling_metrics(output, is_fresh, lambda mine: torch.cat([mine, elsewhere]), by_sequence=by_sequence)
    tokens = [(0, 0), (0, 1), (2, 0), (2, 2), (3, 0)]
    distances = np.array([abs(float(old[t] - sampled[t])) for t in tokens])
    if by_sequence:
        ratios = np.array([float(ratio[row, 0]) for row in (0, 2, 3)])
    else:
        ratios = np.array([*(float(ratio[t]) for t in tokens), 1.0])
    assert metrics == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": (distances.mean() + 0.5) / 2,
            "sampling/sampling_logp_difference/max": 9.0,
            "sampling/importance_sampling_ratio/min": min(ratios.min(), 0.1),
            "sampling/importance_sampling_ratio/mean": (ratios.mean() + 1.0) / 2,
            "sampling/importance_sampling_ratio/max": max(ratios.max(), 5.0),
        },
        rel=1e-5,
    )
    nothing = sampling_metrics(output, ~is_fresh & is_fresh, lambda mine: mine, by_sequence=by_sequence)
    assert set(nothing.values()) == {0.0}
