"""The service at the study centre: authority, store, secure-sum sessions, the study's runner.

One asyncio process without torch (`coordinator.server.serve`); what needs torch runs in one child
process (`coordinator.worker`). The command line writes to the same store (`coordinator.admin`).
"""
