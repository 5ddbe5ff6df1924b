"""
The long form of the tests of hostile buffers: `python tests/buffer/fuzz.py --inputs 100000`, or `make fuzz`.

Every input has a seed, which is all that is needed to see it again: `--first SEED --inputs 1`. The exit code is 1 if
one of them ended in something else than an [`ExperienceBufferError`] or a buffer that can be used, or took more memory
or time than is said.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from hostile import hostile_buffer, hostile_table
from hostile_use import stage_of, use, use_dataset
from peak import peak_bytes

# Of an input, all of them together: they are small. Seconds of the processor, as others may be busy beside it.
MOST_SECONDS, MOST_BYTES = 20.0, 2**30
DATASET_SHARE = 0.2


def examined(seed, folder):
    """What became of the input of a seed, with what was wrong in it."""
    chance = random.Random(seed)
    if chance.random() < DATASET_SHARE:
        unit, table, what = hostile_table(chance)
        run = lambda: use_dataset(unit, table)  # noqa: E731
        kind = "dataset"
    else:
        what = hostile_buffer(chance, folder / "buffer")
        run = lambda: use(folder / "buffer", folder / "elsewhere")  # noqa: E731
        kind = "files"
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        return f"{kind} {run()}", what, None
    except Exception as error:
        return f"{kind} ESCAPED {type(error).__name__} in {stage_of(error)}", what, error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class TooLong(Exception):
    """An input took longer than any should."""


def stop(*_):
    raise TooLong(f"more than {MOST_SECONDS} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=int(os.environ.get("FUZZ_INPUTS", "100000")))
    parser.add_argument("--first", type=int, default=0, help="seed of the first input")
    parser.add_argument("--verbose", action="store_true", help="show where everything escaped")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPROF, stop)
    outcomes = collections.Counter()
    failures = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.first, arguments.first + arguments.inputs):
            memory, began = peak_bytes(), time.process_time()
            try:
                outcome, what, error = examined(seed, Path(folder))
            except Exception as error:
                raise RuntimeError(f"The generator failed at seed {seed}.") from error
            took = time.process_time() - began
            outcomes[outcome] += 1
            if error is not None or took > MOST_SECONDS or peak_bytes() - memory > MOST_BYTES:
                failures += 1
                grown = (peak_bytes() - memory) / 2**20
                shown = ascii(f"{what}: {error!s:.200}")
                print(f"seed {seed}: {outcome} in {took:.1f} s, {grown:.0f} MiB more: {shown}", flush=True)
                if arguments.verbose and error is not None:
                    traceback.print_exception(error, limit=-6)
            if (seed - arguments.first + 1) % 10_000 == 0:
                print(
                    f"{seed - arguments.first + 1} inputs, {time.monotonic() - start:.0f} s: {dict(outcomes)}",
                    flush=True,
                )
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8} {outcome}")
    print(f"{failures} failures of {arguments.inputs} inputs, at most {peak_bytes() / 2**20:.0f} MiB of memory")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
