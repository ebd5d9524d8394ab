"""§13 BENCHMARKS and how §6 reads prompts: shared beginnings, honest floors, every arm asked for the same."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

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


def packed(lm: lw.LM, texts: tuple[str, ...] = PROMPTS, soft: lw.SoftPrompt | None = None) -> lw.Packed:
    return lw.lay_out(lm, soft, [lm.ids(text) for text in texts], before=lm.bos, left=True)


def asked(*words: str) -> lw.BenchmarkSettings:
    settings, _ = lw.settings_from(lw.BenchmarkSettings, [*words, "--device", "cpu"])
    return settings


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Everything, measured once on tiny models."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw, "LEAST_TRIALS", 2)
        results = lw.benchmark_run(asked("--benchmark", "all", *PAIR, *QUICK, "--output_dir", str(folder)), lw.Silent())
    lw.write_benchmark(results, folder)
    return results, folder


# ---- prompts that are read once ----------------------------------------------------------------------------------------


def test_scoring_leaves_a_prompt_that_can_still_be_continued():
    lm = load("tiny-gemma")
    prompt = lm.prefill(packed(lm))
    first = lm.score(prompt, [[lm.ids(" one two")]] * 3)
    assert first == lm.score(prompt, [[lm.ids(" one two")]] * 3)
    assert lm.generate(prompt, 5, line=False) == lm.generate(lm.prefill(packed(lm)), 5, line=False)


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


def test_all_take_turns_and_a_slow_one_stops_after_ten(monkeypatch):
    calls: list[str] = []
    seconds = {"slow": 3.0, "fast": 0.1}
    monkeypatch.setattr(lw, "seconds_of", lambda run: run())
    runs = {name: lambda name=name: calls.append(name) or seconds[name] for name in seconds}
    found = lw.race(runs, asked("--num_trials", "12", "--warmup", "2", "--max_seconds", "10"))
    assert calls[:4] == ["slow", "slow", "fast", "fast"]
    assert calls[4:14] == ["slow", "fast"] * 5
    assert {name: len(own) for name, own in found.items()} == {"slow": 10, "fast": 12}


@pytest.mark.slow
def test_peak_memory_is_what_a_call_takes():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here")
    for _ in range(3):  # memory that an earlier call has freed counts again
        for megabytes in (0, 10, 200):
            peak = lw.peak_of(lambda size=megabytes: float(torch.ones(size * 250_000).sum()), torch.device("cpu"))
            assert peak == pytest.approx(megabytes, abs=5)


@pytest.mark.slow
@pytest.mark.alone
def test_limits_are_of_a_real_device():
    limits = lw.device_limits(torch.device("cpu"), torch.float32)
    table, one = torch.ones(8192, 4096), torch.ones(4096, 1)
    assert limits["bytes_per_s"] > 0.5 * table.numel() * 4 / min(lw.seconds_of(lambda: table @ one) for _ in range(5))
    a = torch.randn(512, 512)
    assert limits["flop_per_s"] > 0.5 * 2 * 512**3 / min(lw.seconds_of(lambda: a @ a) for _ in range(5))
    assert limits["bytes_per_s"] < 2e12 and limits["flop_per_s"] < 1e14  # of one CPU core


# ---- what is measured ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_arm_gives_every_length_of_answer(measured):
    results, _ = measured
    rows = results["latency"]
    arms = {"bridge", "bridge:cached", "text", "text_relay:1", "text_relay:8", "text_relay:50"}
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
    assert floor["text", 0] < floor["text_relay:1", 0] < floor["text_relay:8", 0] < floor["text_relay:50", 0]
    assert floor["text", 0] < floor["text", 5]
    time = {(row["arm"], row["answer_tokens"]): row["median_ms"] for row in rows}
    assert time["text_relay:50", 0] > 2 * time["text_relay:8", 0] > time["text_relay:1", 0]
    assert time["text", 5] > time["text", 0]


def test_all_arms_generate_the_same_number_of_tokens(monkeypatch):
    bench = lw.bench_of(asked(*PAIR))
    steps: list[tuple[str, int]] = []
    generate, extend = lw.LM.generate, lw.LM.extend

    def watched(self: lw.LM, prefill: lw.Prefill, most: int, **options: Any) -> list[str]:
        count = [0]

        def step(*words: Any) -> lw.Prefill:
            count[0] += 1
            return extend(self, *words)

        monkeypatch.setattr(self, "extend", step)
        said = generate(self, prefill, most, **options)
        steps.append((self.name, count[0] + 1))
        return said

    monkeypatch.setattr(lw.LM, "generate", watched)
    for name in ("bridge", "text", "text_relay:8"):
        bench.run(name, bench.texts(2), 5)
    assert steps == [("tiny-gemma", 5), ("tiny-gemma", 5), ("tiny-llama", 8), ("tiny-gemma", 5)]


def test_the_bridge_arm_sends_bytes_and_its_words_arrive(monkeypatch):
    bench = lw.bench_of(asked(*PAIR))
    sent: list[bytes] = []
    opened, prefill = bench.timed.open, bench.receiver.prefill
    monkeypatch.setattr(bench.timed, "open", lambda data: sent.extend(data) or opened(data))
    packs: list[lw.Packed] = []
    monkeypatch.setattr(bench.receiver, "prefill", lambda packed: packs.append(packed) or prefill(packed))
    for texts in (["good film", "dull film"], ["dull film", "good film"]):
        bench.run("bridge", texts, 0)
    assert [lw.Message.from_bytes(data).latents.shape[1] for data in sent] == [8] * 4
    assert sent[0] == sent[3] != sent[1] == sent[2]
    torch.testing.assert_close(packs[0].embeds[0], packs[1].embeds[1])


@pytest.mark.slow
def test_throughput_goes_through_all_texts(measured):
    rows = measured[0]["batched"]
    assert {(row["batch"], row["trials"]) for row in rows} == {(1, 8), (4, 2)}  # where two are enough
    assert all(row["texts_per_s"] > 0 for row in rows)


def test_a_cached_arm_never_reads_in_a_trial(monkeypatch):
    words = ("--batch_sizes", "2", "--num_samples", "24", "--warmup", "1", "--arms", "bridge:cached")
    bench = lw.bench_of(asked(*PAIR, *words))
    read: list[int] = []
    hidden = lw.LM.hidden_states
    monkeypatch.setattr(lw.LM, "hidden_states", lambda *words: read.append(len(words)) or hidden(*words))
    during: list[int] = []

    def once(run: Any) -> float:
        before = len(read)
        run()
        during.append(len(read) - before)
        return 1.0

    monkeypatch.setattr(lw, "seconds_of", once)
    bench.limits = {"bytes_per_s": 1e9, "flop_per_s": 1e9}
    assert [row["arm"] for row in lw.BENCHMARKS["batched"](bench).rows()] == ["bridge:cached"]
    assert len(during) == 12 and not any(during)


@pytest.mark.parametrize("count", [1, 8])
def test_the_relay_that_is_timed_is_the_one_that_evaluation_runs(count, monkeypatch):
    """The same instruction to the sender, and of its note as much to the receiver, in the same words around it."""
    bench, read, told = lw.bench_of(asked(*PAIR)), list[Any](), list[Any]()
    texts, joined, generate = bench.texts(2), lw.LM.prefill_ids, lw.LM.generate
    monkeypatch.setattr(lw.LM, "prefill_ids", lambda self, rows, most: read.append(rows) or joined(self, rows, most))

    def watched(self: lw.LM, prefill: lw.Prefill, most: int, *rest: Any, **options: Any) -> list[str]:
        told.append((self.name, most, prefill.mask.sum(1).tolist(), prefill.logits.tolist()))
        return generate(self, prefill, most, *rest, **options)

    monkeypatch.setattr(lw.LM, "generate", watched)
    assert lw.arm_names(asked("--arms", f"relay:{count}")) == [f"text_relay:{count}"]
    bench.run(f"text_relay:{count}", texts, 0)
    setup = dataclasses.replace(bench.context.setup, splits={"train": [], "evaluated": bench.examples(texts)})
    settings, own = lw.EvalSettings(relay_tokens=count), bench.context
    channel = lw.EvalContext(setup, own.settings, settings, own.receiver, None)
    lw.METHODS[f"text_relay:{count}"](channel).answers(channel.examples)
    assert len(read) == 2 and read[0] == read[1]
    notes = [row for row in told if row[0] == "tiny-llama"]
    assert len(notes) == 2 and notes[0] == notes[1] and notes[0][1] == count
    assert min(notes[0][2]) > 24 + len("Which of these is it")  # bytes are tokens here


@pytest.mark.slow
def test_memory_counts_the_weights_each_arm_needs(measured):
    rows = {(row["arm"], row["batch"]): row for row in measured[0]["memory"]}
    sender, receiver = load("tiny-llama"), load("tiny-gemma")
    both = sum(p.numel() * 4 for lm in (sender, receiver) for p in {*lm.model.parameters()}) / 1e6
    alone = sum(p.numel() * 4 for p in {*receiver.model.parameters()}) / 1e6
    assert rows["text", 1]["weights_mb"] == pytest.approx(alone)
    assert rows["text_relay:50", 1]["weights_mb"] == pytest.approx(both)
    assert rows["bridge:cached", 4]["weights_mb"] < rows["bridge", 4]["weights_mb"]


@pytest.mark.slow
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


@pytest.mark.slow
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
        (["--benchmark", "latencies"], "unknown benchmark 'latencies'; did you mean 'latency'?"),
        (["--arms", "bridg"], "did you mean 'bridge'?"),
        (["--arms", "probe"], "--arms probe: this benchmark cannot time it"),
        (["--random_weights", "llama-3.1-80b"], "did you mean 'llama-3.1-8b'?"),
        (["--batch_sizes", "0"], "--batch_sizes"),
        (["--engine", "static"], "--engine: it should be 'auto' or 'eager' (given: 'static')"),
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
@pytest.mark.alone
def test_nothing_grows_faster_than_its_input(tmp_path):
    words = ["--benchmark", "growth", *PAIR, "--num_trials", "7", "--warmup", "1", "--output_dir", str(tmp_path)]
    results = lw.benchmark_run(asked(*words), lw.Silent())
    exponents = {row["of"]: row["exponent"] for row in results["growth"]}
    print(exponents)
    assert exponents["texts"] < 1.15
    assert all(math.isfinite(value) and value < 1.3 for value in exponents.values())


# ---- what is there for speed -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_short_cuts_are_timed_beside_the_plain_way(measured):
    rows = {row["of"]: row for row in measured[0]["self"]}
    assert [*rows] == ["loss", "head", "padding", "bridge", "bridge:cached"]
    assert all(row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"]) for row in rows.values())


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("two_threads")
def test_no_short_cut_has_become_slower(tmp_path):
    """Ratios of one run beside the committed ones; two thirds of them is a margin for another machine."""
    if not all(lw.LMS[name]().installed() for name in ("smollm2-135m", "gemma-3-270m")):
        pytest.skip("the bundled models are not installed")
    words = ["--benchmark", "self", "--num_trials", "15", "--warmup", "3", "--input_tokens", "64"]

    def slower(turn: str) -> list[str]:
        results = lw.benchmark_run(asked(*words, "--output_dir", str(tmp_path / turn)), lw.Silent())
        found = {row["of"]: row["ratio"] for row in results["self"]}
        print({name: round(ratio, 2) for name, ratio in found.items()})
        wanted = json.loads((Path(__file__).parent / "speed.json").read_text())[results["dtype"].removeprefix("torch.")]
        return [name for name, ratio in wanted.items() if found[name] < 2 / 3 * ratio]

    assert not ((first := slower("first")) and set(first) & set(slower("again"))), "slower in both of two runs"


def anonymous() -> int:
    """Bytes of memory that no file backs: what a machine must really have."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.slow
