"""What cannot work is refused with a message that names the value and the way out, as early as possible."""

import functools
from types import SimpleNamespace

import pytest
import trl
from tiny import first_letter_reward, make_trainer, tiny_arguments, tiny_dataset
from trl import GRPOConfig, GRPOTrainer

from exgrpo_trl import (
    ExGRPOConfig,
    ExGRPOTrainer,
    Experience,
    ExperienceBuffer,
    ExperienceBufferError,
    Question,
    question_id_of,
)
from exgrpo_trl.compatibility import check_hooks, check_vllm
from exgrpo_trl.examples import row_question_id

NAN, INF = float("nan"), float("inf")
BAD_FIELDS = [
    ("replay_fraction", [-0.1, 1.0, 1.5, NAN, INF, "a", True]),
    ("replay_start_pass_rate", [-0.1, 1.0, NAN]),
    ("success_threshold", [NAN, INF, -INF, "1"]),
    ("bucket_mean", [-0.1, 1.1, NAN]),
    ("bucket_std", [0.0, -1.0, NAN, INF]),
    ("shaping_beta", [0.0, -0.1, NAN, INF]),
    ("buffer_capacity", [0, -1, 1.5, NAN]),
    ("max_completions_per_question", [0, -1, 2.5]),
    ("max_staleness", [-1, 0.5, NAN]),
    ("question_sampling", ["gauss", None, ""]),
    ("completion_selection", ["lowest", None]),
    ("replay_weighting", ["shape", None]),
    ("difficulty", ["hard"]),
    ("log_replay", ["long", None, True, ["all"]]),
    ("num_generations", [1, 0]),
]


@pytest.fixture
def warnings_of(monkeypatch):
    """Collect warnings of the library, whose loggers belong to transformers."""
    from exgrpo_trl import compatibility, notices

    messages = []
    for module in (compatibility, notices):
        monkeypatch.setattr(module.logger, "warning", lambda message, *args: messages.append(message))
    return messages


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD_FIELDS for value in values])
def test_config_fields_out_of_range(tmp_path, field, value):
    with pytest.raises(ValueError, match=field) as error:
        ExGRPOConfig(**tiny_arguments(tmp_path, **{field: value}))
    assert repr(value) in str(error.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"question_sampling='best'.*'gaussian'.*'uniform'.*'random'"):
        ExGRPOConfig(**tiny_arguments(tmp_path, question_sampling="best"))
    with pytest.raises(ValueError, match=r"completion_selection='best'.*'lowest_entropy'.*'most_recent'"):
        ExGRPOConfig(**tiny_arguments(tmp_path, completion_selection="best"))


@pytest.mark.parametrize("value", [0.0, 0.999])
def test_the_ends_of_a_range_are_accepted(tmp_path, value):
    assert ExGRPOConfig(**tiny_arguments(tmp_path, replay_fraction=value)).replay_fraction == value


def test_a_plain_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"GRPOConfig.*ExGRPOConfig"):
        ExGRPOTrainer("model", first_letter_reward, GRPOConfig(**tiny_arguments(tmp_path)))


@pytest.mark.parametrize("option", ["seed", "n", "best_of"])
def test_generation_options_that_vllm_takes_for_whole_groups(tmp_path, option):
    with pytest.raises(ValueError, match=rf"generation_kwargs has {option}, .*replay_fraction=0"):
        make_trainer(tmp_path, use_vllm=True, generation_kwargs={option: 2, "top_a": 0.1})


@pytest.mark.parametrize(
    ("vllm", "is_main", "missing"),
    [
        (SimpleNamespace(mode="server", vllm_client=SimpleNamespace(generate=print)), True, None),
        (SimpleNamespace(mode="server"), False, None),
        (SimpleNamespace(mode="server"), True, "vllm_client"),
        (SimpleNamespace(mode="colocate", llm=SimpleNamespace()), False, "llm"),
        (SimpleNamespace(mode="telepathy"), True, "mode"),
    ],
)
def test_vllm_of_a_trl_that_is_not_known(vllm, is_main, missing):
    if missing is None:
        check_vllm(vllm, is_main)
        return
    with pytest.raises(RuntimeError, match=rf"relies on {missing}.* of SimpleNamespace.*trl \d"):
        check_vllm(vllm, is_main)


@pytest.mark.skipif(not hasattr(GRPOTrainer, "compute_liger_loss"), reason="this TRL has no fused Liger loss")
def test_the_fused_liger_loss_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match=r"use_liger_kernel=True.*use_liger_kernel=False"):
        make_trainer(tmp_path, use_liger_kernel=True)


def test_luspo_needs_the_sequence_level(tmp_path):
    with pytest.raises(ValueError, match=r"luspo.*importance_sampling_level='sequence'"):
        make_trainer(tmp_path, loss_type="luspo")


