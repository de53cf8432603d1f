"""An engine that does what an attach session tells it, and what the session must never tell it."""

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from executor_svc.core.engine import ModelInfo, PromptScores, StepOutput
from executor_svc.core.messages import (
    AbortLease,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    StartLease,
    StepDone,
)
from executor_svc.core.session import Session
from tests.executor.sessions import length

MAX_TOKENS = 4
MODELS = tuple(
    ModelInfo(name, "f", 100, 100, (), "w", "a", "float32", is_resident=name == "m")
    for name in ("m", "n", "o", "p")
)
MAX_MODELS = 2


def token(request_id: str, sample: int, index: int) -> int:
    return hash((int(request_id), sample, index)) % 1000


def num_top(request_id: str) -> int:
    """Every second request asks for alternatives: a token and the id after it."""
    return 2 * (int(request_id) % 2)


def is_scored(request_id: str) -> bool:
    """Every third request has its prompt scored."""
    return int(request_id) % 3 == 0


def emit(output: StepOutput, key: int, sample: "EngineSample", index: int) -> None:
    """One token of a step, with all that belongs to it."""
    token_id = token(sample.request_id, sample.number, index)
    count = num_top(sample.request_id)
    output.key.append(key + sample.number)
    output.index.append(index)
    output.token_id.append(token_id)
    output.logprob.append(0.0)
    if count or output.num_top:
        output.num_top += [0] * (len(output.key) - 1 - len(output.num_top)) + [count]
    output.top_token_id += range(token_id, token_id + count)
    output.top_logprob += [0.0] * count


@dataclass
class EngineSample:
    request_id: str
    number: int
    index: int


class SessionEngine(RuleBasedStateMachine):
    """A session and its engine, which makes steps and loads models when it pleases."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(
            MODELS, num_slots=8, max_models=MAX_MODELS, max_leases=100, max_report_tokens=3
        )
        self.now_ms = 0
        self.running: dict[int, list[EngineSample]] = {}  # by lease key
        self.unscored: set[int] = set()  # lease keys whose prompt is to be scored
        self.model_of: dict[int, str] = {}  # of each of them
        self.resident = {"m"}
        self.loading: list[LoadModel] = []  # orders that are not done yet

    def tell(self, event: object) -> None:
        for effect in self.session.handle(event, self.now_ms):  # type: ignore[arg-type]
            if isinstance(effect, AbortLease):
                self.unscored.discard(effect.key)
                del self.running[effect.key]  # never an abort for what the engine lacks
            elif isinstance(effect, LoadModel):
                self.loading.append(effect)
            elif isinstance(effect, StartLease):
                request = effect.request
                assert request.key not in self.running
                self.model_of[request.key] = request.model
                assert all(request.key > key for key in self.running)
                if request.scoring is not None:
                    self.unscored.add(request.key)
                self.running[request.key] = [
                    EngineSample(str(request.prompt_token_ids[0]), number, start)
                    for number in range(request.num_samples)
                    if number not in request.ended
                    for start in [len(request.generated[number]) if request.generated else 0]
                ]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        output = StepOutput()
        keys = data.draw(st.lists(st.sampled_from(sorted(self.running)), unique=True))
        for key in keys:
            self.score(output, key)
            for sample in list(self.running[key]):
                for _ in range(data.draw(st.integers(0, 2))):
                    if sample.index == MAX_TOKENS:
                        break
                    emit(output, key, sample, sample.index)
                    sample.index += 1
                if sample.index == MAX_TOKENS:
                    output.ends.append(length(key + sample.number, MAX_TOKENS))
                    self.running[key].remove(sample)
            if not self.running[key]:
                del self.running[key]
        self.tell(StepDone(output))

    def score(self, output: StepOutput, key: int) -> None:
        if key in self.unscored:
            self.unscored.remove(key)
            output.prompt_scores.append(PromptScores(key, [0.0, 0.0]))

    @precondition(lambda self: self.loading)
    @rule(works=st.booleans())
    def load_ends(self, works: bool) -> None:
        command = self.loading.pop(0)
        self.resident -= set(command.evict)
        if works:
            self.resident.add(command.model)
            self.tell(ModelLoaded(command.model, 7))
        else:
            self.tell(ModelLoadFailed(command.model, "bad luck"))

    def run_to_the_end(self) -> None:
        """One step with all that is left."""
        output = StepOutput()
        for key, samples in self.running.items():
            self.score(output, key)
            for sample in samples:
                for index in range(sample.index, MAX_TOKENS):
                    emit(output, key, sample, index)
                output.ends.append(length(key + sample.number, MAX_TOKENS))
        self.running.clear()
        self.tell(StepDone(output))

    @property
    def usable(self) -> set[str]:
        """What is on the device and not about to be evicted."""
        return self.resident - {name for command in self.loading for name in command.evict}

    @invariant()
    def leases_run_on_models_that_stay(self) -> None:
        assert {self.model_of[key] for key in self.running} <= self.usable
        assert len(self.usable) + len(self.loading) <= MAX_MODELS

    @invariant()
    def the_engine_runs_what_the_session_runs(self) -> None:
        num_running = sum(not lease.has_ended for lease in self.session.hello())
        assert num_running == len(self.running)
