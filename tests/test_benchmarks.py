"""§13 BENCHMARKS and the engines of §6: same answers whatever the engine, honest floors, every arm asked for the same."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import LATENTWIRE as lw

CPU = lw.ModelSettings(device="cpu", dtype="float32")
TINY = ("tiny-llama", "tiny-qwen", "tiny-gemma")
PROMPTS = ("The sky is", "A longer prompt than the sliding window of tiny-gemma, which holds sixteen tokens", "x")
QUICK = ("--num_trials", "3", "--warmup", "1", "--batch_sizes", "1,4", "--num_samples", "8", "--input_tokens", "24",
         "--answer_tokens", "0,5")  # fmt: skip
PAIR = ("--sender", "tiny-llama", "--receiver", "tiny-gemma", "--dtype", "float32")


@functools.cache
def load(name: str) -> lw.LM:
    return lw.load_lm(name, CPU)


def static(name: str) -> lw.LM:
    """The same model with the other engine."""
    lm = lw.load_lm(name, CPU)
    lm.engine = lw.StaticEngine()
    return lm


def packed(lm: lw.LM, texts: tuple[str, ...] = PROMPTS, soft: lw.SoftPrompt | None = None) -> lw.Packed:
    return lw.lay_out(lm, soft, [lm.ids(text) for text in texts], before=lm.bos, left=True)


def asked(*words: str) -> lw.BenchmarkSettings:
    settings, _ = lw.settings_from(lw.BenchmarkSettings, [*words, "--device", "cpu"])
    return settings


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Everything, measured once on tiny models."""
    folder = tmp_path_factory.mktemp("bench")
    results = lw.benchmark_run(asked("--benchmark", "all", *PAIR, *QUICK, "--output_dir", str(folder)), lw.Silent())
    lw.write_benchmark(results, folder)
    return results, folder


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_static_engine_gives_the_answers_of_the_eager_one(name):
    eager, other = load(name), static(name)
    soft = lw.SoftPrompt(torch.randn(3, 5, eager.width, generator=torch.Generator().manual_seed(1)))
    for prompt in (None, soft):
        ours, theirs = (lm.prefill(packed(lm, soft=prompt)) for lm in (other, eager))
        assert ours.mask.shape[1] % lw.StaticEngine.GRAIN == 0
        assert not ours.mask.all(), "the mask must always take the same way through the model"
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        candidates = [[eager.ids(" yes"), eager.ids(" perhaps")]] * 3
        for mine, its in zip(other.score(ours, candidates), eager.score(theirs, candidates), strict=True):
            assert mine == pytest.approx(its, abs=1e-3)
        how = lw.DecodeSettings(eos_ban_steps=40)
        said = [lm.generate(lm.prefill(packed(lm, soft=prompt)), 40, how, line=False) for lm in (other, eager)]
        assert said[0] == said[1]
        steps = [lm.engine.steps(lm, lm.prefill(packed(lm, soft=prompt)), 40) for lm in (other, eager)]
        written = torch.randint(3, 200, (40, 3, 1), generator=torch.Generator().manual_seed(2))
        for tokens in written:  # beyond the sliding window
            found, wanted = (step(tokens, torch.ones(3, 1, dtype=torch.bool)) for step in steps)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_decoding_steps_can_be_used_again_for_another_prompt(name):
    lm, eager = static(name), load(name)
    for texts in (PROMPTS, PROMPTS[::-1], ("once more", "and once", "more")):
        how = lw.DecodeSettings(eos_ban_steps=8)
        said = [one.generate(one.prefill(packed(one, texts)), 8, how, line=False) for one in (lm, eager)]
        assert said[0] == said[1]
    assert isinstance(lm.engine, lw.StaticEngine)
    assert len(lm.engine.decoders) <= 2  # by shape, not by prompt


@pytest.mark.parametrize("name", TINY)
def test_the_static_engine_gives_the_states_of_the_eager_one(name):
    eager, other = load(name), static(name)
    rows = [eager.ids(text) for text in PROMPTS]
    ours, theirs = (lm.states(rows, [1, 2]) for lm in (other, eager))
    width = theirs.mask.shape[1]
    assert torch.equal(ours.mask[:, :width], theirs.mask)
    assert not ours.mask[:, width:].any()
    keep = theirs.mask[:, None, :, None]
    torch.testing.assert_close(ours.hidden[:, :, :width] * keep, theirs.hidden * keep, rtol=1e-4, atol=1e-4)


