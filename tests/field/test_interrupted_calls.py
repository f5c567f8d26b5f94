"""A call that is interrupted leaves a session, a cache and stores on disk as they were before it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import longspan as ls
from longspan.mechanisms.memorizing.memory_store import MemoryStore

from .models import CONVERTIBLE, DIM, FIELDS, HEADS, NAMES, converted, llama, own, tokens

LAYERS = 3
READ = tokens(1, 40)[0]


class Interrupting(TorchFunctionMode):
    """Raises in place of the torch calls with certain numbers, and counts them all."""

    def __init__(self, *at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # settings that contexts of torch put back on their way out are not counted
        if not any(setting in getattr(func, "__name__", "") for setting in ("grad_enabled", "autocast")):
            self.count += 1
            if self.count in self.at:
                raise self.error("interrupted")
        return func(*args, **(kwargs or {}))


class CountingBeforeTheMove(Interrupting):
    """Counts all torch calls; `last` is the number of the last one before the session's position moved."""

    def __init__(self, session: ls.StreamSession) -> None:
        super().__init__()
        self.session, self.start, self.last = session, session.position, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if self.session.position == self.start:
            self.last = self.count
        return output


def _session(model: Any) -> ls.StreamSession:
    session = ls.StreamSession(model)
    session.feed(READ[:21])
    for token in READ[21:25]:
        session.feed(token[None])
    return session


def _call_numbers(session: ls.StreamSession, count: int) -> Iterator[int]:
    """Numbers of torch calls, evenly spaced from the first of a session's next token to the last before it moves."""
    twin = session.fork()
    with CountingBeforeTheMove(twin) as counting:
        twin.feed(READ[25:26])
    for step in range(count):
        yield 1 + step * (counting.last - 1) // (count - 1)


def _continues_identically(session: ls.StreamSession, expected: list[Tensor]) -> None:
    assert session.position == 25
    for token, logits in zip(READ[25:30], expected, strict=True):
        assert torch.equal(session.feed(token[None]), logits)


def _uninterrupted(model: Any) -> list[Tensor]:
    session = _session(model)
    return [session.feed(token[None]).clone() for token in READ[25:30]]


