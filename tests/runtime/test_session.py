"""OnnxSession: batches, sampling, streaming, stop tokens, resuming, and no torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest

from arkv_fx.errors import EngineError
from arkv_fx.runtime import OnnxSession, Sampling


@pytest.fixture(scope="module")
def session() -> OnnxSession:
    return cases.session("llama")


IDS = cases.prompt()[0].numpy()
MASK = cases.prompt()[1].numpy()


def test_it_runs_where_torch_cannot_be_imported(session: OnnxSession) -> None:
    expected = session.generate(IDS, 5, mask=MASK).tolist()
    script = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "transformers", "onnx"):
                    raise ImportError(name + " is blocked")
        sys.meta_path.insert(0, Blocked())
        from arkv_fx.runtime import OnnxSession
        session = OnnxSession({str(cases.folder("llama"))!r})
        print(session.generate({IDS.tolist()}, 5, mask={MASK.tolist()}).tolist())
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout.strip() == str(expected), done.stderr


def test_a_sequence_answers_as_it_does_beside_another(session: OnnxSession) -> None:
    both = session.generate(IDS, 8, mask=MASK)
    swapped = session.generate(IDS[::-1], 8, mask=MASK[::-1])
    assert both.tolist() == swapped[::-1].tolist()


def test_padding_changes_nothing(session: OnnxSession) -> None:
    ids, mask = np.pad(IDS, ((0, 0), (9, 0))), np.pad(MASK, ((0, 0), (9, 0)))
    assert (
        session.generate(ids, 8, mask=mask).tolist() == session.generate(IDS, 8, mask=MASK).tolist()
    )


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_short_prompts_are_those_of_a_step_by_step_start(session: OnnxSession, length: int) -> None:
    """Shorter than the graph's least: padded by the session, and answered as if they were not."""
    ids = IDS[:, -length:]
    logits = session.prefill(ids)
    session.reset()
    for token in ids.T:
        stepped = session.step(token)
    assert np.abs(logits - stepped).max() < 1e-4


def test_streams_give_what_generate_gives(session: OnnxSession) -> None:
    stream = session.stream(IDS, 6, mask=MASK)
    first = next(stream)
    assert first.shape == (2,)
    rest = [first, *stream]
    assert np.stack(rest, 1).tolist() == session.generate(IDS, 6, mask=MASK).tolist()


def test_stop_tokens_end_a_sequence_and_then_all(session: OnnxSession) -> None:
    free = session.generate(IDS, 10, mask=MASK)
    one = int(free[0, 3])
    assert one not in free[1, :6]
    ended = session.generate(IDS, 6, mask=MASK, stop=[one])
    at = free[0].tolist().index(one)
    assert ended[0, : at + 1].tolist() == free[0, : at + 1].tolist()
    assert set(ended[0, at:].tolist()) == {one}
    assert ended[1].tolist() == free[1, :6].tolist()
    both = session.generate(IDS, 10, mask=MASK, stop=[one, int(free[1, 0])])
    assert both.shape[1] == at + 1


def test_a_sequence_goes_on_from_a_saved_state(session: OnnxSession) -> None:
    new = session.generate(IDS, 12, mask=MASK)
    session.prefill(IDS, MASK)
    for token in new[:, :5].T:
        session.step(token)
    saved = {name: x.copy() for name, x in session.state().items()}
    session.reset()
    session.set_state(saved, MASK.sum(1) + 5)
    rest = [session.step(token).argmax(-1) for token in new[:, 5:11].T]
    assert np.stack(rest, 1).tolist() == new[:, 6:].tolist()


def test_reset_forgets(session: OnnxSession) -> None:
    fresh = {name: x.copy() for name, x in OnnxSession(cases.folder("llama")).state().items()}
    session.generate(IDS, 3, mask=MASK)
    assert any((x != fresh[name]).any() for name, x in session.state().items())
    session.reset()
    assert all((x == fresh[name]).all() for name, x in session.state().items())


def test_the_state_stays_as_large_as_it_is(session: OnnxSession) -> None:
    session.prefill(IDS, MASK)
    sizes = {name: x.nbytes for name, x in session.state().items()}
    for token in range(60):
        session.step(np.array([token, 100 - token]))
    assert {name: x.nbytes for name, x in session.state().items()} == sizes
    assert sum(sizes.values()) == session.nbytes


def test_sampling_is_repeatable_and_follows_the_seed(session: OnnxSession) -> None:
    def run(seed: int) -> list[list[int]]:
        return session.generate(IDS, 8, mask=MASK, temperature=1.5, seed=seed).tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)


def counts(sampling: Sampling, logits: list[float], draws: int = 4000) -> np.ndarray:
    rows = np.tile(np.array(logits, np.float32), (draws, 1))
    chosen = sampling.choose(rows, np.random.default_rng(0))
    return np.bincount(chosen, minlength=len(logits)) / draws


