"""
Two oracles for loss and gradient of mixed batches.

They watch every micro-batch of a real `trainer.train()`. The first computes the objective row by row in float64,
without padding, from the stored log-probabilities. The second lets TRL compute the loss of the fresh rows and adds the
term of the replayed ones with the normaliser of the loss type.
"""

import copy
import math

import torch
import trl
from packaging.version import Version
from tiny import completion_logps
from trl import GRPOTrainer

from exgrpo_trl import ExGRPOTrainer

TRL_VERSION = Version(trl.__version__)
BETA = 0.1


def weight(log_w, advantage, weighting, eps_low, eps_high):
    """Value and gradient factor of the replay weighting, from the table in the paper's terms of w."""
    w = log_w.exp()
    if weighting == "shaped":
        return w / (w + BETA), BETA * w / (w + BETA) ** 2
    if weighting == "balanced":
        return (1 + BETA) ** 2 / BETA * w / (w + BETA), (1 + BETA) ** 2 * w / (w + BETA) ** 2
    if weighting == "truncated":
        return w.clamp(max=1), w.clamp(max=1)
    if weighting == "none":
        return torch.ones_like(w), torch.ones_like(w)
    if advantage >= 0:
        return w.clamp(max=1 + eps_high), torch.where(w > 1 + eps_high, 0.0, w)
    return w.clamp(min=1 - eps_low), torch.where(w < 1 - eps_low, 0.0, w)


def pixels_of(inputs, row):
    """What a forward needs of the images of one row of a micro-batch."""
    if "pixel_values" not in inputs:
        return {}
    num_images = inputs["num_images"]
    before, own = sum(num_images[:row]), num_images[row]
    pixels = {}
    if not own:  # a forward takes no empty tensors
        pass
    elif "image_grid_thw" in inputs:
        patches = inputs["image_grid_thw"].prod(-1).tolist()
        start = sum(patches[:before])
        pixels["pixel_values"] = inputs["pixel_values"][start : start + sum(patches[before : before + own])]
        pixels["image_grid_thw"] = inputs["image_grid_thw"][before : before + own]
    else:
        pixels["pixel_values"] = inputs["pixel_values"][before : before + own]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            is_own = torch.cat([inputs["prompt_mask"][row], inputs["completion_mask"][row]]).bool()
            pixels[name] = inputs[name][row][is_own][None]
    return pixels


