"""An online training whose completions are given, in any number of processes."""

import random
from collections import Counter

from datasets import Dataset

from trl_larpo import OnlineLarPOTrainer

PROMPTS = Dataset.from_dict({"prompt": [f"{i} why is the dog {'so ' * i}old" for i in range(4)]})


def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


class Scripted(OnlineLarPOTrainer):
    """Completions are random words that depend on the prompt and the step alone; batches are recorded."""

    def __init__(self, *args, **kwargs):
        self.batches = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        completions, draws = [], Counter()
        for ids in prompt_ids:
            draws[tuple(ids)] += 1
            rng = random.Random(f"{ids} {draws[tuple(ids)]} {self.state.global_step}")
            text = " " + " ".join(rng.choice(["blue", "green", "dog", "why"]) for _ in range(rng.randint(1, 4)))
            end = [self._tokenizer.eos_token_id] * (rng.random() < 0.7)
            completions.append(self._tokenizer(text)["input_ids"] + end)
        return completions, None

    def _compute_loss(self, model, inputs):
        if self.model.training:
            self.batches.append({name: value.clone() for name, value in inputs.items()})
        return super()._compute_loss(model, inputs)

    def rows(self):
        """The lists of all batches, as a dataset for LarPOTrainer."""
        decode, eos = self._tokenizer.decode, self._tokenizer.eos_token_id
        for batch in self.batches:
            for i, real in enumerate(batch["candidate_mask"]):
                completions = zip(batch["completion_ids"][i][real], batch["completion_mask"][i][real], strict=True)
                ids = [tokens[mask.bool()].tolist() for tokens, mask in completions]
                texts = [decode(tokens, skip_special_tokens=True) for tokens in ids]
                yield {
                    "prompt": decode(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]),
                    "completions": texts,
                    "rewards": vowels(texts),
                    "finished": [tokens[-1] == eos for tokens in ids],
                    "completion_ids": ids,
                }


ONLINE = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 12, "max_steps": 2}
