"""The peers' side of `benchmarks.secure_sum`: in an environment of its own, none of ours imported.

One JSON request a line on standard input, one JSON answer a line on standard output. Seconds are
processor time, as they are for our own jobs. Vectors come as .npy files, so that all encode the
same numbers. Flower's functions are called in the order in which its client module and its
workflow call them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from typing import Any

import numpy as np

# The defaults of Flower's workflow.
SETUP = {
    "clipping_range": 8.0,
    "target_range": 1 << 22,
    "mod_range": 1 << 32,
    "max_weight": 1000.0,
}
COUNT = 100
CKKS_SLOTS = 4096


class Flower:
    """Clients that have shared their keys with one another, all pairs (SecAgg)."""

    def __init__(self, silos: int, *, first_only: bool = False) -> None:
        """With `first_only` client 0 alone can upload, and nobody unmask: the others deal to it
        what it needs for that and leave the rest, minutes of Shamir shares with 100 clients, alone.
        What client 0 does is the same."""
        self.mod: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
        self.flow: Any = import_module(
            "flwr.server.workflow.secure_aggregation.secaggplus_workflow"
        )
        self.silos, self.threshold = silos, silos * 2 // 3 + 1
        setup = SETUP | {"sample_num": silos, "share_num": silos, "threshold": self.threshold}
        self.states = [self.mod.SecAggPlusState() for _ in range(silos)]
        public = {}
        for nid, state in enumerate(self.states):
            state.nid = nid
            keys = self.mod._setup(state, setup)
            public[str(nid)] = (keys["pk1"], keys["pk2"])
        self.parcels: list[dict[str, list[Any]]] = [{"srcs": [], "ctxts": []} for _ in range(silos)]
        for state in self.states[: 1 if first_only else silos]:
            sent = self.mod._share_keys(state, public)
            for to, ciphertext in zip(sent["dsts"], sent["ctxts"], strict=True):
                self._deliver(state.nid, to, ciphertext)
        for state in self.states[1:] if first_only else ():
            self._deliver(state.nid, 0, self._parcel_to_first(state))
        self.public = [self.states[0].public_keys_dict[i] for i in range(silos)]

    def _deliver(self, source: int, to: int, ciphertext: bytes) -> None:
        self.parcels[to]["srcs"].append(source)
        self.parcels[to]["ctxts"].append(ciphertext)

    def _parcel_to_first(self, state: Any) -> bytes:
        """What `state` would send to client 0, with other shares of the same length."""
        first, mod = self.states[0], self.mod
        key = mod.generate_shared_key(
            mod.bytes_to_private_key(state.sk2), mod.bytes_to_public_key(first.pk2)
        )
        shares = first.rd_seed_share_dict[0], first.sk1_share_dict[0]
        found: bytes = mod.encrypt(key, mod.share_keys_plaintext_concat(state.nid, 0, *shares))
        return found

    def upload(self, nid: int, vector: np.ndarray[Any, Any]) -> list[bytes]:
        """What client `nid` sends: decrypted shares, quantised, masked, serialised."""
        parameters = self.mod.Parameters([self.mod.ndarray_to_bytes(vector)], "numpy.ndarray")
        sent = self.mod._collect_masked_vectors(
            self.states[nid], self.parcels[nid], COUNT, parameters
        )
        found: list[bytes] = sent["masked_params"]
        return found

    def unmask(self, uploads: dict[int, list[bytes]]) -> list[np.ndarray[Any, Any]]:
        """The server: sum the uploads, restore secrets, take the masks off, dequantise."""
        flow, total = self.flow, None
        for sent in uploads.values():
            arrays = [flow.bytes_to_ndarray(raw) for raw in sent]
            total = arrays if total is None else flow.parameters_addition(total, arrays)
        total = flow.parameters_mod(total, SETUP["mod_range"])
        dead = [nid for nid in range(self.silos) if nid not in uploads]
        shares: dict[int, list[bytes]] = {nid: [] for nid in range(self.silos)}
        for nid in uploads:
            stage = {"active_nids": list(uploads), "dead_nids": dead}
            reply = self.mod._unmask(self.states[nid], stage)
            for owner, share in zip(reply["nids"], reply["shares"], strict=True):
                shares[owner].append(share)
        for nid, held in shares.items():
            secret = flow.combine_shares(held)
            shapes = flow.get_parameters_shape(total)
            if nid in uploads:
                mask = flow.pseudo_rand_gen(secret, SETUP["mod_range"], shapes)
                total = flow.parameters_subtraction(total, mask)
                continue
            for other in (i for i in range(self.silos) if i != nid):
                key = flow.generate_shared_key(
                    flow.bytes_to_private_key(secret),
                    flow.bytes_to_public_key(self.public[other][0]),
                )
                mask = flow.pseudo_rand_gen(key, SETUP["mod_range"], shapes)
                combine = flow.parameters_addition if nid > other else flow.parameters_subtraction
                total = combine(total, mask)
        ratio, values = flow.factor_extract(flow.parameters_mod(total, SETUP["mod_range"]))
        mean = flow.dequantize(values, SETUP["clipping_range"], SETUP["target_range"])
        for vector in mean:
            vector += -(len(uploads) - 1) * SETUP["clipping_range"]
            vector *= SETUP["target_range"] / ratio
        found: list[np.ndarray[Any, Any]] = mean
        return found


@cache
def _first(silos: int) -> Flower:
    return Flower(silos, first_only=True)


@cache
def _all(silos: int) -> Flower:
    return Flower(silos)


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = job()
    return time.process_time() - start, result


def flower_client(vector: np.ndarray[Any, Any], peers: int) -> dict[str, Any]:
    """Up to the bytes of the record that is pushed to the server."""
    flower = _first(peers + 1)
    record: Any = import_module("flwr.app").ConfigRecord

    def client() -> int:
        return len(record({"masked_params": flower.upload(0, vector)}, False).deflate())

    seconds, size = timed(client)
    return {"seconds": seconds, "bytes": size}


def flower_server(vector: np.ndarray[Any, Any], peers: int) -> dict[str, Any]:
    """`peers` inputs and one silo that vanished; all clients send the same vector."""
    flower = _all(peers + 1)
    uploads = {nid: flower.upload(nid, vector) for nid in range(1, peers + 1)}
    held = sum(len(raw) for sent in uploads.values() for raw in sent)
    seconds, mean = timed(lambda: flower.unmask(uploads))
    error = np.linalg.norm(mean[0] - vector) / np.linalg.norm(vector)
    return {"seconds": seconds, "bytes": held, "error": float(error)}


def ckks_client(vector: np.ndarray[Any, Any], peers: int) -> dict[str, Any]:
    """Encrypt and serialise with the parameters that NVFlare's HE jobs set."""
    tenseal: Any = import_module("tenseal")
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40]
    )
    context.global_scale = 2**40

    def encrypt() -> int:
        blocks = (vector[at : at + CKKS_SLOTS] for at in range(0, vector.size, CKKS_SLOTS))
        return sum(len(tenseal.ckks_vector(context, block).serialize()) for block in blocks)

    seconds, size = timed(encrypt)
    return {"seconds": seconds, "bytes": size}


def main() -> None:
    jobs = {job.__name__: job for job in (flower_client, flower_server, ckks_client)}
    for line in sys.stdin:
        request = json.loads(line)
        if request["job"] == "versions":
            answer: dict[str, Any] = {name: metadata.version(name) for name in ("flwr", "tenseal")}
        else:
            vector = np.load(request["vector"])
            answer = jobs[request["job"]](vector, request["peers"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
