"""transformers' Trainer on a small Llama, in bf16, with evaluation and a save."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
rows = [{"input_ids": (ids := torch.randint(64, (16,)).tolist()), "labels": ids} for _ in range(16)]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=4,
        bf16=True,
        report_to=[],
        logging_steps=1,
        save_steps=2,
        disable_tqdm=True,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    print(trainer.evaluate(), trainer.model.device)
