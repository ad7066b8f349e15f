"""A whole study over real sockets: sums are exact whoever vanishes, and the outputs are there."""

from __future__ import annotations

import json
from pathlib import Path

from coordinator import admin
from tests.coordinator.federation import Federation, TestSilo, Vanish


async def test_a_study_ends_with_a_model_although_silos_vanish_in_between(tmp_path: Path) -> None:
    async with Federation(tmp_path) as federation:
        silos = await federation.join_four()
        lost = {"after SHARE": "round 2", "after MASKED_INPUT": "round 3"}

        async def vanish(silo: TestSilo, where: str) -> None:
            taking = next(iter(silo.studies.values()), None)
            quantity = str(taking.context.quantity) if taking and taking.context else ""
            if quantity == lost.get(where):
                raise Vanish

        silos[1].hook = vanish
        for silo in silos:
            silo.start()
        study = admin.start_study(federation.home, federation.plan(rounds=3))

        def revive() -> bool:
            if not silos[1].alive:
                silos[1].start()
            return federation.study(study).state == "finished"

        await federation.until(lambda: not silos[1].alive, 40)
        await federation.until(lambda: federation.result(study, "round 00002 sum"))
        await federation.until(revive, 40)

        names = [silo.name for silo in silos]
        assert federation.exact(study, "census", "census 1") == names
        assert federation.exact(study, "round 00001 sum", "round 1") == names
        assert federation.exact(study, "round 00002 sum", "round 2") == [
            name for name in names if name != "site-2"
        ]
        assert federation.exact(study, "round 00003 sum", "round 3") == names

        await federation.until(lambda: all(study in silo.ended for silo in silos))
        folder = federation.study(study).folder
        report = json.loads((folder / "report.json").read_text())
        assert [r["survivors"] for r in report["rounds"]][1] == ["site-1", "site-3", "site-4"]
        assert report["images"] == 400
        assert (folder / "model" / "unet" / "config.json").exists()
        assert (folder / "grids" / "round-003.png").exists()
        assert "data:image/png" in (folder / "index.html").read_text()
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
