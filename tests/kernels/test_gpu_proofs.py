"""The proofs that wait for a GPU are sound: on a CPU, at small sizes, each of them holds."""

from collections.abc import Callable

import pytest

from benchmarks import gpu_proofs


@pytest.mark.parametrize(
    ("proof", "size"),
    [
        (gpu_proofs.masks_have_the_bits_of_the_cpu, (3001,)),
        (gpu_proofs.norms_are_those_of_the_cpu, ()),
        (gpu_proofs.elementwise_ops_are_those_of_the_cpu, ()),
        (gpu_proofs.more_than_2_to_the_31_elements_in_a_sample, (100_005,)),
        (gpu_proofs.more_than_2_to_the_31_elements_in_a_batch, (5,)),
        (gpu_proofs.masks_of_more_than_2_to_the_31_elements, (100_005,)),
        (gpu_proofs.replays_of_a_training_step_are_its_steps, ()),
    ],
)
def test_a_proof_holds_on_a_cpu(proof: Callable[..., str], size: tuple[int, ...]) -> None:
    assert proof("cpu", *size)


def test_every_proof_can_be_asked_for_by_name() -> None:
    names = [proof.__name__ for proof in gpu_proofs.PROOFS]
    assert len(set(names)) == len(names)
