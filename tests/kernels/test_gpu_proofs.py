"""The proofs that wait for a GPU are sound: on a CPU, at small sizes, each of them holds."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from benchmarks import gpu_large, gpu_networks, gpu_ops, gpu_proofs, gpu_sanitizer, gpu_session

SMALL = ("classes, convolutions between scales",)


@pytest.mark.parametrize(
    ("proof", "size"),
    [
        (gpu_proofs.masks_have_the_bits_of_the_cpu, (3001,)),
        (gpu_proofs.norms_are_those_of_the_cpu, ()),
        (gpu_proofs.elementwise_ops_are_those_of_the_cpu, ()),
        (gpu_large.more_than_2_to_the_31_elements_in_a_sample, (100_005,)),
        (gpu_large.more_than_2_to_the_31_elements_in_a_batch, (5,)),
        (gpu_large.samples_of_more_than_2_to_the_31_elements, (100_005,)),
        (gpu_large.masks_of_more_than_2_to_the_31_elements, (100_005,)),
        (gpu_large.optimiser_of_more_than_2_to_the_31_elements, (100_005,)),
        (gpu_proofs.replays_of_a_training_step_are_its_steps, ()),
        (gpu_networks.fused_networks_compute_what_plain_ones_do, (SMALL,)),
        (gpu_networks.fused_networks_are_as_near_in_bfloat16, (SMALL,)),
        (gpu_networks.three_steps_are_those_of_the_cpu, ("cpu", torch.float32, 2)),
        (gpu_networks.a_replayed_step_trains_as_an_eager_one, ("cpu", 2, 2)),
        (gpu_ops.strided_inputs_are_taken_as_they_are_meant, ()),
        (gpu_ops.every_op_passes_opcheck, (("add_masks_",),)),
        (gpu_ops.every_op_compiles_into_one_graph, ("aot_eager", ("ddpm_loss",))),
    ],
)
def test_a_proof_holds_on_a_cpu(proof: Callable[..., str], size: tuple[int, ...]) -> None:
    assert proof("cpu", *size)


def _wrong_on_the_device(
    monkeypatch: pytest.MonkeyPatch, op: str, spoil: Callable[..., Any]
) -> None:
    """Every second call, which is the one "on the device", gets a result that is not the CPU's."""
    right, calls = getattr(kernels, op), itertools.count()

    def sometimes(*arguments: Any, **named: Any) -> Any:
        if next(calls) % 2 == 0:
            return right(*arguments, **named)
        return spoil(right, *arguments, **named)

    monkeypatch.setattr(kernels, op, sometimes)


