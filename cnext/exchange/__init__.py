"""Export and import of adapters (PEFT, released layout, merged checkpoint), with model card and logit check.

The conversion of tensors is in `adapters.exchange`; this reads and writes whole folders.
"""
