"""Pins that processes which train together learn what one process learns, whichever way networks are spread."""

from __future__ import annotations

import pytest
import torch
from spread import spread
from together import OBJECTIVES, train_all

STEPS = 3
UNET = {"teacher": {"model": "builtin:digits", "guidance": 1.0}}
LORA = {"student": {"lora": {"rank": 2, "alpha": 4, "target_modules": ["inside", "outside"]}}}
SETTINGS = {
    f"{name}, {parts} parts": {"objective": objective, "trainer": {"accumulate": parts}}
    for name, objective in OBJECTIVES.items()
    for parts in (1, 2)
}
MORE = {
    "adapters": {"objective": OBJECTIVES["dmd2"], **LORA},
    "a unet that computes blocks again": {
        "objective": OBJECTIVES["dmd2"], **UNET, "trainer": {"gradient_checkpointing": True}
    },
    "a step that is not finite in one process": {"objective": OBJECTIVES["lcm"], "poisoned": 1},
    "averages on the cpu": {"objective": OBJECTIVES["lcm"], "trainer": {"ema_offload": True}},
}  # fmt: skip
HALVES = {name: {"objective": OBJECTIVES["dmd2"], "trainer": {"precision": name}} for name in ("bf16", "fp16")}
WAYS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def alone():
    """What one process learns."""
    return train_all({**SETTINGS, **MORE, **HALVES}, STEPS)


@pytest.fixture(scope="module")
def together():
    """By number of processes, what each of them found in every case and way."""
    asked = {2: {**SETTINGS, **MORE, **HALVES}, 4: {name: SETTINGS[name] for name in SETTINGS if "2 parts" in name}}
    return {
        ranks: spread(
            ranks, train_all, {(way, n): {"parallel": way, **s} for way in WAYS for n, s in cases.items()}, STEPS
        )
        for ranks, cases in asked.items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("ranks", "case"), [*((2, c) for c in (*SETTINGS, *MORE)), *((4, c) for c in SETTINGS if "2 parts" in c)]
)
def test_processes_together_learn_what_one_learns_of_the_same_batches(alone, together, ranks, case, way):
    """Losses, norms of gradients, student, average, target network and critic; to 1e-6 after three updates."""
    found, one = [each[way, case] for each in together[ranks]], alone[case]
    for step, expected in enumerate(one["metrics"]):
        for name in expected.keys() & {"loss", "critic/loss"}:
            mean = sum(each["metrics"][step][name] for each in found) / ranks
            assert mean == pytest.approx(expected[name], abs=1e-6)
        for name in expected.keys() & {"grad_norm", "critic/grad_norm"}:
            for each in found:
                assert each["metrics"][step][name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    assert {each["skipped"] for each in found} == {one["skipped"]} == {int("poisoned" in MORE.get(case, {}))}
    assert found[0]["state"].keys() == one["state"].keys()
    assert any(name.startswith("student") for name in one["state"])
    for name, tensor in one["state"].items():
        relative = 1e-4 if name.startswith("gradients") else 0.0
        torch.testing.assert_close(found[0]["state"][name], tensor, rtol=relative, atol=1e-6)
    assert all(each["state"] == {} for each in found[1:])


@pytest.mark.parametrize("precision", HALVES)
def test_halves_learn_what_autocast_learns(alone, together, precision):
    """Weights travel in halves where autocast casts them at use: the same numbers, up to the order of sums."""
    found, one = [each["fsdp", precision]["metrics"] for each in together[2]], alone[precision]["metrics"]
    for step, expected in enumerate(one):
        for name in expected.keys() & {"loss", "critic/loss"}:
            assert sum(m[step][name] for m in found) / 2 == pytest.approx(expected[name], rel=0.02)
        assert found[0][step]["critic/grad_norm"] == pytest.approx(expected["critic/grad_norm"], rel=0.05)
    state = together[2][0]["fsdp", precision]["state"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize(("ranks", "case"), [(4, "lcm, 2 parts"), (4, "dmd2, 2 parts"), (2, "adapters")])
def test_every_process_keeps_its_part_of_whatever_grows_with_the_network(together, ranks, case):
    for each in together[ranks]:
        assert len(each["fsdp", case]["kept"]) >= 4
        for share in each["fsdp", case]["kept"].values():
            assert share == pytest.approx(1 / ranks, rel=0.1)  # what has fewer rows than there are processes is uneven
        assert set(each["ddp", case]["kept"].values()) == {1.0}
