"""The built-in model's chat examples, made from the corpus and a few hand-written answers.

Rule: an answer is one to three sentences and says nothing that the documentation, or the truth
about this model, does not. Each call draws other phrasings of the same questions, so that the
model learns the facts and not the wording.
"""

import random
import re

from executor_svc.builtin_model.corpus import Entry

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

_ABOUT_ME = (
    (
        ("hello", "hi", "hey", "Hello!", "Hi!", "Hi there!", "Hey there", "Good morning",
         "good evening", "Hello there.", "greetings", "Hallo", "yo", "Hello, world!", "hello?",
         "Hi, how are you?", "How are you?", "how are you doing", "Say hello.", "say hi"),
        ("Hello! I am Headway's built-in demo model. Ask me about Python's standard library.",
         "Hi! I am a tiny demo model. I know a little of Python's documentation."),
    ),
    (
        ("who are you?", "Who are you?", "what are you", "What are you?", "What is your name?",
         "what's your name", "Introduce yourself.", "Tell me about yourself.", "Which model is this?",
         "What model are you?", "Are you ChatGPT?", "Are you GPT-4?", "Are you Qwen?", "Are you an AI?",
         "Are you a human?", "Who made you?", "Are you real?", "what is this"),
        ("I am Headway's built-in demo model: tiny, trained on Python's documentation, and nothing "
         "else.",
         "I am the small demo model that comes with Headway. I was trained on Python's documentation "
         "only."),
    ),
    (
        ("What can you do?", "what can you do", "help", "Help!", "Can you help me?", "What do you know?",
         "What can I ask you?", "How can you help me?", "What are you good at?", "I need help",
         "What should I ask?", "can you help me with python"),
        ("I can say a little about Python's standard library. Try: What does json.dumps do?",
         "Not much: I know some of Python's documentation. Ask me what textwrap.fill does."),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How large is this model?",
         "How were you trained?", "What were you trained on?", "What data were you trained on?",
         "Where does your knowledge come from?", "how were you made"),
        ("I have about four million parameters, and I was trained on Python's own documentation.",),
    ),
    (
        ("Are you reliable?", "Can I trust you?", "Are your answers correct?", "Do you make mistakes?",
         "Is that true?", "Are you sure?", "are you smart", "Can I use you in production?"),
        ("No. I am a demo model and often wrong; please check Python's documentation.",),
    ),
    (
        ("What is Headway?", "what is headway", "Tell me about Headway.", "What does Headway do?",
         "Explain Headway.", "headway?"),
        ("Headway is a service that queues requests for language models in front of a fleet of "
         "machines. I am its built-in demo model.",),
    ),
    (
        ("thanks", "Thank you!", "thank you", "Thanks a lot!", "great", "Great, thanks.", "ok", "Okay.",
         "cool", "nice", "Good answer.", "thx"),
        ("You are welcome.",),
    ),
    (
        ("bye", "Goodbye!", "goodbye", "See you later.", "good night", "Bye bye", "ciao", "exit", "quit"),
        ("Goodbye!",),
    ),
    (
        ("What is Python?", "what is python", "Tell me about Python.", "Explain Python", "python",
         "What is the Python language?"),
        ("Python is a programming language. Its standard library is what I was trained on.",),
    ),
    (
        ("What is the capital of France?", "Tell me a joke.", "What is the weather today?",
         "Who is the president?", "Write a poem about the sea.", "What is the meaning of life?",
         "Tell me a story.", "Write a story about a dragon.", "What is 2 + 2?", "what is 17 times 3",
         "Translate hello to German.", "How old is the universe?", "Who won the world cup?",
         "What is love?", "Recommend a film.", "How do I cook rice?", "What time is it?",
         "What is the news today?", "Who wrote Hamlet?", "Sing a song.", "Where is Berlin?",
         "Write an essay about history.", "What is quantum physics?", "Why is the sky blue?",
         "Do you like music?", "Tell me about cats.", "What is the largest planet?",
         "Give me a recipe for soup.", "Summarize the French revolution.", "What is a dog?",
         "Write a haiku.", "Once upon a time", "What is machine learning?", "What is a GPU?",
         "Write a program in Rust.", "Explain JavaScript.", "What is C++?", "Fix my code.",
         "How do I lose weight?", "Who is Albert Einstein?", "What is the speed of light?",
         "How far is the moon?", "Explain gravity.", "Tell me a fun fact.", "asdf", "test",
         "Count to ten.", "Roll a die.", "Pick a number.", "What is your favorite color?",
         "How many people live in China?", "What is the best phone?", "Plan my holiday.",
         "What is democracy?", "Explain black holes.", "How does a car work?", "When was Rome built?"),
        ("I do not know that. I am a tiny demo model, trained on Python's documentation only.",
         "I cannot say: I only know a little of Python's documentation."),
    ),
)  # fmt: skip
_ABOUT_ME_REPEATS = 2


def make_chats(entries: list[Entry], random_source: random.Random) -> list[list[Message]]:
    """One epoch of chats, shuffled; each ends with an assistant message."""
    turns = [
        turn for entry in entries for turn in _turns_about(entry, random_source)
    ]
    for questions, answers in _ABOUT_ME:
        turns += [
            (question, random_source.choice(answers))
            for question in questions
            for _ in range(_ABOUT_ME_REPEATS)
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
        plain = re.sub(r"^[\w.]+\([^)]*\)\s*(?:-{1,2}>\s*[\w.\[\], ]+?)?\s*(?:--|:|$)\s*", "", plain)
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