def test_sampling_draws_from_the_distribution() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    assert np.abs(counts(Sampling(1.0), logits) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert np.abs(counts(Sampling(1.0, top_k=2), logits) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert np.abs(counts(Sampling(1.0, top_p=0.6), logits) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert counts(Sampling(1.0, top_p=0.5), logits)[0] == 1  # the token that reaches it is in
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    assert np.abs(counts(Sampling(0.5), logits) - cold / cold.sum()).max() < 0.03
    assert counts(Sampling(), logits)[0] == 1


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_wrong_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(EngineError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (IDS.astype(np.float32), None, "ids are float32; give integers"),
        (IDS[:1], None, r"take \[2, tokens\]"),
        (IDS[:, :0], None, r"take \[2, tokens\]"),
        (IDS + 1000, None, "ids must be in 0..127"),
        (IDS, MASK[:, ::-1], "padding stands on the left"),
        (IDS, MASK[:, 1:], "mask"),
        (IDS, MASK * 2, "mask"),
    ],
)
def test_wrong_inputs_are_refused(
    session: OnnxSession, ids: object, mask: object, says: str
) -> None:
    with pytest.raises(EngineError, match=says):
        session.prefill(ids, mask)  # type: ignore[arg-type]


def test_wrong_states_are_refused(session: OnnxSession) -> None:
    state = session.state()
    name = next(iter(state))
    for wrong in ({}, {**state, name: state[name][:1]}, {**state, name: state[name].astype(float)}):
        with pytest.raises(EngineError, match=name):
            session.set_state(wrong, [0, 0])


@pytest.mark.parametrize(
    ("change", "tokens", "says"),
    [
        ({"unknown": np.zeros(3)}, [0, 0], "know no state unknown"),
        ({"past_key_values.0.pos": [1, 2]}, [0, 0], "0.pos is a list; give a numpy array"),
        ({"past_key_values.0.pos": None}, [0, 0], "lacks past_key_values.0.pos"),
        ({}, [0], "number of tokens seen for each of 2"),
        ({}, 5, "number of tokens seen"),
        ({}, [-1, 0], "number of tokens seen"),
        ({}, [1.5, 0], "tokens are float64; give integers"),
        ({}, ["a", "b"], "tokens are <U1; give integers"),
    ],
)
def test_states_are_named_that_cannot_be(
    session: OnnxSession, change: dict[str, object], tokens: object, says: str
) -> None:
    before = session.state()
    with pytest.raises(EngineError, match=says):
        session.set_state({**before, **change}, tokens)  # type: ignore[dict-item, arg-type]
    with pytest.raises(EngineError, match="state is a list"):
        session.set_state([], [0, 0])  # type: ignore[arg-type]
    assert all((x == before[name]).all() for name, x in session.state().items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folder": None}, "folder=None: give a path"),
        ({"folder": 3}, "folder=3: give a path"),
        ({"threads": -1}, "threads=-1"),
        ({"threads": "2"}, "threads='2'"),
    ],
)
def test_sessions_are_not_made_of_anything(options: dict[str, object], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        OnnxSession(**{"folder": cases.folder("llama"), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens='3'"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": None}, "top_p=None"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "x"}, "seed='x'"),
        ({"stop": ["x"]}, "stop are"),
        ({"ids": [[1, 2], [3]]}, "ids: give integers in rows of one length"),
        ({"ids": "ab"}, "ids are"),
    ],
)
def test_options_that_cannot_be_are_named(
    session: OnnxSession, options: dict[str, object], says: str
) -> None:
    with pytest.raises(EngineError, match=says):
        session.generate(**{"ids": IDS, "max_new_tokens": 2, **options})  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_sessions_of_a_folder_share_their_weights() -> None:
    """Four take the memory of one and three states, which are small here."""
    script = f"""
        import os
        from arkv_fx.runtime import OnnxSession
        def size():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        folder, sessions, sizes = {str(cases.folder("llama"))!r}, [], []
        for _ in range(4):
            sessions.append(OnnxSession(folder, threads=1))
            sizes.append(size())
        assert len({{id(s._decode) for s in sessions}}) == 1
        assert len({{id(x) for s in sessions for x in s._state}}) == 4 * len(sessions[0]._state)
        one = [s.generate({IDS.tolist()}, 4).tolist() for s in sessions]
        assert all(x == one[0] for x in one)
        print(sizes[3] - sizes[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


def test_keys_that_are_not_numbers_are_reported(session: OnnxSession) -> None:
    session.prefill(IDS, MASK)
    state = session.state()
    ring = state["past_key_values.0.value"].copy()
    ring[0] = np.nan
    session.set_state({**state, "past_key_values.0.value": ring}, MASK.sum(1))
    with pytest.raises(EngineError, match="NaN"):
        session.step(IDS[:, 0])
    session.reset()


def test_threads_wait_for_each_other(session: OnnxSession) -> None:
    prompts = [np.roll(IDS, shift, 1) for shift in range(4)]
    expected = [session.generate(ids, 12).tolist() for ids in prompts]
    assert expected[0] != expected[1]  # so that a mixed up state would be seen
    with ThreadPoolExecutor(4) as pool:
        found = [f.tolist() for f in pool.map(lambda ids: session.generate(ids, 12), prompts * 2)]
    assert found == expected * 2


def test_a_stream_that_another_call_broke_into_says_so(session: OnnxSession) -> None:
    for call in (
        lambda: session.generate(IDS, 2),
        lambda: session.step(IDS[:, 0]),
        lambda: session.reset(),
        lambda: next(session.stream(IDS, 2)),
    ):
        stream = session.stream(IDS, 4, mask=MASK)
        next(stream), next(stream)
        call()
        with pytest.raises(EngineError, match="another call went on with this session"):
            next(stream)
