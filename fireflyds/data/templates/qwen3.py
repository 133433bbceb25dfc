"""Qwen3 as Alibaba defines it: ChatML with tools, and with the thoughts after the last question alone.

An answer without thoughts gets an empty thought before it, as with `enable_thinking=false`, which carries no loss.
"""

from fireflyds.data.chat_template import JinjaChat

_TOOLS = (
    "'# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\''
)
_SYSTEM = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}{{ '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') + "
    + _TOOLS
    + " + '<|im_end|>\\n' }}{% elif system %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{% endif %}"
)
_LAST_QUESTION = (
    "{% set last = namespace(question=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}"
)
_THOUGHT = (
    "{% set content = message.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = message.reasoning_content or (message.content.split('</think>')[0].split('<think>')[-1] "
    "if '</think>' in message.content else '') %}"
)
_CALLS = (
    "{% for call in message.tool_calls or [] %}{{ ('\\n' if content or not loop.first else '') + "
    '\'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson + '
    "'}\\n</tool_call>' }}{% endfor %}"
)
_ANSWER = (
    "{{ '<|im_start|>assistant\\n' }}"
    + _THOUGHT
    + "{% set shown = loop.index0 > last.question and (loop.last or thought) %}"
    "{% if shown and not thought %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% generation %}"
    "{% if shown and thought %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    + _CALLS
    + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
)
_TOOL = (
    "{% set is_first = messages[loop.index0 - 1].role != 'tool' %}"
    "{% set is_last = loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{ ('<|im_start|>user' if is_first else '') + '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' + "
    "('<|im_end|>\\n' if is_last else '') }}"
)

CHAT = JinjaChat(
    _SYSTEM
    + _LAST_QUESTION
    + "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>user\\n' + message.content + "
    "'<|im_end|>\\n' }}{% elif message.role == 'assistant' %}"
    + _ANSWER
    + "{% elif message.role == 'tool' %}"
    + _TOOL
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + "
    "('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '') }}{% endif %}",
    special=("<|im_start|>", "<|im_end|>"),
    stop="<|im_end|>",
)
