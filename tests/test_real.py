"""Real models: the bundled pair on real reviews, quality, speed and the dense cache. Minutes of work."""

import time
from pathlib import Path

import pytest
import torch

import LATENTWIRE as lw

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("two_threads")]
PAIR = ["--sender", "smollm2-135m", "--receiver", "gemma-3-270m", "--dataset", "rotten_tomatoes"]


@pytest.fixture(scope="module")
def spent() -> list[float]:
    """Seconds of each checkpoint that ``real_run`` wrote."""
    return []


@pytest.fixture(scope="module")
def real_run(tmp_path_factory, spent) -> Path:
    folder = tmp_path_factory.mktemp("real") / "run"
    sizes = ["--samples", "2000", "--steps", "150", "--lr", "1e-3", "--batch_size", "16", "--val_samples", "150"]
    sizes += ["--eval_every", "50"]  # ten validations would take a quarter of the time
    save = lw.Trainer.save

    def timed(self):
        started = time.perf_counter()
        save(self)
        spent.append(time.perf_counter() - started)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lw.Trainer, "save", timed)
        lw.train_main([*PAIR, *sizes, "--checkpoint_interval", "20", "--output_dir", str(folder)])
    return folder


def test_real_pair_communicates(real_run):
    methods = "bridge,control:zero,control:shuffled,control:mean,control:gaussian,control:none,probe"
    results = lw.eval_main(["--checkpoint", str(real_run), "--num_samples", "400", "--methods", methods])
    found = {name: summary["accuracy"] for name, summary in results["methods"].items()}
    assert results["communication"] and results["p"] < 0.01, results["verdict"]  # no control that gives the answer away
    assert found["bridge"] >= found["probe"] - 0.05, found


def plain_loop(settings: lw.TrainSettings, rows: list[lw.Example], setup: lw.Setup, steps: int) -> float:
    """The loop everyone writes first: sender every step, padded to the longest, ``labels=``; → seconds per step."""
    trainer = lw.Trainer(settings, lw.Run(Path("unused")), setup, lw.Silent())
    sender, receiver, prompting = setup.sender, setup.receiver, trainer.prompting
    ids = {e.id: lw.sender_ids(sender, setup.part.sender_text(e), settings.max_tokens) for e in rows}
    longest = max(map(len, ids.values()))
    started = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first step only warms up
            started = time.perf_counter()
        examples = rows[step * settings.batch_size : (step + 1) * settings.batch_size]
        padded = [ids[e.id] + [sender.pad] * (longest - len(ids[e.id])) for e in examples]
        mask = torch.tensor([[i < len(ids[e.id]) for i in range(longest)] for e in examples])
        with torch.no_grad():
            output = sender.model(input_ids=torch.tensor(padded), attention_mask=mask.long(), output_hidden_states=True)
        states = lw.States(output.hidden_states[trainer.bridge.shape.layers[0]][:, None], mask)
        soft = trainer.bridge.decode(trainer.bridge.encode(states))
        gold = [[*prompting.answer_ids(e.answers[0]), receiver.pad] for e in examples]  # the pad is not an input
        packed = lw.lay_out(receiver, soft, [prompting.after()] * len(gold), gold, before=receiver.bos)
        labels = torch.full(packed.mask.shape, -100)
        own = packed.order < torch.tensor([len(ids) - 1 for ids in gold])[packed.rows]
        labels[packed.rows[own], packed.columns[own] + 1] = packed.targets[own]
        inputs = {
            "inputs_embeds": packed.embeds,
            "attention_mask": packed.mask.long(),
            "position_ids": packed.positions,
        }
        loss = receiver.model(**inputs, labels=labels).loss
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    return (time.perf_counter() - started) / steps


def test_training_is_about_three_times_faster_than_the_plain_loop(tmp_path, monkeypatch, capsys):
    """Four epochs of 128 rows, same dtype, one process: cached states, early stop in the sender, logits where needed."""
    flags = [
        *PAIR,
        "--samples",
        "128",
        "--batch_size",
        "16",
        "--epochs",
        "4",
        "--val_samples",
        "0",
        "--state_cache",
        "memory",
    ]
    settings, _ = lw.settings_from(lw.TrainSettings, [*flags, "--output_dir", str(tmp_path / "run")])
    settings, _ = lw.resolve(settings)
    part = lw.make_task(settings)
    splits, source = lw.training_splits(part, settings)
    setup = lw.Setup(lw.load_lm("smollm2-135m", settings), lw.load_lm("gemma-3-270m", settings), part, splits, source)
    texts: list[int] = []
    states = lw.LM.states
    monkeypatch.setattr(
        lw.LM, "states", lambda self, rows, layers: texts.append(len(rows)) or states(self, rows, layers)
    )
    ratios: list[float] = []
    for number in range(2):  # one code gave 2.1 to 3.5 within ten minutes: a second round where the first had bad luck
        plain = plain_loop(settings, splits["train"], setup, steps=3)
        texts.clear()
        started = time.perf_counter()
        run = lw.Run.start(tmp_path / f"run{number}", settings, resume=False)
        lw.Trainer(settings, run, setup, lw.Silent()).train()
        ours = time.perf_counter() - started
        assert sum(texts) == len({part.sender_text(e) for e in splits["train"]})
        plain = (
            plain + plain_loop(settings, splits["train"], setup, steps=3)
        ) * 16  # of its 32 steps, before and after
        ratios.append(plain / ours)
        with capsys.disabled():
            print(
                f"\nplain loop {plain:.1f} s (6 of 32 steps measured), ours {ours:.1f} s with caching: {ratios[-1]:.2f} times"
            )
        if ratios[-1] >= 2.5:
            break
    assert max(ratios) >= 2.5, ratios  # 3.15 and 3.21 on a quiet machine (LOG.md)


