"""The proofs that wait for a GPU are sound: on a CPU, at small sizes, each of them holds."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels
from benchmarks import gpu_proofs, gpu_sanitizer, gpu_session


@pytest.mark.parametrize(
    ("proof", "size"),
    [
        (gpu_proofs.masks_have_the_bits_of_the_cpu, (3001,)),
        (gpu_proofs.norms_are_those_of_the_cpu, ()),
        (gpu_proofs.elementwise_ops_are_those_of_the_cpu, ()),
        (gpu_proofs.more_than_2_to_the_31_elements_in_a_sample, (100_005,)),
        (gpu_proofs.more_than_2_to_the_31_elements_in_a_batch, (5,)),
        (gpu_proofs.masks_of_more_than_2_to_the_31_elements, (100_005,)),
        (gpu_proofs.optimiser_of_more_than_2_to_the_31_elements, (100_005,)),
        (gpu_proofs.replays_of_a_training_step_are_its_steps, ()),
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


NORMS = gpu_proofs.norms_are_those_of_the_cpu
ELEMENTWISE = gpu_proofs.elementwise_ops_are_those_of_the_cpu


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


def test_two_results_in_one_place_are_no_comparison() -> None:
    value = torch.ones(3)
    with pytest.raises(AssertionError, match="itself"):
        gpu_proofs._assert_close([value], [value], 1.0)


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