def test_scoring_leaves_a_prompt_that_can_still_be_continued():
    lm, eager = static("tiny-gemma"), load("tiny-gemma")
    prompt = lm.prefill(packed(lm))
    first = lm.score(prompt, [[lm.ids(" one two")]] * 3)
    assert first == lm.score(prompt, [[lm.ids(" one two")]] * 3)
    assert lm.generate(prompt, 5, line=False) == eager.generate(eager.prefill(packed(eager)), 5, line=False)


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: values that Python looks at, and numbers that Python brings."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "lift_fresh", "item", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        refused = any(word in name for word in self.REFUSED) and args[0].numel() > 0
        assert not refused, f"{name} cannot be captured"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TINY)
def test_nothing_that_would_be_captured_waits_for_the_device(name, monkeypatch):
    lm = static(name)
    bridge = lw.bench_of(asked(*PAIR)).bridge
    torch.ones(1) + torch.ones(1)
    ran = []

    def recorded(self: lw.StaticEngine, key: Any, work: Any, *inputs: torch.Tensor) -> Any:
        work(*inputs)  # as capturing does, once before
        ran.append(key)
        with NoWaiting():
            return work(*inputs)

    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)  # as while capturing
    monkeypatch.setattr(lw.StaticEngine, "run", recorded)
    states = lm.states([lm.ids(text) for text in PROMPTS], [1])
    prompt = lm.prefill(packed(lm))
    lm.engine.steps(lm, prompt, 4)(torch.ones(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool))
    if name == "tiny-llama":
        with torch.no_grad():
            lm.engine.run("write", lambda h, m: bridge.encode(lw.States(h, m)).latents, states.hidden, states.mask)
    assert len(ran) == 3 + (name == "tiny-llama")


