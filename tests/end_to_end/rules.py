"""Strategies of a user, for tests."""

from exgrpo_trl import EvictionRule, QuestionSampler


class LeastReplayed(QuestionSampler):
    """Stateful: the questions that were replayed least often, in the order of their ids."""

    def __init__(self):
        self.counts = {}

    def __call__(self, pool, num_questions, rng):
        ids = sorted(question_id for ids in pool.buckets().values() for question_id in ids)
        return sorted(ids, key=lambda question_id: self.counts.get(question_id, 0))[:num_questions]

    def observe(self, batch):
        for replay in batch.replays:
            name = replay.question.question_id
            self.counts[name] = self.counts.get(name, 0) + 1

    def state_dict(self):
        return {"counts": self.counts}

    def load_state_dict(self, state):
        self.counts = dict(state["counts"])

    def metrics(self):
        return {"most_replayed": max(self.counts.values(), default=0)}


class Lowest(EvictionRule):
    """Of the whole buffer, or of a question, the lowest by some key: walks it, which a test may."""

    def __init__(self, key):
        self.key = key

    def __call__(self, pool, question_id):
        owned = [
            (name, experience)
            for ids in pool.buckets().values()
            for name in ids
            if question_id in (None, name)
            for experience in pool.completions(name)
        ]
        return min(owned, key=lambda pair: self.key(pair[1]))
