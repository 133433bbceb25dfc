"""gpt-oss in OpenAI's Harmony format: thoughts in the channel `analysis` before the last answer, answers in `final`.

Only the last answer ends with `<|return|>`, which ends a generation; earlier ones end with `<|end|>`, without loss.
"""

from fireflyds.data.chat_template import JinjaChat

_SYSTEM = (
    "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n"
    "Knowledge cutoff: 2024-06\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: ' + "
    "(reasoning_effort or 'medium') + '\\n\\n# Valid channels: analysis, commentary, final. Channel must be included "
    "for every message.<|end|>' }}"
)
CHAT = JinjaChat(
    "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + _SYSTEM + "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ '<|start|>developer<|message|># Instructions\\n\\n' + message.content + "
    "'\\n\\n<|end|>' }}{% elif message.role == 'user' %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant' }}{% generation %}{% if loop.last and message.reasoning_content %}"
    "{{ '<|channel|>analysis<|message|>' + message.reasoning_content + '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' + message.content }}{% if loop.last %}{{ '<|return|>' }}{% endif %}"
    "{% endgeneration %}{% if not loop.last %}{{ '<|end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    stop="<|return|>",
)