class WatchedTrainer(ExGRPOTrainer):
    """Compares loss and gradient of every micro-batch with both oracles."""

    def __init__(self, *args, model, **kwargs):
        # Copied before TRL patches the forward of the model that it trains.
        self.twin, self.reference = copy.deepcopy(model).double(), copy.deepcopy(model).double()
        super().__init__(model, *args, **kwargs)
        self.log_ratios, self.sampler_weights = [], []
        self.num_mixed, self.num_only_replayed, self.num_fresh = 0, 0, 0
        self.num_foreign = 0  # tokens that the model did not write
        self.replayed_advantages = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training:
            return loss
        is_replayed = inputs["is_replayed"]
        self.replayed_advantages += inputs["advantages"][is_replayed].tolist()
        self.num_only_replayed += bool(is_replayed.all())
        self.num_mixed += bool(is_replayed.any() and not is_replayed.all())
        self.num_fresh += bool(not is_replayed.any())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)

        missing, _ = self.twin.load_state_dict(self.model.state_dict(), strict=False)
        assert not missing
        expected = self.row_by_row(self.twin, inputs)
        twin_trained = [p for p in self.twin.parameters() if p.requires_grad]
        expected_gradient = torch.autograd.grad(expected, twin_trained, allow_unused=True)
        self.compare(loss, gradient, expected, expected_gradient, "row by row")

        if self.beta and self.args.use_bias_correction_kl:
            return loss  # TRL would put a gradient through the KL ratio of the replayed rows that replay does not have
        by_term = self.by_term(inputs)
        by_term_gradient = torch.autograd.grad(by_term, trained, allow_unused=True)
        self.compare(loss, gradient, by_term, by_term_gradient, "by term")
        return loss

    @staticmethod
    def compare(loss, gradient, expected, expected_gradient, oracle):
        torch.testing.assert_close(
            loss.double(), expected.double(), rtol=2e-5, atol=2e-6, msg=lambda m: f"{oracle}: {m}"
        )
        flat, flat_expected = (
            torch.cat([g.double().flatten() for g in grads if g is not None])
            for grads in (gradient, expected_gradient)
        )
        error = (flat - flat_expected).norm() / flat_expected.norm().clamp(min=1e-6)
        assert error < 5e-5, f"{oracle}: gradient differs by {error:.2e}"

    def normalizer(self, inputs, num_rows, tokens):
        """What a sum over tokens (or, for grpo, sapo and luspo, over rows) is divided by."""
        steps = self.current_gradient_accumulation_steps
        if self.loss_type in ("grpo", "sapo", "luspo"):
            return num_rows * steps
        if self.loss_type == "bnpo":
            return max(tokens, 1) * steps
        if self.loss_type == "dr_grpo":
            return num_rows * self.max_completion_length * steps
        items = max(float(inputs["num_items_in_batch"]), 1.0)
        return items * steps / self.args.steps_per_generation if Version("1.9.1") <= TRL_VERSION else items

    def sampler_weight(self, old, sampled):
        """TRL's weight of a fresh row for the distance between its sampler and the policy; shape (T,)."""
        args = self.args
        log_ratio = (old - sampled).nan_to_num(0.0)
        if args.vllm_importance_sampling_mode.startswith("sequence"):
            log_ratio = log_ratio.sum().expand_as(log_ratio)
        low = getattr(args, "vllm_importance_sampling_clip_min", None) or 0.0
        high = getattr(args, "vllm_importance_sampling_clip_max", None) or args.vllm_importance_sampling_cap
        ratio = log_ratio.exp()
        if args.vllm_importance_sampling_mode.endswith("truncate"):
            return ratio.clamp(low, high)
        return torch.where((ratio < low) | (ratio > high), 0.0, ratio)

    def policy_term(self, logps, old, advantage, is_replayed, sampler_weight):
        """Minus the objective of one row, per token; shape (T,)."""
        eps_low, eps_high, args = self.epsilon_low, self.epsilon_high, self.args
        log_ratio = logps - old
        if self.importance_sampling_level == "sequence" and self.loss_type != "vespo":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        if is_replayed:
            self.log_ratios.append(log_ratio.detach())
            value, factor = weight(log_ratio.detach(), advantage, args.replay_weighting, eps_low, eps_high)
            if self.loss_type in ("cispo", "vespo"):
                clamp = min(1.0, eps_high) if self.loss_type == "cispo" else 1.0
                return -clamp * factor * advantage * logps
            return -advantage * (value + factor * (log_ratio - log_ratio.detach()))
        ratio = log_ratio.exp()
        if self.loss_type == "vespo":
            least = math.log(1e-8)
            log_w = log_ratio.detach().sum() + sampler_weight.log().clamp(least, 20).sum()
            w = log_w.clamp(least, 20).exp()
            k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
            return -(math.e**rate * w**k * torch.exp(-rate * w)) * advantage * logps
        if self.loss_type == "cispo":
            term = -ratio.clamp(max=eps_high).detach() * advantage * logps
        elif self.loss_type == "sapo":
            temperature = args.sapo_temperature_pos if advantage > 0 else args.sapo_temperature_neg
            term = -advantage * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
        else:
            term = -torch.min(ratio * advantage, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
        return term * sampler_weight

    def row_by_row(self, twin, inputs):
        terms, entropies = [], []
        for row in range(len(inputs["completion_ids"])):
            mask = inputs["completion_mask"][row].bool()
            if not mask.any():
                terms.append(torch.zeros(0, dtype=torch.float64))
                continue
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            completion = inputs["completion_ids"][row][mask]
            pixels = pixels_of(inputs, row)
            # What tools said is read by the model, and never trained.
            by_model = (
                inputs["tool_mask"][row][mask].bool() if "tool_mask" in inputs else torch.ones_like(completion) > 0
            )
            self.num_foreign += int((~by_model).sum())
            logps, entropy = (of_row[by_model] for of_row in completion_logps(twin, prompt, completion, **pixels))
            is_replayed = bool(inputs["is_replayed"][row])
            if is_replayed:
                old = inputs["behavior_per_token_logps"][row][mask][by_model].double()
            elif "old_per_token_logps" in inputs:
                old = inputs["old_per_token_logps"][row][mask][by_model].double()
            else:
                old = logps.detach()
            corrects = self.use_vllm and self.vllm_importance_sampling_correction
            sampler_weight = torch.ones_like(old)
            if corrects and not is_replayed:
                sampler_weight = self.sampler_weight(
                    old, inputs["sampling_per_token_logps"][row][mask][by_model].double()
                )
                self.sampler_weights.append(sampler_weight)
            term = self.policy_term(logps, old, float(inputs["advantages"][row]), is_replayed, sampler_weight)
            if self.beta:
                with torch.no_grad():
                    ref = completion_logps(self.reference, prompt, completion, **pixels)[0][by_model]
                kl = torch.exp(ref - logps) - (ref - logps) - 1
                if self.args.use_bias_correction_kl and not is_replayed:  # a stored completion is shown with ratio 1
                    kl = kl * torch.exp(logps - old)
                term = term + self.beta * kl
            terms.append(term)
            entropies.append(entropy)
        num_tokens = sum(len(term) for term in terms)
        if self.loss_type in ("grpo", "sapo"):
            total = sum(term.mean() for term in terms if len(term))
        else:
            total = sum(term.sum() for term in terms)
        loss = total / self.normalizer(inputs, len(terms), num_tokens)
        if getattr(self, "entropy_coef", 0):
            bonus = torch.cat(entropies).sum() / num_tokens
            loss = loss - self.entropy_coef * bonus / self.current_gradient_accumulation_steps
        return loss

    def by_term(self, inputs):
        """TRL's loss with the replayed advantages at zero, plus the term of the replayed rows."""
        is_replayed, mask = inputs["is_replayed"], inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        without = {
            k: v for k, v in inputs.items() if k not in ("is_replayed", "behavior_per_token_logps", "rollout_rows")
        }
        without["advantages"] = inputs["advantages"].masked_fill(is_replayed, 0.0)
        seen = []
        original = GRPOTrainer._get_per_token_logps_and_entropies

        def spy(trainer, *args, **kwargs):
            outputs = original(trainer, *args, **kwargs)
            seen.append(outputs[0])
            return outputs

        GRPOTrainer._get_per_token_logps_and_entropies = spy
        metrics = copy.deepcopy(self._metrics)
        try:
            loss = GRPOTrainer.compute_loss(self, self.model, without)
        finally:
            GRPOTrainer._get_per_token_logps_and_entropies = original
            self._metrics = metrics
        (logps,) = seen
        total = torch.zeros((), dtype=torch.float64)
        for row in is_replayed.nonzero()[:, 0].tolist():
            own = mask[row]
            if not own.any():
                continue
            stored = inputs["behavior_per_token_logps"][row][own].double()
            term = self.policy_term(logps[row][own].double(), stored, float(inputs["advantages"][row]), True, 1.0)
            total = total + (term.mean() if self.loss_type in ("grpo", "sapo") else term.sum())
        return loss + total / self.normalizer(inputs, len(mask), int(mask.sum()))