@pytest.mark.parametrize("name", NAMES)
def test_a_token_interrupted_anywhere(name: str) -> None:
    model = own(name, layers=LAYERS)
    expected, session = _uninterrupted(model), _session(model)
    errors = [KeyboardInterrupt, RuntimeError, MemoryError]
    for index, call_number in enumerate(_call_numbers(session, 9)):
        error = errors[index % len(errors)]
        with pytest.raises(error), Interrupting(call_number, error=error):
            session.feed(READ[25:26])
    _continues_identically(session, expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_in_every_layer_before_and_after_the_mixer(name: str) -> None:
    model = own(name, layers=LAYERS)
    expected, session = _uninterrupted(model), _session(model)

    def failing(error: type[BaseException]) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            raise error

        return fail

    for number, layer in enumerate(model.layers):
        for index, module in enumerate((layer.mixer_norm, layer.mixer.projections.o_proj, layer.ffn_norm, layer.ffn)):
            error = (KeyboardInterrupt, ValueError)[(number + index) % 2]
            handle = module.register_forward_pre_hook(failing(error))
            for count in (1, 3):
                with pytest.raises(error):
                    session.feed(READ[25 : 25 + count])
            handle.remove()
    _continues_identically(session, expected)


@pytest.mark.parametrize("name", ["lsh", "routing", "full", "linear", "memorizing"])
def test_an_interruption_between_the_call_and_the_move_of_the_session(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own(name, layers=LAYERS)
    expected, session = _uninterrupted(model), _session(model)
    # what the session makes after the call: its next state, and the record of what that state has overwritten
    for record in ("longspan.stream.SessionState", "longspan.state.Undo"):
        with monkeypatch.context() as patch:
            patch.setattr(record, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.feed(READ[25:26])
    assert torch.equal(session.fork().feed(READ[25:26]), expected[0])
    _continues_identically(session, expected)


@pytest.mark.parametrize("name", ["lsh", "routing"])
def test_an_interruption_of_the_undoing(name: str) -> None:
    model = own(name, layers=LAYERS)
    expected, session = _uninterrupted(model), _session(model)
    for call_number in _call_numbers(session, 7):
        with pytest.raises(KeyboardInterrupt), Interrupting(call_number, call_number + 1, call_number + 2):
            session.feed(READ[25:26])
        with pytest.raises(KeyboardInterrupt), Interrupting(call_number, call_number + 2):
            session.score(READ[25:26])
    _continues_identically(session, expected)


@pytest.mark.parametrize("name", ["lsh", "routing", "full", "sparse", "window"])
def test_saved_and_forked_after_an_interruption(name: str, tmp_path: Path) -> None:
    model = own(name, layers=LAYERS)
    expected, session = _uninterrupted(model), _session(model)
    handle = model.layers[-1].ffn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.feed(READ[25:26])
    handle.remove()
    session.save(tmp_path / "state")
    _continues_identically(session.fork(), expected)
    _continues_identically(ls.StreamSession.load(model, tmp_path / "state"), expected)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", ["full", "lsh", "linear"])
def test_recurrent_memory(name: str, per_layer: bool) -> None:
    backbone = own(name, layers=2)
    torch.manual_seed(1)
    model = ls.RecurrentMemory(backbone, segment_length=7, num_memory_tokens=2, per_layer=per_layer).eval()
    expected, session = _uninterrupted(model), _session(model)
    for call_number in _call_numbers(session, 7):
        with pytest.raises(KeyboardInterrupt), Interrupting(call_number):
            session.feed(READ[25:26])
    _continues_identically(session, expected)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_sessions_of_converted_models(name: str) -> None:
    from longspan.hf.decoder import ConvertedDecoder

    model = ConvertedDecoder(converted(name, layers=2))
    expected, session = _uninterrupted(model), _session(model)
    for call_number in _call_numbers(session, 5):
        with pytest.raises(KeyboardInterrupt), Interrupting(call_number):
            session.feed(READ[25:26])
    _continues_identically(session, expected)


def _store(folder: Path, index: str = "exact") -> MemoryStore:
    return MemoryStore(folder, kv_heads=HEADS, head_dim=DIM // HEADS, capacity=10, index=index)  # type: ignore[arg-type]


@pytest.mark.parametrize("session", [True, False])
def test_memory_stores_on_disk(tmp_path: Path, session: bool) -> None:
    """Segments of 4: the call interrupted closes one, in a store that is full and overwrites its oldest pairs."""
    model: Any = own("memorizing", layers=2)

    def read(folder: str, interrupt: bool) -> list[Tensor]:
        stores = [_store(tmp_path / f"{folder}{index}") for index in range(2)]
        for layer, store in zip(model.layers, stores, strict=True):
            layer.mixer.core.attach(store)
        reader = ls.StreamSession(model)
        state = None

        @torch.no_grad()
        def feed(part: Tensor) -> Tensor:
            nonlocal state
            if session:
                return reader.feed(part).clone()
            logits, state = model(part[None], state)
            last: Tensor = logits[0, -1]
            return last

        feed(READ[:23])
        if interrupt:
            for call_number in (3, 40, 90, 140, 200, 300):
                with Interrupting(call_number) as counting:
                    try:
                        feed(READ[23:24])
                        raise AssertionError(f"only {counting.count} calls")
                    except KeyboardInterrupt:
                        pass
            assert [store.written for store in stores] == [20, 20]
            handle = model.layers[-1].ffn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError))
            with pytest.raises(ValueError):
                feed(READ[23:24])
            handle.remove()
        seen = [feed(READ[first : first + 1]) for first in range(23, 36)]
        for store in stores:
            store.close()
        return seen

    for mine, whole in zip(read("a", True), read("b", False), strict=True):
        assert torch.equal(mine, whole)


def _generate(model: Any, cache: Any, ids: Tensor) -> Tensor:
    name = "past_key_values"
    with torch.no_grad():
        logits: Tensor = model(ids, **{name: cache}, use_cache=True).logits
    return logits


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("name", ["lsh", "window", "linear"])
def test_caches_of_converted_models(name: str, partly: bool) -> None:
    """In a partly converted model the layers that keep their keys go back too."""
    import longspan.hf as hf
    from longspan.hf.cache import StateCache

    model = llama(layers=3)
    hf.convert(model, name, layers=[1] if partly else None, **FIELDS[name])
    inner = model.model.layers

    def cache() -> Any:
        state_cache = StateCache([not partly or index == 1 for index in range(3)])
        _generate(model, state_cache, READ[None, :20])
        return state_cache

    whole, cut = cache(), cache()
    expected = [_generate(model, whole, READ[None, i : i + 1]) for i in range(20, 24)]
    for layer in inner:
        for module in (layer.self_attn.q_proj, layer.mlp):
            handle = module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                _generate(model, cut, READ[None, 20:21])
            handle.remove()
            assert [cut.get_seq_length(index) for index in range(3)] == [20] * 3
    for i, logits in zip(range(20, 24), expected, strict=True):
        assert torch.equal(_generate(model, cut, READ[None, i : i + 1]), logits)


def test_a_cache_that_is_reset_after_an_interruption_is_empty() -> None:
    model = converted("window", layers=2)
    from longspan.hf.cache import StateCache

    cache: Any = StateCache([True, True])
    _generate(model, cache, READ[None, :20])
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _generate(model, cache, READ[None, 20:21])
    handle.remove()
    cache.reset()
    fresh = StateCache([True, True])
    assert torch.equal(_generate(model, cache, READ[None, :9]), _generate(model, fresh, READ[None, :9]))