@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_every_graph_has_a_name_of_its_own(layer, monkeypatch):
    """A replay is a call of the function that was recorded first under this name and these shapes."""
    recorded: dict[Any, Any] = {}

    def run(self: lw.StaticEngine, name: Any, work: Any, *inputs: torch.Tensor) -> Any:
        key = (id(self), name, *((*tensor.shape, tensor.dtype) for tensor in inputs))
        return recorded.setdefault(key, work)(*inputs)

    bench = lw.bench_of(asked(*PAIR, "--layers", layer))
    arms = [lw.ARMS[name](bench) for name in ("bridge", "relay:8", "text", "bridge:cached")]
    texts, heard = bench.texts(2), list[Any]()
    score = lw.LM.score
    monkeypatch.setattr(lw.LM, "score", lambda *words: heard.append(score(*words)) or heard[-1])
    for arm in (*arms, *reversed(arms)):
        arm.run(texts, 0)
    eager, heard[:] = [*heard], []
    monkeypatch.setattr(lw.StaticEngine, "run", run)
    for lm in (bench.sender, bench.receiver):
        lm.engine = lw.StaticEngine()
    for arm in (*arms, *reversed(arms)):
        arm.run(texts, 0)
    assert len(recorded) >= 4 and len(eager) == 8
    for ours, theirs in zip(heard, eager, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(its, abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("name", TINY)
def test_cuda_graphs_give_the_eager_answers(name):
    there = lw.ModelSettings(device="cuda", dtype="float32")
    eager, other = lw.load_lm(name, there), lw.load_lm(name, there)
    other.engine = lw.StaticEngine()
    how = lw.DecodeSettings(eos_ban_steps=20)
    for _ in range(3):
        said = [lm.generate(lm.prefill(packed(lm)), 20, how, line=False) for lm in (other, eager)]
        assert said[0] == said[1]


# ---- a beginning that is shared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_a_shared_beginning_is_read_once_and_changes_nothing(name, monkeypatch):
    lm = load(name)
    shown = lm.ids("Review: a fine film. Sentiment: positive\n\nReview: a dull film. Sentiment: negative\n\n")
    rows = [[*lm.bos, *shown, *lm.ids(text)] for text in PROMPTS]
    plain = lm.prefill(lw.lay_out(lm, None, rows, left=True))
    read = []
    forward = lw.LM.forward

    def watched(self: lw.LM, packed: lw.Packed, **options: Any) -> Any:
        read.append(tuple(packed.mask.shape))
        return forward(self, packed, **options)

    monkeypatch.setattr(lw.LM, "forward", watched)
    shared = lm.prefill_ids(rows, 16)
    assert [count for count, _ in read] == [1], "the beginning is one row, the rest goes on from it"
    torch.testing.assert_close(shared.logits, plain.logits, rtol=1e-4, atol=1e-4)
    candidates = [[lm.ids(" positive"), lm.ids(" no")]] * 3
    for mine, its in zip(lm.score(shared, candidates), lm.score(plain, candidates), strict=True):
        assert mine == pytest.approx(its, abs=1e-3)
    assert lm.generate(shared, 12, line=False) == lm.generate(plain, 12, line=False)


def test_prompts_that_differ_or_slide_are_read_as_they_are(monkeypatch):
    gemma, llama = load("tiny-gemma"), load("tiny-llama")
    shown = "the same beginning for everybody who reads here, and it is long"
    for lm, texts in ((gemma, [shown + "a", shown + "bc"]), (llama, ["a" + shown, "b" + shown]), (llama, [shown])):
        rows = [lm.ids(text) for text in texts]
        ours, theirs = lm.prefill_ids(rows, 16), lm.prefill(lw.lay_out(lm, None, rows, left=True))
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.mask, theirs.mask)


@pytest.mark.parametrize(("room", "read"), [(0, [1]), (1, [2])])
def test_a_beginning_is_not_shared_where_answers_would_reach_the_sliding_window(room, read, monkeypatch):
    lm = load("tiny-gemma")
    monkeypatch.setattr(lm.config, "sliding_window", 64)
    rows = [lm.ids("the same beginning for everybody who reads " + tail) for tail in ("a", "bc")]
    found: list[int] = []
    prefill = lw.LM.prefill
    monkeypatch.setattr(lw.LM, "prefill", lambda self, packed: found.append(len(packed.mask)) or prefill(self, packed))
    lm.prefill_ids(rows, 64 - max(map(len, rows)) + room)
    assert found == read


def test_prompts_that_are_the_same_leave_one_token_to_read():
    lm = load("tiny-llama")
    rows = [lm.ids("exactly the same words for both of the rows, all of them")] * 2
    plain = lm.prefill(lw.lay_out(lm, None, rows, left=True))
    torch.testing.assert_close(lm.prefill_ids(rows, 1).logits, plain.logits, rtol=1e-4, atol=1e-4)


# ---- floors, races, memory -----------------------------------------------------------------------------------------------


def test_a_pass_costs_its_weights_once_and_two_operations_per_weight_and_token():
    lm = load("tiny-llama")
    block = 48 * 48 * 2 + 48 * 24 * 2 + 48 * 96 * 3 + 48 * 2  # q o, k v, gate up down, two norms
    vocabulary = 48 * lm.config.vocab_size
    assert lw.Pass(lm, 3, 7, 1, heads=0).cost() == (4 * block, 2.0 * block * 21)
    assert lw.Pass(lm, 3, 7, 2).cost() == (4 * (2 * block + vocabulary), 2.0 * (2 * block * 21 + vocabulary * 3))
    limits = {"bytes_per_s": 1e9, "flop_per_s": 1e30}
    assert lw.Pass(lm, 3, 7, 1, heads=0).floor(limits) == pytest.approx(4 * block / 1e9)
    assert lw.Pass(lm, 3, 7, 1, heads=0).floor({**limits, "flop_per_s": 1.0}) == pytest.approx(42.0 * block)


def test_all_take_turns_and_a_slow_one_stops_after_five(monkeypatch):
    calls: list[str] = []
    seconds = {"slow": 3.0, "fast": 0.1}
    monkeypatch.setattr(lw, "once", lambda run: run())
    runs = {name: lambda name=name: calls.append(name) or seconds[name] for name in seconds}
    found = lw.race(runs, asked("--num_trials", "8", "--warmup", "2", "--max_seconds", "10"))
    assert calls[:4] == ["slow", "slow", "fast", "fast"]
    assert calls[4:14] == ["slow", "fast"] * 5
    assert {name: len(own) for name, own in found.items()} == {"slow": 5, "fast": 8}


def test_peak_memory_is_what_a_call_takes():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here")
    for _ in range(3):  # memory that an earlier call has freed counts again
        for megabytes in (0, 10, 200):
            peak = lw.peak_of(lambda size=megabytes: float(torch.ones(size * 250_000).sum()), torch.device("cpu"))
            assert peak == pytest.approx(megabytes, abs=5)


def test_limits_are_of_a_real_device():
    limits = lw.device_limits(torch.device("cpu"), torch.float32)
    table, one = torch.ones(8192, 4096), torch.ones(4096, 1)
    assert limits["bytes_per_s"] > 0.5 * table.numel() * 4 / min(lw.once(lambda: table @ one) for _ in range(5))
    a = torch.randn(512, 512)
    assert limits["flop_per_s"] > 0.5 * 2 * 512**3 / min(lw.once(lambda: a @ a) for _ in range(5))
    assert limits["bytes_per_s"] < 2e12 and limits["flop_per_s"] < 1e14  # of one CPU core


# ---- what is measured ------------------------------------------------------------------------------------------------------


def test_every_arm_gives_every_length_of_answer(measured):
    results, _ = measured
    rows = results["latency"]
    arms = {"bridge", "bridge:cached", "text", "relay:1", "relay:8", "relay:50"}
    assert {(row["arm"], row["answer_tokens"]) for row in rows} >= {(arm, n) for arm in arms for n in (0, 5)}
    for row in rows:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert 0 < row["roofline"] < 1
        assert row["trials"] == 3
        assert row["floor_ms"] == pytest.approx(row["roofline"] * row["median_ms"])
        own = {"bridge": ["sender", "bridge"], "bridge:cached": ["bridge"], "text": []}.get(row["arm"], ["sender"])
        assert [*row["parts_ms"]] == [*own, "receiver"]
    floor = {(row["arm"], row["answer_tokens"]): row["floor_ms"] for row in rows}
    assert floor["bridge:cached", 0] < floor["bridge", 0]
    assert floor["text", 0] < floor["relay:1", 0] < floor["relay:8", 0] < floor["relay:50", 0]
    assert floor["text", 0] < floor["text", 5]
    time = {(row["arm"], row["answer_tokens"]): row["median_ms"] for row in rows}
    assert time["relay:50", 0] > 2 * time["relay:8", 0] > time["relay:1", 0]
    assert time["text", 5] > time["text", 0]


def test_all_arms_generate_the_same_number_of_tokens(monkeypatch):
    bench = lw.bench_of(asked(*PAIR))
    steps: list[tuple[str, int]] = []
    generate = lw.LM.generate

    def watched(self: lw.LM, prefill: lw.Prefill, most: int, how: lw.DecodeSettings, **options: Any) -> list[str]:
        engine = lw.Engine.steps(self.engine, self, prefill, most)
        count = [0]

        def step(*tensors: torch.Tensor) -> torch.Tensor:
            count[0] += 1
            return engine(*tensors)

        monkeypatch.setattr(self.engine, "steps", lambda *_: step)
        said = generate(self, prefill, most, how, **options)
        steps.append((self.name, count[0] + 1))
        return said

    monkeypatch.setattr(lw.LM, "generate", watched)
    for name in ("bridge", "text", "relay:8"):
        lw.ARMS[name](bench).run(bench.texts(2), 5)
    assert steps == [("tiny-gemma", 5), ("tiny-gemma", 5), ("tiny-llama", 8), ("tiny-gemma", 5)]


def test_the_bridge_arm_sends_bytes_and_its_words_arrive(monkeypatch):
    bench = lw.bench_of(asked(*PAIR))
    sent: list[bytes] = []
    opened = bench.listener.open
    monkeypatch.setattr(bench.listener, "open", lambda data: sent.extend(data) or opened(data))
    packs = []
    for texts in (["good film", "dull film"], ["dull film", "good film"]):
        packs.append(lw.BridgeArm(bench).prompt(texts, lw.untimed))
    assert [lw.Message.from_bytes(data).latents.shape[1] for data in sent] == [8] * 4
    assert sent[0] == sent[3] != sent[1] == sent[2]
    torch.testing.assert_close(packs[0].embeds[0], packs[1].embeds[1])


def test_throughput_goes_through_all_texts(measured):
    rows = measured[0]["batched"]
    assert {row["trials"] for row in rows if row["batch"] == 1} == {8}
    assert {row["trials"] for row in rows if row["batch"] == 4} == {2}
    assert all(row["texts_per_s"] > 0 for row in rows)


def test_a_cached_arm_never_reads_in_a_trial(monkeypatch):
    bench = lw.bench_of(asked(*PAIR))
    read: list[int] = []
    hidden = lw.Engine.hidden
    monkeypatch.setattr(lw.Engine, "hidden", lambda *words: read.append(len(words)) or hidden(*words))
    during: list[int] = []

    def once(run: Any) -> float:
        before = len(read)
        run()
        during.append(len(read) - before)
        return 1.0

    monkeypatch.setattr(lw, "once", once)
    settings = asked("--batch_sizes", "2", "--num_samples", "24", "--warmup", "1")
    arms = {"bridge:cached": lw.CachedArm(bench)}
    lw.batched_rows(arms, settings, {"bytes_per_s": 1e9, "flop_per_s": 1e9})
    assert len(during) == 12 and not any(during)


@pytest.mark.parametrize("name", ["relay:1", "relay:8"])
def test_the_receiver_reads_as_many_tokens_of_a_note_as_were_written(name, monkeypatch):
    bench = lw.bench_of(asked(*PAIR))
    monkeypatch.setattr(
        lw.LM, "generate", lambda self, *words, **options: ["", "a note that is longer than it should be"]
    )
    packed = lw.ARMS[name](bench).prompt(bench.texts(2), lw.untimed)
    count = int(name.partition(":")[2])
    ending = len(bench.listener.prompting.ending())
    assert packed.mask.sum(1).tolist() == [len(bench.receiver.bos) + count + ending] * 2


def test_memory_counts_the_weights_each_arm_needs(measured):
    rows = {(row["arm"], row["batch"]): row for row in measured[0]["memory"]}
    sender, receiver = load("tiny-llama"), load("tiny-gemma")
    both = sum(p.numel() * 4 for lm in (sender, receiver) for p in {*lm.model.parameters()}) / 1e6
    alone = sum(p.numel() * 4 for p in {*receiver.model.parameters()}) / 1e6
    assert rows["text", 1]["weights_mb"] == pytest.approx(alone)
    assert rows["relay:50", 1]["weights_mb"] == pytest.approx(both)
    assert rows["bridge:cached", 4]["weights_mb"] < rows["bridge", 4]["weights_mb"]


def test_training_and_decoding_and_growth_have_their_rows(measured):
    results, _ = measured
    assert [row["batch"] for row in results["training"]] == [1, 4]
    assert all(0 < row["matmul_share"] < 1 for row in results["training"])
    assert {(row["model"], row["batch"]) for row in results["decoding"]} == {
        (name, size) for name in ("tiny-llama", "tiny-gemma") for size in (1, 4)
    }
    assert all(0 < row["roofline"] < 1 for row in results["decoding"])
    grown: dict[str, list[float]] = {}
    for row in results["growth"]:
        grown.setdefault(row["of"], []).append(row["size"])
    assert {*grown} == {"texts", "input tokens", "soft tokens", "receivers"}
    assert all(sizes == sorted(sizes) for sizes in grown.values())


def test_what_is_written_is_what_was_measured(measured):
    results, folder = measured
    kept = json.loads((folder / "benchmark.json").read_text())
    assert kept["latency"] == json.loads(json.dumps(results["latency"]))
    assert kept["provenance"]["settings"]["input_tokens"] == 24
    text = (folder / "benchmark.md").read_text()
    bridge = next(row for row in results["latency"] if row["arm"] == "bridge")
    assert lw.in_short(bridge["median_ms"]) in text
    for name in lw.BENCHMARKS:
        assert f"**{name}**" in text
    for name in ("latency", "throughput", "growth", "growth_memory"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.12345, "0.123"), (12.345, "12.3"), (1234.5, "1234"), (7, "7"), ("bridge", "bridge")],
)
def test_cells_are_short(value, text):
    assert lw.in_short(value) == text