def test_an_unknown_loss_type_is_refused(tmp_path):
    with pytest.raises(NotImplementedError, match=r"loss_type='ppo'.*grpo"):
        make_trainer(tmp_path, loss_type="ppo")


def test_an_unknown_success_reward_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"success_reward='accuracy'.*first_letter_reward"):
        make_trainer(tmp_path, success_reward="accuracy")


def test_a_missing_id_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"question_id_column='id'.*'uid'"):
        make_trainer(tmp_path, question_id_column="id")


def test_an_id_that_two_prompts_share_is_refused(tmp_path):
    dataset = tiny_dataset().remove_columns("uid").add_column("uid", ["same"] * 16)
    with pytest.raises(ValueError, match=r"question_id_column='uid'.*'same'.*two different prompts"):
        make_trainer(tmp_path, train_dataset=dataset, question_id_column="uid")


def test_a_row_without_an_id_is_refused(tmp_path):
    dataset = tiny_dataset().remove_columns("uid").add_column("uid", [*"abcdefghijklmn", None, "p"])
    with pytest.raises(ValueError, match=r"question_id_column='uid' has no value in row 14 of the training dataset"):
        make_trainer(tmp_path, train_dataset=dataset, question_id_column="uid")


def test_a_row_of_a_stream_without_an_id_is_refused():
    with pytest.raises(ValueError, match=r"question_id_column='uid' has no value in the row with prompt '1 \+ 1'"):
        row_question_id({"prompt": "1 + 1", "uid": None}, "uid")


def filled_buffer(num_tokens=3, token=5, example=None, **options):
    buffer = ExperienceBuffer(**options)
    example = example or tiny_dataset()[0]
    question = Question(question_id_of(example["prompt"]), example)
    experience = Experience.create([token] * num_tokens, [-1.0] * num_tokens, policy_version=0, reward=1.0)
    buffer.collect(question, [experience], num_correct=1, group_size=4)
    return buffer


def test_a_stored_completion_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"experience buffer.*9 tokens.*max_completion_length=8"):
        make_trainer(tmp_path, experience_buffer=filled_buffer(num_tokens=9))


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"experience buffer.*token id 5000"):
        make_trainer(tmp_path, experience_buffer=filled_buffer(token=5000))


def test_limits_that_disagree_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"given to the trainer has capacity=7.*buffer_capacity=9.*Set buffer_capacity=7"
    ):
        make_trainer(tmp_path, experience_buffer=filled_buffer(capacity=7), buffer_capacity=9)
    with pytest.raises(ValueError, match=r"group_size=4.*num_generations=8"):
        make_trainer(tmp_path, experience_buffer=filled_buffer(), num_generations=8)


@pytest.mark.parametrize("wrong", [5, [], {"prompt": "a"}, tiny_dataset, ExperienceBuffer, tiny_dataset(1)])
def test_what_is_no_buffer_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"(?s)experience_buffer=.*path of a saved one.*from_dataset") as error:
        make_trainer(tmp_path, experience_buffer=wrong)
    assert repr(wrong) in str(error.value)


def test_a_path_without_a_buffer_is_refused(tmp_path):
    with pytest.raises(ExperienceBufferError, match=r"none does not exist\. Check the path") as error:
        make_trainer(tmp_path, experience_buffer=str(tmp_path / "none"))
    assert "save(" not in str(error.value)


def test_a_saved_buffer_that_does_not_fit_is_named(tmp_path):
    filled_buffer(num_tokens=9).save(tmp_path / "saved")
    with pytest.raises(ExperienceBufferError, match=r"saved holds a completion of 9 tokens"):
        make_trainer(tmp_path, experience_buffer=tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved has group_size=4.*num_generations=8"):
        make_trainer(tmp_path, experience_buffer=tmp_path / "saved", num_generations=8)


@pytest.mark.parametrize(("argument", "known"), [("question_sampler", "gaussian"), ("weighting", "balanced")])
def test_an_unknown_name_of_a_strategy_is_refused(tmp_path, argument, known):
    with pytest.raises(ValueError, match=rf"{argument}='best' is unknown.*'{known}'"):
        make_trainer(tmp_path, **{argument: "best"})
    with pytest.raises(TypeError, match=r"must be callable.* got 3\..*name of a built-in one"):
        make_trainer(tmp_path, **{argument: 3})


def test_a_stored_row_that_lacks_a_column_gets_it_from_the_dataset(tmp_path):
    seen = []

    def reward(prompts, completions, uid, answer, **kwargs):
        seen.extend(zip(prompts, uid, answer, strict=True))
        return [0.0] * len(completions)

    buffer = filled_buffer(example={"prompt": "1 + 1 = "})
    make_trainer(tmp_path, experience_buffer=buffer, max_steps=1, reward_funcs=reward).train()
    assert ("1 + 1 = ", "q1", 2) in seen


class MisbehavingBuffer(ExperienceBuffer):
    """Returns what it is told, unlike the real one, which checks its sampler."""

    answer = staticmethod(lambda ids, n: ids)

    def sample_questions(self, n, sampler=None):
        ids = [q for questions in self.buckets().values() for q in questions]
        return self.answer(ids, n)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ids, n: [*ids, *"abc"], r"sample_questions\(1\) returned 4 questions"),
        (lambda ids, n: ["nobody"], r"sample_questions\(1\) returned 'nobody', which has no stored completion"),
    ],
)
def test_a_custom_buffer_that_misbehaves(tmp_path, answer, message):
    buffer = filled_buffer()
    buffer.__class__ = MisbehavingBuffer
    buffer.answer = answer
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, experience_buffer=buffer, max_steps=1).train()