def plain_evaluation(run: Path, batches: int) -> float:
    """The evaluation everyone writes first: for every method sender, bridge and ten generated tokens; → seconds per row.

    Generated by our own loop: the library's takes ten times as long here, where torch meets a slow path.
    """
    channel = lw.open_context(lw.EvalSettings(checkpoint=run), lw.Checkpoint.open(run))
    sender, receiver, bridge = channel.speaker, channel.setup.receiver, channel.bridge
    prompting, layer = channel.receiver.prompting, bridge.shape.layers[0]
    started = time.perf_counter()
    for number in range(batches):
        examples = channel.examples[number * 32 : (number + 1) * 32]
        rows = [sender.ids(channel.text(example)) for example in examples]
        ids, mask = lw.pad_rows(rows, sender.pad, sender.device)
        for method in ("bridge", "zero", "shuffled", "mean", "gaussian", "none"):
            with torch.no_grad():
                read = sender.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
                message = bridge.encode(lw.States(read.hidden_states[layer][:, None], mask))
                soft = None if method == "none" else bridge.decode(message)
                said = receiver.prefill(prompting.pack(soft, examples))
                receiver.generate(said, 10, lw.DecodeSettings(eos_ban_steps=10), line=False)
    return (time.perf_counter() - started) / batches / 32


def test_evaluation_is_several_times_faster_than_generating(real_run, tmp_path, capsys):
    plain = plain_evaluation(real_run, 1) * 128
    methods = "bridge,control:zero,control:shuffled,control:mean,control:gaussian,control:none"
    flags = ["--checkpoint", str(real_run), "--num_samples", "128", "--methods", methods, "--state_cache", "memory"]
    started = time.perf_counter()
    lw.eval_main([*flags, "--output_dir", str(tmp_path)])
    ours = time.perf_counter() - started
    with capsys.disabled():
        print(f"\ngenerating {plain:.1f} s (32 of 128 rows measured), ours {ours:.1f} s: {plain / ours:.2f} times")
    assert plain / ours >= 4


def test_checkpoints_cost_less_than_two_percent(real_run, spent, capsys):
    last = lw.read_rows(real_run / "diagnostics.jsonl")[-1]["seconds"]
    with capsys.disabled():
        print(
            f"\n{len(spent)} checkpoints took {sum(spent):.2f} s of {last:.1f} s of training ({sum(spent) / last:.2%})"
        )
    assert len(spent) >= 2
    assert sum(spent) / last < 0.02


@pytest.mark.parametrize(("receiver", "sender"), [("gemma-3-270m", "bytes"), ("smollm2-135m", "gemma-3-270m")])
def test_copied_latents_are_the_text_to_a_real_receiver(receiver, sender):
    """The plumbing of BOS, scale, mask and wire on real models: nothing is trained, nothing may be lost."""
    cpu = lw.ModelSettings(device="cpu", dtype="float32")
    lm = lw.load_lm(receiver, cpu)
    reader = lw.ByteReader(torch.device("cpu")) if sender == "bytes" else lw.load_lm(sender, cpu)
    settings = lw.BridgeSettings(
        encoder="byte" if sender == "bytes" else "hidden", pooler="window", init="copy", windows_on="receiver",
        ratio=[1.0], d_z=lm.width, codec="fp32", width=32,
    )  # fmt: skip
    bridge = lw.Bridge(lw.BridgeShape.of(settings, reader, lm)).eval()
    texts = ["The naïve cat 🙂 sat in Zürich in 2018.", "Warsaw is the capital of Poland, and its largest city."]
    after = lm.ids("\nQuestion: Where?\nAnswer:")
    with torch.no_grad():
        states = lw.Sender(reader, bridge, 999, lm).states(texts)
        bridge.begin([(states, [states.heard])], [0])
        for text, message in zip(texts, bridge.encode(states, bridge.language(0)).rows(), strict=True):
            soft = bridge.decode(lw.Message.from_bytes(message.to_bytes()))
            heard = lm.prefill(lw.lay_out(lm, soft, [after], before=lm.bos, left=True)).logits
            read = lm.prefill(lw.lay_out(lm, None, [[*lm.ids(text), *after]], before=lm.bos, left=True)).logits
            assert torch.allclose(heard, read, atol=1e-3), float((heard - read).abs().max())
