"""A training with transformers' Trainer: what autotune needs of it is the function ``workload``.

autotune search --model examples/transformers_trainer.py:workload
python examples/transformers_trainer.py
"""

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

VOCABULARY, TOKENS, REVIEWS = 5000, 256, 320


class Reviews(torch.utils.data.Dataset):
    """Made up, and padded to the limit when they were tokenized, as in many a tutorial."""

    def __init__(self):
        numbers = torch.Generator().manual_seed(0)
        lengths = (torch.randn(REVIEWS, generator=numbers) * 0.7 + 4.3).exp().long().clamp(8, TOKENS)
        self.mask = (torch.arange(TOKENS) < lengths[:, None]).long()
        self.ids = torch.randint(1, VOCABULARY, (REVIEWS, TOKENS), generator=numbers) * self.mask

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {
            "input_ids": self.ids[index],
            "attention_mask": self.mask[index],
            "labels": self.ids[index, 0] % 2,
        }


def model():
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=256, n_layers=4, n_heads=4, hidden_dim=1024, max_position_embeddings=TOKENS
    )
    return DistilBertForSequenceClassification(config)


def trainer(model, **options):
    plain = {"per_device_train_batch_size": 32, "num_train_epochs": 2, "learning_rate": 1e-4}
    arguments = TrainingArguments("runs/reviews", report_to=[], save_strategy="no", **{**plain, **options})
    return Trainer(model, arguments, train_dataset=Reviews(), data_collator=default_data_collator)


def workload():
    return trainer(model())


def main():
    import autotune

    tuned = autotune.load("examples/transformers_trainer.py:workload")
    tuned.prepare(trainer(model(), **tuned.arguments("transformers"))).train()


if __name__ == "__main__":
    main()