@pytest.mark.alone
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


def test_no_row_rests_on_fewer_than_ten_trials():
    """V10: a batch of sixteen rested on two; texts/s are those of the median, like the milliseconds."""
    seconds = iter([*[1.0] * 9, 11.0] * 50)
    runs = {"slow": lambda: None}
    asked = lw.BenchmarkSettings(num_trials=50, warmup=0, max_seconds=0.001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw, "seconds_of", lambda run: next(seconds))
        found = lw.race(runs, asked)["slow"]
    assert len(found) == 10
    row = lw.timing("slow", 4, 0, found, 0.5)
    assert row["median_ms"] == 1000 and row["texts_per_s"] == 4.0 and row["trials"] == 10


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_table_is_cut_nowhere_however_narrow_the_terminal(columns, monkeypatch, capsys):
    """rich shrinks columns below their least width, and what then does not fit is lost at the right edge."""
    monkeypatch.setenv("COLUMNS", str(columns))
    found = json.loads((Path(__file__).parent.parent / "latex" / "results" / "benchmark.json").read_text())
    table = next(lw.benchmark_tables(found))
    lw.RichReport().rows(table)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    wanted = Counter(word for row in [table.heads, *table.rows] for word in " ".join(row).split())
    assert not wanted - Counter(printed.split())
