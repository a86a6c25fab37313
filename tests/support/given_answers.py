"""A part of a document, and a model whose answers are given; for tests of the client."""

from types import SimpleNamespace

from vllm_kvzip.client import Document
from vllm_kvzip.client.asking.budget import Calls
from vllm_kvzip.client.asking.drafting import AskedPart
from vllm_kvzip.client.library import ReadPart
from vllm_kvzip.client.server import Reply
from vllm_kvzip.client.text.parts import Part

FILLER = "The river rose all night and nobody in the town slept. "
TEXT = (
    f"{FILLER * 3}The gate code of the old mill is 4821. {FILLER}The licence number of the sugar "
    f"refinery is 7730. {FILLER * 2}Maria Rossi signed the treaty in Turin. {FILLER}"
)
QUESTION = "What is the gate code of the old mill?"
RIGHT = "The gate code of the old mill is 4821."


def asked(text=TEXT, number=0, start=0):
    document = Document("a document", " " * start + text)
    part = Part(number, start, start + len(text), text, 100)
    return AskedPart(number, ReadPart(document, part, {}, "id", 96, 3, 1))


def reply(text, is_whole=True, cached=96):
    return Reply(text, is_whole, 100, 5, cached, 0.1, None, None)


class Model:
    """Says what it is given, one after the other; remembers what it was asked."""

    def __init__(self, *texts):
        self.texts = list(texts)
        self.prompts = []
        self.openings = []

    async def chat(self, messages, *, max_tokens, send, opening=None):
        self.prompts.append(messages[0]["content"])
        self.openings.append(opening)
        text = self.texts.pop(0)
        return text if isinstance(text, Reply) else reply(text)


def calls_of(model, most=100, drafts=0):
    tally = SimpleNamespace(replies=[], parts_read_again=0)
    return Calls(model, tally, most, drafts), tally
