"""A conversation with a model, about images too: what was said so far, and what is asked next."""

from dataclasses import dataclass, field

from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import IMAGE_MARK, Message, Sample
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import ImageFile, Item


@dataclass(kw_only=True)
class Conversation:
    """`waiting` are images that go with the next message."""

    system: str
    waiting: list[ImageFile] = field(default_factory=list)
    messages: list[Message] = field(init=False)
    images: list[ImageFile] = field(init=False)

    def __post_init__(self) -> None:
        self._begin()

    def reset(self) -> None:
        """Forget what was said, and the images."""
        self.waiting = []
        self._begin()

    def ask(self, text: str, evaluator: Evaluator, max_new_tokens: int) -> str:
        """The model's greedy answer, which becomes part of the conversation. Image marks in `text` are left out.
        Collective over the world.

        Raises:
            UserError: the conversation has become too long, or an image cannot be used; the message and its images
                are forgotten.
        """
        before = list(self.messages), list(self.images)
        content = IMAGE_MARK * len(self.waiting) + text.replace(IMAGE_MARK, "")
        self.messages.append(Message(role="user", content=content))
        self.images += self.waiting
        self.waiting = []
        item = Item(key="chat", prompt=Sample(messages=tuple(self.messages)), images=tuple(self.images))
        try:
            (answer,) = evaluator.generate([item], max_new_tokens)
        except UserError:
            self.messages, self.images = before
            raise
        self.messages.append(Message(role="assistant", content=answer))
        return answer

    def _begin(self) -> None:
        self.images = []
        self.messages = [Message(role="system", content=self.system)] if self.system else []
