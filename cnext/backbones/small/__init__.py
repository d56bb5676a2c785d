"""The embedded backbone of `next-real`: the tiny one's shape in another size; not its pretraining."""
