"""Many silos in one process: studies of strategies, with the trainer and the sums of the service.

Submodules are imported explicitly (`from concilium.simulate.study import simulate`).
"""
