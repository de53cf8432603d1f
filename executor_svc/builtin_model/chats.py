"""The built-in model's chat examples, made from the corpus and a few hand-written answers.

Rule: an answer is one to three sentences and says nothing that the documentation, or the truth
about this model, does not. Each call draws other phrasings of the same questions, so that the
model learns the facts and not the wording.
"""

import random
import re

from executor_svc.builtin_model.corpus import Entry
from executor_svc.builtin_model.small_talk import SMALL_TALK

Message = dict[str, str]

# What a newcomer asks about first; drawn more often.
_POPULAR_MODULES = {
    "builtins", "collections", "csv", "datetime", "functools", "itertools", "json", "logging",
    "math", "os", "os.path", "pathlib", "random", "re", "shutil", "statistics", "string",
    "subprocess", "sys", "tempfile", "textwrap", "threading", "time",
}  # fmt: skip
_POPULAR_REPEATS = 3
# Long, and rarely asked about: their share of a small memory is better spent elsewhere.
_UNASKED_MODULES = ("tkinter", "turtle", "xml", "multiprocessing", "ctypes", "unittest", "curses")

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Headway's built-in demo model.",
    "Answer briefly.",
)

# "acos(x) -> number -- " and the like, at the start of a C docstring.
_CALL_PREFIX = re.compile(
    r"^[\w.]+\([^)]*\)\s*(?:-{1,2}>\s*[\w.\[\], ]+?)?\s*(?:--|:|$)\s*",
)

_ASK_WHAT = (
    "What does {name} do?",
    "What does {name} do?",
    "what does {name} do",
    "What is {name}?",
    "What is {name} for?",
    "Explain {name}",
    "Explain {name}.",
    "explain {name}",
    "Tell me about {name}.",
    "Describe {name}",
    "Can you explain {name}?",
    "Please explain {name}.",
    "{name}",
    "{name}?",
    "In Python, what does {name} do?",
)
_ASK_HOW = (
    "How do I use {name}?",
    "How do I use {name}?",
    "how to use {name}",
    "How can I use {name}?",
    "How do I call {name}?",
    "How should I use {name}?",
    "What arguments does {name} take?",
    "Show me how to use {name}.",
)
_ASK_MODULE = (
    "What is the {name} module?",
    "What is the {name} module for?",
    "What does the {name} module do?",
    "Explain the {name} module.",
    "Tell me about {name}",
    "What is {name}?",
    "How do I use the {name} module?",
)
_ASK_WHICH = (
    "How do I {task}?",
    "how do i {task}",
    "How can I {task}?",
    "Which function can {task}?",
)
_TASK_VERBS = {
    "add", "append", "build", "change", "check", "close", "combine", "compute", "convert", "copy",
    "count", "create", "decode", "delete", "encode", "find", "format", "generate", "get", "insert",
    "join", "list", "load", "make", "move", "open", "parse", "print", "read", "remove", "rename",
    "replace", "return", "reverse", "run", "search", "send", "serialize", "set", "shuffle", "sort",
    "split", "start", "test", "wait", "wrap", "write",
}  # fmt: skip

_LANGUAGE_TOPICS = {
    "assert": "the assert statement",
    "await": "await",
    "break": "the break statement",
    "class": "a class definition",
    "context-managers": "a context manager",
    "dict": "a dictionary display",
    "exceptions": "an exception",
    "for": "the for statement",
    "function": "a function definition",
    "if": "the if statement",
    "lambda": "a lambda",
    "lists": "a list display",
    "nonlocal": "the nonlocal statement",
    "numbers": "a numeric literal",
    "objects": "an object",
    "pass": "the pass statement",
    "slicings": "slicing",
    "truth": "truth value testing",
    "try": "the try statement",
    "typesmapping": "a mapping",
    "while": "the while statement",
    "with": "the with statement",
    "yield": "a yield expression",
}
_ASK_TOPIC = (
    "What is {name}?",
    "what is {name}",
    "Explain {name}.",
    "Explain {name} in Python.",
    "How does {name} work?",
    "Tell me about {name}.",
    "What does {name} do?",
)

_SMALL_TALK_REPEATS = 2


