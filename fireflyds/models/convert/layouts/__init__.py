"""Layouts of published checkpoints that come with code of their own, one file per `model_type` in lower case.

Each has `TEMPLATES`, the chat templates of its chat models; `config(source, folder)`, the contents of `config.json` for
an architecture of transformers; and `convert(source, name, tensor)`, the weights of that architecture that one tensor
becomes, which must work on the meta device too.
"""
