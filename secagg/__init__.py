"""The secure sum: adds one vector per silo over Z_2^b and reveals the sum of those that stayed.

Sans-I/O: `secagg.silo` and `secagg.coordinator` turn `(state, event)` into `(state, effects)`;
clocks, sockets, disks and the masking of large vectors belong to their callers.
The protocol is written down in docs/secure-sum.md.
"""
