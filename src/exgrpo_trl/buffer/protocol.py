"""What the trainer asks of a buffer: implement this to replace [`ExperienceBuffer`]."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NoReturn, Protocol, Self

from ..records import Experience, Question, Reuse
from ..strategies.eviction import EvictionFunction
from ..strategies.samplers import SamplingFunction


class ReplayBuffer(Protocol):
    """
    What the trainer asks of a buffer; [`ExperienceBuffer`] documents each member.

    `retired` iterates in the order of retirement, and `load` returns a buffer like the one that was saved: resuming
    relies on both. `collect` gets every group in batch order, `evict` a completion whose reward no longer counts.

    `reuse`, `note_reuse`, `unit` and `groups` are for configurations that count replays, go by what was last known of
    a completion, or replay whole groups: as long as nothing asks for them, a buffer without works, too. `groups` is
    for `unit == "group"` alone.
    """

    @property
    def capacity(self) -> int | None: ...
    @property
    def max_completions_per_question(self) -> int | None: ...

    @property
    def unit(self) -> str: ...

    eviction: EvictionFunction
    provenance: dict[str, Any]
    replay_state: dict[str, Any]

    @property
    def num_questions(self) -> int: ...
    @property
    def retired(self) -> Set[str]: ...
    def collect(
        self,
        question: Question,
        experiences: Sequence[Experience],
        *,
        num_correct: int,
        group_size: int,
        bucket: int | None = None,
    ) -> int: ...
    def sample_questions(self, n: int, sampler: SamplingFunction | None = None) -> Sequence[str]: ...
    def question(self, question_id: str) -> Question: ...
    def update(self, question: Question) -> None: ...
    def completions(self, question_id: str) -> Sequence[Experience]: ...
    def reuse(self, experience: Experience) -> Reuse: ...
    def note_reuse(self, question_id: str, experience: Experience, reuse: Reuse) -> bool: ...
    def groups(self, question_id: str) -> Sequence[Sequence[Experience]]: ...
    def buckets(self) -> Mapping[int, Sequence[str]]: ...
    def items(self) -> Iterator[tuple[Question, int, Experience]]: ...
    def retire(self, question_id: str) -> None: ...
    def evict(self, question_id: str, experience: Experience) -> bool: ...
    def evict_older_than(self, policy_version: int) -> int: ...
    def metrics(self) -> Mapping[str, float]: ...
    def set_limits(self, *, capacity: int | None, max_completions_per_question: int | None) -> None: ...
    def save(self, path: Any) -> None: ...
    @classmethod
    def load(cls, path: Any) -> Self: ...


class RemoteBuffer:
    """
    Stands for the experience buffer on the processes that do not own it: it lives on the main process.

    `save` does nothing, so that a script may call it on all processes, as it would call `trainer.save_model()`.
    Anything else is an error.
    """

    def save(self, path: Any) -> None:
        """The main process saves."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"The experience buffer lives on the main process, so this process cannot read its {name!r}. Guard the "
            "access with `if trainer.accelerator.is_main_process:`."
        )
