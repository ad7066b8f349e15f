"""A contender of `test_train_step.py`, as a process: `python -m tests.kernels.contender HOW`."""

import sys
import time

from benchmarks.worker import serve


def main() -> None:
    how, steps = sys.argv[1], iter(range(1000))

    def step() -> None:
        done = next(steps)
        if how == "chatters":
            sys.stderr.write("a warning\n" * 20_000)  # more than a pipe holds
        elif how == "dies" and done == 3:
            raise RuntimeError("out of memory")
        elif how == "hangs" and done == 3:
            time.sleep(60)

    if how == "never starts":
        raise ModuleNotFoundError("No module named 'diffusers'")
    if how == "starts late":
        time.sleep(60)
    serve(lambda: (step, {"parameters": 7, "how": how}))


if __name__ == "__main__":
    main()