def make_chats(entries: list[Entry], random_source: random.Random) -> list[list[Message]]:
    """One epoch of chats, shuffled; each ends with an assistant message."""
    turns = [turn for entry in entries for turn in _turns_about(entry, random_source)]
    for questions, answers in SMALL_TALK:
        turns += [
            (question, random_source.choice(answers))
            for question in questions
            for _ in range(_SMALL_TALK_REPEATS)
        ]
    random_source.shuffle(turns)
    chats = []
    while turns:
        num_turns = min(len(turns), random_source.choice((1, 1, 1, 1, 2, 3)))
        messages = []
        if random_source.random() < 0.25:
            messages.append({"role": "system", "content": random_source.choice(_SYSTEM_PROMPTS)})
        for _ in range(num_turns):
            question, answer = turns.pop()
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        chats.append(messages)
    return chats


def summary(text: str, limit: int = 250) -> str:
    """The first one or two sentences of a docstring in one line; empty when there are none."""
    # C docstrings may open with the calls themselves, one a line: "range(stop) -> range object"
    text = re.sub(r"^(?:[\w.]+\(.*\)\s*-{1,2}>(?!.* -- ).*\n)+", "", text)
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    for paragraph in paragraphs:
        plain = re.sub(r":[\w:]+:`~?([^`<]*)[^`]*`", r"\1", paragraph).replace("``", "")
        plain = plain.replace("`", "")
        plain = _CALL_PREFIX.sub("", plain)
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain)
        chosen = sentences[0]
        if len(sentences) > 1 and len(chosen) + len(sentences[1]) < limit * 2 // 3:
            chosen = f"{chosen} {sentences[1]}"
        chosen = chosen.rstrip(" :;,")
        is_prose = re.match(r"[A-Z]\w*\s", chosen) and ">>>" not in chosen and "::=" not in chosen
        if is_prose and 15 <= len(chosen) <= limit and "***" not in chosen:
            return chosen if chosen[-1] in ".!?" else f"{chosen}."
    return ""


def _turns_about(entry: Entry, random_source: random.Random) -> list[tuple[str, str]]:
    if entry.kind == "topic":
        return _topic_turns(entry, random_source)
    if not entry.is_public or entry.name.startswith(_UNASKED_MODULES):
        return []
    about = summary(entry.text)
    if not about:
        return []
    repeats = _POPULAR_REPEATS if entry.module in _POPULAR_MODULES else 1
    return [_one_turn(entry, about, random_source) for _ in range(repeats)]


def _one_turn(entry: Entry, about: str, random_source: random.Random) -> tuple[str, str]:
    choose = random_source.choice
    if entry.kind == "module":
        question = choose(_ASK_MODULE).format(name=entry.name)
        return question, f"{entry.name} is a module of the standard library. {about}"
    asked = entry.name + choose(("", "", "", "()")) if entry.kind != "class" else entry.name
    call = f"{entry.name}{entry.signature}"
    draw = random_source.random()
    first_word, _, rest = about.partition(" ")
    if draw < 0.1 and entry.module in _POPULAR_MODULES and first_word.lower() in _TASK_VERBS:
        task = f"{first_word.lower()} {rest.split('. ')[0].rstrip('.')}"
        return choose(_ASK_WHICH).format(task=task), f"Use {entry.name}. {about}"
    if draw < 0.4 and entry.signature and len(call) <= 100:
        return choose(_ASK_HOW).format(name=asked), f"Call it as {call}. {about}"
    return choose(_ASK_WHAT).format(name=asked), f"{_place(entry)} {about}"


def _place(entry: Entry) -> str:
    if entry.kind == "method":
        return f"{entry.name} is a method of {entry.name.rpartition('.')[0]}."
    if entry.module == "builtins":
        return f"{entry.name} is a built-in {entry.kind}."
    return f"{entry.name} is a {entry.kind} of the {entry.module} module."


def _topic_turns(entry: Entry, random_source: random.Random) -> list[tuple[str, str]]:
    name = _LANGUAGE_TOPICS.get(entry.name.removeprefix("topic "))
    about = summary(entry.text, limit=320)
    if name is None or not about:
        return []
    return [
        (random_source.choice(_ASK_TOPIC).format(name=name), about)
        for _ in range(2 * _POPULAR_REPEATS)
    ]
