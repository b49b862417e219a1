"""Text in and out: the tokenizer, the chat template, the tasks and their teachers."""
