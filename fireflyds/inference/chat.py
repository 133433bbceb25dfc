"""Chat with a model directory, with answers streamed to the terminal."""

import math

import torch
from transformers import AutoTokenizer, TextStreamer

from fireflyds.config import ChatConfig
from fireflyds.errors import UserError
from fireflyds.models.load import load_for_inference


class ChatSession:
    """A chat with its message history; the oldest turns are dropped when the context is full."""

    def __init__(self, config: ChatConfig) -> None:
        self._config = config
        self._tokenizer = AutoTokenizer.from_pretrained(config.model)
        if self._tokenizer.chat_template is None:
            raise UserError(
                "has no chat template, so it is a base model",
                key="model",
                value=config.model,
                remedy="Instruction-tune it first",
            )
        self._model = load_for_inference(config.model)
        torch.manual_seed(config.seed)
        self.clear()

    def clear(self) -> None:
        """Resets the history to the system message, if any."""
        system = self._config.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def send(self, text: str) -> str:
        """Returns the answer to `text`; prints it while it is generated."""
        self.messages.append({"role": "user", "content": text})
        inputs = self._inputs()
        sampling = self._config.temperature > 0
        output = self._model.generate(
            **inputs,
            max_new_tokens=self._config.max_new_tokens,
            do_sample=sampling,
            temperature=self._config.temperature if sampling else None,
            top_p=self._config.top_p if sampling else None,
            streamer=TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        answer: str = self._tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer.strip()})
        return answer.strip()

    def _inputs(self) -> dict[str, torch.Tensor]:
        """Returns the encoded history; drops the oldest turns until the prompt and the answer fit the context."""
        # BLOOM's ALiBi has no maximum position, and its configuration no such key.
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        max_prompt_tokens = positions - self._config.max_new_tokens
        first = 1 if self._config.system else 0
        while True:
            encoded = self._tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            if encoded["input_ids"].shape[1] <= max_prompt_tokens or len(self.messages) <= first + 1:
                return {name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
            del self.messages[first : first + 2]
