"""DeepSeek-R1 and its distilled models: the thoughts before the last answer, those of earlier answers left out.

The published template leaves out all thoughts, as it serves inference; in training those of the last answer are kept,
behind the `<think>` that its generation prompt opens.
"""

from fireflyds.data.chat_template import JinjaChat

CHAT = JinjaChat(
    "{{ bos_token }}{% if tools %}{{ raise_exception('no tools') }}{% endif %}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}{% else %}{{ '<｜Assistant｜>' }}"
    "{% set content = message.content.split('</think>')[-1] %}"
    "{% set thought = message.reasoning_content or (message.content.split('</think>')[0].split('<think>')[-1] "
    "if '</think>' in message.content else '') %}"
    "{% if loop.last and thought %}{{ '<think>\\n' }}{% endif %}{% generation %}"
    "{% if loop.last and thought %}{{ thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ (content.lstrip('\\n') if loop.last and thought else content) + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    special=("<｜User｜>", "<｜Assistant｜>"),
)
