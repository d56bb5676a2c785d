"""The embedded backbone: its model, tokenizer and weights; not its pretraining."""
