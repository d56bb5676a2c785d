"""What other libraries' training loops need of cnext: `cnext.integrations.transformers` for transformers' Trainer.

One module per library, which imports that library. No backbones, and no files of weights in other formats: those are in
`backbones` and `exchange`.
"""