# ---- as typed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--benchmark latency --checkpoint {run} --soft_tokens 8 --num_trials 2 --warmup 1 --arms bridge,text",
        "--benchmark batched --batch_sizes 1 2 --num_samples 4 --arms bridge",
        "--benchmark memory --batch_sizes 1 --arms text",
    ],
)
def test_commands_of_the_documents(words, toy_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lw, "device_limits", lambda *_: {"bytes_per_s": 1e10, "flop_per_s": 1e11})
    pair = [] if "{run}" in words else ["--sender", "tiny-llama", "--receiver", "tiny-qwen"]
    script = ["telepathy/run_benchmarks.py", *words.format(run=toy_run).split(), "--output_dir", "runs/benchmarks"]
    assert lw.main([*script, *pair, "--device", "cpu"]) == 0
    assert Path("runs/benchmarks/benchmark.json").is_file()
    assert "the same as Markdown, JSON and pictures: runs/benchmarks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--benchmark", "latencies"], "unknown; did you mean 'latency'?"),
        (["--arms", "bridg"], "did you mean 'bridge'?"),
        (["--random_weights", "llama-3.1-80b"], "did you mean 'llama-3.1-8b'?"),
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "nowhere", "--sender", "tiny-llama"], "the checkpoint knows its models"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = [] if "--checkpoint" in words else ["--sender", "tiny-llama", "--receiver", "tiny-qwen"]
    assert lw.main(["benchmark", *words, *pair]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_random_weights_have_the_shape_that_was_named(monkeypatch, tmp_path):
    kind, sizes = lw.ARCHITECTURES["mistral-7b"]
    small = {**sizes, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
    monkeypatch.setitem(lw.ARCHITECTURES, "mistral-7b", (kind, small))
    bench = lw.bench_of(asked("--random_weights", "mistral-7b", "--layers", "2", "--dtype", "float32"))
    for lm in (bench.sender, bench.receiver):
        assert (lm.config.model_type, lm.width, lm.n_layers, lm.config.num_key_value_heads) == ("mistral", 64, 3, 8)
    assert bench.bridge.shape.layers == (2,) or list(bench.bridge.shape.layers) == [2]
    assert len(bench.sender.ids(bench.texts(1)[0])) == pytest.approx(64, abs=2)


@pytest.mark.parametrize("name", [*lw.ARCHITECTURES])
def test_known_shapes_have_the_number_of_weights_in_their_names(name):
    import transformers

    kind, sizes = lw.ARCHITECTURES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
    count = sum(p.numel() for p in {*model.parameters()})
    known = {  # of the published checkpoints
        "llama-3.1-8b": 8_030_261_248, "mistral-7b": 7_248_023_552, "qwen2.5-7b": 7_615_616_512,
        "llama-3.2-1b": 1_235_814_400, "qwen2.5-1.5b": 1_543_714_304, "smollm2-135m": 134_515_008,
    }  # fmt: skip
    assert count == known[name]


# ---- growth -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_grows_faster_than_its_input(tmp_path):
    words = ["--benchmark", "growth", *PAIR, "--num_trials", "7", "--warmup", "1", "--output_dir", str(tmp_path)]
    results = lw.benchmark_run(asked(*words), lw.Silent())
    exponents = {row["of"]: row["exponent"] for row in results["growth"]}
    print(exponents)
    assert exponents["texts"] < 1.15
    assert all(math.isfinite(value) and value < 1.3 for value in exponents.values())


def anonymous() -> int:
    """Bytes of memory that no file backs: what a machine must really have."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_states_of_many_texts_are_kept_with_little_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path))
    lm, grown = load("tiny-llama"), {}
    for count in (4_000, 40_000):
        texts = [f"text number {i} of {count}, in some words" for i in range(count)]
        before, most = anonymous(), [0]

        def look(done: int, total: int, most: list[int] = most) -> None:
            most[0] = max(most[0], anonymous())

        lw.collect_states(lm, texts, [1], 64, "disk", look)
        grown[count] = (max(most[0], anonymous()) - before) / 1e6
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 1e6
    print(f"{grown} MB of memory, {stored:.0f} MB on disk")
    assert grown[40_000] < 0.5 * stored
