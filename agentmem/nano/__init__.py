"""The embedded model: a generated language, a small Qwen3 trained on it, a memory adapter, and the recipe of all three.

Evaluations and demos use `language`; `build.build` makes `weights/`, the shipped model, which `agentmem.load("nano")`
opens. `language`, `toolchat`, `pools` and `chatml` do not need torch.
"""
