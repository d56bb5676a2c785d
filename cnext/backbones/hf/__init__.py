"""The backbone ``hf``: models of transformers that read text, or text and images, and write text.

Here are their folders, chat templates and labels; not the families with a backbone of their own, and no other library's
models.
"""