def two_questions():
    buffer = filled_buffer()
    example = tiny_dataset()[1]
    experience = Experience.create([5, 6], [-1.0, -1.0], policy_version=0, reward=1.0)
    buffer.collect(Question(question_id_of(example["prompt"]), example), [experience], num_correct=1, group_size=4)
    return buffer


def test_a_custom_buffer_that_repeats_a_question(tmp_path):
    buffer = two_questions()
    buffer.__class__ = MisbehavingBuffer
    buffer.answer = lambda ids, n: ids[:1] * 2
    with pytest.raises(ValueError, match=r"sample_questions\(2\) returned .* more than once"):
        make_trainer(tmp_path, experience_buffer=buffer, max_steps=1).train()


@pytest.mark.parametrize("ids", [["nobody"], "all + 1", "twice"])
def test_a_custom_sampler_that_misbehaves(tmp_path, ids):
    def sampler(pool, n, rng):
        known = [q for questions in pool.buckets().values() for q in questions]
        return {"all + 1": [*known, "another"], "twice": known[:1] * 2}.get(ids if isinstance(ids, str) else "", ids)

    with pytest.raises(ValueError, match=r"(?i)sampler|question"):
        make_trainer(tmp_path, experience_buffer=two_questions(), question_sampler=sampler, max_steps=1).train()


def test_a_custom_selector_that_misbehaves(tmp_path):
    buffer = filled_buffer()
    question = buffer.question(question_id_of(tiny_dataset()[0]["prompt"]))
    other = Experience.create([5, 6], [-1.0, -1.0], policy_version=0, reward=1.0)
    buffer.collect(question, [other], num_correct=1, group_size=4)
    with pytest.raises(ValueError, match="completion selector returned 2 for 2 candidates"):
        make_trainer(
            tmp_path, experience_buffer=buffer, completion_selector=lambda candidates, rng: 2, max_steps=1
        ).train()


@pytest.mark.parametrize("max_steps", [3, 13])
def test_a_threshold_that_no_reward_reaches(tmp_path, warnings_of, max_steps):
    def partial(completions, **kwargs):
        return [0.3] * (len(completions) - 1) + [0.7]

    make_trainer(tmp_path, max_steps=max_steps, reward_funcs=partial).train()
    (message,) = [message for message in warnings_of if message.startswith("No completion")]
    assert "success_threshold=1.0" in message
    assert "0.7" in message


def test_no_warning_where_something_succeeds(tmp_path, warnings_of):
    make_trainer(tmp_path, max_steps=12).train()
    assert not any("No completion" in message or "not started" in message for message in warnings_of)
    assert len(warnings_of) == 2, "a line at the start and one at the end"


def test_missing_hooks_name_the_release_of_trl():
    class Changed(GRPOTrainer):
        def _generate_single_turn(self, requests):
            return requests

    with pytest.raises(RuntimeError, match=rf"prompt_ids.*_generate_single_turn.*trl {trl.__version__}"):
        check_hooks(Changed)

    class Renamed:
        pass

    with pytest.raises(RuntimeError, match=r"_generate_and_score_completions\(\)"):
        check_hooks(Renamed)
    check_hooks(GRPOTrainer)


def test_a_patched_method_of_trl_is_named_and_works_with_its_signature(tmp_path, monkeypatch):
    calculate = GRPOTrainer._calculate_rewards
    calls = []

    def patched(self, *args, **kwargs):
        calls.append(args)
        return calculate(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", patched)
    with pytest.raises(RuntimeError, match=rf"replaced by {__name__}\..*patched.*functools\.wraps"):
        make_trainer(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", functools.wraps(calculate)(patched))
    make_trainer(tmp_path, max_steps=1).train()
    assert calls


def test_a_release_that_skips_the_forward_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: next(model.parameters()).sum())
    with pytest.raises(RuntimeError, match="without the forward that replay relies on"):
        make_trainer(tmp_path, max_steps=1).train()
