"""What silo and coordinator agree on: the plan, the encoding of what is summed, the strategies.

Submodules are imported explicitly (`from study.plan import load_plan`). Nothing here imports torch.
"""
