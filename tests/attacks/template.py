"""`python -m tests.attacks.template FOLDER`: the sites that the attacks begin with.

An agent enrols with an honest coordinator, accepts a study and takes part in its first steps; what
it then has on disk is kept twice:

* `fresh`: it has accepted; session 1, a census, was opened and given up.
* `counted`: it is in the census (session 2), and has prepared moments, round 1 and tags, the
  sessions of which (3, 4, 5) were given up.

All of it is done by the real parts, in a process of its own, so that torch stays out of the tests.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import numpy as np

from diffusion.features.file import FEATURES
from diffusion.features.pinned import FEATURE_NETWORKS
from diffusion.model import parameter_layout, to_vector
from secagg.coordinator import Summed
from secagg.events import Open
from secagg.messages import Step
from silo.home import SiloHome
from silo.identity import load_or_make_identity
from silo.jobs.training import first_model
from study.plan import Plan
from study.quantity import (
    CensusWork,
    MomentsWork,
    RoundWork,
    TagsWork,
    Work,
    encode_work,
    moments_bound,
)
from tests.attacks.liar import Liar
from tests.attacks.stage import ME, NAMES, Agent, Federation, Stage, sha256
from tests.silo.centre import Centre, enrol, make_site
from tests.silo.studies import make_plan

TOTAL = 100
"""Σñ as the coordinator says it."""


async def build(folder: Path) -> None:
    centre = Centre(folder / "centre")
    await centre.start()
    home = make_site(folder, NAMES[ME - 1])
    await enrol(centre, home, NAMES[ME - 1])
    await centre.stop()
    plan = make_plan(sha256=FEATURE_NETWORKS["digits"].sha256)
    federation = Federation.make(plan, load_or_make_identity(SiloHome(home)).public)
    federation.save(folder / "federation")
    liar, victim = Liar(folder / "centre", centre.address), Agent(home)
    (folder / "address").write_text(centre.address)
    await liar.start()
    await victim.start()
    try:
        answer = await liar.offer(federation.offer())
        assert answer is not None
        assert answer.accepted
        stage = Stage(liar, victim, federation, 0)
        await give_up(stage, CensusWork())
        await victim.stop()
        await liar.alone()
        keep(stage, folder / "fresh")
        await victim.start()
        stage.open(CensusWork())
        await stage.until(Summed)
        await stage.settle()
        for name, work in works(folder, plan, liar).items():
            (folder / f"{name}.json").write_bytes(encode_work(work))
            model = sha256(liar.artifacts[next(iter(liar.artifacts))]) if name == "round" else None
            await give_up(stage, work, **({"model": model} if model else {}))
    finally:
        await victim.stop()
        await liar.stop()
    keep(stage, folder / "counted")


def works(folder: Path, plan: Plan, liar: Liar) -> dict[str, Work]:
    """What the study asks after the census; the input model of round 1 is kept beside it."""
    model = first_model(plan)
    content = to_vector(model).astype("<f4").tobytes()
    (folder / "model").write_bytes(content)
    liar.artifacts[sha256(content)] = content
    sizes = tuple(int(np.prod(shape)) for _, shape, _ in parameter_layout(model))
    evaluation, auxiliary = plan.evaluation, plan.auxiliary
    assert evaluation is not None
    assert auxiliary is not None
    network = FEATURE_NETWORKS["digits"]
    return {
        "moments": MomentsWork(
            total_count=TOTAL,
            network="digits",
            sha256=network.sha256,
            dimension=FEATURES,
            bound=moments_bound(evaluation.feature_bound),
        ),
        "round": RoundWork(total_count=TOTAL, sizes=sizes, clips=(plan.first_clip,) * len(sizes)),
        "tags": TagsWork(
            total_count=TOTAL,
            images=auxiliary.images,
            slots=auxiliary.images * auxiliary.slots_per_image,
        ),
    }


async def give_up(stage: Stage, work: Work, **changes: object) -> None:
    """The agent prepares its vector and advertises; then the session is dropped."""
    context = stage.open(work, **changes)
    said = await stage.ask(Open(context))
    assert said.steps == [Step.ADVERTISE], said


def keep(stage: Stage, folder: Path) -> None:
    shutil.copytree(stage.victim.home, folder / "home")
    (folder / "number").write_text(str(stage.number))
    (folder / "previous").write_bytes(stage.previous)


if __name__ == "__main__":
    asyncio.run(build(Path(sys.argv[1])))
