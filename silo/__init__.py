"""The agent of an institution: its data, its site policy, its ledger, local training, the protocol.

Submodules are imported explicitly. Only `silo.jobs` imports torch, and only the worker process
imports `silo.jobs`: an agent that waits stays small.
"""
