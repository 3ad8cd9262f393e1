"""The embedded model: a generated language, a small Qwen3 that speaks it, the adapter trained on it, and their recipe.

`language` is what evaluations and demos talk with; `build.build` makes `weights/`, the shipped model, which
`agentmem.load("nano")` opens. `language`, `toolchat`, `pools` and `chatml` need no torch.
"""