def _a_wrong_result(right: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return right(*arguments, **named) * 1.1


def _a_wrong_gradient(which: int | str) -> Callable[..., Any]:
    def spoil(right: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        leaf = named[which] if isinstance(which, str) else arguments[which]
        leaf.register_hook(lambda gradient: gradient * 1.1)
        return right(*arguments, **named)

    return spoil


def _a_wrong_value(right: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Whose gradient is right."""
    made = right(*arguments, **named)
    return made + 0.1 * made.detach()


NORMS = gpu_proofs.norms_are_those_of_the_cpu
ELEMENTWISE = gpu_proofs.elementwise_ops_are_those_of_the_cpu
STRIDED = gpu_ops.strided_inputs_are_taken_as_they_are_meant


@pytest.mark.parametrize(
    ("proof", "op", "spoil"),
    [
        (NORMS, "group_norm_silu", _a_wrong_result),
        (NORMS, "group_norm_silu", _a_wrong_gradient(0)),
        (NORMS, "group_norm_silu", _a_wrong_gradient(2)),
        (NORMS, "group_norm_silu", _a_wrong_gradient("scale")),
        (ELEMENTWISE, "q_sample", _a_wrong_result),
        (ELEMENTWISE, "add_noise", _a_wrong_result),
        (ELEMENTWISE, "ddpm_loss", _a_wrong_gradient(0)),
        (STRIDED, "normal", _a_wrong_result),
        (STRIDED, "sampler_step", _a_wrong_result),
        (STRIDED, "group_norm_silu", _a_wrong_gradient("shift")),
    ],
)
def test_a_proof_fails_where_the_device_computes_something_else(
    monkeypatch: pytest.MonkeyPatch,
    proof: Callable[[str], str],
    op: str,
    spoil: Callable[..., Any],
) -> None:
    _wrong_on_the_device(monkeypatch, op, spoil)
    with pytest.raises(AssertionError, match="not close"):
        proof("cpu")


@pytest.mark.parametrize(
    ("op", "spoil", "found"),
    [
        ("q_sample", _a_wrong_result, "elements from 0 on"),
        ("ddpm_loss", _a_wrong_gradient(0), "elements from 0 on"),
        ("ddpm_loss", _a_wrong_value, "^loss: "),
    ],
)
def test_a_wide_index_that_goes_astray_is_found(
    monkeypatch: pytest.MonkeyPatch, op: str, spoil: Callable[..., Any], found: str
) -> None:
    right = getattr(kernels, op)
    monkeypatch.setattr(kernels, op, functools.partial(spoil, right))
    with pytest.raises(AssertionError, match=found):
        gpu_large.samples_of_more_than_2_to_the_31_elements("cpu", 100_005)


def test_a_network_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.apply_to_unet

    def with_a_wrong_norm(unet: Any) -> Any:
        unet.mid_block.resnets[0].norm1.eps = 0.05
        return right(unet)

    monkeypatch.setattr(kernels, "apply_to_unet", with_a_wrong_norm)
    with pytest.raises(AssertionError, match="not close"):
        gpu_networks.fused_networks_compute_what_plain_ones_do("cpu", SMALL)
    with pytest.raises(AssertionError, match="of its norm off"):
        gpu_networks.fused_networks_are_as_near_in_bfloat16("cpu", SMALL)


def test_three_steps_in_bfloat16_are_not_those_in_float32() -> None:
    with pytest.raises(AssertionError, match="on the CPU"):
        gpu_networks.three_steps_are_those_of_the_cpu("cpu", "cpu", torch.bfloat16, 2)


def test_a_replay_that_trains_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = gpu_networks._by_hand, itertools.count()

    def captured_nothing(*arguments: Any) -> Any:
        again, run = right(*arguments)
        run.losses[3] = 1.0
        return (again if next(calls) else lambda: None), run

    monkeypatch.setattr(gpu_networks, "_by_hand", captured_nothing)
    with pytest.raises(AssertionError, match="replay 0"):
        gpu_networks.a_replayed_step_trains_as_an_eager_one("cpu", "cpu", 2, 2)


def test_two_results_in_one_place_are_no_comparison() -> None:
    value = torch.ones(3)
    with pytest.raises(AssertionError, match="itself"):
        gpu_proofs.assert_close([value], [value], 1.0)


ALL_SAID = "".join(f"{proof.__name__} shown\n" for proof in gpu_sanitizer.SANITIZED)
NONE, ONE = "========= ERROR SUMMARY: 0 errors\n", "========= ERROR SUMMARY: 1 error\n"


def test_the_sanitizer_says_whether_it_found_something_or_the_program_failed() -> None:
    verdict = gpu_sanitizer.sanitizer_verdict
    assert verdict(0, ALL_SAID + NONE, "").startswith("memcheck over")
    with pytest.raises(AssertionError, match=r"found 1 error\(s\): Invalid __global__ read"):
        verdict(9, "========= Invalid __global__ read\n" + ONE, "")
    with pytest.raises(AssertionError, match="the program failed, nothing found: Trace"):
        verdict(1, NONE, "Traceback\nAssertionError: norms differ")
    with pytest.raises(AssertionError, match="did not come to masks"):
        verdict(0, NONE, "")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("========= Error: Device not supported.\n" + ONE, "Error: Device not supported."),
        ("", "no summary of compute-sanitizer; error 999"),
    ],
)
def test_a_sanitizer_that_is_kept_from_the_device_measured_nothing(said: str, why: str) -> None:
    assert gpu_sanitizer.sanitizer_verdict(9, said, "error 999") == f"not measured: {why}"


def test_every_proof_can_be_asked_for_by_name() -> None:
    names = [proof.__name__ for proof in gpu_session.PROOFS]
    assert len(set(names)) == len(names)
