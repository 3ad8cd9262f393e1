"""Chat templates in six styles, each with one habit that makes borders hard to find, and a tokenizer for them."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerFast

from tests.helpers.bpe import byte_bpe

CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Strips the reasoning of earlier turns, opens an empty one in the last, groups tool results in one user turn, names
# the tools inside the system turn, and looks at how a user's text begins.
QWEN = """
{%- if tools or messages[0].role == 'system' %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}
{{- '\n\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(query=messages | length - 1, found=false) %}
{%- for m in messages[::-1] %}
{%- if not ns.found and m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set ns.found = true %}{%- set ns.query = messages | length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set text = m.content %}{%- set thought = '' %}
{%- if '</think>' in text %}
{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{%- endif %}
{{- text.lstrip('\n') }}
{%- for call in m.tool_calls or [] %}
{%- if text or not loop.first %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

# Writes BOS and a system turn of its own, trims every text, and writes a tool call instead of the content.
LLAMA = """
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is Monday.\n' }}
{%- if messages[0].role == 'system' %}
{{- messages[0].content | trim }}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", ' }}
{{- '"parameters": ' + m.tool_calls[0].function.arguments | tojson + '}' }}
{%- else %}
{{- m.content | trim }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# Knows no system and no tool role, and insists on alternation.
GEMMA = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role not in ('user', 'assistant') %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""

# Puts the system text and the tools before the last question; the generation prompt is empty.
MISTRAL = """
{{- bos_token }}
{%- set ns = namespace(last=0, system='') %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- if m.role == 'system' %}{%- set ns.system = m.content + '\n\n' %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}
"""

# Says in a system turn of its own whether it reasons, which a flag in the system text decides too, and puts an empty
# reasoning before every reply where it does not.
SMOLLM = """
{%- set enable_thinking = true if enable_thinking is not defined else enable_thinking %}
{%- set ns = namespace(mode='/think' if enable_thinking else '/no_think', text='') %}
{%- if messages[0].role == 'system' %}
{%- if '/no_think' in messages[0].content %}{%- set ns.mode = '/no_think' %}
{%- elif '/think' in messages[0].content %}{%- set ns.mode = '/think' %}
{%- endif %}
{%- set ns.text = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\n## Metadata\n\nToday Date: 01 May 2026\nReasoning Mode: ' + ns.mode + '\n\n' }}
{{- '## Custom Instructions\n\n' + (ns.text or 'You are a helpful assistant.') + '\n\n' }}
{%- if tools %}
{{- '### Tools\n\n<tools>\n' }}{%- for tool in tools %}{{- tool | string + '\n' }}{%- endfor %}{{- '</tools>\n\n' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if ns.mode == '/no_think' else '') + m.content.lstrip('\n') }}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if ns.mode == '/no_think' else '') }}
{%- endif %}
"""

# Looks at the first character of a text: marks there are noticed.
PEEKING = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + ('!' if m.content[:1] == '!' else '') + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Counts characters: any mark is noticed.
COUNTING = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + ' ' + m.content | length | string + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# The same, and its beginnings change as the conversation goes on.
SHIFTING = "{{- messages | length }}" + COUNTING

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
]  # fmt: skip
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

_BOS = {LLAMA: "<|begin_of_text|>", GEMMA: "<s>", MISTRAL: "<s>"}


@cache
def tokenizer(template: str, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with all the control tokens above."""
    text = "hello there, how are you today? system user assistant tool name arguments the answer is fine.\n\n"
    made: PreTrainedTokenizerFast = byte_bpe(
        [text] * 2,
        template,
        control=SPECIAL,
        tags=TAGS,
        vocab_size=400,
        trim_offsets=trim_offsets,
        eos_token="</s>",
        pad_token=None,
        bos_token=_BOS.get(template),
        additional_special_tokens=SPECIAL,
    )
    return made
