"""Stanford Alpaca without its input section, as in the first generation of Chinese-LLaMA-Alpaca."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(
    begin=BOS,
    system="{}\n\n",
    default_system=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ),
    user="### Instruction:\n{}\n\n",
    opening="### Response: ",
)
