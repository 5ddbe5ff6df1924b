"""Several processes do what one does: DDP, FSDP2, ZeRO-2 and ZeRO-3, full fine-tuning and LoRA."""

import pytest
import torch
from ranks import MODES, run_ranks
from same_rollouts import result_of, results, same_rollouts_trainer, train_and_save


def run_single(folder, **options):
    trainer = same_rollouts_trainer(folder, **options)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return result_of(trainer), start


def assert_agree(single, ranks, start):
    rows = {}
    for rank in ranks:
        assert not rows.keys() & rank["rows"].keys()
        rows |= rank["rows"]
    assert rows == single["rows"]
    assert sum(is_replayed for _, _, is_replayed in rows.values()) > 10
    main = ranks[0]["buffer"]
    for part in ("questions", "completions", "rng"):
        assert main[part] == single["buffer"][part], part
    for mine, other in zip(main["logps"], single["buffer"]["logps"], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    moved = 0.0
    for rank in ranks:
        assert rank["retired"] == single["retired"]
        assert rank["parameters"].keys() == single["parameters"].keys()
        for name, expected in single["parameters"].items():
            torch.testing.assert_close(rank["parameters"][name], expected, atol=2e-5, rtol=1e-4)
            moved = max(moved, (expected - start[name]).abs().max().item())
    assert moved > 1e-2, "nothing was learned, so agreement says nothing"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_a_single_process(tmp_path, mode, lora):
    options = {"lora": lora}
    single, start = run_single(tmp_path / "single", **options)
    run_ranks(
        train_and_save,
        str(tmp_path),
        options | {"per_device_train_batch_size": 8},
        folder=tmp_path,
        mode=mode,
    )
    assert_agree(single, results(tmp_path), start)
